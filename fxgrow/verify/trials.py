"""Inputs to compare two models on: the example, and others that the trace of the model allows.

Other values (drawn anew, permuted, a hundred times larger and smaller, indices over all rows of the tables they look
up) and other sizes of every dim that is dynamic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from fxgrow.ir import trees
from fxgrow.ir.dtypes import same_kind
from fxgrow.ir.sizes import shape_of
from fxgrow.rules.base import moves
from fxgrow.verify.execute import op_of

#: factors of the examples in a mixed trial, by turns
FACTORS = (1.0, 100.0, -100.0, 0.01)


@dataclass
class Trial:
    """Arguments of one call.

    Attributes:
        args, kwargs: as the model takes them.
        words: what they are, for people.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    words: str

    @property
    def leaves(self) -> list[Any]:
        """In the order of the graph's inputs."""
        return list(trees.tree_leaves((self.args, self.kwargs)))

    def copy(self, dtype: torch.dtype | None = None) -> Trial:
        """Tensors of its own, which a forward may write into; in another dtype where they are floats."""

        def own(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            return x.detach().to(x.dtype if dtype is None else same_kind(x.dtype, dtype), copy=True)

        args, kwargs = trees.tree_map(own, (self.args, self.kwargs))
        return Trial(args, kwargs, self.words)


#: one trial for each call that takes part, by the call's number
Round = dict[int, Trial]


def bound(trial: Trial, inputs: Sequence[fx.Node]) -> list[Any]:
    """A trial's values for the inputs of a graph.

    Raises:
        ValueError: the graph takes another number of inputs.
    """
    leaves = trial.leaves
    if len(leaves) != len(inputs):
        raise ValueError(f"{len(leaves)} values for the {len(inputs)} inputs of the graph")
    return leaves


class Trials:
    """Trials of one call.

    Args:
        example: what the call was captured with.
        inputs: placeholders of its graph.
        seed: of the random values.
    """

    def __init__(self, example: Trial, inputs: Sequence[fx.Node], seed: int = 0) -> None:
        self.example, self.inputs, self._seed = example, list(inputs), seed
        leaves = example.leaves
        self._shapes: list[list[Any] | None] = [None] * len(leaves)
        if len(leaves) == len(self.inputs):
            for i, (node, leaf) in enumerate(zip(self.inputs, leaves, strict=True)):
                value = node.meta.get("val")
                if isinstance(leaf, torch.Tensor) and isinstance(value, torch.Tensor) and value.dim() == leaf.dim():
                    self._shapes[i] = shape_of(value)
        self._rows = [_rows_of(n) for n in self.inputs] if len(leaves) == len(self.inputs) else [None] * len(leaves)
        self.symbols: dict[sympy.Symbol, int] = {}
        for shape, leaf in zip(self._shapes, leaves, strict=True):
            for expr, size in zip(shape or (), leaf.shape if shape else (), strict=True):
                if isinstance(expr, sympy.Symbol):
                    self.symbols.setdefault(expr, int(size))
        first = next((s for s in self._shapes if s), None)
        self._batch = first[0] if first and isinstance(first[0], sympy.Symbol) else None

    def mixed(self) -> Iterator[Trial]:
        """Small sizes, every example of the batch with another factor; tamer ones follow, in case it is not taken."""
        small = {s: _smaller(n, s == self._batch) for s, n in self.symbols.items()}
        batch = {s: v for s, v in small.items() if s == self._batch}
        for sizes in _distinct([small, batch, {}]):
            yield self._make(sizes, factors=FACTORS, fresh=True)
        for sizes in _distinct([small, batch, {}]):
            yield self._make(sizes, factors=(1.0,), fresh=False)

    def longer(self) -> Iterator[Trial]:
        """Sizes above the example's, in a small batch; indices over the whole of their tables."""
        few = {s: min(n, 2) for s, n in self.symbols.items() if s == self._batch}
        others = {s: n for s, n in self.symbols.items() if s != self._batch}
        if others:
            for step in (lambda n: 2 * n + 1 if n <= 8 else n + n // 4, lambda n: n + 1, lambda n: max(n - 1, 2)):
                yield self._make({**few, **{s: step(n) for s, n in others.items()}}, factors=(1.0,), fresh=False)
        elif few:
            yield self._make({s: 2 * n + 3 for s, n in self.symbols.items()}, factors=(1.0, -1.0), fresh=False)

    def _make(self, sizes: dict[sympy.Symbol, int], factors: Sequence[float], fresh: bool) -> Trial:
        generator = torch.Generator().manual_seed(self._seed + len(sizes) + 17 * fresh)
        every = {**self.symbols, **sizes}
        out, shapes = [], []
        for leaf, shape, rows in zip(self.example.leaves, self._shapes, self._rows, strict=True):
            if not isinstance(leaf, torch.Tensor) or shape is None:
                out.append(leaf)
                continue
            wanted = [e if isinstance(e, int) else every[e] if e in every else int(e.subs(every)) for e in shape]
            scaled = factors if self._batch is not None and shape and shape[0] == self._batch else factors[:1]
            out.append(_other(leaf, wanted, scaled, rows, fresh, generator))
            shapes.append("×".join(map(str, wanted)) or "scalar")
        args, kwargs = trees.tree_unflatten(out, trees.tree_structure((self.example.args, self.example.kwargs)))
        kind = "drawn anew" if fresh else "permuted"
        if len(factors) > 1:
            kind += f", times {', '.join(f'{f:g}' for f in factors)} by turns"
        return Trial(args, kwargs, f"{'; '.join(dict.fromkeys(shapes)) or 'no tensors'}, {kind}")


def _smaller(size: int, batch: bool) -> int:
    if batch:  # one example of every factor
        return len(FACTORS) + (size == len(FACTORS))
    return size + 2 if size <= 3 else max(3, size // 2 + 1)


def _distinct(values: list[dict[Any, int]]) -> list[dict[Any, int]]:
    return [v for i, v in enumerate(values) if v not in values[:i]]


def _other(
    leaf: torch.Tensor,
    shape: Sequence[int],
    factors: Sequence[float],
    rows: int | None,
    fresh: bool,
    generator: torch.Generator,
) -> torch.Tensor:
    """Values like those of ``leaf`` in another shape."""
    t = leaf.detach().cpu()
    for dim, size in enumerate(shape):
        old = t.shape[dim]
        if old == 0:
            return torch.zeros(list(shape), dtype=leaf.dtype, device=leaf.device)
        # where nothing but the size of a dim changes, its order stays: positions, times
        order = torch.arange(size) % old if dim else torch.randperm(max(size, old), generator=generator)[:size] % old
        t = t.index_select(dim, order)
    if t.is_floating_point():
        if fresh and t.numel() and bool(t.isfinite().all()) and bool((t < 0).any()):
            spread = float(t.double().std()) if t.numel() > 1 else 1.0
            noise = torch.randn(t.shape, generator=generator, dtype=torch.float64)
            t = (noise * spread + float(t.double().mean())).to(leaf.dtype)
        elif fresh:  # of one sign: probabilities, masks, times
            t = t * (0.5 + 0.5 * torch.rand(t.shape, generator=generator, dtype=torch.float64)).to(leaf.dtype)
        if len(factors) > 1 and t.dim():
            turn = torch.tensor([factors[i % len(factors)] for i in range(t.shape[0])], dtype=torch.float64)
            t = (t.double() * turn.reshape(-1, *[1] * (t.dim() - 1))).to(leaf.dtype)
    elif rows is not None and t.numel():
        drawn = torch.randint(rows, t.shape, generator=generator).to(leaf.dtype)
        drawn.view(-1)[-1] = rows - 1
        t = torch.where(t >= 0, drawn, t)  # negative ones are marks
    elif fresh and t.numel() and t.dim() and bool(((t == 0) | (t == 1)).all()):
        drawn = torch.randint(2, t.shape, generator=generator).to(leaf.dtype)
        drawn[..., 0] = t[..., 0]  # a mask keeps something
        t = drawn
    return t.contiguous().to(leaf.device)


def _rows_of(node: fx.Node) -> int | None:
    """The rows of the smallest table that an input is an index of; None where it looks up none."""
    found: list[int] = []
    todo, seen = [node], {node}
    while todo:
        here = todo.pop()
        for user in here.users:
            name = op_of(user)
            table = user.args[0] if user.args else None
            if name == "embedding" and user.args[1] is here and isinstance(table, fx.Node):
                value = table.meta.get("val")
                if isinstance(value, torch.Tensor):
                    found.append(int(value.shape[0]))
            elif name in ("cross_entropy_loss", "nll_loss", "nll_loss_nd") and user.args[1] is here:
                value = user.args[0].meta.get("val") if isinstance(user.args[0], fx.Node) else None
                if isinstance(value, torch.Tensor) and value.dim() > 1 and isinstance(value.shape[1], int):
                    found.append(int(value.shape[1]))
            elif moves(user) and user.args and user.args[0] is here and user not in seen:
                seen.add(user)
                todo.append(user)
    return min(found, default=None)
