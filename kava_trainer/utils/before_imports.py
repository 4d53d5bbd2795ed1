"""What is settled before the libraries are imported: what they log then, and how their threads wait for each other."""

import logging
import os


def _is_no_missing_extension(record: logging.LogRecord) -> bool:
    """torchao names each compiled extension that this device or this torch cannot load. transformers imports torchao
    wherever it is installed, and what KAVA takes of it, its optimizers, needs none of them."""
    return not str(record.msg).startswith(("Failed to load ", "Skipping import of cpp extensions "))


def _is_no_missing_kernel(record: logging.LogRecord) -> bool:
    """bitsandbytes names an optional package of kernels that it would like to load; it computes without it."""
    return "kernels-community" not in record.getMessage()


def _is_no_registration(record: logging.LogRecord) -> bool:
    """torch tells of an enum that torchao registers in a way that a future torch will not take."""
    first = record.args[0] if isinstance(record.args, tuple) and record.args else None
    return not (getattr(first, "__module__", "").startswith("torchao.") and "is an Enum subclass" in str(record.msg))


def leave_out() -> None:
    """Leave these lines out from now on; whatever else the libraries log is shown as before."""
    logging.getLogger("torchao").addFilter(_is_no_missing_extension)
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_missing_kernel)
    logging.getLogger("torch.utils._pytree").addFilter(_is_no_registration)


def let_threads_sleep() -> None:
    """Let threads that wait for each other fall asleep within microseconds, unless `OMP_WAIT_POLICY` has its own say.

    OpenMP's would spin for milliseconds. Beside another busy process one of them has no core to itself, and at every
    operation the others spin away the time that it needs: a run beside one took several times as long, see
    `benchmarks/busy.py`. It has no effect on the numbers.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # libgomp's, in turns of a loop: about 50 microseconds
        os.environ.setdefault("KMP_BLOCKTIME", "0")  # Intel's and LLVM's, in milliseconds
