"""Models of which ``DistributedDataParallel`` holds a copy on every rank: what is inside, and how it goes on.

DDP averages the gradients of the parameters that it was made with. Others in their place train on every rank by
themselves, without a word. So its reducer is built anew in the object that the loop holds, as DDP itself builds it when
it is unpickled, with its options, communication hooks and modes.
"""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fxgrow.errors import FxgrowError
from fxgrow.ir.modules import OWN_ATTRIBUTES, named_tensors, set_children, uncompiled
from fxgrow.ranks import ALONE, Group, size

#: of a DDP, what goes with its reducer
_REDUCER = (
    *("reducer", "logger", "_module_parameters", "modules_buffers", "named_module_buffers", "parameters_to_ignore"),
    *("_has_rebuilt_buckets", "_lazy_init_ran", "_static_graph_delay_allreduce_enqueued"),
)
_BUILTIN = "BuiltinCommHookType."


def innermost(model: nn.Module) -> nn.Module:
    """The module inside what ``torch.compile`` and ``DistributedDataParallel`` put around it, in any order."""
    while True:
        inner = uncompiled(model)
        inner = inner.module if isinstance(inner, DistributedDataParallel) else inner
        if inner is model:
            return model
        model = inner


def within(model: nn.Module) -> list[DistributedDataParallel]:
    """The DDPs that a model is, or has inside."""
    return [m for m in model.modules() if isinstance(m, DistributedDataParallel)]


def around(model: nn.Module) -> list[DistributedDataParallel]:
    """The living DDPs that a model is, or has inside, or that have its parameters, whoever holds them."""
    return list({id(o): o for o in (*within(model), *holding(model.parameters()))}.values())


def holding(parameters: Iterable[torch.Tensor]) -> list[DistributedDataParallel]:
    """The living DDPs that reduce gradients of some of these parameters.

    A trainer passes on the model inside and keeps the DDP to itself, and neither knows what holds it: all objects are
    looked at, where ranks work together.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return []
    wanted = set(map(id, parameters))
    every = [o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel)]
    made = [o for o in every if "module" in vars(o).get("_modules", ())]  # not one that is being unpickled
    return [o for o in made if any(id(p) in wanted for p in o.parameters())]


def group_of(replicas: Iterable[DistributedDataParallel]) -> Group:
    """The ranks that hold copies of a model; :data:`~fxgrow.ranks.ALONE` where none is held.

    Raises:
        FxgrowError: they work in several groups, or inside a ``Join``, whose ranks end at different steps.
    """
    groups: list[Any] = []
    for ddp in replicas:
        if ddp._join_config.enable:
            raise FxgrowError(
                "the model cannot grow inside of torch.distributed.algorithms.Join: a rank whose data has ended takes "
                "no part. Give all ranks as many batches, or end the `with` block before"
            )
        if not any(ddp.process_group is g for g in groups):
            groups.append(ddp.process_group)
    if len(groups) > 1:
        raise FxgrowError("parts of the model are in DistributedDataParallel over different groups of ranks")
    return groups[0] if groups else ALONE


@contextmanager
def plainly(model: Any) -> Iterator[None]:
    """Let parts of a module compute what they do on one rank: for a trace, in which no rank waits for another.

    A DDP inside calls its module, and a SyncBatchNorm takes the statistics of its own batch.
    """
    changed: list[nn.Module] = []
    try:
        for part in model.modules() if isinstance(model, nn.Module) else ():
            if "forward" in vars(part):
                continue
            if isinstance(part, DistributedDataParallel):
                vars(part)["forward"] = functools.partial(_call_inside, part)
            elif isinstance(part, nn.SyncBatchNorm):
                vars(part)["forward"] = functools.partial(nn.BatchNorm2d.forward, part)
            else:
                continue
            changed.append(part)
        yield
    finally:
        for part in changed:
            vars(part).pop("forward", None)


def _call_inside(ddp: DistributedDataParallel, *args: Any, **kwargs: Any) -> Any:
    return ddp.module(*args, **kwargs)


def check_replicas(replicas: Iterable[DistributedDataParallel]) -> None:
    """Refuse what could not go on with other parameters, before anything is changed.

    Raises:
        FxgrowError: with the option, and what to do.
    """
    for ddp in replicas:
        parameters = list(ddp.module.parameters())
        reason = ""
        if ddp.mixed_precision is not None:
            reason = "mixed_precision keeps copies of its parameters; use torch.autocast"
        elif ddp._delay_all_reduce_params:
            reason = "delay_all_reduce_named_params names parameters that it reduces by itself; leave it out"
        elif ddp._use_python_reducer:
            reason = 'torch._dynamo.config.optimize_ddp = "python_reducer" hooks every parameter; use "ddp_optimizer"'
        elif any(hasattr(p, "_in_backward_optimizers") for p in parameters):
            reason = "its parameters have optimizers that step in backward; step after it"
        else:
            for hook, state in ddp._comm_hooks:
                held = _holds(hook, state)
                if held:
                    name = getattr(hook, "__qualname__", type(hook).__name__)
                    reason = f"its communication hook {name} keeps {held} for its parameters; grow before it begins to"
        if reason:
            raise FxgrowError(f"DistributedDataParallel cannot go on with a grown model: {reason}")


def _holds(*values: Any) -> str:
    """What a communication hook and its state keep that belongs to the parameters, in words; "" for nothing."""
    todo, seen = list(values), set[int]()
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, nn.Module | dist.ProcessGroup | type):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor) and value.numel() > 1:
            return f"a tensor of shape {list(value.shape)}"
        if isinstance(value, Optimizer) or hasattr(value, "functional_optimizer"):
            return "an optimizer"
        if isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            todo += value
        elif isinstance(value, functools.partial):
            todo += [value.func, value.args, value.keywords]
        todo += [cell.cell_contents for cell in getattr(value, "__closure__", None) or () if _filled(cell)]
        slots = [n for kind in type(value).__mro__ for n in _names(vars(kind).get("__slots__", ()))]
        todo += [getattr(value, n, None) for n in ("__self__", *slots)]
        todo += getattr(value, "__dict__", {}).values()
    return ""


def _names(slots: Any) -> list[str]:
    return [slots] if isinstance(slots, str) else list(slots)


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def ignored_by(replicas: Iterable[DistributedDataParallel]) -> set[int]:
    """``id`` of the parameters and buffers that DDPs leave to each rank, as they were told by name."""
    return {id(t) for ddp in replicas for n, t in named_tensors(ddp.module).items() if n in ddp.parameters_to_ignore}


def follow(ddp: DistributedDataParallel, ignored: Collection[int] | None = None) -> Callable[[], None]:
    """Let a DDP reduce the gradients of the parameters that its module holds now; no rank waits for another.

    Args:
        ddp: which :func:`check_replicas` lets through.
        ignored: ``id`` of the tensors that it leaves to each rank; None: those of the names that it has for them.

    Returns:
        What puts the former reducer back, for when the former parameters are.
    """
    table, module = vars(ddp), ddp.module
    kept = {name: table[name] for name in _REDUCER if name in table}
    listed, builtin = vars(module).get(_IGNORED), _builtin_hook(ddp)

    def back() -> None:
        for name in _REDUCER:
            table.pop(name, None)
        table.update(kept)
        if listed is not None:
            vars(module)[_IGNORED] = listed

    if ignored is not None and ddp.parameters_to_ignore:
        ddp.parameters_to_ignore = {n for n, t in named_tensors(module).items() if id(t) in ignored}
        if listed is not None:
            vars(module)[_IGNORED] = sorted(ddp.parameters_to_ignore)
    try:
        _build(ddp, builtin)
    except BaseException:
        back()
        raise
    return back


_IGNORED = "_ddp_params_and_buffers_to_ignore"


def _build(ddp: DistributedDataParallel, builtin: Any) -> None:
    """What ``DistributedDataParallel.__setstate__`` does after it has been unpickled, and its hooks."""
    ddp._module_parameters = [p for n, p in ddp.module.named_parameters() if n not in ddp.parameters_to_ignore]
    parameters, sparse = ddp._build_params_for_reducer()
    ddp._ddp_init_helper(parameters, sparse, ddp._build_debug_param_to_name_mapping(parameters), ddp.static_graph)
    ddp._has_rebuilt_buckets = ddp._lazy_init_ran = False
    assert ddp.logger is not None
    for hook, state in ddp._comm_hooks:
        ddp.logger._set_comm_hook_name(hook.__qualname__)
        dist._register_comm_hook(ddp.reducer, state, hook)
    if builtin is not None:
        ddp._register_builtin_comm_hook(builtin)
    if ddp.static_graph:
        ddp._static_graph_delay_allreduce_enqueued = False
        ddp.reducer._set_static_graph()
        ddp.logger._set_static_graph()


def _builtin_hook(ddp: DistributedDataParallel) -> Any:
    """The communication hook of PyTorch's own that a DDP's reducer has; nothing but its log knows of it."""
    name = str(ddp._get_ddp_logging_data().get("comm_hook", ""))
    return getattr(dist.BuiltinCommHookType, name.removeprefix(_BUILTIN)) if name.startswith(_BUILTIN) else None


@contextmanager
def following(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let the DDPs of some parameters follow what a block changes of which of them there are, and learn.

    Gradients of those that begin to learn would not be reduced, and those that cease to would be waited for.

    Raises:
        FxgrowError: see :func:`check_replicas`; the block does not run then.
    """
    replicas = holding(parameters)
    before = [_learning(ddp) for ddp in replicas]
    if replicas:
        check_replicas(replicas)
    yield
    for ddp, learned in zip(replicas, before, strict=True):
        now = _learning(ddp)
        if now and list(map(id, now)) != list(map(id, learned)):  # a reducer has something to reduce
            follow(ddp)


def _learning(ddp: DistributedDataParallel) -> list[nn.Parameter]:
    return [p for p in ddp.module.parameters() if p.requires_grad]


def rewrapped(model: nn.Module, module: nn.Module) -> nn.Module:
    """Another module in DDPs like those around a model; what ``torch.compile`` put there is left out.

    Raises:
        FxgrowError: the model has parts that work over ranks by themselves, which the module has not.
    """
    inner = innermost(model)
    apart = next((type(m).__name__ for m in inner.modules() if isinstance(m, _OVER_RANKS)), "")
    if apart and size() > 1:
        raise FxgrowError(
            f"{type(inner).__name__} has a {apart} inside, which the code of a traced module has not: grow the model "
            "in place"
        )
    if model is inner:
        return module
    around_it = uncompiled(model)
    if not isinstance(around_it, DistributedDataParallel):
        return rewrapped(around_it, module)
    made = object.__new__(type(around_it))
    vars(made).update({k: copy.copy(v) if k in OWN_ATTRIBUTES else v for k, v in vars(around_it).items()})
    set_children(made, {"module": rewrapped(around_it.module, module)})
    made._comm_hooks = list(around_it._comm_hooks)
    follow(made)
    return made


_OVER_RANKS = (DistributedDataParallel, nn.SyncBatchNorm)

__all__ = [
    *("around", "check_replicas", "follow", "following", "group_of", "holding", "ignored_by", "innermost", "plainly"),
    *("rewrapped", "within"),
]
