"""From the sizes of a small and a large instance of a class to the operations that lead from one to the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fxgrow.algebra import Axis
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
    # blocks that are added are copies of grown ones
    return [*_sizes(small, big, how), *deepen]


def _sizes(small: Program, big: Program, how: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    sizes = {a.name: a.size for a in big.axes}
    named: set[int] = set()
    for axis in small.axes:
        named.add(axis.axis.id)
        size = sizes.get(axis.name, _size_by_shapes(small, big, axis))
        if size is None:
            raise SpecError(f"the larger model has no axis {axis.name}; {did_you_mean(axis.name, sizes)}")
        if size < axis.size:
            raise SpecError(f"{axis.name} has {axis.size} units, the larger model {size}")
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
