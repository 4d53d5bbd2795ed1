"""Every target but the hidden states, whose runs are everywhere else: a training learns it, goes on bit-equal from a
checkpoint, is called collapsed where it is, and leaves a plain student."""

import re

import pytest
import torch
from datasets import Dataset
from helpers.caches import cached_run
from helpers.hashes import weight_hash
from helpers.library import DATA, arguments, make, new_student, new_teacher
from helpers.models import STUDENT_LAYERS, STUDENT_SIZE, model_of, tiny_lora_llama
from helpers.outcomes import assert_same_step, one_step
from helpers.programs import launch, words
from helpers.trainers import loss_lines
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from kava_trainer import HiddenStateTarget, KavaTrainer, ProjectorConfig
from kava_trainer.config.parser import parse_arguments
from kava_trainer.distillation.targets import build_target
from kava_trainer.distillation.teacher_cache import CachedTeacher
from kava_trainer.models.attention.capture import AttentionPart
from kava_trainer.models.teacher import OnlineTeacher
from kava_trainer.quickstart import STUDENT_FOLDER
from kava_trainer.utils.errors import BadRequest

TARGETS = {
    "hidden shared": {"projector_sharing": "all", "layer_mapping": "uniform:2", "projector_init": "least_squares"},
    "relations": {"alignment_target": "relations", "layer_mapping": "uniform:2"},
    "attention": {"alignment_target": "attention", "layer_mapping": "uniform:2", "attention_weight": 3000.0},
    "kv flat": {"alignment_target": "kv", "layer_mapping": "all", "projector_direction": "teacher_to_student"},
    "kv headwise": {"alignment_target": "kv", "kv_shape": "headwise", "layer_mapping": "uniform:2"},
}

each = pytest.mark.parametrize("settings", TARGETS.values(), ids=TARGETS)

OF_CUT = {"inherited_layers": [1, 3]}
"""Which layers of the teacher a student was cut from, or has been found to be most like."""

MAPPINGS = {
    "last": ({"layer_mapping": "last"}, {}),
    "all": ({"layer_mapping": "all"}, {}),
    "pairs": ({"layer_mapping": "[[2, 1], [1, 3]]"}, {}),
    "cka": ({"layer_mapping": "cka"}, {}),
    "inherited": ({"layer_mapping": "inherited"}, OF_CUT),
}
"""Arguments, and what the trainer is given beside them."""

CROSSED = [
    pytest.param(settings | changes, given, id=f"{name}, {mapping}", marks=() if mapping == "cka" else pytest.mark.slow)
    for name, settings in TARGETS.items()
    for mapping, (changes, given) in MAPPINGS.items()
]


def term_of(trainer):
    return trainer.target.terms[0]


def lora_student():
    return tiny_lora_llama(STUDENT_SIZE, STUDENT_LAYERS, seed=2)


def assert_learned(folder, tokenizer, settings, given=dict, **changes):
    """A training lowers its loss, goes on bit-equal from a checkpoint, and leaves a plain student.

    `given` makes what each trainer is given, for a student is trained once.
    """
    steps = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "learning_rate": 3e-3, "lm_weight": 0.5}
    steps |= {"lr_scheduler_type": "cosine", **changes}
    middle = folder / "straight" / f"checkpoint-{steps['save_steps']}"
    straight, resumed = (
        make(folder / name, tokenizer, given(), **settings, **steps) for name in ("straight", "resumed")
    )
    term = term_of(straight)
    before = straight.evaluate()
    straight.train()
    after = straight.evaluate()
    assert after[f"eval_{term}_loss"] < 0.95 * before[f"eval_{term}_loss"]
    assert after["eval_cos_sim"] > before["eval_cos_sim"]
    resumed.train(str(middle))
    assert weight_hash(resumed.model) == weight_hash(straight.model)
    assert loss_lines(resumed) == loss_lines(straight)
    straight.save_finals(folder / "final_student", folder / "final_projector.pth")
    loaded, info = AutoModelForCausalLM.from_pretrained(folder / "final_student", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(1, 9).unsqueeze(0)
    with torch.no_grad():
        found, expected = loaded(ids).logits, straight.student.eval()(ids).logits
    # Adapters that are merged round in another way.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if given().get("student") else 0)
    return straight


@each
@pytest.mark.parametrize("packed", [True, False])
def test_training_lowers_its_loss_and_resumes_bit_equal(tmp_path, tokenizer, settings, packed):
    trained = assert_learned(tmp_path, tokenizer, settings, max_tokens_per_batch=60 if packed else 0)
    assert trained.batches.packs == packed


@pytest.mark.parametrize(("settings", "given"), CROSSED)
def test_every_target_is_learned_in_whatever_layers(tmp_path, tokenizer, settings, given):
    assert_learned(tmp_path, tokenizer, settings, given.copy)


@each
def test_adapters_learn_every_target(tmp_path, tokenizer, settings):
    changes = {"learning_rate": 3e-2, "max_steps": 12, "save_steps": 6}
    trained = assert_learned(tmp_path, tokenizer, settings, lambda: {"student": lora_student()}, **changes)
    assert any("lora_A" in name for name, _ in trained.student.named_parameters())


@each
def test_packed_and_padded_rows_have_one_loss(tmp_path, tokenizer, settings):
    trainers = [make(tmp_path, tokenizer, **settings, max_tokens_per_batch=tokens) for tokens in (60, 0)]
    for trainer in trainers:
        trainer.train()
    packed, padded = ([line[f"{term_of(t)}_loss"] for line in loss_lines(t)] for t in trainers)
    assert packed == pytest.approx(padded, rel=1e-4)


@each
def test_gradient_checkpointing_changes_nothing(tmp_path, tokenizer, settings):
    hashes = []
    for way in (False, True):
        trainer = make(tmp_path, tokenizer, **settings, gradient_checkpointing=way)
        trainer.train()
        hashes.append(torch.cat([weight.flatten() for weight in trainer.student.parameters()]))
    torch.testing.assert_close(*hashes, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("sizes", [(2, 2, 2), pytest.param((2, 4, 1), marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "attention" else pytest.mark.slow) for name in TARGETS]
)
def test_one_step_does_not_depend_on_how_the_batch_is_split(tmp_path, name, sizes):
    asked = {**TARGETS[name], "projector_init": "random"}
    whole, split = (one_step(tmp_path, *own, **asked) for own in ((8, 1, 1), sizes))
    assert split["world_size"] == sizes[-1]
    assert_same_step(split, whole)


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        *(pytest.param(settings, {}, id=name) for name, settings in TARGETS.items()),
        *CROSSED,
    ],
)
def test_a_planted_collapse_is_called(tmp_path, tokenizer, settings, given):
    trainer = make(tmp_path, tokenizer, given, **settings, eval_strategy="steps", eval_steps=1, learning_rate=0.0)
    with torch.no_grad():
        trainer.student.get_input_embeddings().weight.fill_(1.0)
        for projector in trainer.target.projectors:
            projector.down.weight.zero_()
    trainer.train()
    assert "another token" in trainer.collapse
    assert trainer.pair_figures()[0]["collapsed"]


@pytest.mark.parametrize("name", ["attention", "kv flat", "kv headwise"])
def test_models_with_a_short_window_are_trained(tmp_path, tokenizer, name):
    """Of a student with a window that is its teacher's copy nothing differs, so the term is 0 where none projects."""
    settings = TARGETS[name] | ({} if name == "attention" else {"projector_direction": "none"})
    models = [model_of("mistral", sliding_window=4) for _ in range(2)]
    args = arguments(tmp_path, **settings, max_steps=1)
    rows = Dataset.from_list(DATA)
    trainer = KavaTrainer(*models, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    (line,) = loss_lines(trainer)
    assert line[f"{term_of(trainer)}_loss"] == pytest.approx(0.0, abs=1e-5)
    assert line["cos_sim"] > 0.8  # the first two tokens of an example attend to no two others, and count as 0


def test_relations_read_the_teacher_cache(tmp_path, tokenizer):
    settings = TARGETS["relations"] | {"mercator_weight": 0.0}
    online, cached = (cached_run(tmp_path / str(kind), tokenizer, kind, **settings) for kind in (None, "bfloat16"))
    for beside, read in zip(loss_lines(online), loss_lines(cached), strict=True):
        assert read["relations_loss"] == pytest.approx(beside["relations_loss"], rel=0.02)
        assert read["cos_sim"] == pytest.approx(beside["cos_sim"], abs=0.01)


def test_a_target_of_another_kind_than_the_arguments_name_is_refused(tmp_path, tokenizer):
    whole = make(tmp_path, tokenizer)
    target = HiddenStateTarget([(2, 4)], ProjectorConfig(64, 32))
    args = arguments(tmp_path, alignment_target="relations")
    with pytest.raises(ValueError, match="alignment_target='hidden'"):
        KavaTrainer(whole.student, whole.teacher.model, target, args)


def test_a_weight_that_somebody_wrote_for_another_target_is_refused(tmp_path):
    given = ["--alignment_target", "relations", "--teacher_model_name_or_path", "quickstart"]
    given += ["--student_model_name_or_path", "quickstart", "--dataset_name", "quickstart", "--use_cpu", "true"]
    with pytest.raises(BadRequest, match="mercator_weight is above 0, but alignment_target relations"):
        parse_arguments([*given, "--mercator_weight", "3"])
    assert parse_arguments([*given, "--mercator_weight", "0"]).training.aligns
    assert parse_arguments(given).training.aligns


class OwnSource:
    """What a user may write: hidden states from anywhere."""

    def __init__(self, model, layers=None):
        self.online = OnlineTeacher(model, [model.config.num_hidden_layers] if layers is None else layers)
        self.hidden_size, self.num_layers = self.online.hidden_size, self.online.num_layers
        if layers is not None:
            self.layers = layers

    def features(self, inputs):
        return self.online.features(inputs)

    def head(self, states):
        return self.online.head(states)


@pytest.mark.slow
def test_all_keys_and_values_at_the_real_shapes_take_two_steps(tmp_path):
    """Qwen2.5 1.5B and 0.5B with all their layers, but little vocabulary and feed-forward, for neither makes keys."""
    sizes = {"vocab_size": 512, "intermediate_size": 256, "num_key_value_heads": 2, "tie_word_embeddings": True}
    teacher = Qwen2Config(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, **sizes)
    student = Qwen2Config(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, **sizes)
    AutoModelForCausalLM.from_config(teacher, dtype=torch.bfloat16).save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(STUDENT_FOLDER).save_pretrained(tmp_path / "teacher")
    student.save_pretrained(tmp_path / "student")
    # Without AVX-512 a product of bfloat16 matrices takes up to a hundred times as long.
    dtype = "float32" if torch.backends.cpu.get_cpu_capability() == "AVX2" else "bfloat16"
    options = {
        **TARGETS["kv flat"],
        "projector_init": "random",
        "projector_mlp_ratio": 0.1,
        "teacher_model_name_or_path": tmp_path / "teacher",
        "teacher_dtype": dtype,
        "student_config_name": tmp_path / "student",
        "student_dtype": dtype,
        "dataset_name": "quickstart",
        "max_train_samples": 4,
        "max_eval_samples": 2,
        "max_length": 48,
        "output_dir": tmp_path / "out",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
        "logging_steps": 1,
        "retention_dataset_name": "none",
        "save_strategy": "no",
        "use_cpu": True,
    }
    result = launch(*words(options), timeout=600)
    assert result.returncode == 0, result.stderr
    assert "Projector: 7168 -> 3072 (teacher to student)" in result.stdout
    assert "all of 1 to 24 with all of 1 to 28" in result.stdout
    steps = re.findall(r"^\[Step 000\d\] Loss: (\d+\.\d+) \| CosSim", result.stdout, re.M)
    assert len(steps) == 2


SOURCES = {
    "own": lambda model: OwnSource(model),
    "online": lambda model: OnlineTeacher(model, [4]),
    "other layers": lambda model: OnlineTeacher(model, [AttentionPart(2, part) for part in ("query", "key", "value")]),
    "cached": lambda model: CachedTeacher(model, lambda ids: {}),
}


def trainer_of(folder, tokenizer, source, settings):
    args = arguments(folder, **settings, max_steps=1)
    target = build_target(args, new_student(), new_teacher())
    rows = Dataset.from_list(DATA)
    return KavaTrainer(new_student(), source, target, args, train_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("name", "told"), [("attention", "query of layer 2, and 3"), ("kv headwise", "key of layer 2")]
)
def test_a_source_that_gives_no_parts_of_attention_is_refused(tmp_path, tokenizer, source, name, told):
    source = SOURCES[source](new_teacher())
    with pytest.raises(
        ValueError, match=f"teacher's key of layer 1, and 3 more, but the {type(source).__name__} does not name it"
    ):
        trainer_of(tmp_path, tokenizer, source, TARGETS[name])


def test_a_source_that_lacks_a_hidden_state_is_refused(tmp_path, tokenizer):
    settings = {"layer_mapping": "uniform:2", "kd_weight": 0.5}
    with pytest.raises(ValueError, match="teacher's state 1 but the OnlineTeacher"):
        trainer_of(tmp_path, tokenizer, OnlineTeacher(new_teacher(), [4]), settings)
    trainer_of(tmp_path, tokenizer, OnlineTeacher(new_teacher(), [1, 4]), settings).train()


def test_a_source_of_ones_own_that_names_its_parts_is_trained_with(tmp_path, tokenizer):
    layers = [AttentionPart(layer, part) for layer in (1, 4) for part in ("query", "key")]
    trainer_of(tmp_path, tokenizer, OwnSource(new_teacher(), layers), TARGETS["attention"]).train()
    trainer_of(tmp_path, tokenizer, OwnSource(new_teacher()), {"layer_mapping": "last"}).train()


def test_a_cache_is_not_read_in_the_place_of_a_teacher_whose_attention_is(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, **TARGETS["attention"])
    with pytest.raises(ValueError, match="but the CachedTeacher does not name it"):
        trainer.read_cache(CachedTeacher(trainer.teacher.model, lambda ids: {}))
