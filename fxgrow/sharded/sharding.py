"""How a model is sharded: what is asked before a growth, and what is known of it beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fxgrow.errors import CaptureError, GrowthRefused
from fxgrow.ir.dtensors import Layout, is_sharded, whole_of
from fxgrow.ir.fsdp import Managed, Wrapping, wrappings_of
from fxgrow.ir.plain import is_distributed
from fxgrow.ir.replicas import group_of
from fxgrow.ir.traced import Traced
from fxgrow.plan import GrowthPlan
from fxgrow.ranks import Group, size
from fxgrow.weights.exchange import Traffic
from fxgrow.weights.shards import check_layout, count_traffic


@dataclass
class Sharding:
    """How a living model is sharded.

    Attributes:
        wrappings: the calls of ``fully_shard``, in the order in which to repeat them.
        layouts: of parameters that are shards, by each of their names.
    """

    wrappings: list[Wrapping]
    layouts: dict[str, Layout]

    @classmethod
    def of(cls, model: nn.Module) -> Sharding:
        """A model's.

        Raises:
            CaptureError: it is sharded in a way that cannot be made again.
        """
        wrappings = wrappings_of(model)  # gathered parameters are given back by it
        named = model.named_parameters(remove_duplicate=False)
        return cls(wrappings, {n: Layout.of(p) for n, p in named if is_sharded(p)})

    @property
    def managed(self) -> dict[str, Managed]:
        """What FSDP shards, by name."""
        return {name: m for w in self.wrappings for name, m in w.parameters.items()}

    def check(self, plan: GrowthPlan, program: Traced) -> None:
        """Whether a plan's tensors can be made shard by shard.

        Raises:
            GrowthRefused: with the tensor and the reason.
        """
        for name, tensor in plan.tensors.items():
            if tensor.source in self.layouts:
                check_layout(tensor.source, self.layouts[tensor.source], program.tensor(tensor.source).dtype)
                self._check_columns(name, tensor.shape, tensor.source)
            elif tensor.source is None and not tensor.shape and self.wrappings and name in self._parameters(plan):
                raise GrowthRefused(
                    f"the growth adds {name}, a single number (a gate), and FSDP cannot shard what has no dims: "
                    "deepen with init: zero"
                )

    def _check_columns(self, name: str, shape: list[int], source: str) -> None:
        managed = self.managed.get(source)
        if managed is None or not managed.dim:
            return
        sizes = self.layouts[source].mesh.mesh.shape[-1]
        if shape[managed.dim] % sizes:
            raise GrowthRefused(
                f"{name} is sharded along dim {managed.dim} by FSDP, which wants even shards there, and {sizes} ranks "
                f"do not divide {shape[managed.dim]}: choose another size, or shard along dim 0"
            )

    def _parameters(self, plan: GrowthPlan) -> set[str]:
        return {n for n, t in plan.tensors.items() if t.requires_grad}

    def traffic(self, plan: GrowthPlan, program: Traced) -> Traffic:
        """The bytes that a growth of the parameters will send between ranks."""
        out = Traffic()
        for tensor in plan.tensors.values():
            if tensor.source in self.layouts:
                old = program.tensor(tensor.source)
                count_traffic(tensor, old.shape, self.layouts[tensor.source], old.element_size(), out)
        return out


def ranks_of(model: nn.Module) -> Group:
    """The ranks that hold a sharded model together.

    Raises:
        CaptureError: they are a part of all, in several dims.
    """
    layouts = [Layout.of(t) for t in (*model.parameters(), *model.buffers()) if is_sharded(t)]
    if not layouts:
        return None
    largest = max(layouts, key=lambda layout: len(layout.ranks))
    if len(largest.ranks) == size():
        return None
    if largest.mesh.ndim > 1:
        raise CaptureError(
            f"the model is sharded over {len(largest.ranks)} of {size()} ranks, in a mesh of {largest.mesh.ndim} dims: "
            "fxgrow grows over all ranks, or over a mesh of one dim"
        )
    return largest.mesh.get_group()


def group_around(model: object, replicas: Iterable[DistributedDataParallel]) -> Group:
    """The ranks that change a model together: those that hold its shards, or copies of it.

    Args:
        replicas: what holds the copies.

    Raises:
        FxgrowError: as :func:`ranks_of`, :func:`fxgrow.ir.replicas.group_of`.
    """
    return ranks_of(model) if isinstance(model, nn.Module) and is_distributed(model) else group_of(replicas)


class Gathered(Mapping[str, torch.Tensor]):
    """A model's parameters by name, each gathered when it is asked for: a collective operation."""

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self._parameters = parameters
        self._last: tuple[str, torch.Tensor] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        if self._last is None or self._last[0] != name:
            self._last = name, whole_of(self._parameters[name]).cpu()
        return self._last[1]

    def __contains__(self, name: object) -> bool:
        return name in self._parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


__all__ = ["Gathered", "Sharding", "group_around", "ranks_of"]
