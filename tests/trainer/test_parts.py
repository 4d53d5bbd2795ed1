"""The parts of a trainer without one: what they do, and that what they keep in a checkpoint comes back."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainerControl, TrainerState

from kava_trainer.config.arguments import KavaTrainingArguments
from kava_trainer.trainer.batches import StepBatches
from kava_trainer.trainer.callbacks.emergency import EmergencyCheckpointCallback
from kava_trainer.trainer.incidents import Incidents
from kava_trainer.trainer.run_state import RunState, read_progress
from kava_trainer.trainer.step import StepRunner
from kava_trainer.trainer.throughput import Throughput
from kava_trainer.utils.errors import RunFailed

CPU = torch.device("cpu")


@pytest.fixture
def args(tmp_path):
    return KavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, plain_output=True, max_nonfinite_steps=2)


@pytest.fixture
def incidents(args):
    return Incidents(args, lambda: 7)


def row(*tokens):
    return {"input_ids": torch.tensor([tokens])}


class Run:
    """A linear model whose loss on a row is the sum of its tokens times its weight."""

    def __init__(self, args, incidents):
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.model.weight)
        accelerator = Accelerator(cpu=True)
        self.optimizer = accelerator.prepare(torch.optim.SGD(self.model.parameters(), lr=0.1))
        self.steps = StepRunner(args, accelerator, incidents, self.backward)
        self.told = {"model": self.model, "optimizer": self.optimizer}
        self.steps.on_train_begin(args, TrainerState(), TrainerControl(), **self.told)

    def backward(self, model, row, num_items):
        loss = row["input_ids"].sum() * model.weight.sum()
        loss.backward()
        return loss.detach()

    def step(self, *micro_batches):
        self.model.zero_grad()
        self.steps.begin([row for rows in micro_batches for row in rows], sharded=False)
        losses = []
        for number, rows in enumerate(micro_batches, start=1):
            self.steps._accelerator.gradient_state._set_sync_gradients(number == len(micro_batches))
            losses.append(self.steps.run(self.model, rows, None).item())
        self.steps.on_pre_optimizer_step(None, TrainerState(global_step=7), TrainerControl(), **self.told)
        self.optimizer.step()
        return losses


def test_a_step_adds_up_the_rows_of_its_micro_batches(args, incidents):
    run = Run(args, incidents)
    assert run.step([row(1.0, 2.0), row(3.0)], [row(4.0)]) == [6.0, 4.0]
    assert run.model.weight.item() == pytest.approx(1 - 0.1 * 10, abs=1e-6)
    assert incidents.problems == []


def test_a_step_that_is_no_number_returns_nothing_and_changes_nothing(args, incidents, capsys):
    run = Run(args, incidents)
    losses = run.step([row(5.0)], [row(float("nan"))])
    assert losses == [5.0, -5.0]
    assert run.model.weight.item() == 1.0
    assert incidents.problems == [{"step": 8, "kind": "nan", "action": "skipped the optimizer step"}]
    assert "Loss or gradient of step 8 is no finite number" in capsys.readouterr().out
    with pytest.raises(RunFailed, match="2 steps in a row, up to step 8; the weights are those from before"):
        run.step([row(float("inf"))])


def test_a_runner_goes_on_from_what_it_saved(args, incidents):
    run, other = Run(args, incidents), Run(args, incidents)
    run.step([row(float("nan"))])
    run.steps.means.add("cos_sim", torch.tensor(3.0), torch.tensor(4.0))
    run.steps.row_limit = 96
    state = run.steps.state_dict()
    other.steps.load_state_dict({**state, "same_ranks": True})
    assert other.steps.state_dict()["nonfinite"] == state["nonfinite"] == [1, 1, 1]
    assert (other.steps.row_limit, other.steps.means.drain(lambda sums: sums)) == (96, {"cos_sim": 0.75})
    with pytest.raises(RunFailed, match="2 steps in a row"):
        other.step([row(float("nan"))])
    elsewhere = Run(args, incidents)
    elsewhere.steps.load_state_dict({**state, "same_ranks": False})
    assert (elsewhere.steps.row_limit, elsewhere.steps.means.drain(lambda sums: sums)) == (96, {})


def test_counts_go_on_from_those_of_earlier_sessions():
    first, second = Throughput(CPU), Throughput(CPU)
    first.on_train_begin(None, TrainerState(), TrainerControl())
    first.count(torch.tensor([80, 30, 100, 4]))
    with first.stopwatch.measure("step"):
        pass
    second.on_train_begin(None, TrainerState(), TrainerControl())
    second.load_state_dict(first.state_dict())
    second.count(torch.tensor([20, 10, 20, 1]))
    spent = second.spent()
    assert (spent["tokens"], spent["positions"], spent["examples"]) == (100, 120, 5)
    assert second.figures()["padding_fraction"] == pytest.approx(1 / 6)
    assert (Throughput(CPU).figures(), second.tokens) == ({}, 20)


def test_batches_know_where_in_a_stream_they_are(args, incidents):
    stream = SimpleNamespace(places=[], state=lambda: "here", rewind=lambda: stream.places.clear())
    stream.restore, stream.note = stream.places.append, stream.places.append
    batches = StepBatches(args, incidents)
    assert batches.state_dict() == {"stream": None}
    batches.load_state_dict({"stream": None})
    batches.stream = stream
    assert batches.state_dict() == {"stream": "here"}
    batches.load_state_dict({"stream": "there"})
    assert stream.places == ["there"]
    with pytest.raises(RunFailed, match=r"line 3 is broken\. If a file is broken, repair it without changing its size"):
        batches.gather(iter([{"problem": "line 3 is broken."}]), 1, 4, None, sharded=False)
    state = TrainerState(global_step=3, max_steps=12)
    batches.on_step_end(None, state, TrainerControl())
    assert state.epoch == 0.25


def test_what_gave_way_to_a_signal_is_known_to_the_checkpoint(args):
    emergency, control = EmergencyCheckpointCallback(lambda path: None), TrainerControl()
    assert emergency.state_dict() == {"evaluation_pending": False, "probe_due": True}
    control.should_evaluate = True
    emergency.stop(15, control)
    assert (control.should_evaluate, control.should_save, control.should_training_stop) == (False, True, True)
    assert emergency.state_dict() == {"evaluation_pending": True, "probe_due": False}


def test_what_is_best_is_hidden_from_trainer_while_it_clears_away_and_named_again(args):
    emergency, state, control = EmergencyCheckpointCallback(lambda path: None), TrainerState(), TrainerControl()
    state.best_model_checkpoint = "checkpoint-2"
    emergency.on_log(args, state, control, logs={"train_loss": 1.0})
    emergency.on_train_end(args, state, control)
    assert state.best_model_checkpoint == "checkpoint-2"  # no signal came
    emergency.stop(15, control)
    emergency.on_log(args, state, control, logs={"loss": 1.0})
    assert state.best_model_checkpoint == "checkpoint-2"
    emergency.on_log(args, state, control, logs={"train_loss": 1.0})
    assert state.best_model_checkpoint is None
    emergency.on_train_end(args, state, control)
    assert state.best_model_checkpoint == "checkpoint-2"


def test_the_state_of_a_run_is_that_of_its_parts(args, incidents, tmp_path):
    late, now = [], Incidents(args, lambda: 9)
    incidents.note("oom", "split the rows")
    emergency = EmergencyCheckpointCallback(lambda path: None)
    emergency.evaluation_pending = True
    RunState([incidents, emergency], late.append, lambda *_: None).save(tmp_path, rank=0, world_size=1)
    assert read_progress(tmp_path, rank=0, world_size=2)["same_ranks"] is False
    now.note("nan", "skipped")
    run = RunState([now, emergency], late.append, lambda model, state: late.append((model, state.global_step)))
    run.on_train_begin(args, TrainerState(global_step=4), TrainerControl(), model="student")
    assert late == []  # it goes on from nothing
    run.checkpoint = str(tmp_path)
    run.on_train_begin(args, TrainerState(global_step=4), TrainerControl(), model="student")
    assert [problem["kind"] for problem in now.problems] == ["oom", "nan"]
    assert late == [str(tmp_path), ("student", 4)]
