"""A training run for `test_requests.py` in which a rank signals itself; exits as `run_kava.py` would."""

import os
import signal
import sys

from transformers import AutoTokenizer, TrainerCallback

from helpers.trainers import make_trainer
from kava_trainer.cli import exit_with
from kava_trainer.quickstart import STUDENT_FOLDER
from kava_trainer.utils.errors import exit_code


class SignalAtStep(TrainerCallback):
    """Sends a signal to this process `times` times at the beginning of the third step."""

    def __init__(self, number: int, times: int) -> None:
        self.number, self.times = number, times

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


def main(output: str, signal_name: str, times: str, rank: str) -> int:
    trainer = make_trainer(
        output,
        AutoTokenizer.from_pretrained(STUDENT_FOLDER),
        max_steps=5,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        save_strategy="steps",
        save_steps=100,
    )
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    if trainer.args.process_index == int(rank):
        trainer.add_callback(SignalAtStep(getattr(signal, signal_name), int(times)))
    trainer.train()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    print(f"rank {trainer.args.process_index} of {trainer.args.world_size} stopped at step {trainer.state.global_step}")
    return exit_code(trainer.emergency.received)


if __name__ == "__main__":
    exit_with(lambda: main(*sys.argv[1:]))
