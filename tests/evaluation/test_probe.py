import pytest
import torch
from helpers.data import random_examples
from helpers.trainers import loss_lines, make_trainer

from kava_trainer.data.selection import choose_examples
from kava_trainer.evaluation.diagnostics import Diagnostics, diagnose
from kava_trainer.evaluation.probe import ProbeResult, describe_collapse
from kava_trainer.reports.findings.alignment import course_of


def test_the_first_examples_with_enough_tokens_are_chosen():
    rows = random_examples(10)
    lengths = [len(row["input_ids"]) for row in rows]
    assert choose_examples(rows, sum(lengths[:3])) == rows[:3]
    assert choose_examples(rows, sum(lengths[:3]) + 1) == rows[:4]
    assert choose_examples(rows, 10**6) == rows


@pytest.mark.parametrize("mapping", ["last", "uniform:2"])
def test_the_probe_sees_the_real_tokens_of_both_models(tmp_path, tokenizer, mapping):
    trainer = make_trainer(tmp_path, tokenizer, layer_mapping=mapping)
    result = trainer.probe.fixed.measure(trainer.model, trainer.terms)
    assert trainer.model.training
    trainer.model.eval()
    for (layer, teacher_layer), projector, figures in zip(
        trainer.target.pairs, trainer.target.projectors, result.pairs, strict=True
    ):
        rows = []
        for example in trainer.eval_dataset:
            ids = {"input_ids": torch.tensor([example["input_ids"]]), "output_hidden_states": True}
            teacher = trainer.terms.teacher.model(**ids).hidden_states[teacher_layer][0]
            student = trainer.student(**ids).hidden_states[layer][0]
            rows.append((student, projector(teacher), student, teacher))
        expected = diagnose(*(torch.cat(states) for states in zip(*rows, strict=True)))
        assert figures.to_dict() == pytest.approx(expected.to_dict(), rel=1e-3, abs=1e-5)
    pairs = len(result.pairs)
    assert len(result.metrics("eval")) == 8 + 2 + 1 + (8 * pairs if pairs > 1 else 0)


def test_the_probe_runs_before_the_first_step_and_at_every_evaluation(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, eval_strategy="steps", eval_steps=1)
    trainer.train()
    steps = [line["step"] for line in trainer.state.log_history if "probe_cka" in line or "eval_cka" in line]
    assert steps == [0, 1, 2]


def test_a_planted_collapse_is_called_by_the_next_probe_and_shown(tmp_path, tokenizer, capsys):
    trainer = make_trainer(tmp_path, tokenizer, eval_strategy="steps", eval_steps=1, max_steps=2, learning_rate=0.0)
    with torch.no_grad():
        trainer.student.get_input_embeddings().weight.fill_(1.0)
        for projector in trainer.target.projectors:
            projector.down.weight.zero_()
    trainer.train()
    assert "another token" in trainer.collapse
    assert [line["collapsed"] for line in loss_lines(trainer)] == [0.0, 1.0]
    assert "Collapsed" in capsys.readouterr().out


def test_an_untrained_model_is_not_called_collapsed(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer)
    assert trainer.run_probe().collapse is not None
    trainer.train()
    assert trainer.collapse is None


def test_without_alignment_there_is_no_probe(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, mercator_weight=0.0)
    assert trainer.run_probe() is None
    assert "eval_cka" not in trainer.evaluate()


def pair(margin):
    return Diagnostics(0.6, 0.5, 0.6 - margin, margin, 0.3, 10.0, 20.0, 20.0)


@pytest.mark.parametrize(
    ("margins", "reasons", "said"),
    [
        ([0.3, 0.4], [None, None], None),
        ([0.01], ["Because."], "Because."),
        ([0.3, 0.01], [None, "Because."], "1 of 2 pairs of layers collapsed, layers 12 -> 14: Because."),
        ([0.02, 0.01], ["One.", "Two."], "2 of 2 pairs of layers collapsed, the worst are layers 12 -> 14: Two."),
        ([float("nan"), 0.01], ["One.", "Two."], "2 of 2 pairs of layers collapsed, the worst are layers 3 -> 4: One."),
    ],
)
def test_a_collapse_names_the_worst_of_several_pairs(margins, reasons, said):
    assert describe_collapse(reasons, list(map(pair, margins)), [(3, 4), (12, 14)][: len(margins)]) == said


def test_the_figures_of_each_pair_have_its_layers(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, layer_mapping="uniform:2")
    trainer.train()
    metrics, rows = trainer.evaluate(), trainer.pair_figures()
    assert [(row["student_layer"], row["teacher_layer"]) for row in rows] == trainer.target.pairs
    for number, row in enumerate(rows):
        assert row["margin"] == metrics[f"eval_pair{number}_margin"]
        assert row["collapsed"] is (trainer.probe.last.reasons[number] is not None)
    state = trainer.probe.state_dict()
    trainer.probe.forget()
    assert trainer.pair_figures() == []
    trainer.probe.load_state_dict(state)
    assert trainer.pair_figures() == rows
    older = {name: value for name, value in state.items() if name not in ("probed_pairs", "whole_before")}
    trainer.probe.load_state_dict(older)
    assert (trainer.pair_figures(), trainer.collapse) == ([], state["collapse"][2])
    assert ProbeResult([], [], None).by_pair() == []


def test_a_resumed_training_knows_where_its_alignment_started(tmp_path, tokenizer):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    first = make_trainer(tmp_path, tokenizer, **options, max_steps=2)
    first.train()
    second = make_trainer(tmp_path, tokenizer, **options, max_steps=2)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    courses = [course_of(trainer.state.log_history) for trainer in (first, second)]
    assert courses[0] == courses[1]
    assert (courses[1].start.step, courses[1].last.step) == (0, 2)
