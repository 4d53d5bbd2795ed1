"""Too little memory and numbers that are none: the step is done again, or skipped, on all ranks."""

import pytest
import torch
from helpers.data import random_examples
from helpers.hashes import weight_hash
from helpers.mishaps import STEADY, Poison, out_of_memory_above, poisoned_rank, short_of_memory
from helpers.processes import Run
from helpers.trainers import loss_lines, make_trainer
from transformers import TrainerCallback

from kava_trainer.data.collators import DistillationCollator, JoiningCollator
from kava_trainer.data.packing import halve, pack_step
from kava_trainer.trainer.step import split_rows
from kava_trainer.utils.errors import RunFailed


def rows_of(tokenizer, packed, count=5):
    examples = random_examples(count)
    if not packed:
        return DistillationCollator(tokenizer)(examples)
    (row,) = pack_step([JoiningCollator()(examples)], 1000)
    return row


def answers(row):
    """Every token that is to be predicted, with the one before it."""
    flat = row["input_ids"].flatten()
    return sorted((flat[i].item(), n.item()) for i, n in zip(row["answer_index"], row["next_tokens"], strict=True))


@pytest.mark.parametrize("packed", [True, False])
def test_halves_hold_the_examples_and_answers_of_the_whole(tokenizer, packed):
    row = rows_of(tokenizer, packed)
    row["teacher_states"] = {3: torch.randn(*row["input_ids"].shape, 2)}
    first, second = halve(row)
    assert sorted(answers(first) + answers(second)) == answers(row)
    axis = 1 if packed else 0
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(torch.cat([first[name], second[name]], dim=axis), row[name])
    states = torch.cat([first["teacher_states"][3], second["teacher_states"][3]], dim=axis)
    assert torch.equal(states, row["teacher_states"][3])
    if packed:
        assert first["packed_lengths"] + second["packed_lengths"] == row["packed_lengths"]
    else:
        assert torch.equal(torch.cat([first["labels"], second["labels"]]), row["labels"])


@pytest.mark.parametrize("packed", [True, False])
def test_rows_are_split_down_to_single_examples_and_no_further(tokenizer, packed):
    row = rows_of(tokenizer, packed)
    assert split_rows([row], None) == [row]
    small = split_rows([row, row], 30)
    assert all(part["input_ids"].numel() <= 30 for part in small)
    single = split_rows([row], 1)
    assert len(single) == 5
    assert all(halve(part) is None for part in single)
    assert [example["input_ids"][0] for example in random_examples(5)] == [p["input_ids"][0, 0].item() for p in single]


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("packing", [0, 80])
def test_too_little_memory_changes_neither_losses_nor_weights(tmp_path, tokenizer, packing, where, capsys):
    settings = {**STEADY, "max_tokens_per_batch": packing}
    roomy = make_trainer(tmp_path, tokenizer, **settings)
    roomy.train()
    tight = out_of_memory_above(40, where)(make_trainer(tmp_path, tokenizer, **settings))
    tight.train()
    for ours, theirs in zip(loss_lines(tight), loss_lines(roomy), strict=True):
        for name in ("loss", "grad_norm", "cos_sim", "lm_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
    for ours, theirs in zip(tight.model.parameters(), roomy.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert not roomy.problems
    assert {problem["kind"] for problem in tight.problems} == {"oom"}
    assert tight.problems[0]["step"] == 1
    assert len(tight.problems) <= 2
    assert tight.steps.row_limit <= 48
    assert "Out of memory in step 1" in capsys.readouterr().out


def test_a_single_example_that_does_not_fit_ends_the_run_with_what_to_lower(tmp_path, tokenizer):
    trainer = out_of_memory_above(10, "forward")(make_trainer(tmp_path, tokenizer, **STEADY))
    with pytest.raises(RunFailed) as caught:
        trainer.train()
    told = str(caught.value)
    assert told.startswith("Out of memory in step 1 with a single example in a forward pass.")
    for remedy in (
        "lower max_length below the 23 tokens",
        "gradient_checkpointing true",
        "adamw_bnb_8bit, which saves 0.00 GB",
    ):
        assert remedy in told


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_one_rank_with_too_little_memory_makes_all_do_the_step_again(tmp_path, where):
    results = {}
    for name, limit in (("roomy", 10_000), ("tight", 30)):
        output = tmp_path / f"{name}.pt"
        arguments = (str(tmp_path / "run"), str(output), 1, where, limit)
        run = Run(short_of_memory, tmp_path / name, *arguments, ranks=2)
        assert run.wait() == [0, 0], run.output()
        results[name] = torch.load(output, weights_only=True)
    assert results["tight"]["world_size"] == 2
    assert results["tight"]["wrapper"] == "DistributedDataParallel"
    assert [problem["kind"] for problem in results["tight"]["problems"]][:1] == ["oom"]
    assert not results["roomy"]["problems"]
    for ours, theirs in zip(results["tight"]["losses"], results["roomy"]["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd", "adafactor"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_without_finite_numbers_is_skipped_and_noted(tmp_path, tokenizer, optim, what):
    trainer = make_trainer(tmp_path, tokenizer, max_steps=5, optim=optim, logging_steps=5, warmup_steps=0)
    Poison(trainer, {2, 4}, what)
    hashes = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            hashes.append(weight_hash(trainer.model))

    trainer.add_callback(Watch())
    trainer.train()
    assert [problem["step"] for problem in trainer.problems] == [2, 4]
    assert {problem["kind"] for problem in trainer.problems} == {"nan"}
    assert hashes[0] == hashes[1] != hashes[2] == hashes[3] != hashes[4]
    (line,) = loss_lines(trainer)
    assert 0 < line["loss"] < 20
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def test_skipped_steps_leave_the_mean_loss_and_the_optimizer_as_they_were(tmp_path, tokenizer):
    settings = {"max_steps": 3, "logging_steps": 3, "lr_scheduler_type": "constant", "projector_dropout": 0.0}
    trainer = make_trainer(tmp_path, tokenizer, **settings)
    Poison(trainer, {3}, "loss")
    trainer.train()
    plain = make_trainer(tmp_path, tokenizer, **{**settings, "max_steps": 2, "logging_steps": 2})
    plain.train()
    assert weight_hash(trainer.model) == weight_hash(plain.model)
    for ours, theirs in zip(
        trainer.optimizer.optimizer.state.values(), plain.optimizer.optimizer.state.values(), strict=True
    ):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert loss_lines(trainer)[0]["loss"] == pytest.approx(loss_lines(plain)[0]["loss"], rel=1e-5)


def test_too_many_skipped_steps_in_a_row_end_the_run_and_name_the_last_good_checkpoint(tmp_path, tokenizer):
    settings = {"max_steps": 20, "save_strategy": "steps", "save_steps": 2, "max_nonfinite_steps": 3}
    trainer = make_trainer(tmp_path, tokenizer, **settings)
    Poison(trainer, {2, 3, 5, 6, 7, 8}, "gradient")
    with pytest.raises(RunFailed, match=r"for 3 steps in a row, up to step 7.* Resume from .*checkpoint-6, which"):
        trainer.train()
    assert [problem["step"] for problem in trainer.problems] == [2, 3, 5, 6, 7]


def test_a_loss_that_is_no_number_on_one_rank_skips_the_step_on_all(tmp_path):
    output = tmp_path / "result.pt"
    run = Run(poisoned_rank, tmp_path, str(tmp_path / "run"), str(output), ranks=2)
    assert run.wait() == [0, 0], run.output()
    result = torch.load(output, weights_only=True)
    assert result["problems"] == [{"step": 2, "kind": "nan", "action": "skipped the optimizer step"}]
    assert 0 < result["losses"][0] < 20
