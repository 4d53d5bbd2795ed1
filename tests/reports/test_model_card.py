"""The model card and the recipe: valid metadata, and everything a reader asks, from the summary alone."""

import ast
import json
from dataclasses import replace

import pytest
import torch
from helpers.fake_hub import card_problems
from helpers.models import tiny_llama, tiny_lora_llama
from helpers.places import ROOT
from huggingface_hub import ModelCard, constants
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from kava_trainer.config import checks, optimizer_names
from kava_trainer.config.parser import parse_arguments
from kava_trainer.data.formats import prompt_kind
from kava_trainer.reports.model_card import as_code, hub_id, is_untouched, local_sources, render_model_card
from kava_trainer.reports.publish import check_card
from kava_trainer.reports.recipe import recipe_of, recipe_text
from kava_trainer.reports.summary import Evaluations, RunSummary, Summary, Throughput, Verdict
from kava_trainer.runs.pair.models import own_parameters
from kava_trainer.utils.environment import describe_environment

TEACHER, STUDENT, DATA = "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-0.5B", "openai/gsm8k"
ARGUMENTS = {
    "teacher_model_name_or_path": TEACHER, "student_model_name_or_path": STUDENT, "dataset_name": DATA,
    "dataset_config_name": "main", "dataset_test_split": "test", "use_cpu": True, "hub_token": "hf_planted",
    "hub_model_id": "me/student",
}  # fmt: skip


def words(options):
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def summary_with(**changes):
    """The summary that a reader of a run's file has."""
    asked = parse_arguments(words({**ARGUMENTS, **changes})).to_dict()
    environment = {**describe_environment(torch.device("cpu")), "local_sources": local_sources(asked)}
    summary = RunSummary(asked, environment)
    summary.add_training([{"loss": 0.5, "cos_sim": 0.2, "step": 60}], 60)
    summary.add_final({"eval_cos_sim": 0.98, "eval_centred_cos_sim": 0.75, "eval_margin": 0.6, "eval_cka": 0.87654})
    summary.add_evaluation("teacher", {"perplexity": 2.0, "cross_entropy": 0.7, "exact_match": 0.75})
    summary.add_evaluation("student_after", {"perplexity": 3.25, "cross_entropy": 1.18, "exact_match": None})
    summary.content.throughput = Throughput(tokens_per_second=12345.6, peak_memory_bytes=3 * 10**9)
    summary.content.verdict = Verdict(success=False, collapsed=False, reasons=["Because.", "Why not."])
    summary.content.duration_seconds = 3725.0
    return summary.as_written()


def card_of(summary, **options):
    text = render_model_card("me/student", summary, **options)
    assert card_problems(text) == []
    return ModelCard(text)


def test_the_metadata_name_base_data_and_results():
    data = card_of(summary_with()).data
    assert (data.base_model, data.base_model_relation) == (STUDENT, "finetune")
    assert data.datasets == [DATA]
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["kava", "knowledge-distillation"]
    assert data.language is data.license is None
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_name, result.metric_value) == ("perplexity", "Answer perplexity", 3.25)
    assert (result.dataset_type, result.dataset_name, result.dataset_config) == (DATA, "gsm8k", "main")
    assert (result.dataset_split, result.task_type, result.verified) == ("test", "text-generation", False)
    index = eval_results_to_model_index("me/student", data.eval_results)
    assert model_index_to_eval_results(index) == ("me/student", data.eval_results)


def test_the_text_has_verdict_results_alignment_cost_and_recipe():
    text = card_of(summary_with()).text
    for line in (
        "**No success.**",
        "- Because.",
        "| Teacher | 2 | 0.7 | 75.0 % |",
        "| Student after | 3.25 | 1.18 | not measured |",
        "| CosSim, centred | 0.75 |",
        "| CKA to the teacher | 0.8765 |",
        "| effective rank of the targets | not measured |",
        "| Steps | 60 |",
        "| Whole run, with its evaluations | 1 h 2 min |",
        "| Training speed | 12,346 tokens per second |",
        "| Peak memory, measured (on a CPU: the whole process) | 3.00 GB |",
        f"Distilled with KAVA from [{TEACHER}](https://huggingface.co/{TEACHER}) on "
        f"[{DATA}](https://huggingface.co/datasets/{DATA})",
    ):
        assert line in text
    assert "hf_planted" not in text
    recipe = text.split("```json\n")[1].split("```")[0]
    assert json.loads(recipe)["student_model_name_or_path"] == STUDENT


def test_what_is_beside_the_card_is_in_it_and_nothing_else():
    bare, full = (card_of(summary_with(), picture=full, projector=full).text for full in (False, True))
    assert "report.png" not in bare
    assert "load_projectors" not in bare
    assert "](report.png)" in full
    assert 'snapshot_download("me/student", allow_patterns="projector/*") + "/projector")' in full
    branch = card_of(summary_with(), revision="v2", projector=True).text
    assert 'AutoModelForCausalLM.from_pretrained("me/student", revision="v2")' in branch
    assert 'AutoTokenizer.from_pretrained("me/student", revision="v2")' in branch
    assert 'snapshot_download("me/student", revision="v2", allow' in branch


def test_the_card_of_an_adapter_names_its_base_and_how_both_are_loaded():
    options = {"use_peft": True, "student_quantization": "4bit", "student_revision": "v2"}
    merged = card_of(summary_with(**options))
    assert (merged.data.library_name, merged.data.base_model_relation) == ("transformers", "finetune")
    assert "rank 16 was trained on the frozen student in 4 bit; it is merged into this model." in merged.text
    card = card_of(summary_with(**options, merge_adapter=False), revision="b")
    assert (card.data.library_name, card.data.base_model_relation) == ("peft", "adapter")
    assert card.data.base_model == STUDENT
    assert "lora" in card.data.tags
    base = f'AutoModelForCausalLM.from_pretrained("{STUDENT}", revision="v2")'
    assert f'model = PeftModel.from_pretrained({base}, "me/student", revision="b")' in card.text


@pytest.mark.parametrize(
    ("changes", "base", "start"),
    [
        ({"student_init": "random"}, None, "random weights"),
        ({"student_init": "teacher_layers"}, TEACHER, "layers of the teacher"),
        ({"student_model_name_or_path": "quickstart"}, None, "random weights"),
        ({"student_model_name_or_path": "models/own"}, None, "`models/own`"),
        ({"student_model_name_or_path": STUDENT}, STUDENT, f"[{STUDENT}]"),
    ],
    ids=["random", "layers", "quickstart", "local", "hub"],
)
def test_the_base_is_the_model_whose_weights_it_has(tmp_path, monkeypatch, changes, base, start):
    (tmp_path / "models" / "own").mkdir(parents=True)
    with monkeypatch.context() as there:
        there.chdir(tmp_path)
        summary = summary_with(**changes)
    card = card_of(summary)  # where `models/own` might be the name of a repository
    assert card.data.base_model == base
    assert card.data.get("base_model_relation") == ("finetune" if base else None)
    assert f"The student started from {start}" in card.text


@pytest.mark.parametrize(
    "name", ["quickstart", "data.jsonl", "a/b/c", "./x", "~/models", "s3://a/b", "da*ta/x", str(ROOT)]
)
def test_what_cannot_be_on_the_hub_is_not_said_to_be(name):
    assert hub_id(name, "dataset_name", Summary()) is None


def test_a_cut_student_says_how_much_of_its_teacher_it_is():
    summary = summary_with(student_init="teacher_layers", student_model_name_or_path=None)
    summary.cut = {"kept": [0, 1, 5], "teacher_layers": 8, "method": "search"}
    card = card_of(summary)
    assert card.data.base_model == TEACHER
    assert "The student started from 3 of the 8 layers of the teacher" in card.text


def test_local_data_is_named_without_its_folder_in_the_metadata(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"text": "a"}\n')
    data = card_of(summary_with(dataset_name=tmp_path / "own.jsonl")).data
    assert data.datasets is None
    (result,) = data.eval_results
    assert (result.dataset_type, result.dataset_name) == ("custom", "own.jsonl")


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\t"])
def test_names_with_ends_of_lines_leave_the_metadata_whole(tmp_path, end):
    (tmp_path / f"my{end}own.jsonl").write_text('{"text": "a"}\n')
    data = card_of(summary_with(dataset_name=tmp_path / f"my{end}own.jsonl", dataset_test_split=f"the{end}test")).data
    (result,) = data.eval_results
    assert (result.dataset_name, result.dataset_split, result.dataset_config) == ("my own.jsonl", "the test", "main")


def test_the_embedded_data_are_no_data_set_of_the_hub():
    (result,) = card_of(summary_with(dataset_name="quickstart")).data.eval_results
    assert (result.dataset_type, result.dataset_name) == ("custom", "arithmetic word problems of KAVA's quickstart")


def usage_of(kind, **changes):
    """The first block of Python in a card."""
    summary = replace(summary_with(**changes), prompt_kind=kind)
    code = card_of(summary).text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    return code


def test_the_card_asks_the_student_as_it_was_trained():
    asked = usage_of("question", generation_max_new_tokens=77)
    assert 'prompt = "Question: Ben has 5 coins' in asked
    assert '?\\nAnswer:"\ninputs = tokenizer(prompt, return_tensors="pt")\n' in asked
    assert "model.generate(**inputs, max_new_tokens=77)" in asked
    chat = usage_of("messages", use_peft=True, merge_adapter=False)
    assert 'messages = [{"role": "user", "content": "' in chat
    assert "tokenizer.apply_chat_template(\n    messages, add_generation_prompt=True, " in chat
    assert "prompt =" not in chat
    for kind in ("prompt", "text", None):  # None in the summary of an older run
        assert 'prompt = "..."' in usage_of(kind)


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        ({"question": "a", "answer": "b"}, "question"),
        ({"text": "a"}, "text"),
        ({"prompt": "a", "completion": "b"}, "prompt"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": []}, "messages"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages"),
    ],
)
def test_what_a_prompt_is_follows_from_a_row(columns, kind):
    assert prompt_kind(columns, tuple(columns)) == kind


def test_the_card_tells_the_size_and_whose_licences_apply():
    text = card_of(replace(summary_with(), student_parameters=494_032_768)).text
    assert " The student has 494.03 million parameters." in text
    assert f"the base model's ([{STUDENT}](https://huggingface.co/{STUDENT})), the teacher's ([{TEACHER}]" in text
    assert "and the data set's apply." in text
    fresh = card_of(replace(summary_with(student_init="random"), student_parameters=1_540_000_000)).text
    assert " The student has 1.54 billion parameters." in fresh
    assert "the base model's" not in fresh
    assert "The student has" not in card_of(summary_with()).text


def test_adapters_do_not_count_as_the_student():
    assert (
        own_parameters(tiny_lora_llama(32, 1))
        == own_parameters(tiny_llama(32, 1))
        == tiny_llama(32, 1).num_parameters()
    )


def test_a_run_that_measured_nothing_has_a_valid_card():
    summary = summary_with(mercator_weight=0, lm_weight=1)
    summary.evaluation, summary.verdict = Evaluations(), Verdict()
    card = card_of(summary)
    assert card.data.eval_results is None
    assert "No hidden states were aligned." in card.text
    assert "| none | not measured |" in card.text


def test_a_card_that_was_changed_is_known():
    card = render_model_card("me/student", summary_with())
    assert is_untouched(card)
    assert not is_untouched(card.replace("Because.", "Because of me."))
    assert not is_untouched("# My own\n")
    assert not is_untouched(card + "More.\n")


def test_the_hub_would_take_the_card(hub, tmp_path):
    card = tmp_path / "README.md"
    card.write_text(render_model_card("me/student", summary_with(), picture=True, projector=True), encoding="utf-8")
    check_card(card)
    assert hub.asked == [("validate", "/api/validate-yaml")]
    card.write_text("---\nbase_model_relation: cousin\n---\n")
    with pytest.raises(ValueError, match=r"it does not take the metadata of README\.md: .*base_model_relation"):
        check_card(card)
    assert hub.address == constants.ENDPOINT


RECIPES = sorted((ROOT / "training_args").glob("*.json"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_recipe_asks_for_the_same_run_again(tmp_path, monkeypatch, recipe):
    monkeypatch.setattr(optimizer_names, "is_torchao_available", lambda: False)
    monkeypatch.setattr(checks, "missing_package", lambda optim: None)
    more = {
        "use_cpu": True, "bf16": False, "hub_token": "hf_planted", "push_to_hub": True, "hub_strategy": "end",
        "hub_model_id": "me/x", "resume_from_checkpoint": "true", "layer_mapping": "[[1, 2]]",
        "report_to": "tensorboard", "accelerator_config": '{"non_blocking": true}', "layer_weights": 1.5,
    }  # fmt: skip
    asked = parse_arguments([str(recipe), *words(more)]).to_dict()
    summary = Summary(arguments=json.loads(json.dumps(asked, default=str)), environment={"device": "cpu"})
    (tmp_path / "recipe.json").write_text(recipe_text(summary))
    given = json.loads((tmp_path / "recipe.json").read_text())
    assert not [name for name in given if name.startswith(("hub", "push", "resume")) or name.endswith("token")]
    assert {"final_dir", "max_tokens_per_batch", "dataloader_pin_memory", "report_to"} & set(given) <= {
        "final_dir",
        "report_to",
    }
    assert given["accelerator_config"] == {"non_blocking": True}
    again = parse_arguments([str(tmp_path / "recipe.json")]).to_dict()
    left_out = {"push_to_hub", "hub_strategy", "hub_model_id", "resume_from_checkpoint"}
    assert {name for name in asked if asked[name] != again[name]} == left_out
    assert recipe_of(replace(summary, arguments=again)) == given


def test_the_recipe_of_the_defaults_has_what_must_be_named_alone():
    asked = {"teacher_model_name_or_path": TEACHER, "student_model_name_or_path": STUDENT, "dataset_name": DATA}
    given = parse_arguments(words({**asked, "use_cpu": True})).to_dict()
    assert recipe_of(Summary(arguments=given, environment={"device": "cpu (x)"})) == {**asked, "use_cpu": True}


def test_names_have_no_meaning_as_markdown_or_code(tmp_path):
    """A folder may be called anything; none of it may become markup, or end a code block or a string."""
    name = 'a`b``c"d</summary>|[x](y)'
    summary = replace(summary_with(use_peft=True, merge_adapter=False), held_out_examples=50)
    summary.arguments |= {"teacher_model_name_or_path": name, "student_model_name_or_path": name}
    text = card_of(summary).text
    assert f"from ```{name}``` on" in text
    code = text.split("```python\n")[1].split("\n```")[0]
    assert name in {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)}


@pytest.mark.parametrize(
    ("text", "code"), [("a/b", "`a/b`"), ("`", "`` ` ``"), ("a``", "``` a`` ```"), ("a\n\n# b", "`a # b`")]
)
def test_any_text_can_be_shown_as_code(text, code):
    assert as_code(text) == code


def test_the_card_says_on_how_many_examples_it_was_measured():
    summary = replace(summary_with(), held_out_examples=50)
    card = card_of(summary)
    assert "On 50 held-out examples (split `test`);" in card.text
    assert "Measured on held-out tokens:" in card.text
    assert card.data.eval_results[0].dataset_args == {"num_examples": 50}
    summary.evaluation.student_after = None
    assert "Measured in the last training steps:" in card_of(summary).text


def test_a_recipe_has_no_name_of_a_run():
    assert "run_name" not in recipe_of(summary_with(run_name="out-20260101-120000"))
