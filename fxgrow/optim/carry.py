"""Carry an optimizer over a growth: state by provenance, per-slice learning rates.

With s the factor a weight was scaled by and g that of its gradient (every copied axis has s * g = its share a), an
optimizer that works on ``p / s`` with gradient ``grad / g`` takes exactly the steps it took on the small model. That is
how policy ``exact`` runs any optimizer that works entry by entry, weight decay and eps included, instead of rescaling
each one's hyper-parameters (for AdamW: lr*s, wd/s, eps*g, m*g, v*g^2).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from fxgrow.errors import FxgrowError
from fxgrow.ir.optimizers import forget_sizes, is_scheduled
from fxgrow.optim.beside import check_hooked, check_no_state_beside
from fxgrow.optim.carried import Carried, carried
from fxgrow.optim.loading import watch_loading
from fxgrow.optim.members import Newcomers
from fxgrow.optim.rates import KEY, STEPS, slice_rates
from fxgrow.optim.wrappers import check_nothing_else, unwrapped
from fxgrow.plan import GrowthPlan
from fxgrow.warn import warn


def carry(
    plan: GrowthPlan,
    names: Mapping[int, str],
    new: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    policy: str = "asymmetric",
    *,
    warmup: int = 250,
    peak: float = 1.3,
    ramp: int | None = None,
    newcomers: Newcomers = None,
    handed: Collection[str] = (),
) -> torch.optim.Optimizer:
    """A new optimizer of the same class over the grown parameters.

    Parameter groups keep their order and hyper-parameters; a new parameter joins the group of the one it was made of,
    and one that was made of nothing (of an inserted layer, a gate) that of its nearest siblings. Gradients that wait
    for a step, and per-slice rates that earlier growths left, come along; parameters that are not the model's stay,
    with copies of their state.

    Args:
        plan: of the growth of the model that ``optimizer`` trains.
        names: ``id`` of each of the small model's parameters to its name.
        new: the grown model's parameters by name.
        optimizer: left as it is. It may hold a part of the model's parameters, where others hold the rest.
        policy: ``exact``: the small model's trajectory goes on unchanged (refused where the growth does not map
            gradients exactly); ``asymmetric``: old entries keep their moments, new ones start with none, and their
            learning rate warms up; ``copy``: every copy inherits its unit's moments, scaled like its
            gradient; ``reset``: no state, and no rates of earlier growths.
        warmup: ``asymmetric``: steps over which the learning rate of new entries warms up, and returns.
        peak: ``asymmetric``: its highest value, as a multiple of the current learning rate.
        ramp: ``exact``: steps over which the per-slice factors go to 1; None: they stay.
        newcomers: who takes parameters that were made of nothing, where their siblings do not decide it: True or False
            for this optimizer, the number of its group, a function from a parameter's name to it (or to None), or the
            optimizer.
        handed: parameters whose waiting gradient the grown model has already.

    Raises:
        FxgrowError: see :func:`fxgrow.optim.check_optimizer`; an optimizer that holds none of the model's parameters,
            or the grown ones already; a wrapper; or, with several optimizers, a newcomer whose siblings are divided
            among them.
    """
    if unwrapped(optimizer) is not optimizer:
        raise FxgrowError(
            f"{type(optimizer).__name__} wraps a {type(unwrapped(optimizer)).__name__}: carry that one, and wrap the "
            "result; or use growth.carry_, which keeps both objects"
        )
    content = carried(
        plan,
        names,
        new,
        optimizer,
        policy,
        warmup=warmup,
        peak=peak,
        ramp=ramp,
        newcomers=newcomers,
        handed=handed,
    )
    if policy != "reset":
        check_no_state_beside(optimizer, content.replaced)
    made = _construct(optimizer, [content.params(number) for number in range(len(content.members))])
    if any(content.rates):
        check_hooked(made)
    _warn_of_what_stays(optimizer)
    for p in content.outside:
        if p in optimizer.state:
            made.state[p] = copy.deepcopy(optimizer.state[p])
    _fill(made, content)
    watch_loading(made)
    return made


def carry_(
    plan: GrowthPlan,
    names: Mapping[int, str],
    new: Mapping[str, nn.Parameter],
    optimizers: list[torch.optim.Optimizer],
    policy: str = "asymmetric",
    *,
    settled: Callable[[], None] = lambda: None,
    **options: Any,
) -> None:
    """Exchange the parameters of optimizers for the grown ones, in place.

    Groups stay the same objects, with their hyper-parameters; so do hooks, attributes, defaults, and whatever holds the
    optimizer: schedulers, scalers, trainers. Parameters that are not the model's are left alone, with their state.

    Args:
        optimizers: one, or several that train one model together; or wrappers that hand everything on to one.
        settled: called when nothing can fail any more, and before anything is changed; it may raise.

    The rest as :func:`carry` takes it.

    Raises:
        FxgrowError: as :func:`carry`; or an optimizer that keeps parameters elsewhere than in its groups. Every
            optimizer is as it was then, to the bit.
    """
    newcomers = options.pop("newcomers", None)
    if isinstance(newcomers, torch.optim.Optimizer):
        newcomers = unwrapped(newcomers)
    if len(optimizers) > 1 and newcomers is not None and not any(newcomers is unwrapped(o) for o in optimizers):
        raise FxgrowError("with several optimizers, newcomers is the one of them that takes the new parameters")
    if not optimizers:
        raise FxgrowError("there is no optimizer to carry over the growth: the list is empty")
    made: list[tuple[torch.optim.Optimizer, Carried]] = []
    for optimizer in optimizers:
        inner = unwrapped(optimizer)
        content = carried(plan, names, new, inner, policy, newcomers=newcomers, **options)
        check_nothing_else(optimizer, content.replaced)
        check_no_state_beside(inner, content.replaced)
        if any(content.rates):
            check_hooked(inner)
        content.state.update(_initial(inner, content))
        made.append((inner, content))
    settled()
    for inner, content in made:  # nothing below can fail
        for p in content.replaced:
            inner.state.pop(p, None)
        _fill(inner, content)
        forget_sizes(inner)
        watch_loading(inner)
        slice_rates(inner)  # read anew, so that nothing holds the small model's parameters until the next step


def _fill(optimizer: torch.optim.Optimizer, content: Carried) -> None:
    for number, group in enumerate(optimizer.param_groups):
        params = content.params(number)
        if isinstance(group["params"], list):
            group["params"][:] = params  # others may hold the list
        else:
            group["params"] = params
        if "param_names" in group:
            group["param_names"] = [m.label or m.name or "" for m in content.members[number]]
        group.pop(KEY, None)
        group.pop(STEPS, None)
        group.update(content.rates[number])
    optimizer.state.update(content.state)
    for p, gradient in content.gradients.items():
        p.grad = gradient


def _initial(optimizer: torch.optim.Optimizer, content: Carried) -> dict[torch.Tensor, dict[str, Any]]:
    """What a class's ``__init__`` makes as state, for parameters that were carried none: its step counts on it.

    It is given stand-ins, so that what it does to parameters (a hook, say) is done to none of the model's.
    """
    if type(optimizer).__module__.partition(".")[0] == "torch":
        return {}  # these make it at the first step
    lacking = [
        [m.parameter for m in members if m.name and m.parameter not in content.state] for members in content.members
    ]
    if not optimizer.state or not any(lacking):
        return {}
    stands = [[nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in params] for params in lacking]
    try:
        made = _construct(optimizer, stands)
    except Exception:  # somebody's own code, which this is an attempt to do without
        return {}
    return {
        p: made.state[stand]
        for params, own in zip(lacking, stands, strict=True)
        for p, stand in zip(params, own, strict=True)
        if made.state.get(stand)
    }


def _construct(optimizer: torch.optim.Optimizer, members: list[list[nn.Parameter]]) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = []
    for old, params in zip(optimizer.param_groups, members, strict=True):
        kept = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in old.items()}  # a learning rate
        groups.append({**kept, "params": params})
    cls = type(optimizer)
    accepted = inspect.signature(cls.__init__).parameters
    options: dict[str, Any] = {k: v for k, v in optimizer.defaults.items() if k in accepted and k != "params"}
    try:
        made: torch.optim.Optimizer = cls(
            [{k: v for k, v in g.items() if k != "param_names"} for g in groups], **options
        )
    except TypeError as error:
        raise FxgrowError(
            f"{cls.__name__} cannot be made anew from its groups and defaults ({error}): use growth.carry_(optimizer), "
            "which keeps the object"
        ) from error
    for name, value in vars(optimizer).items():  # settings that its own __init__ took and keeps
        if not name.startswith("_") and isinstance(value, bool | int | float | str | None):
            setattr(made, name, value)
    for target, g in zip(made.param_groups, groups, strict=True):
        target.update({k: v for k, v in g.items() if k != "params"})
    return made


def _warn_of_what_stays(optimizer: torch.optim.Optimizer) -> None:
    """What holds on to the old optimizer goes on without a word, and without effect."""
    if is_scheduled(optimizer):
        warn(
            "a learning-rate scheduler drives the optimizer that was carried over a growth, and goes on with the old "
            "one, without effect on the new: use growth.carry_(optimizer), which keeps the object, or set "
            "`scheduler.optimizer = new_optimizer`"
        )
