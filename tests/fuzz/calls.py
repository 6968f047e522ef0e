"""Valid calls of every op that has a rule: the judge's samples, and PyTorch's database of operators."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fxgrow.ir.ops import op_name
from fxgrow.rules import RULES
from fxgrow.testing.judge import Sample
from tests.rules.samples import SAMPLES

_BASES = ("rand", "randn", "rand_like", "randn_like", "randint", "randperm", "bernoulli", "bernoulli_", "uniform_")
_MORE = ("normal", "normal_", "exponential_", "multinomial", "empty", "empty_like", "new_empty")
#: what draws at random, or leaves memory unset: their results are used for their shape only
RANDOM = frozenset(n for n in RULES if n.startswith("aten.") and n.split(".")[1] in _BASES + _MORE)


def operator(name: str) -> Any:
    """The overload itself."""
    _, base, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, base), overload)


def _exists(name: str) -> bool:
    try:
        operator(name)
    except AttributeError:
        return False
    return True


#: every op of PyTorch that has a rule, by name
OPS: tuple[str, ...] = tuple(n for n in sorted(RULES) if n.startswith("aten.") and _exists(n))


def samples(name: str, rng: random.Random, database: bool) -> list[Sample]:
    """Calls of an op, in the order in which to try them."""
    own = list(SAMPLES.get(name, []))
    rng.shuffle(own)
    if not database:
        return own
    more = list(_database(name))
    rng.shuffle(more)
    return [x for pair in itertools.zip_longest(more[:3], own) for x in pair if x is not None]


@functools.cache
def _database(name: str) -> tuple[Sample, ...]:
    """Calls of an overload as the database's entries of its name make them; distinct ones."""
    from tests.rules.database import entries
    from tests.rules.opinfo import calls

    base = name.split(".")[1].strip("_")
    stems = {base, base.replace("_", ".", 1), f"nn.functional.{base}", base.rstrip("0123456789d")}
    stems |= {
        f"nn.functional.{base.removesuffix('_loss')}",
        f"nn.functional.interpolate.{base.split('_')[-1].rstrip('123d')}",
    }
    found: dict[str, Sample] = {}
    for entry in entries().values():
        if entry.name.rpartition(".variant")[0] not in stems and entry.name not in stems:
            continue
        with contextlib.suppress(Exception):
            for target, sample in calls(entry, 8):
                leaves = pytree.tree_leaves((sample.args, sample.kwargs))
                if op_name(target) == name and sum(x.numel() for x in leaves if isinstance(x, Tensor)) < 800:
                    key = repr([(x.dtype, x.shape) if isinstance(x, Tensor) else x for x in leaves])
                    found.setdefault(key, sample)
    return tuple(found.values())


def literal(value: Any) -> str:
    """Code of a plain argument."""
    if isinstance(value, list | tuple):
        inner = ", ".join(literal(v) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
        return f'float("{value}")'
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    if isinstance(value, complex):
        return repr(value)
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.layout | torch.memory_format):
        return repr(value)
    raise ValueError(f"no code for {value!r}")
