"""FSDP2 as PyTorch keeps it: by which calls of ``fully_shard`` a model is sharded, to take that off and do it again.

``fully_shard`` exchanges a module's class, parameters and hooks, and keeps sizes, so that a module whose parameters
change has to be sharded anew. All of its private attributes that fxgrow reads are named here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from fxgrow.errors import CaptureError
from fxgrow.ir.modules import share_hooks

#: what ``FSDPModule.set_…`` methods set, and a new call of ``fully_shard`` would not know
_SETTINGS = (
    "reduce_grads",
    "all_reduce_grads",
    "reshard_after_backward",
    "reduce_scatter_max_input_buffers",
    "gradient_divide_factor",
    "reduce_scatter_unused_params",
    "force_sum_reduction_for_comms",
    "unshard_async_op",
    "unshard_in_backward",
    "_all_reduce_hook",
    "_all_reduce_hook_stream",
    "_all_gather_comm",
    "_reduce_scatter_comm",
)
_DEFAULT_COMMS = ("DefaultAllGather", "DefaultReduceScatter")
_PREFETCH = ("_states_to_forward_prefetch", "_states_to_backward_prefetch")


def is_fsdp(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on a module."""
    return any(
        c.__name__ == "FSDPModule" and c.__module__.startswith("torch.distributed") for c in type(module).__mro__
    )


class Managed(NamedTuple):
    """A parameter that FSDP shards: the dim, and where it was a ``DTensor`` before (tensor parallel), how it lay."""

    dim: int
    mesh: Any = None
    placements: tuple[Any, ...] = ()


@dataclass
class Wrapping:
    """One call of ``fully_shard``.

    Attributes:
        paths: of the modules it was given, in their order; several share one group.
        options: it was given.
        parameters: every name of those it shards, with where.
        settings: made since.
        prefetch: by attribute, the paths of the modules that are fetched ahead.
    """

    paths: list[str]
    options: dict[str, Any]
    parameters: dict[str, Managed] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    prefetch: dict[str, list[str]] = field(default_factory=dict)


def mesh_of_all(device: str, ranks: int) -> Any:
    """The mesh of all ranks, in one dim; a collective operation.

    Args:
        device: its type.
    """
    return importlib.import_module("torch.distributed.device_mesh").init_device_mesh(device, (ranks,))


def shard_parts(model: nn.Module, parts: Iterable[nn.Module], mesh: Any) -> None:
    """Call ``fully_shard`` for parts of a model, each a group of its own, and for what is left of it."""
    fully_shard: Any = importlib.import_module("torch.distributed.fsdp").fully_shard
    for part in (*parts, model):
        fully_shard(part, mesh=mesh)


def wrappings_of(model: nn.Module) -> list[Wrapping]:
    """The calls of ``fully_shard`` that made a model what it is, in the order in which to repeat them.

    Raises:
        CaptureError: parameters that lie on meshes of their own; a forward or backward under way.
    """
    reshard(model)
    paths = {id(m): path for path, m in model.named_modules()}
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    states: dict[int, Any] = {}
    for module in model.modules():
        if is_fsdp(module):
            state = module._get_fsdp_state()  # type: ignore[operator]
            states.setdefault(id(state), state)
    meshes = [g.mesh_info.mesh for s in states.values() for g in _groups(s)]
    out = []
    for state in reversed(states.values()):  # children before their parents
        groups = _groups(state)
        if len(groups) > 1 or any(g.mesh_info.is_spmd_mesh for g in groups if hasattr(g.mesh_info, "is_spmd_mesh")):
            raise CaptureError(
                f"{paths[id(_modules(state)[0])] or 'the model'} is sharded with meshes of its own for some parameters "
                "(ShardPlacementResult, dp_mesh_dims), which fxgrow cannot make again"
            )
        if state._training_state.name != "IDLE":
            raise CaptureError(
                "FSDP is in the middle of a forward or backward pass: grow between steps (after an exception, call "
                "model.reset_iter_state() first)"
            )
        out.append(_wrapping(state, groups[0] if groups else None, meshes, paths, names))
    return out


def reshard(model: nn.Module) -> None:
    """Give gathered parameters back: after a forward without a backward, some are left."""
    for module in model.modules():
        if is_fsdp(module):
            module.reshard()  # type: ignore[operator]


def _groups(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        group = state._fsdp_param_group
        return [] if group is None else [group]
    return list(groups)


def _modules(state: Any) -> tuple[nn.Module, ...]:
    return tuple(state._modules)


def _wrapping(
    state: Any, group: Any, meshes: list[Any], paths: Mapping[int, str], names: Mapping[int, list[str]]
) -> Wrapping:
    options = {
        "mesh": group.mesh_info.mesh if group is not None else meshes[0] if meshes else None,
        "mp_policy": state._mp_policy,
        "reshard_after_forward": _reshards(state, group),
    }
    out = Wrapping([paths[id(m)] for m in _modules(state)], options)
    for attribute in _PREFETCH:
        out.prefetch[attribute] = [paths[id(_modules(s)[0])] for s in getattr(state, attribute, ())]
    if group is None:
        return out
    options["offload_policy"] = group.offload_policy
    for p in group.fsdp_params:
        before = getattr(p, "_unsharded_dtensor_spec", None) or getattr(p, "_tp_spec", None)
        managed = Managed(p.fsdp_placement.dim, *((before.mesh, before.placements) if before is not None else ()))
        out.parameters |= dict.fromkeys(names[id(p.sharded_param)], managed)
    for name in _SETTINGS:
        value = getattr(group, name, None)
        if hasattr(group, name) and type(value).__name__ not in _DEFAULT_COMMS:
            out.settings[name] = value
    return out


def _reshards(state: Any, group: Any) -> bool | int | None:
    if getattr(state, "_auto_reshard_after_forward", False) or group is None:
        return None
    after = group.post_forward_mesh_info
    if after is None:
        return False
    return True if after is group.mesh_info or after == group.mesh_info else int(after.shard_mesh_size)


class Stripped:
    """Modules without what ``torch.distributed`` has put around them, until :meth:`undo`.

    Hooks by which inputs and parameters are sharded and gathered go, of FSDP and of tensor parallelism; classes are
    those of the user again. Parameters stay what they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._undo: list[Callable[[], None]] = []
        #: hooks of tensor parallelism, by path: what is to run them again after a growth
        self.kept: dict[str, dict[str, list[tuple[Any, bool]]]] = {}
        reshard(model)
        try:
            for path, module in model.named_modules():
                self._strip(path, module)
        except BaseException:
            self.undo()
            raise

    def _strip(self, path: str, module: nn.Module) -> None:
        kind, table = type(module), vars(module)
        for name, hooks in table.items():
            if isinstance(hooks, dict) and name.endswith("_hooks") and any(map(_of_torch, hooks.values())):
                before = dict(hooks)
                self._undo.append(lambda hooks=hooks, before=before: _refill(hooks, before))  # type: ignore[misc]
                for key, hook in before.items():
                    if _of_torch(hook):
                        del hooks[key]
                        if not _of_fsdp(hook) and name in ("_forward_hooks", "_forward_pre_hooks"):
                            kwargs = key in table.get(f"{name}_with_kwargs", ())
                            self.kept.setdefault(path, {}).setdefault(name, []).append((hook, kwargs))
        if not is_fsdp(module):
            return
        self._undo.append(lambda: setattr(module, "__class__", kind))
        object.__setattr__(module, "__class__", kind.__mro__[getattr(kind, "_orig_cls_mro_index", 2)])
        for name, entries in list(table.items()):
            if "composable_api_state_key" in name and isinstance(entries, dict):
                before = dict(entries)
                self._undo.append(lambda entries=entries, before=before: _refill(entries, before))  # type: ignore[misc]
                for key in [k for k in entries if getattr(k, "__name__", k) == "fully_shard"]:
                    del entries[key]
        states = importlib.import_module("torch.distributed._composable_state")._module_state_mapping
        held = states.pop(module, None)

        def back() -> None:
            states.pop(module, None)
            if held is not None:
                states[module] = held

        self._undo.append(back)

    def undo(self) -> None:
        """Everything as it was, whatever was put around these modules since."""
        while self._undo:
            self._undo.pop()()


def _refill(table: dict[Any, Any], entries: Mapping[Any, Any]) -> None:
    table.clear()
    table.update(entries)


def _of_torch(hook: Any) -> bool:
    function = getattr(hook, "hook", hook)  # of those that are given the module, too
    function = getattr(function, "func", function)  # a partial function
    return str(getattr(function, "__module__", "")).startswith(("torch.distributed.tensor", "torch.distributed.fsdp"))


def _of_fsdp(hook: Any) -> bool:
    function = getattr(hook, "hook", hook)
    return str(getattr(function, "__module__", "")).startswith("torch.distributed.fsdp")


def wrap(model: nn.Module, wrappings: Iterable[Wrapping]) -> None:
    """Shard a model by these calls of ``fully_shard``; those of its parameters that one shards are on meta.

    Afterwards they are ``DTensor`` on meta: :func:`fill` gives them values.
    """
    fully_shard: Any = importlib.import_module("torch.distributed.fsdp").fully_shard
    shard: Any = importlib.import_module("torch.distributed.tensor").Shard
    wrappings = list(wrappings)
    everywhere = {name for wrapping in wrappings for name in wrapping.parameters}
    done = []
    for wrapping in wrappings:
        modules = [model.get_submodule(path) for path in wrapping.paths]
        own = dict(model.named_parameters(remove_duplicate=False))
        managed = {id(own[name]): m for name, m in wrapping.parameters.items()}
        inside = {id(p) for m in modules for p in m.parameters()}
        sharded = {id(own[name]) for name in everywhere}
        ignored = {p for p in own.values() if id(p) in inside - sharded}

        def placement(p: nn.Parameter, managed: Mapping[int, Managed] = managed) -> Any:
            return shard(managed[id(p)].dim) if id(p) in managed else None

        fully_shard(
            modules[0] if len(modules) == 1 else modules,
            **wrapping.options,
            shard_placement_fn=placement,
            **({"ignored_params": ignored} if ignored else {}),
        )
        done.append((wrapping, modules[0]))
    for wrapping, module in done:
        state = module._get_fsdp_state()  # type: ignore[operator]
        for name, value in wrapping.settings.items():
            for group in _groups(state):
                setattr(group, name, value)
        for attribute, paths in wrapping.prefetch.items():
            if paths:
                setattr(state, attribute, [model.get_submodule(p)._get_fsdp_state() for p in paths])  # type: ignore[operator]


def fill(model: nn.Module, make: Callable[[str, torch.Tensor, torch.Tensor], None]) -> None:
    """Give the sharded parameters of a model their values.

    Args:
        make: given a name, a ``DTensor`` on meta and a plain tensor, which it fills with this rank's shard.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    for state in _states(model):
        for group in _groups(state):
            for held in group.fsdp_params:
                place = held.sharded_param
                local = place.to_local()  # on meta
                dim = held.fsdp_placement.dim
                where = "cpu" if held.offload_to_cpu else held.device
                padded = local.new_zeros(held.padded_sharded_param_size, device=where)  # as FSDP keeps it: all alike
                if held.pin_memory:
                    padded = padded.pin_memory()
                own = padded.narrow(dim, 0, local.shape[dim] if local.numel() else 0)
                make(names[id(place)], place, own)
                parameter = nn.Parameter(held.to_sharded_dtensor(own), requires_grad=place.requires_grad)
                share_hooks(place, parameter)
                held._sharded_param_data = padded.view(-1)
                held.sharded_param = parameter
                held._setattr_on_modules(parameter)
                held.reset_sharded_param()


def _states(model: nn.Module) -> Iterator[Any]:
    seen: set[int] = set()
    for module in model.modules():
        if is_fsdp(module):
            state = module._get_fsdp_state()  # type: ignore[operator]
            if id(state) not in seen:
                seen.add(id(state))
                yield state


__all__ = [
    *("Managed", "Stripped", "Wrapping", "fill", "is_fsdp", "mesh_of_all", "reshard", "shard_parts", "wrap"),
    "wrappings_of",
]
