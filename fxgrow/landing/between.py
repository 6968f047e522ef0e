"""From the sizes of a small and a large instance of a class to the operations that lead from one to the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fxgrow.algebra import Axis, Concat, Expr, Product, resolve, size_of
from fxgrow.analysis.axes import NamedAxis
from fxgrow.errors import SpecError, did_you_mean
from fxgrow.ir.stacks import stack_name, stacks_of
from fxgrow.program import Program


def spec_between(small: Program, big: Program, **how: Any) -> list[dict[str, Any]]:
    """The operations that turn the sizes of one program into those of the other.

    Args:
        how: further keys for every ``widen`` (fill, split, noise ...).

    Raises:
        SpecError: the larger model has no axis or stack of that name, or is smaller somewhere.
    """
    deepen: list[dict[str, Any]] = []
    stacks, larger = stacks_of(small), stacks_of(big)
    for stack, numbers in stacks.items():
        more = len(larger.get(stack, [])) - len(numbers)
        if more < 0:
            raise SpecError(
                f"{stack_name(stack)} has {len(numbers)} blocks, the larger model {len(larger.get(stack, []))}"
            )
        if more:
            deepen.append({"op": "deepen", "stack": stack, "by": more})
    sizes = {a.name: a.size for a in big.axes}
    shared = _shared(small, big, sizes)
    # blocks that are added are copies of grown ones
    return [*_sizes(small, big, sizes, how), *shared, *deepen]


def _shared(small: Program, big: Program, sizes: dict[str, int]) -> list[dict[str, Any]]:
    """Units that more copies than before share out the groups of; ``sizes`` gets those that come before that."""
    named = {a.axis.id: a for a in small.axes}
    pairs: dict[str, tuple[NamedAxis, NamedAxis]] = {}
    places = [(n, i, d) for n, dims in small.axes.tensor_dims().items() for i, d in enumerate(dims)]
    known: dict[str, dict[bool, set[int]]] = {}  # units of the larger model, alone or with the members of their groups
    for name, i, dim in places:
        for part, size in _parts(dim, big, name, i):
            axes = [named.get(f.id) if isinstance(f, Axis) else None for f in _factors(part)]
            units = axes[0] if axes and axes[0] is not None and axes[0].role == "kv_heads" else None
            grouped = len(axes) > 1 and axes[1] is not None and axes[1].role == "groups"
            if units is None or size is None:
                continue
            for axis in axes[2 if grouped else 1 :]:
                rest = None if axis is None else sizes.get(axis.name)
                size = size // rest if size is not None and rest and size % rest == 0 else None
            if size is not None:
                known.setdefault(units.name, {}).setdefault(grouped, set()).add(size)
                if grouped and axes[1] is not None:
                    pairs[units.name] = units, axes[1]
    out: list[dict[str, Any]] = []
    for name, (units, groups) in pairs.items():
        alone, together = (known[name].get(g, set()) for g in (False, True))
        if len(alone) != 1 or len(together) != 1:
            continue
        (new,), (members,) = alone, together
        each = members // new
        copies = next(
            (m for m in range(1, new + 1) if new % m == 0 and each * m >= groups.size and new // m >= units.size), 0
        )
        if copies > 1 and members % new == 0:
            sizes[name], sizes[groups.name] = new // copies, each * copies
            out.append({"op": "widen", "axis": name, "to": new, "groups": "share"})
    return out


def _parts(dim: Expr, big: Program, name: str, i: int) -> Iterator[tuple[Expr, int | None]]:
    """The parts of a dim, with their sizes in the larger model."""
    tensor = big.tensors.get(big.aliases.get(name, name))
    if tensor is None or i >= tensor.dim():
        return
    dim = resolve(dim)
    if not isinstance(dim, Concat):
        yield dim, int(tensor.shape[i])
        return
    there = resolve(big.axes.tensor_dims()[big.aliases.get(name, name)][i])
    same = isinstance(there, Concat) and len(there.parts) == len(dim.parts)
    sizes = [size_of(p) for p in there.parts] if same and isinstance(there, Concat) else [None] * len(dim.parts)
    yield from zip(dim.parts, (s if isinstance(s, int) else None for s in sizes), strict=True)


def _factors(dim: Expr) -> list[Expr]:
    dim = resolve(dim)
    return [resolve(f) for f in dim.factors] if isinstance(dim, Product) else [dim]


def _sizes(small: Program, big: Program, sizes: Mapping[str, int], how: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    named: set[int] = set()
    for axis in small.axes:
        named.add(axis.axis.id)
        size = sizes.get(axis.name, _size_by_shapes(small, big, axis))
        if size is None:
            raise SpecError(f"the larger model has no axis {axis.name}; {did_you_mean(axis.name, sizes)}")
        if size < axis.size:
            why = ""
            if axis.role == "groups":
                why = (
                    ": smaller groups need copies of the units that they share (widen with groups: share), and there "
                    "is no axis of these (one unit for all is none), or their numbers do not fit"
                )
            raise SpecError(f"{axis.name} has {axis.size} units, the larger model {size}{why}")
        if size == axis.size:
            continue
        # what is looked up by number, returned or counted has its entries appended; all else is shared out
        if axis.growable and any(m.tensor in small.parameters for m in axis.members):
            yield {"op": "widen", "axis": axis.name, "to": size, **how}
        else:
            yield {"op": "extend", "axis": axis.name, "to": size}
    for name, dims in small.axes.tensor_dims().items():
        if name not in small.buffers or name not in big.buffers:
            continue
        for i, (dim, new) in enumerate(zip(dims, big.buffers[name].shape, strict=False)):
            if isinstance(dim, Axis) and dim.id not in named and new > dim.size:
                named.add(dim.id)
                yield {"op": "extend", "axis": f"{name}:{i}", "to": int(new)}


def _size_by_shapes(small: Program, big: Program, axis: NamedAxis) -> int | None:
    """The size of an axis that the larger model has no name for, off a tensor that has a dim for it alone."""
    dims = small.axes.tensor_dims()
    for member in axis.members:
        tensor = big.tensors.get(big.aliases.get(member.tensor, member.tensor))
        alone = member.dim < len(dims.get(member.tensor, ())) and dims[member.tensor][member.dim] is axis.axis
        if alone and tensor is not None and member.dim < tensor.dim():
            return int(tensor.shape[member.dim])
    return None
