import json
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from helpers.places import ROOT

from kava_trainer.config.arguments import KavaArguments, KavaTrainingArguments
from kava_trainer.config.checks import settle_numbers
from kava_trainer.config.parser import parse_arguments
from kava_trainer.utils.errors import BadRequest

TRAINING_FIELDS = fields(KavaTrainingArguments)

MINIMAL = {
    "teacher_model_name_or_path": "quickstart",
    "student_model_name_or_path": "quickstart",
    "dataset_name": "quickstart",
}


def write(tmp_path, **changes):
    path = tmp_path / "args.json"
    path.write_text(json.dumps({**MINIMAL, "output_dir": str(tmp_path / "out"), "use_cpu": True, **changes}))
    return str(path)


def refused(tmp_path, *argv, **changes):
    with pytest.raises(BadRequest) as caught:
        parse_arguments([write(tmp_path, **changes), *argv])
    return str(caught.value)


@pytest.mark.parametrize("recipe", sorted((ROOT / "training_args").glob("*.json")), ids=lambda path: path.name)
def test_every_recipe_is_parsed(recipe):
    assert parse_arguments([str(recipe), "--use_cpu"]).data.dataset_name


def test_defaults_are_those_of_the_home_case(tmp_path):
    arguments = parse_arguments([write(tmp_path)])
    training = arguments.training
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (2, 16)
    assert (arguments.data.max_length, training.num_train_epochs) == (512, 1)
    assert (training.learning_rate, training.projector_learning_rate) == (5e-5, 1e-3)
    assert (training.projector_mlp_ratio, training.projector_dropout) == (1.0, 0.0)
    assert (training.mercator_alpha, training.mercator_beta, training.lm_weight) == (1.0, 0.01, 1.0)
    assert (training.save_steps, training.logging_steps) == (200, 50)
    assert training.final_dir == training.output_dir


@pytest.mark.parametrize(
    ("asked", "dropout"),
    [
        ({"projector_init": "random"}, 0.1),
        ({"projector_init": "least_squares"}, 0.0),
        ({"projector_direction": "teacher_to_student", "projector_anchor": "pca", "projector_init": "random"}, 0.0),
        ({"projector_init": "least_squares", "projector_dropout": 0.1}, 0.1),
        ({"projector_init": "random", "projector_dropout": 0}, 0.0),
        ({"projector_dropout": None, "projector_init": "random"}, 0.1),
    ],
)
def test_there_is_no_dropout_where_the_projector_starts_from_a_fit(tmp_path, asked, dropout):
    training = parse_arguments([write(tmp_path, **asked)]).training
    assert training.projector_dropout == training.to_dict()["projector_dropout"] == dropout


def test_the_command_line_wins_over_the_file(tmp_path):
    arguments = parse_arguments(
        [write(tmp_path, max_steps=5, learning_rate=1e-4), "--max_steps", "7", "--lm-weight=0.5"]
    )
    assert (arguments.training.max_steps, arguments.training.learning_rate) == (7, 1e-4)
    assert arguments.training.lm_weight == 0.5


def test_what_was_given_is_known_by_the_names_of_the_arguments(tmp_path):
    path = write(tmp_path, max_steps=5, max_eval_samples=None)
    words = ["--lm-weight=0.5", "--plain_output", "--no_dataloader_pin_memory", "--report_to", "none"]
    arguments = parse_arguments([path, *words], {"max_length": 64, "max_steps": 9})
    named = {"max_steps", "max_eval_samples", "lm_weight", "plain_output", "dataloader_pin_memory", "report_to"}
    assert arguments.given == {*MINIMAL, "output_dir", "use_cpu", "max_length"} | named


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_what_has_two_names_is_given_by_either(tmp_path, name):
    both = {f"{kind}_checkpointing" for kind in ("gradient", "activation")} & {f.name for f in TRAINING_FIELDS}
    if name not in both:
        pytest.skip("these transformers have one name for it")
    given = parse_arguments([write(tmp_path, **{name: True})]).given
    assert both <= given
    assert not any("kwargs" in one for one in given)


@pytest.mark.parametrize(
    ("given", "fraction", "samples"),
    [
        ({"rollouts_from": "own.jsonl"}, 1.0, False),
        ({"rollouts_from": "own.jsonl", "on_policy_fraction": 0.25, "teacher_cache_dir": "cache"}, 0.25, False),
        ({"rollouts_from": None}, 0.0, False),
        ({"on_policy_fraction": 0.25}, 0.25, True),
    ],
)
def test_a_file_of_answers_is_all_that_is_trained_on_unless_a_share_is_written(tmp_path, given, fraction, samples):
    arguments = parse_arguments([write(tmp_path, **given)])
    assert (arguments.training.on_policy_fraction, arguments.training.samples) == (fraction, samples)
    assert arguments.data.accepts_prompts == (fraction == 1)


def test_arguments_that_code_makes_are_not_given(tmp_path):
    parsed = parse_arguments([write(tmp_path)])
    assert KavaArguments(parsed.model, parsed.data, parsed.training).given == frozenset()


def test_arguments_of_transformers_work_as_users_know_them(tmp_path):
    training = parse_arguments(
        [
            write(tmp_path, lr_scheduler_type="cosine", optim="adamw_torch", eval_strategy="steps", warmup_steps=10),
            *(
                "--gradient_checkpointing",
                "true",
                "--report_to",
                "none",
                "--lr_scheduler_kwargs",
                '{"num_cycles": 0.25}',
            ),
        ]
    ).training
    assert training.lr_scheduler_type == "cosine"
    assert training.eval_steps == training.logging_steps
    assert training.gradient_checkpointing
    assert training.lr_scheduler_kwargs == {"num_cycles": 0.25}


def test_a_flag_that_is_on_by_default_can_be_turned_off(tmp_path):
    argv = [write(tmp_path), "--remove_unused_columns", "false", "--no_average_tokens_across_devices"]
    training = parse_arguments(argv).training
    assert not training.remove_unused_columns
    assert not training.average_tokens_across_devices


def test_no_file_is_needed():
    argv = [word for name, value in MINIMAL.items() for word in (f"--{name}", value)]
    assert parse_arguments([*argv, "--use_cpu"]).model.teacher_model_name_or_path == "quickstart"


@pytest.mark.parametrize("value", [True, "true"])
def test_resume_takes_true_and_a_path(tmp_path, value):
    assert parse_arguments([write(tmp_path, resume_from_checkpoint=value)]).training.resume_from_checkpoint == "true"
    argv = [write(tmp_path), "--resume_from_checkpoint", "some/checkpoint-3"]
    assert parse_arguments(argv).training.resume_from_checkpoint == "some/checkpoint-3"


def test_layer_pairs_may_be_a_json_list(tmp_path):
    assert parse_arguments([write(tmp_path, layer_mapping=[[1, 2]])]).training.layer_mapping == "[[1, 2]]"


def test_all_mistakes_come_in_one_message(tmp_path):
    message = refused(
        tmp_path,
        *("--max_stps", "3", "--save_steps", "often"),
        mercator_wieght=1,
        learning_rate="5e-5",
        teacher_quantization="3bit",
        bf16=1,
        num_train_epochs="2",
        max_length=1,
        projector_dropout=2.0,
        optim="adam",
    )
    for part in (
        "'max_stps'; did you mean 'max_steps'?",
        "'mercator_wieght'; did you mean 'mercator_weight'?",
        'save_steps is "often"; write a number.',
        'learning_rate is "5e-5"; write a number.',
        'teacher_quantization is "3bit"; write one of none, 8bit, 4bit.',
        "bf16 is 1; write true or false.",
        'num_train_epochs is "2"; write a number.',
        "max_length is 1;",
        "projector_dropout is 2.0;",
        'optim is "adam"; write one of',
    ):
        assert part in message


CUT = {"student_model_name_or_path": None}
"""No student is named."""


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"teacher_model_name_or_path": None}, "teacher_model_name_or_path is missing"),
        ({"student_model_name_or_path": None}, "The student is missing"),
        ({"student_config_name": "x"}, "exclude each other"),
        ({"student_model_name_or_path": None}, "student_num_layers to cut it out of the teacher"),
        ({"student_num_layers": 2}, "and student_model_name_or_path gives it another shape; leave out"),
        ({"student_intermediate_size": 8}, "student_intermediate_size cuts the student out of the teacher"),
        ({"student_layers": [0, 1]}, "student_layers is for a student that is cut out of its teacher"),
        ({**CUT, "student_num_layers": 0}, "student_num_layers is 0; write 1 or more."),
        ({**CUT, "student_num_attention_heads": -2}, "student_num_attention_heads is -2; write 1 or more."),
        (
            {**CUT, "student_layers": [3, 1]},
            "write each block once and in the teacher's order: [1, 3].",
        ),
        ({**CUT, "student_layers": [1, 1]}, "in the teacher's order: [1]."),
        ({**CUT, "student_layers": [-1, 1]}, "write importance, uniform, or blocks of the teacher"),
        ({**CUT, "student_layers": "evenly"}, "student_layers is 'evenly'; write importance"),
        ({**CUT, "student_layers": []}, "student_layers is '[]'; write importance"),
        ({**CUT, "student_layers": [0, 1], "student_num_layers": 3}, "names 2 blocks, but student_num_layers is 3"),
        ({**CUT, "student_layers": "uniform"}, "nothing says how many layers of the teacher are kept"),
        ({**CUT, "student_init": "teacher_layers"}, "nothing says how many of them; write student_num_layers."),
        ({**CUT, "student_init": "random", "student_num_layers": 2}, "but student_init is random; leave out"),
        ({**CUT, "student_num_layers": 2.5}, "student_num_layers is 2.5; write a whole number."),
        ({**CUT, "student_num_layers": 2, "student_quantization": "4bit", "use_peft": True}, "layers of the teacher"),
        ({"dataset_name": None}, "dataset_name is missing"),
        ({"mercator_weight": 0, "lm_weight": 0}, "nothing would be trained"),
        ({"mercator_weight": -1}, "cannot be negative"),
        ({"gradient_accumulation_steps": 0}, "write 1 or more"),
        ({"projector_mlp_ratio": 0}, "above 0"),
        ({"max_train_samples": 0}, "max_train_samples is 0"),
        ({"layer_mapping": "first"}, "layer_mapping is 'first'"),
        ({"layer_mapping": [[0, 1]]}, "counted from 1"),
        ({"layer_mapping": "uniform:0"}, "uniform:2"),
        ({"per_device_train_batch_size": 2.5}, "per_device_train_batch_size is 2.5; write a whole number."),
        ({"per_device_train_batch_size": True}, "write a whole number."),
        ({"dataset_name": 3}, "dataset_name is 3; write text in quotes."),
        ({"lr_scheduler_type": "cosin"}, "write one of cosine"),
        ({"train_sampling_strategy": "grouped"}, "train_sampling_strategy is"),
        ({"learning_rate": float("nan")}, "write a finite number"),
        ({"seed": -1}, "seed is -1"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0"),
        ({"max_steps": 0}, "max_steps is 0; write a number above 0, or -1 to go by num_train_epochs."),
        ({"fsdp": "full_shard"}, "fsdp is not read from the arguments; start with accelerate launch"),
        ({"deepspeed": "ds.json"}, "deepspeed is not supported; shard with FSDP2"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches true is not supported; leave it out"),
        ({"ddp_static_graph": True}, "ddp_static_graph is true, but KAVA's steps differ"),
        ({"optim": "galore_adamw_layerwise"}, "takes its steps within the backward pass"),
        ({"load_best_model_at_end": True, "projector_dropout": 2.0}, "projector_dropout is 2.0"),
        ({"generation_max_new_tokens": 0}, "generation_max_new_tokens is 0"),
        ({"on_policy_fraction": 1.5}, "on_policy_fraction is 1.5; write a number from 0 to 1."),
        ({"on_policy_fraction": -0.1}, "on_policy_fraction is -0.1; write a number from 0 to 1."),
        ({"on_policy_temperature": 0}, "on_policy_temperature is 0.0; write a number above 0, such as 1.0."),
        ({"on_policy_top_p": 0}, "on_policy_top_p is 0.0; write a number above 0, up to 1."),
        ({"on_policy_top_p": 1.1}, "on_policy_top_p is 1.1; write a number above 0, up to 1."),
        ({"on_policy_max_new_tokens": 0}, "on_policy_max_new_tokens is 0; write 1 or more."),
        ({"rollouts_every": 0}, "rollouts_every is 0; write 1 or more."),
        (
            {"on_policy_fraction": 0.5, "mercator_weight": 0},
            "on_policy_fraction is 0.5, but no term asks the teacher, and nothing else is learned from a student's own",
        ),
        (
            {"on_policy_fraction": 1, "teacher_cache_dir": "cache"},
            "teacher_cache_dir holds no states of answers that are yet to be sampled; leave teacher_cache_dir out, or "
            "name a file of answers that are sampled already in rollouts_from.",
        ),
        (
            {"on_policy_fraction": 0.5, "on_policy_max_new_tokens": 2**24},
            "on_policy_max_new_tokens (16777216) or max_tokens_per_batch.",
        ),
        (
            {"rollouts_from": "own.jsonl", "on_policy_fraction": 0},
            "on_policy_fraction is 0, so nothing of rollouts_from own.jsonl would be read; write the share that it",
        ),
        ({"rollouts_from": "own.jsonl", "mercator_weight": 0}, "on_policy_fraction is 1, but no term asks the teacher"),
        (
            {"rollouts_from": "own.jsonl", "streaming": True, "max_steps": 3},
            "rollouts_from is a file that is read before the training, but streaming is true; write streaming false",
        ),
        ({"load_best_model_at_end": True}, "load_best_model_at_end"),
        ({"output_dir": "out-\udcff"}, r'output_dir is "out-\udcff", which is not UTF-8 text'),
        ({"lora_target_modules": ["q\udcff"], "use_peft": True}, "which is not UTF-8 text"),
        ({"hub_token": "hf_\udcff"}, "hub_token is of the wrong kind, which is not UTF-8 text"),
    ],
)
def test_wrong_values_are_refused(tmp_path, changes, part):
    assert part in refused(tmp_path, **changes)


@pytest.mark.parametrize("name", ["quickstart", "quickstart.json", "training_args/quickstart.json"])
def test_a_recipe_is_found_by_its_name_from_anywhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()  # a folder of the user's hides no recipe
    assert parse_arguments([name, "--use_cpu"]).training.output_dir == "checkpoints/quickstart"


def test_a_file_of_the_users_goes_before_a_recipe_and_a_mistaken_path_starts_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(write(tmp_path, output_dir="mine")).rename("quickstart.json")
    assert parse_arguments(["quickstart.json"]).training.output_dir == "mine"
    for path in ("runs/quickstart.json", "../training_args/quickstart.json", "training_args/quick.json"):
        with pytest.raises(BadRequest, match="There is no arguments file"):
            parse_arguments([path, "--use_cpu"])


def test_a_missing_file_and_broken_json_are_named(tmp_path):
    with pytest.raises(BadRequest, match=r"There is no arguments file .*gone\.json; .* recipe: gsm8k_.*, quickstart,"):
        parse_arguments([str(tmp_path / "gone.json")])
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(BadRequest, match="not valid JSON"):
        parse_arguments([str(tmp_path / "broken.json")])
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(BadRequest, match="one JSON object"):
        parse_arguments([str(tmp_path / "list.json")])


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"learning_rate": 1, "max_steps": 2, "learning_rate": 3}', "names learning_rate more than once"),
        ('{"lr_scheduler_kwargs": {"a": 1, "a": 2}}', "names a more than once"),
        ('{"output_dir": "caf\u00e9"}'.encode("latin-1"), "is not UTF-8 text; save it as UTF-8"),
        ("[" * 100_000, "not valid JSON"),
        ("", "not valid JSON"),
        ('{\n"a": 1,\n\n}', "in line 2 a comma stands before }, with nothing between them; take that comma out"),
        ('{"a": [1,\n2, ]}', "in line 2 a comma stands before ], with nothing between"),
        ('{\n"a": 1\n"b": 2}', "not valid JSON: line 3, column 1: Expecting ',' delimiter"),
        ('{"a": ,}', "not valid JSON: line 1, column 7: Expecting value"),
        ('{"max_steps": 1e400}', "max_steps is Infinity; write a finite number."),
        ('{"learning_rate": -Infinity}', "learning_rate is -Infinity; write a finite number."),
        ('{"layer_weights": [1, NaN]}', "layer_weights is [1, NaN]; write a finite number."),
        ('{"lr_scheduler_kwargs": {"num_cycles": NaN}}', "write a finite number."),
        ('{"max_steps": 99999999999999999999}', "max_steps is 99999999999999999999; write a number up to 4294967295."),
        ('{"seed": 4294967296}', "seed is 4294967296; write a number up to 4294967295."),
        (f'{{"learning_rate": 1{"0" * 400}}}', "...; write a number up to 4294967295."),
        ('{"num_train_epochs": 1e308}', "num_train_epochs is 1e+308; write a number up to 1e+30."),
        ('{"projector_mlp_ratio": 1e9}', "projector_mlp_ratio is 1000000000.0; write a number above 0"),
        ('{"output_dir": ["a", "b"]}', 'output_dir is ["a", "b"]; write text in quotes.'),
        ('{"student_revision": {"a": 1}}', 'student_revision is {"a": 1}; write text in quotes.'),
        ('{"max_length": null}', "max_length is null; write a whole number."),
        ('{"hub_token": ["hf_planted"]}', "hub_token is of the wrong kind; write text in quotes."),
    ],
)
def test_a_wrong_file_is_refused_in_words(tmp_path, text, part):
    path = tmp_path / "args.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    argv = [word for name, value in MINIMAL.items() for word in (f"--{name}", value)]
    with pytest.raises(BadRequest) as caught:
        parse_arguments([str(path), *argv, "--use_cpu"])
    assert part in str(caught.value)
    assert "hf_planted" not in str(caught.value)


def test_a_folder_is_no_arguments_file_and_a_byte_order_mark_does_no_harm(tmp_path):
    with pytest.raises(BadRequest, match=rf"^The arguments file {tmp_path} cannot be read: Is a directory\.$"):
        parse_arguments([str(tmp_path)])
    path = tmp_path / "marked.json"
    path.write_text(json.dumps({**MINIMAL, "use_cpu": True}), encoding="utf-8-sig")
    assert parse_arguments([str(path)]).data.dataset_name == "quickstart"


def test_a_micro_batch_that_no_device_holds_is_refused(tmp_path):
    message = refused(tmp_path, per_device_train_batch_size=10**6, max_length=4096)
    assert message.startswith("One micro-batch could hold 4096000000 tokens, more than 16777216; lower")


def test_text_on_the_command_line_where_a_number_belongs(tmp_path):
    message = refused(tmp_path, "--learning_rate", "fast", "--max_steps", "1.5", "--lm_weight", "nan")
    assert message.splitlines() == [
        'learning_rate is "fast"; write a number.',
        'max_steps is "1.5"; write a whole number.',
        "lm_weight is NaN; write a finite number.",
    ]


def test_secrets_are_masked_where_arguments_are_written(tmp_path):
    arguments = parse_arguments([write(tmp_path, hub_token="hf_planted")])
    assert "hf_planted" not in json.dumps(arguments.to_dict(), default=str)


def test_a_word_of_the_command_line_that_is_no_text_is_refused_and_not_shown():
    with pytest.raises(BadRequest, match="The command line holds text that is not UTF-8") as refusal:
        parse_arguments(["--hub_token", "hf_secret\udcff"])
    assert "secret" not in str(refusal.value)


FLOATS = sorted(
    name
    for name, hint in get_type_hints(KavaTrainingArguments).items()
    if float in {hint, *get_args(hint)} and int not in get_args(hint) and not name.endswith("_steps")
)
"""Arguments that take a float and no whole number."""


@pytest.mark.parametrize("name", FLOATS)
def test_a_whole_number_becomes_the_float_that_an_argument_takes(tmp_path, name):
    args = KavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    setattr(args, name, 1)
    settle_numbers(args)
    assert (type(getattr(args, name)), getattr(args, name)) == (float, 1.0)


def test_a_file_may_write_whole_numbers_for_floats(tmp_path):
    weights = {
        "mercator_weight": 2,
        "lm_weight": 1,
        "kd_weight": 1,
        "learning_rate": 1,
        "use_peft": True,
        "lora_dropout": 0,
    }
    arguments = parse_arguments([write(tmp_path, **weights, layer_mapping="uniform:2", layer_weights=[1, 3])])
    assert [type(getattr(arguments.training, name)) for name in list(weights)[:4]] == [float] * 4
    assert type(arguments.model.lora_dropout) is float
    assert [type(share) for share in arguments.training.layer_weights] == [float, float]


@pytest.mark.parametrize(
    ("words", "layers", "is_cut"),
    [
        (["--student_num_layers", "2"], "importance", True),
        (["--student_layers", "[0, 2]"], "[0, 2]", True),
        (["--student_layers", "0,2"], "[0, 2]", True),
        (["--student_intermediate_size", "8"], "importance", True),
        (["--student_num_layers", "2", "--student_layers", "uniform"], "uniform", True),
    ],
)
def test_a_size_or_a_list_of_layers_cuts_the_student_out_of_the_teacher(words, layers, is_cut):
    named = ["--teacher_model_name_or_path", "quickstart", "--dataset_name", "quickstart", "--teacher_quantization"]
    model = parse_arguments([*named, "4bit", "--use_cpu", *words]).model
    assert (model.student_layers, model.is_cut) == (layers, is_cut)
    assert model.student_init == "teacher_layers"
    assert model.student_name == "quickstart"
