"""PyTorch's own database of operators and sample calls (``op_db``), behind one door.

It is private, and there is no public list of valid calls of every op; nothing else imports it. What is relied on:
``OpInfo.full_name``, ``.op``, ``.dtypes`` (of the CPU) and ``.sample_inputs(device, dtype)``, which yields
``SampleInput`` (``input``, ``args``, ``kwargs``). Importing it needs the package ``expecttest``.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch

#: preferred first: what a model computes in, then what it masks and counts with
DTYPES = (torch.float64, torch.bool, torch.int64, torch.complex128)


@dataclass(frozen=True)
class Entry:
    """One entry of the database: ``function`` called as each of ``samples()``, (args, kwargs), says."""

    name: str
    info: Any

    @property
    def function(self) -> Any:
        return self.info.op

    @property
    def dtype(self) -> torch.dtype | None:
        """What the entry is sampled in; None where the CPU has no kernel for any of :data:`DTYPES`."""
        return next((d for d in DTYPES if d in self.info.dtypes), None)

    def samples(self, limit: int | None = None) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The first ``limit`` sample calls, all by default."""
        torch.manual_seed(0)
        if self.dtype is None:
            return []
        drawn = self.info.sample_inputs("cpu", self.dtype, requires_grad=False)
        found = [((s.input, *s.args), s.kwargs) for s in itertools.islice(drawn, limit)]
        if hasattr(drawn, "close"):
            drawn.close()  # it may hold a grad mode, which a trace would record
        return found


@functools.cache
def entries() -> dict[str, Entry]:
    """Every entry by its name, e.g. ``nn.functional.linear``; variants are named ``sum_to_size.variant``."""
    from torch.testing._internal.common_methods_invocations import op_db

    return {info.full_name: Entry(info.full_name, info) for info in op_db}
