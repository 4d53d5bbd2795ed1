"""Students that are trained through LoRA adapters: what is trained, with what gradient, and how it is gone on with."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import ddp_step
from helpers.data import random_examples
from helpers.hashes import weight_hash
from helpers.mishaps import STEADY, Poison, out_of_memory_above
from helpers.models import LORA, STUDENT_LAYERS, STUDENT_SIZE, tiny_llama, tiny_lora_llama
from helpers.processes import Run
from helpers.trainers import loss_lines, make_trainer
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from transformers import TrainerCallback
from transformers.integrations import peft as peft_integration

from kava_trainer.config.model_arguments import ModelArguments
from kava_trainer.models.lora import add_adapter, trained_parameters
from kava_trainer.models.lora_files import adapter_weights, base_weights
from kava_trainer.models.student import load_student
from kava_trainer.quickstart import TEACHER_FOLDER
from kava_trainer.utils.errors import BadRequest


def lora_arguments(**changes):
    return ModelArguments("teacher", student_model_name_or_path="some/student", use_peft=True, **{**LORA, **changes})


def stirred(trainer):
    """A trainer whose adapters do something: they start as zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in trainer.student.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return trainer


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_only_adapters_are_trained_and_they_are_float32(tokenizer, tmp_path):
    student = tiny_llama(STUDENT_SIZE, STUDENT_LAYERS).bfloat16()
    add_adapter(student, lora_arguments())
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    assert all("lora_" in name and parameter.dtype == torch.float32 for name, parameter in trained.items())
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trained} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert trained_parameters(student) == sum(parameter.numel() for parameter in trained.values())
    assert student.dtype == torch.bfloat16
    assert student.peft_config["default"].base_model_name_or_path == "some/student"


def test_modules_to_save_are_trained_whole():
    student = tiny_llama(STUDENT_SIZE, STUDENT_LAYERS, tie=False)
    add_adapter(student, lora_arguments(lora_target_modules="q_proj, v_proj", lora_modules_to_save=["lm_head"]))
    trained = {name.rpartition(".default.")[0] for name, p in student.named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 1)[0].rsplit(".", 1)[-1] for name in trained} == {"q_proj", "v_proj", "lm_head"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora_target_modules": ["q_proj", "query"]},
            "names query, which .* LlamaForCausalLM, does not have. It has d",
        ),
        ({"lora_target_modules": ["mlp"]}, "LoRA adapters cannot be put into the student: Target module"),
        ({"lora_modules_to_save": ["head"]}, "lora_modules_to_save names head, which .* It has .*lm_head"),
        ({"lora_target_modules": ["q_proj", "lm_head"]}, "names lm_head, but .* are one weight"),
        ({"lora_target_modules": ["q_proj", "embed_tokens"]}, "write merge_adapter false"),
    ],
)
def test_modules_that_cannot_be_adapted_are_refused(changes, message):
    with pytest.raises(BadRequest, match=message):
        add_adapter(tiny_llama(STUDENT_SIZE, STUDENT_LAYERS), lora_arguments(**changes))


def test_where_transformers_refuses_the_installed_peft_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(peft_integration, "MIN_PEFT_VERSION", "99.0")
    message = (
        r"need peft 99\.0 or later with transformers \S+, and peft \S+ is installed\. "
        r'Run pip install -U "peft>=99\.0", or, where pip finds none, pip install "transformers==5\.23\.0"\.$'
    )
    with pytest.raises(BadRequest, match=message):
        add_adapter(tiny_llama(STUDENT_SIZE, STUDENT_LAYERS), lora_arguments())


def test_a_tied_head_can_be_adapted_where_nothing_is_merged():
    student = tiny_llama(STUDENT_SIZE, STUDENT_LAYERS)
    add_adapter(student, lora_arguments(lora_target_modules=["lm_head"], merge_adapter=False))
    assert trained_parameters(student) == LORA["lora_r"] * (512 + STUDENT_SIZE)


HEAD = {"lora_target_modules": ["q_proj", "embed_tokens"], "lora_modules_to_save": ["lm_head"], "tie": False}


@pytest.mark.parametrize(
    ("changes", "where"),
    [({}, {}), ({"max_tokens_per_batch": 0}, {}), ({"gradient_checkpointing": True}, {}), ({}, HEAD)],
    ids=["all linear", "padded", "recomputed", "embeddings and head"],
)
def test_the_gradient_of_the_adapters_is_that_of_the_plain_loss_on_a_peft_model(tmp_path, tokenizer, changes, where):
    model = partial(tiny_lora_llama, **where)
    trainer = stirred(make_trainer(tmp_path, tokenizer, model=model, lm_weight=0.5, **changes))
    if changes.get("gradient_checkpointing"):
        trainer.student.gradient_checkpointing_enable({"use_reentrant": True})
        trainer.student.train()
    trainer.target.eval()
    batch = trainer.data_collator(random_examples(5, seed=9))
    with torch.enable_grad():
        trainer.compute_loss(trainer.model, batch).backward()

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=LORA["lora_r"],
        lora_alpha=LORA["lora_alpha"],
        target_modules=where.get("lora_target_modules", "all-linear"),
        modules_to_save=where.get("lora_modules_to_save"),
    )
    plain = get_peft_model(tiny_llama(STUDENT_SIZE, STUDENT_LAYERS, seed=2, tie=not where), config)
    weights = {f"base_model.model.{name}": weight for name, weight in adapter_weights(trainer.student).items()}
    set_peft_model_state_dict(plain, weights)
    inputs, mask = (
        {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]},
        batch["attention_mask"].bool(),
    )
    output = plain(**inputs, output_hidden_states=True)
    with torch.no_grad():
        teacher = trainer.teacher.model(**inputs, output_hidden_states=True).hidden_states[-1]
    ours, theirs = output.hidden_states[-1][mask], trainer.target.projectors[0](teacher)[mask]
    lengths = ours.norm(dim=1), theirs.norm(dim=1)
    cosine = (ours * theirs).sum(dim=1) / (lengths[0] * lengths[1])
    mercator = (1 - cosine + 0.01 * (lengths[0].log() - lengths[1].log()) ** 2).mean()
    lm = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    (mercator + 0.5 * lm).backward()

    expected = {
        name.removeprefix("base_model.model."): p.grad for name, p in plain.named_parameters() if p.requires_grad
    }
    found = {name: p.grad for name, p in trainer.student.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"])
def test_training_changes_the_adapters_and_no_other_weight(tmp_path, tokenizer, optim):
    if "bnb" in optim or "paged" in optim:
        pytest.importorskip("bitsandbytes")
    options = {"optim": optim, "weight_decay": 0.1, "run_control": False, "learning_rate": 1e-2}
    trainer = make_trainer(tmp_path, tokenizer, model=tiny_lora_llama, **options)
    base, adapter = base_weights(trainer.student), {n: w.clone() for n, w in adapter_weights(trainer.student).items()}
    plain = tiny_llama(STUDENT_SIZE, STUDENT_LAYERS, seed=2).state_dict()
    assert same({name: base[name] for name in plain}, plain)
    base = {name: weight.clone() for name, weight in base.items()}
    trainer.train()
    assert same(base_weights(trainer.student), base)
    after = adapter_weights(trainer.student)
    assert all(not torch.equal(after[name], adapter[name]) for name in adapter)
    trained = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in trainer.model.parameters() if parameter.requires_grad}


def test_the_probe_measures_the_gradient_of_the_adapters(tmp_path, tokenizer):
    trainer = stirred(make_trainer(tmp_path, tokenizer, model=tiny_lora_llama))
    shares = trainer.run_probe().gradient_shares
    assert shares["mercator"] + shares["lm"] == pytest.approx(1)
    assert min(shares.values()) > 0
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "lr_scheduler_type": "cosine"}


def test_a_resumed_run_has_the_same_losses_and_weights(tmp_path, tokenizer):
    settings = {**SAVING, "model": partial(tiny_lora_llama, lora_dropout=0.1), "projector_dropout": 0.1}
    straight = make_trainer(tmp_path / "straight", tokenizer, **settings)
    straight.train()
    resumed = make_trainer(tmp_path / "again", tokenizer, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert weight_hash(resumed.model) == weight_hash(straight.model)
    losses = [[line["loss"] for line in loss_lines(trainer)] for trainer in (straight, resumed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


def test_the_best_adapter_is_loaded_at_the_end_and_kept(tmp_path, tokenizer):
    settings = {**SAVING, "save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = make_trainer(tmp_path, tokenizer, model=tiny_lora_llama, learning_rate=1e-2, **settings)
    kept = {}

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            kept[state.global_step] = {n: w.clone() for n, w in adapter_weights(trainer.student).items()}

    trainer.add_callback(Keep())
    trainer.train()
    assert trainer.state.best_global_step == 1  # the highest loss is the first
    assert same(adapter_weights(trainer.student), kept[1])
    assert not same(kept[1], kept[3])
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]  # Trainer deletes the others


@pytest.mark.slow
def test_two_processes_make_the_step_of_one(tmp_path):
    shape = ("1.0,1.0", "tiny_lora_llama")
    run = Run(ddp_step.main, tmp_path, str(tmp_path / "split"), "2", "2", *shape, ranks=2)
    ddp_step.main(str(tmp_path / "whole"), "8", "1", *shape)
    assert run.wait() == [0, 0], run.output()
    whole, split = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "split"))
    assert (whole["world_size"], split["world_size"]) == (1, 2)
    assert split["wrapper"] == "DistributedDataParallel"
    moved = 0
    start = dict(tiny_lora_llama(STUDENT_SIZE, STUDENT_LAYERS, seed=2).named_parameters())
    for name, parameter in whole["weights"].items():
        torch.testing.assert_close(split["weights"][name], parameter, rtol=0, atol=1e-5, msg=name)
        own = start.get(name.removeprefix("student."))
        changed = own is not None and not torch.equal(own, parameter)
        assert not changed or "lora_B" in name, name  # lora_A has no gradient while lora_B is zero
        moved += changed
    assert moved == 7 * STUDENT_LAYERS
    assert split["evaluation"] == pytest.approx(whole["evaluation"], rel=1e-4)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_student_has_the_same_gradient_after_it_was_evaluated(bits):
    pytest.importorskip("bitsandbytes")
    arguments = ModelArguments(
        "quickstart", student_model_name_or_path=str(TEACHER_FOLDER), use_peft=True, student_quantization=bits,
        lora_dropout=0.0,
    )  # fmt: skip
    student = load_student(arguments, None)
    tokens = torch.tensor([[5, 9, 12, 40, 3, 77, 130, 8]])
    gradients = []
    for _ in range(2):
        student.train()
        student.zero_grad()
        student(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None})
        student.eval()
        with torch.no_grad():
            student(input_ids=tokens)
    assert all(gradient.abs().max() > 0 for name, gradient in gradients[0].items() if "lora_B" in name)
    assert same(*gradients)


def test_packed_rows_make_the_step_of_padded_ones(tmp_path, tokenizer):
    settings = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 1, "max_grad_norm": 0.0, "projector_dropout": 0.0}
    packed, padded = (
        stirred(make_trainer(tmp_path, tokenizer, model=tiny_lora_llama, max_tokens_per_batch=tokens, **settings))
        for tokens in (96, 0)
    )
    for trainer in (packed, padded):
        trainer.train()
    assert packed.batches.packs
    assert not padded.batches.packs
    for name, weight in adapter_weights(packed.student).items():
        torch.testing.assert_close(weight, adapter_weights(padded.student)[name], rtol=0, atol=1e-5, msg=name)


def test_a_step_of_adapters_is_done_again_where_memory_runs_out_and_skipped_where_numbers_do(tmp_path, tokenizer):
    settings = {**STEADY, "model": tiny_lora_llama, "max_steps": 3, "max_tokens_per_batch": 80}
    roomy, tight = (make_trainer(tmp_path, tokenizer, **settings) for _ in range(2))
    out_of_memory_above(40, "backward")(tight)
    for trainer in (roomy, tight):
        Poison(trainer, {2}, "gradient")
        trainer.train()
    assert [problem["kind"] for problem in roomy.problems] == ["nan"]
    assert sorted({problem["kind"] for problem in tight.problems}) == ["nan", "oom"]
    start = adapter_weights(tiny_lora_llama(STUDENT_SIZE, STUDENT_LAYERS, seed=2))
    for name, weight in adapter_weights(tight.student).items():
        assert not torch.equal(weight, start[name])
        torch.testing.assert_close(weight, adapter_weights(roomy.student)[name], rtol=0, atol=2e-5)
