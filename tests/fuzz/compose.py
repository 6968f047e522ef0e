"""The bench that a model is built on: each line is run at once, in two contexts of other sizes, and kept if both agree.

What a value is (dtype, and which of its dims follow the inputs) is read off the two runs, so that nothing needs to be
told how an op maps shapes.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz.text import SIZES, Input, Member, Model, Step, names_in

Dim = int | str  # a number, a letter of SIZES, or "?" where the size is computed from several

CONTEXTS = SIZES[:2]
_LETTERS = {(CONTEXTS[0][k], CONTEXTS[1][k]): k for k in CONTEXTS[0]}
LARGEST = 20_000


@dataclass(frozen=True)
class Value:
    """A tensor of the model under construction."""

    name: str
    dims: tuple[Dim, ...]
    dtype: torch.dtype

    @property
    def real(self) -> bool:
        return self.dtype.is_floating_point

    @property
    def free(self) -> list[str]:
        return [d for d in self.dims if isinstance(d, str)]

    @property
    def known(self) -> list[int]:
        """Places of the dims whose size is a number above 1."""
        return [i for i, d in enumerate(self.dims) if isinstance(d, int) and d > 1]


class Rejected(Exception):
    """A line that does not run, or not in every context."""


class Composer:
    """Builds one model. ``pool`` are the values so far; ``used`` the names of those that something reads."""

    def __init__(self, rng: random.Random, inputs: list[Input], dtype: torch.dtype = torch.float64) -> None:
        self.rng = rng
        self.model = Model(inputs=inputs, dtype=dtype)
        self.pool: list[Value] = []
        self.used: set[str] = set()
        self.count = 0
        self._spaces: list[dict[str, Any]] = []
        self._start()
        for i in inputs:
            v = self._typed(i.name)
            if v is not None:
                self.pool.append(v)

    # running ----------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Fresh contexts, with everything that has been kept so far."""
        self._spaces = []
        for number, sizes in enumerate(CONTEXTS):
            space: dict[str, Any] = {"__name__": "fuzzed"}
            exec(self.model.prelude(), space)
            space["generator"].manual_seed(0)
            if self.model.classes:
                exec(self.model.classes, space)
            owner = nn.Module()
            owner.train(False)
            space["self"] = owner
            space |= self.model.draw(sizes, number)
            self._spaces.append(space)
        for member in self.model.members:
            self._run(member.line)
            self._settle(member.name)
        for step in self.model.steps:
            self._run(step.code)

    def _run(self, code: str) -> None:
        torch.manual_seed(0)
        for space in self._spaces:
            exec(code, space)

    def _settle(self, name: str) -> None:
        self._run(f"trained(self.{name}).eval() if isinstance(self.{name}, nn.Module) else None")

    def _typed(self, name: str) -> Value | None:
        """What a name holds; None where it is no tensor, or not of one kind in both contexts."""
        a, b = (space.get(name) for space in self._spaces)
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return None
        if a.dtype != b.dtype or a.dim() != b.dim() or max(a.numel(), b.numel()) > LARGEST:
            return None
        dims: list[Dim] = []
        for m, n in zip(a.shape, b.shape, strict=True):
            dims.append(m if m == n else _LETTERS.get((m, n), "?"))
        return Value(name, tuple(dims), a.dtype)

    def tensors(self, name: str) -> list[Tensor]:
        return [space[name] for space in self._spaces]

    def tensors_of(self, expression: str) -> Any:
        """What an expression gives in the first context, run on copies of what it names, so that it writes nowhere.

        Raises:
            Rejected: it fails.
        """
        space = dict(self._spaces[0])
        for name in names_in(expression):
            if isinstance(space.get(name), Tensor):
                space[name] = space[name].detach().clone()
        try:
            return eval(expression, space)
        except Exception as error:
            raise Rejected(f"{expression}: {type(error).__name__}: {error}") from None

    # adding -----------------------------------------------------------------------------------------------------------

    def fresh(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def member(self, line: str, kind: str = "w") -> str:
        """Add ``self.<kind><n>``; ``line`` names it as NAME, as in ``self.NAME = nn.Parameter(rnd(3))``."""
        self.count += 1
        name = f"{kind}{self.count}"
        code = line.replace("NAME", name)
        try:
            self._run(code)
            self._settle(name)
        except Exception as error:
            raise Rejected(f"{code}: {error}") from None
        self.model.members.append(Member(name, code))
        return f"self.{name}"

    def parameter(self, *shape: int, init: str = "rnd({})") -> str:
        return self.member(f"self.NAME = nn.Parameter({init.format(', '.join(map(str, shape)))})")

    def buffer(self, init: str) -> str:
        return self.member(f'self.register_buffer("NAME", {init})', "b")

    def step(self, code: str, *outs: str, keep: bool = False) -> list[Value]:
        """Run and keep a statement; ``outs`` are the names that it makes.

        Raises:
            Rejected: it fails, gives something of another kind in another context, or nothing that is a number.
        """
        try:
            self._run(code)
            values = [self._typed(o) for o in outs]
            problem = "" if all(v is not None for v in values) else "no value of one kind"
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if not problem and any(self._useless(o) for o in outs):
            problem = "not finite"
        if problem:
            for space in self._spaces:
                for o in outs:
                    space.pop(o, None)
            if keep:
                self._start()  # half of a write may have happened
            raise Rejected(f"{code}: {problem}")
        made = [v for v in values if v is not None]
        self.model.steps.append(Step(code, outs, tuple((v.dims, str(v.dtype)) for v in made), keep))
        self.used |= names_in(code) - set(outs)
        for i in self.model.inputs:
            if re.search(rf"\b{i.name}\b", code):
                self.used.add(i.name)
        self.pool += made
        return made

    def value(self, expression: str, keep: bool = False) -> Value:
        """Add ``v<n> = expression``."""
        name = self.fresh()
        return self.step(f"{name} = {expression}", name, keep=keep)[0]

    def _useless(self, name: str) -> bool:
        """More than half of it no number, or values that nothing can be compared at."""
        for t in self.tensors(name):
            if t.numel() and (t.is_floating_point() or t.is_complex()):
                good = t.isfinite()
                if good.double().mean() < 0.5:
                    return True
                if t.numel() and bool(good.any()) and float(t[good].detach().abs().max()) > 1e8:
                    return True
            if not t.numel():
                return True
        return False

    # choosing ---------------------------------------------------------------------------------------------------------

    def choose(self, values: list[Value]) -> Value:
        """One of some values, those that nothing reads yet and younger ones rather."""
        if not values:
            raise Rejected("nothing fits")
        weights = [(4 if v.name not in self.used else 1) * (1 + i) for i, v in enumerate(values)]
        return self.rng.choices(values, weights)[0]

    def reals(self) -> list[Value]:
        return [v for v in self.pool if v.real and v.dims]

    def vectors(self, minimum: int = 0) -> list[Value]:
        """Real values whose last dim is a number above 1, and that follow the inputs."""
        return [
            v
            for v in self.pool
            if v.real
            and v.dtype is self.model.dtype
            and len(v.dims) > minimum
            and v.free
            and "?" not in v.dims
            and isinstance(v.dims[-1], int)
            and 1 < v.dims[-1] <= 64
        ]

    def size(self) -> int:
        """The size of a new axis."""
        return self.rng.choice((2, 3, 4, 4, 5, 6, 6, 8))

    def letter(self, letter: str) -> str:
        """Code that reads a size off an input."""
        for i in self.model.inputs:
            if letter in i.dims and not i.optional:
                return f"{i.name}.shape[{i.dims.index(letter)}]"
        raise Rejected(f"no input has a dim {letter}")

    def shape(self, dims: tuple[Dim, ...] | list[Dim]) -> str:
        return ", ".join(str(d) if isinstance(d, int) else self.letter(d) for d in dims)

    def constant(self) -> str:
        return self.rng.choice(("0.5", "2.0", "0.1", "-1.5", "3", "2", "1e-3", "0.25"))


__all__ = ["CONTEXTS", "Composer", "Dim", "F", "Rejected", "Value", "math"]
