"""Runs in processes of their own that start quickly: one server imports everything once and forks for each of them."""

import gc
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from helpers.places import ROOT

os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
)
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["helpers.fault_child", "kava_trainer.runs.pipeline"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _enter(function, log, rank, ranks, port, arguments):
    """Within the new process: its rank, and a file in place of the terminal."""
    output = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.fsync = lambda descriptor: None  # no test takes the power away
    if ranks > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }  # fmt: skip
    # Else data workers would be started as this process was, by a server that has imported nothing yet.
    multiprocessing.set_start_method(None, force=True)
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what was imported need not be looked through for garbage
    sys.exit(function(*arguments))


class Run:
    """A function at work in one process, or in several ranks.

    Args:
        function: of a module; what it returns is the exit code.
        folder: takes the ranks' logs.
        ranks: number of processes.
        arguments: of the function, the same for every rank.
    """

    def __init__(self, function, folder, *arguments, ranks=1):
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.logs = [Path(folder) / f"rank{rank}.log" for rank in range(ranks)]
        for log in self.logs:
            log.unlink(missing_ok=True)
        port = free_port()
        self.processes = [
            CONTEXT.Process(target=_enter, args=(function, str(log), rank, ranks, port, arguments))
            for rank, log in enumerate(self.logs)
        ]
        for process in self.processes:
            process.start()

    def kill(self):
        for process in self.processes:
            with suppress(ProcessLookupError):  # it has ended by itself
                os.kill(process.pid, signal.SIGKILL)

    def wait(self, timeout=120):
        """The exit codes; those that a signal ended are negative."""
        for process in self.processes:
            process.join(timeout)
        codes = [process.exitcode for process in self.processes]
        if None in codes:
            self.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self.output()}")
        return codes

    def output(self):
        return "\n".join(log.read_text() for log in self.logs)


def launch(module, *words, ranks=1):
    """A module started from the command line, with torchrun where there are several ranks; what it says is captured."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", module, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
