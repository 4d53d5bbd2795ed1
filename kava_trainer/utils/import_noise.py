"""What libraries log while they are imported and nobody can act upon; it is not shown."""

import logging


class _WithoutExtensions(logging.Filter):
    """torchao names each compiled extension that this device or this torch cannot load. transformers imports torchao
    wherever it is installed, and what KAVA takes of it, its optimizers, needs none of them."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(("Failed to load ", "Skipping import of cpp extensions "))


class _WithoutKernels(logging.Filter):
    """bitsandbytes names an optional package of kernels that it would like to load; it computes without it."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "kernels-community" not in record.getMessage()


class _WithoutRegistrations(logging.Filter):
    """torch tells of an enum that torchao registers in a way that a future torch will not take."""

    def filter(self, record: logging.LogRecord) -> bool:
        first = record.args[0] if isinstance(record.args, tuple) and record.args else None
        return not (
            getattr(first, "__module__", "").startswith("torchao.") and "is an Enum subclass" in str(record.msg)
        )


def leave_out() -> None:
    """Leave these lines out from now on; whatever else the libraries log is shown as before."""
    for name, unwanted in (
        ("torchao", _WithoutExtensions()),
        ("bitsandbytes.backends.cpu.ops", _WithoutKernels()),
        ("torch.utils._pytree", _WithoutRegistrations()),
    ):
        logging.getLogger(name).addFilter(unwanted)
