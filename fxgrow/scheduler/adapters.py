"""What a schedule does to adapters: scales them, lets them fade, and merges them into the weights that they adapt."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxgrow.errors import FxgrowError, SpecError, did_you_mean
from fxgrow.ir import trees
from fxgrow.ir.adapters import DOWN, UP, LowRank, adapters_of, detach, product
from fxgrow.ir.modules import named_tensors, tensor_of
from fxgrow.optim.rates import KEY, all_rates, write_rates
from fxgrow.optim.wrappers import unwrapped
from fxgrow.schedule import LoraDecay, LoraMerge, LoraScale
from fxgrow.scheduler.acting import Change

Adapted = list[tuple[str, nn.Module, LowRank]]
VOCABULARY = "vocabulary"


def matches(path: str, pattern: str) -> bool:
    """Whether one of several globs, with | between them, fits a path."""
    return any(fnmatch.fnmatchcase(path, glob.strip()) for glob in pattern.split("|"))


def selected(model: nn.Module, pattern: str) -> Adapted:
    """The adapted modules that a pattern names.

    Raises:
        SpecError: there are none.
    """
    every = list(adapters_of(model))
    tables = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}

    def fits(path: str, module: nn.Module, hook: LowRank) -> bool:
        if pattern == VOCABULARY:
            return hook.embedding or module.get_parameter(UP).shape[0] in tables
        return matches(path, pattern)

    found = [each for each in every if fits(*each)]
    if not found:
        raise SpecError(f"no adapted module matches {pattern!r}; {did_you_mean(pattern, [p for p, _, _ in every])}")
    return found


def scale(model: nn.Module, action: LoraScale) -> Change:
    """Multiply what adapters add."""
    found = selected(model, action.modules)
    before = sorted({hook.alpha for _, _, hook in found})
    for _, _, hook in found:
        hook.alpha *= action.factor
    return {"alpha": before}, {"alpha": sorted({hook.alpha for _, _, hook in found}), "adapters": len(found)}


def decay(model: nn.Module, action: LoraDecay, step: int) -> Change:
    """Let what adapters add fade from a step on; :func:`fade` does so."""
    found = selected(model, action.modules)
    for _, _, hook in found:
        hook.fade(step)
        hook.alpha, hook.factor = hook.alpha * hook.factor, 1.0
        hook.fading = (step, action.steps, action.to)
    return {}, {"adapters": len(found), "until": step + action.steps}


def fade(model: nn.Module, step: int) -> None:
    """Bring every adapter that fades to where it is at a step."""
    for _, _, hook in adapters_of(model):
        hook.fade(step)


def merge(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], action: LoraMerge) -> Change:
    """Add adapters to the weights that they adapt, and take them away.

    Raises:
        SpecError: nothing matches, a layer has no weight of its own, or a weight is another module's too, which would
            get what the adapter adds.
        FxgrowError: the module computes something else with the merged weight. Nothing is changed then.
    """
    found = selected(model, action.modules)
    inner = [unwrapped(o) for o in optimizers]
    gone = {id(m.get_parameter(name)) for _, m, _ in found for name in (DOWN, UP)}
    places: dict[int, list[str]] = {}
    for name, tensor in named_tensors(model).items():
        places.setdefault(id(tensor), []).append(name)
    for path, module, _ in found:
        weight = tensor_of(module, "weight")
        if weight is None:
            raise SpecError(f"{path} has no parameter `weight` that an adapter could be added to")
        there = {f"{p}.weight" for p, m in model.named_modules(remove_duplicate=False) if m is module}
        shared = [n for n in places[id(weight)] if n not in there]
        if shared:
            raise SpecError(
                f"{path}.weight is {shared[0]} as well, which would get what the adapter adds: untie them first"
            )
    kept: list[tuple[nn.Module, Tensor]] = []
    try:
        for path, module, hook in found:
            kept.append((module, module.get_parameter("weight").detach().clone()))
            _merged(path, module, hook)
    except BaseException:
        with torch.no_grad():
            for module, weight in kept:
                module.get_parameter("weight").copy_(weight)
        raise
    numbers = sum(m.get_parameter(name).numel() for _, m, _ in found for name in (DOWN, UP))
    for _, module, _ in found:
        detach(module)
    for optimizer in inner:
        _forget(optimizer, gone)
    return {"parameters": numbers + sum(p.numel() for p in model.parameters())}, {
        "parameters": sum(p.numel() for p in model.parameters()),
        "merged": len(found),
    }


@torch.no_grad()
def _merged(path: str, module: nn.Module, hook: LowRank) -> None:
    """Add an adapter to its weight, and see that the module computes the same without it."""
    weight, training = module.get_parameter("weight"), module.training
    entries = module.get_parameter(DOWN).shape[1]
    x: Any
    if hook.embedding:
        x = torch.arange(min(entries, 64), device=weight.device)
    else:
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(4, entries, generator=draw, dtype=torch.float64).to(weight)
    factor = hook.factor
    module.eval()
    try:
        before = trees.tensors_in(module(x))[0]
        weight.add_(product(module, hook))
        hook.factor = 0.0
        after = trees.tensors_in(module(x))[0]
    except Exception as error:  # the user's forward: nobody knows what it raises
        raise FxgrowError(f"{path} ({type(module).__name__}) cannot be tried on its own, and not be merged") from error
    finally:
        hook.factor = factor
        module.train(training)
    limit = 1e3 * torch.finfo(before.dtype).eps * float(before.abs().max().clamp(min=1))
    if not torch.allclose(after, before, rtol=0, atol=limit):
        raise FxgrowError(
            f"{path} ({type(module).__name__}) computes something else with the adapter in its weight, and cannot be "
            "merged"
        )


def _forget(optimizer: torch.optim.Optimizer, gone: set[int]) -> None:
    """Take parameters out of an optimizer, with their state and what rates a growth left them."""
    rates, names = all_rates(optimizer), dict[int, str]()
    for group in optimizer.param_groups:
        if KEY in group:
            names |= {id(p): n for p, n in zip(group["params"], group[KEY]["names"], strict=True)}
    for group in optimizer.param_groups:
        stays = [i for i, p in enumerate(group["params"]) if id(p) not in gone]
        for p in group["params"]:
            if id(p) in gone:
                optimizer.state.pop(p, None)
        if "param_names" in group:
            group["param_names"] = [group["param_names"][i] for i in stays]
        group["params"][:] = [group["params"][i] for i in stays]
    if rates:
        write_rates(optimizer, rates, {i: n for i, n in names.items() if i not in gone})


__all__ = ["VOCABULARY", "decay", "fade", "matches", "merge", "scale", "selected"]
