"""A sharded model, grown in place: its class as any other's, then sharded as it was, each rank filling its shards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fxgrow.ir.dtensors import Layout, Rectangle, local_of, sharded_as
from fxgrow.ir.fsdp import Managed, Wrapping, fill, wrap
from fxgrow.ir.modules import set_tensor, share_hooks
from fxgrow.ir.plain import Plain
from fxgrow.ir.traced import Traced
from fxgrow.landing.apply import apply
from fxgrow.landing.living import Living
from fxgrow.plan import GrowthPlan
from fxgrow.sharded.sharding import Sharding
from fxgrow.trace.foreign import without_values
from fxgrow.weights.exchange import Traffic
from fxgrow.weights.materialise import materialise_tensor
from fxgrow.weights.shards import materialise_shard


class Applied:
    """A sharded model that was grown in place, until it is taken back."""

    def __init__(self, plain: Plain, living: Living) -> None:
        self._plain, self._living = plain, living

    def undo(self) -> None:
        """The model as it was, with its old shards."""
        self._living.undo()
        self._plain.undo()


def apply_shards(
    model: nn.Module,
    plan: GrowthPlan,
    before: Traced,
    grown: Traced,
    held: Mapping[str, tuple[str, str]],
    sharding: Sharding,
    traffic: Traffic,
    settled: Callable[[Callable[[], Living]], Living],
) -> Applied:
    """Grow a sharded model in place; a collective operation.

    Args:
        before, grown: its programs before and after, with shapes for parameters.
        held: places of constants, see :func:`fxgrow.landing.apply.constants_held`.
        traffic: counts what is sent.
        settled: runs what can fail on one rank alone, before anything is sent: it raises on all of them, or on none.

    Raises:
        GrowthRefused: the class cannot compute the grown function; the model is as it was.
    """
    plain = Plain(model)
    try:
        with without_values():
            living = settled(lambda: apply(model, plan, before, grown, _tensors(plan, before, grown, plain), held))
    except BaseException:
        plain.undo()
        raise
    try:
        _shard_again(model, plan, grown, plain, living, sharding, traffic)
    except BaseException:
        living.undo()
        plain.undo()
        raise
    return Applied(plain, living)


def _tensors(plan: GrowthPlan, before: Traced, grown: Traced, plain: Plain) -> dict[str, torch.Tensor]:
    """What the class is grown with: shapes for what is sharded, and values for the rest."""
    out: dict[str, torch.Tensor] = {}
    for name, shape in grown.tensors.items():
        tensor = plan.tensors[name]
        if name in grown.parameters:
            own = None if tensor.source is None else plain.parameters.get(tensor.source)
            value = torch.empty(shape.shape, dtype=shape.dtype)  # never written
            if own is not None and type(own) is nn.Parameter:
                value = materialise_tensor(tensor, own)
            out[name] = nn.Parameter(value, requires_grad=tensor.requires_grad)
        else:
            source = None if tensor.source is None else before.tensor(tensor.source)
            out[name] = materialise_tensor(tensor, source)
    return out


def _shard_again(
    model: nn.Module,
    plan: GrowthPlan,
    grown: Traced,
    plain: Plain,
    living: Living,
    sharding: Sharding,
    traffic: Traffic,
) -> None:
    old: dict[str, Any] = plain.parameters
    canonical = {n: grown.aliases.get(n, n) for n, _ in model.named_parameters(remove_duplicate=False)}
    sources = {n: plan.tensors[c].source for n, c in canonical.items()}
    wrappings = _moved(model, sharding, living.origins, sources)
    managed = {n: m for w in wrappings for n, m in w.parameters.items()}
    places: dict[str, nn.Parameter] = {}
    for name, p in list(model.named_parameters(remove_duplicate=False)):
        own = old.get(sources[name] or "")
        if canonical[name] not in places:
            tensor = plan.tensors[canonical[name]]
            if name in managed:
                places[canonical[name]] = _on_meta(p, managed[name], own)
            elif own is not None and sources[name] in sharding.layouts:
                shard = sharded_as(own, materialise_shard(tensor, own, own, traffic=traffic), tensor.shape)
                places[canonical[name]] = nn.Parameter(shard, requires_grad=p.requires_grad)
            elif own is None:  # made of nothing, and nobody shards it
                beside = next((local_of(t).device for t in old.values()), torch.device("cpu"))
                made = materialise_tensor(tensor, None, dtype=p.dtype).to(beside)
                places[canonical[name]] = nn.Parameter(made, requires_grad=p.requires_grad)
            else:
                continue
        _put(model, name, places[canonical[name]])
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        own_buffer = plain.buffers.get(plan.tensors[grown.aliases.get(name, name)].source or "")
        if own_buffer is not None and type(own_buffer) is not torch.Tensor:
            mine = Layout.of(own_buffer).own(buffer.shape)
            part = buffer[mine.within(Rectangle.whole(buffer.shape))]
            _put(model, name, sharded_as(own_buffer, part.contiguous(), buffer.shape))
    _hook_again(model, plain, living.origins)
    wrap(model, wrappings)

    def make(name: str, place: torch.Tensor, out: torch.Tensor) -> None:
        tensor = plan.tensors[canonical[name]]
        source = None if tensor.source is None else old[tensor.source]
        materialise_shard(tensor, source, place, dtype=place.dtype, out=out, traffic=traffic)

    fill(model, make)


def _moved(
    model: nn.Module, sharding: Sharding, origins: Mapping[str, str], sources: Mapping[str, str | None]
) -> list[Wrapping]:
    """The calls of ``fully_shard`` for the grown model: copies of blocks are sharded as what they are copies of."""
    where: dict[str, list[str]] = {}
    for path, _ in model.named_modules():
        where.setdefault(origins.get(path, path), []).append(path)
    out = []
    for wrapping in sharding.wrappings:
        prefetch = {k: [where[p][0] for p in v if p in where] for k, v in wrapping.prefetch.items()}
        for paths in zip(*(where.get(p, []) for p in wrapping.paths), strict=False):
            out.append(dataclasses.replace(wrapping, paths=list(paths), parameters={}, prefetch=prefetch))
    owner = {path: w for w in out for path in w.paths}
    managed = sharding.managed
    for name, source in sources.items():
        within = name.rpartition(".")[0]
        while within and within not in owner:
            within = within.rpartition(".")[0]
        if within not in owner:
            continue
        if source is None or source in managed:  # what is made of nothing is sharded as what is around it
            owner[within].parameters[name] = managed[source] if source is not None else Managed(0)
    # a tied parameter is in the group of the one that has it under its first name
    seen: set[int] = set()
    named = dict(model.named_parameters(remove_duplicate=False))
    for wrapping in out:
        for name in list(wrapping.parameters):
            if id(named[name]) in seen:
                del wrapping.parameters[name]
            seen.add(id(named[name]))
    return out


def _on_meta(p: nn.Parameter, managed: Managed, own: torch.Tensor | None) -> nn.Parameter:
    """What ``fully_shard`` is given: a shape; where it was given a shard before, one that lies so."""
    place = torch.empty(p.shape, dtype=p.dtype, device="meta")
    if managed.mesh is not None:
        layout = Layout(managed.mesh, tuple(managed.placements))
        local = torch.empty(layout.own(p.shape).shape, dtype=p.dtype, device="meta")
        place = sharded_as(own, local, p.shape, layout)
    out = nn.Parameter(place, requires_grad=p.requires_grad)
    share_hooks(p, out)
    return out


def _put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    set_tensor(model.get_submodule(path), leaf, tensor)


def _hook_again(model: nn.Module, plain: Plain, origins: Mapping[str, str]) -> None:
    """Let what shards and gathers inputs of layers run again, in copies of blocks, too."""
    for path, module in model.named_modules():
        for kind, hooks in plain.stripped.kept.get(origins.get(path, path), {}).items():
            for hook, kwargs in hooks:
                if kind == "_forward_pre_hooks":
                    module.register_forward_pre_hook(hook, with_kwargs=kwargs)
                else:
                    module.register_forward_hook(hook, with_kwargs=kwargs)


__all__ = ["Applied", "apply_shards"]
