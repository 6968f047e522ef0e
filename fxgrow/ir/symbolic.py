"""How ``torch.export`` treats dynamic sizes, and what it raises where sizes or values hang on data."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental import _config
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

#: errors of a trace that reads data: no other choice of dynamic dims helps
ON_DATA = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)


def oblivious_sizes(on: bool) -> AbstractContextManager[Any]:
    """Trace with sizes that are not taken to be at least 2; an op's own branches then leave no guards.

    What remains is what the graph's validity hangs on. The setting is local to the thread.
    """
    return _config.patch(backed_size_oblivious=on)  # type: ignore[attr-defined]
