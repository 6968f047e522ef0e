"""What PyTorch logs while a model is traced, left out where it is told otherwise."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
from collections.abc import Iterator
from typing import TextIO

#: dims that the model fixes, which are shown as frozen axes; and a page for an op that does not fit its operands
_LOGGERS = (
    "torch._export.non_strict_utils",
    "torch._subclasses.fake_tensor",
    "torch.fx.experimental.symbolic_shapes",
    "torch._dynamo.variables.higher_order_ops",
)


class _OtherThreads(logging.Filter):
    """Lets the records of other threads pass."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread != self.thread


class _OtherThreadsErrors(io.TextIOBase):
    """Standard error, for what other threads write: ``torch.export`` prints the graph it has so far when it fails."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream, self.thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self.thread else self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        return self.stream.fileno()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what this thread logs of a trace, and writes to standard error meanwhile."""
    mute, loggers = _OtherThreads(), [logging.getLogger(name) for name in _LOGGERS]
    errors = _OtherThreadsErrors(sys.stderr)
    for logger in loggers:
        logger.addFilter(mute)
    try:
        with contextlib.redirect_stderr(errors):
            yield
    finally:
        errors.thread = -1  # where another thread's trace ended before, it may have put this one back
        for logger in loggers:
            logger.removeFilter(mute)
