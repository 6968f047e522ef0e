"""What actions do to a model and its optimizers: each looks first, and changes then, so that nothing is half done."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxgrow.errors import SpecError, did_you_mean
from fxgrow.landing.living import attributes_of, configs_of
from fxgrow.optim.newborn import Frozen, Part
from fxgrow.schedule import Dropout, WeightDecay

_LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

Change = tuple[dict[str, Any], dict[str, Any]]  # what was, and what is now


def set_weight_decay(optimizers: Sequence[torch.optim.Optimizer], action: WeightDecay) -> Change:
    """Set or multiply the weight decay of groups that have any.

    Raises:
        SpecError: there is no such group.
    """
    groups = [g for o in optimizers for g in o.param_groups if g.get("weight_decay")]
    if not groups:
        raise SpecError("no group of the optimizer has a weight decay that could be changed")
    before = [float(g["weight_decay"]) for g in groups]
    for group in groups:
        old = group["weight_decay"]
        group["weight_decay"] = action.set if action.set is not None else old * (action.scale or 0.0)
    return {"weight_decay": before}, {"weight_decay": [float(g["weight_decay"]) for g in groups]}


def set_dropout(model: nn.Module, action: Dropout) -> Change:
    """Set the probability of dropout layers, and of what modules and configs hold under such a name.

    Raises:
        SpecError: nothing of the kind is there, or it stands in the code of a traced module.
    """
    if any(isinstance(m, fx.GraphModule) for m in model.modules()):
        raise SpecError(
            "the probabilities of dropout stand in the code of a traced module; grow the model in place "
            "(GrowthScheduler(in_place=True)), and set it there"
        )
    matched = {n: m for n, m in model.named_modules() if fnmatch.fnmatchcase(n, action.modules)}
    found = list({(id(h), name): (h, name) for m in matched.values() for h, name in _probabilities(m)}.values())
    if not found:
        near = did_you_mean(action.modules, [n for n, m in model.named_modules() if any(_probabilities(m))])
        raise SpecError(f"no dropout in the modules that match {action.modules!r}; {near}")
    before = sorted({float(attributes_of(h)[name]) for h, name in found})
    for holder, name in found:
        attributes_of(holder)[name] = action.p
    return {"dropout": before}, {"dropout": [action.p], "places": len(found)}


def _probabilities(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Where a module and its configs hold probabilities of dropout."""
    if isinstance(module, _LAYERS):
        yield module, "p"
    for holder in (module, *configs_of(module)):
        for name, value in attributes_of(holder).items():
            named = isinstance(name, str) and ("dropout" in name or name.endswith("pdrop"))
            if named and isinstance(value, float) and 0 <= value < 1:
                yield holder, name


#: what a `freeze` names beside globs: parameters and entries, by whether the last growth made them
PARTS: dict[str, Part] = {"old": "old", "new": "new"}


def check_part(what: str, freezing: bool, grown: bool, held: str) -> None:
    """Whether what is old or new can be frozen, or let go.

    Args:
        grown: whether anything has grown.
        held: what such a freeze holds; "" for nothing.

    Raises:
        SpecError: it can not.
    """
    if freezing and not grown:
        raise SpecError(f"freeze: {what}: nothing has grown yet, so that nothing is {what}")
    if freezing and held:
        raise SpecError(f"freeze: {what}: {held} parameters stand still already: unfreeze them first")
    if not freezing and held != what:
        raise SpecError(f"unfreeze: {what}: no `freeze: {what}` of this schedule holds anything")


def matching_parameters(
    model: nn.Module, pattern: str, frozen: bool, also: Frozen | None = None
) -> dict[str, nn.Parameter]:
    """The parameters of a model that match a glob, and stand still or learn; those too that hold still in part.

    Raises:
        SpecError: there are none.
    """
    named = dict(model.named_parameters())
    fits = {n: p for n, p in named.items() if fnmatch.fnmatchcase(n, pattern)}
    found = {n: p for n, p in fits.items() if p.requires_grad is not frozen or (also is not None and also.holds(p))}
    if not found:
        state = "frozen" if frozen else "learning"
        raise SpecError(f"no {state} parameter matches {pattern!r}; {did_you_mean(pattern, named)}")
    return found


def freeze(parameters: dict[str, nn.Parameter]) -> Change:
    """Let parameters stand still; gradients that wait in them are dropped."""
    for p in parameters.values():
        p.requires_grad_(False)
        p.grad = None
    return {}, {"frozen": len(parameters), "numbers": sum(p.numel() for p in parameters.values())}


def unfreeze(parameters: dict[str, nn.Parameter]) -> Change:
    """Let parameters learn again."""
    for p in parameters.values():
        p.requires_grad_(True)
    return {}, {"unfrozen": len(parameters), "numbers": sum(p.numel() for p in parameters.values())}


__all__ = [
    "PARTS",
    "Change",
    "check_part",
    "freeze",
    "matching_parameters",
    "set_dropout",
    "set_weight_decay",
    "unfreeze",
]
