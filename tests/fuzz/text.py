"""A model as text: members, steps and inputs. What is run is what is printed, and what shrinking takes lines from."""

from __future__ import annotations

import itertools
import linecache
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

#: sizes of dims that may differ from call to call: those of the example first, then others
SIZES: tuple[dict[str, int], ...] = (
    {"B": 3, "T": 5, "U": 4},
    {"B": 4, "T": 9, "U": 6},
    {"B": 2, "T": 3, "U": 5},
    {"B": 7, "T": 12, "U": 8},
)

_VALUES = re.compile(r"\bv\d+\b")
_MEMBERS = re.compile(r"\bself\.([A-Za-z]\w*)")


@dataclass(frozen=True)
class Member:
    """A line of ``__init__`` that makes ``self.<name>``; it may name members before it."""

    name: str
    line: str

    @property
    def needs(self) -> set[str]:
        return set(_MEMBERS.findall(self.line)) - {self.name, "register_buffer"}


@dataclass(frozen=True)
class Step:
    """A statement of ``forward``, perhaps of several lines, and the values that it makes.

    ``types`` are what each value is (dtype and sizes in each context), so that shrinking finds one to stand in for it.
    ``keep``: it writes to something, so that it is needed even where nothing that it makes is used.
    """

    code: str
    outs: tuple[str, ...] = ()
    types: tuple[Any, ...] = ()
    keep: bool = False

    @property
    def uses(self) -> set[str]:
        return set(_VALUES.findall(self.code)) - set(self.outs)


@dataclass(frozen=True)
class Input:
    """An argument of ``forward``; a dim is a number, or a letter of :data:`SIZES`. ``high``: integers below it."""

    name: str
    dims: tuple[int | str, ...]
    high: int = 0
    optional: bool = False

    def shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        return tuple(sizes[d] if isinstance(d, str) else d for d in self.dims)

    def draw(self, sizes: dict[str, int], generator: torch.Generator, dtype: torch.dtype, scale: float) -> Tensor:
        if self.high:
            return torch.randint(0, self.high, self.shape(sizes), generator=generator)
        return (torch.randn(self.shape(sizes), generator=generator, dtype=torch.float64) * scale).to(dtype)

    def code(self, sizes: dict[str, int], dtype: torch.dtype) -> str:
        shape = ", ".join(map(str, self.shape(sizes)))
        if self.high:
            return f"torch.randint(0, {self.high}, ({shape},))"
        return f"torch.randn({shape}, dtype=torch.float64).to({dtype})"


PRELUDE = '''\
import math

import torch
import torch.nn.functional as F
from torch import nn

generator = torch.Generator().manual_seed(0)
dtype = torch.float64


def rnd(*shape):
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.6).to(dtype)


def ints(high, *shape):
    return torch.randint(0, high, shape, generator=generator)


def trained(model):
    """Weights off their initial values, and statistics that are none."""
    with torch.no_grad():
        for m in [m for m in model.modules() if type(m).__module__.startswith("torch.nn.modules")]:
            m.to(dtype)
            for n, p in [*m.named_parameters(recurse=False), *m.named_buffers(recurse=False)]:
                if p.is_floating_point():
                    p.copy_(rnd(*p.shape).abs() + 0.5 if "var" in n else rnd(*p.shape))
    return model
'''

_numbers = itertools.count()


@dataclass
class Model:
    """A model as text. ``classes`` are further class definitions; ``calls`` the inputs that each further call takes."""

    inputs: list[Input]
    members: list[Member] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    classes: str = ""
    dtype: torch.dtype = torch.float64
    calls: dict[str, list[str]] = field(default_factory=dict)
    dynamic: str = "all"  # how it is captured

    def copy(self, **changes: Any) -> Model:
        own = {
            "inputs": list(self.inputs),
            "members": list(self.members),
            "steps": list(self.steps),
            "outputs": list(self.outputs),
            "classes": self.classes,
            "dtype": self.dtype,
            "calls": dict(self.calls),
            "dynamic": self.dynamic,
        }
        return Model(**{**own, **changes})

    def pruned(self) -> Model:
        """Without steps and members that no output needs."""
        needed = {v for o in self.outputs for v in _VALUES.findall(o)}
        steps: list[Step] = []
        for step in reversed(self.steps):
            if step.keep or needed & set(step.outs):
                needed |= step.uses
                steps.append(step)
        steps.reverse()
        text = "\n".join([*(s.code for s in steps), *self.outputs])
        names = set(_MEMBERS.findall(text))
        members: list[Member] = []
        for member in reversed(self.members):
            if member.name in names:
                names |= member.needs
                members.append(member)
        members.reverse()
        inputs = [i for i in self.inputs if re.search(rf"\b{i.name}\b", text)] or self.inputs[:1]
        calls = {n: names for n, names in self.calls.items() if set(names) <= {i.name for i in inputs}}
        classes = self.classes if any("Block" in m.line for m in members) else ""
        return self.copy(steps=steps, members=members, inputs=inputs, calls=calls, classes=classes)

    def prelude(self) -> str:
        return PRELUDE.replace("torch.float64\n\n", f"{self.dtype}\n\n", 1)

    def definition(self) -> str:
        """The class, and ``make()``."""
        lines = [self.classes] if self.classes else []
        lines += ["class M(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for m in self.members for line in m.line.split("\n")]
        given = ", ".join(f"{i.name}=None" if i.optional else i.name for i in self.inputs)
        lines += ["", f"    def forward(self, {given}):"]
        lines += [f"        {line}" for s in self.steps for line in s.code.split("\n")]
        result = self.outputs[0] if len(self.outputs) == 1 else f"({', '.join(self.outputs)})"
        lines += [f"        return {result}"]
        return "\n".join(lines)

    def build(self, seed: int = 0) -> nn.Module:
        """The model itself with the weights of a seed, in eval mode.

        Raises:
            Exception: whatever the text raises.
        """
        source = f"{self.prelude()}\n\n{self.definition()}\n"
        name = f"<fuzz {next(_numbers)}>"
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        while len(linecache.cache) > 400:
            linecache.cache.pop(next(iter(linecache.cache)))
        space: dict[str, Any] = {"__name__": "fuzzed"}
        exec(compile(source, name, "exec"), space)
        space["generator"].manual_seed(seed)
        torch.manual_seed(seed)
        model: nn.Module = space["trained"](space["M"]()).eval()
        return model

    def draw(self, sizes: dict[str, int], seed: int, scale: float = 1.0) -> dict[str, Tensor]:
        """Values of all inputs."""
        generator = torch.Generator().manual_seed(seed)
        return {i.name: i.draw(sizes, generator, self.dtype, scale) for i in self.inputs}

    def ways(self) -> dict[str, list[str]]:
        """The inputs of each call, by the call's name."""
        return {"forward": [i.name for i in self.inputs], **self.calls}


def names_in(code: str) -> set[str]:
    return set(_VALUES.findall(code))


def replace_value(code: str, old: str, new: str) -> str:
    return re.sub(rf"\b{old}\b", new, code)


def members_in(texts: Iterable[str]) -> set[str]:
    return {n for t in texts for n in _MEMBERS.findall(t)}
