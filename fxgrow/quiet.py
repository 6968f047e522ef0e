"""What PyTorch logs while a model is traced, left out where it is told otherwise."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what this thread logs of a trace."""
    mute, loggers = _OtherThreads(), [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(mute)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(mute)
