import pytest
import torch
from helpers.data import random_examples
from helpers.trainers import loss_lines, make_trainer

from kava_trainer.data.selection import choose_examples
from kava_trainer.evaluation.diagnostics import diagnose


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
