"""What a schedule does to adapters: scales them, lets them fade, and merges them into the weights that they adapt."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxgrow.errors import FxgrowError, SpecError, did_you_mean
from fxgrow.ir import trees
from fxgrow.ir.adapters import all_adapters
from fxgrow.ir.libraries import Adapter, libraries, set_plainly
from fxgrow.ir.modules import named_tensors, tensor_of
from fxgrow.optim.rates import KEY, all_rates, write_rates
from fxgrow.optim.wrappers import unwrapped
from fxgrow.schedule import LoraDecay, LoraMerge, LoraScale
from fxgrow.scheduler.acting import Change

VOCABULARY = "vocabulary"


def matches(path: str, pattern: str) -> bool:
    """Whether one of several globs, with | between them, fits a path."""
    return any(fnmatch.fnmatchcase(path, glob.strip()) for glob in pattern.split("|"))


def selected(model: nn.Module, pattern: str) -> list[Adapter]:
    """The adapters of the modules that a pattern names.

    Raises:
        SpecError: there are none.
    """
    every = all_adapters(model)
    tables = in_vocabulary(model) if pattern == VOCABULARY else set()
    found = [a for a in every if (a.path in tables if pattern == VOCABULARY else matches(a.path, pattern))]
    if not found:
        raise SpecError(f"no adapted module matches {pattern!r}; {did_you_mean(pattern, [a.path for a in every])}")
    return found


def in_vocabulary(model: nn.Module) -> set[str]:
    """Paths of the adapted modules that look words up, or write one number for each."""
    tables = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    return {a.path for a in all_adapters(model) if a.embedding or a.widths[1] in tables}


def _say(model: nn.Module) -> None:
    """Let configs of other libraries say what has become of their adapters."""
    for library in libraries():
        library.say(model, set_plainly)


def scale(model: nn.Module, action: LoraScale) -> Change:
    """Multiply what adapters add."""
    found = selected(model, action.modules)
    before = sorted({adapter.alpha for adapter in found})
    for adapter in found:
        adapter.scale_by(action.factor)
    _say(model)
    return {"alpha": before}, {"alpha": sorted({adapter.alpha for adapter in found}), "adapters": len(found)}


def decay(model: nn.Module, action: LoraDecay, step: int) -> Change:
    """Let what adapters add fade from a step on; :func:`fade` does so."""
    found = selected(model, action.modules)
    for adapter in found:
        adapter.begin_fade(step, action.steps, action.to)
    return {}, {"adapters": len(found), "until": step + action.steps}


def fade(model: nn.Module, step: int) -> None:
    """Bring every adapter that fades to where it is at a step."""
    fading = [adapter.fade(step) for adapter in all_adapters(model)]
    if any(fading):
        _say(model)


def merge(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], action: LoraMerge) -> Change:
    """Add adapters to the weights that they adapt, and take them away.

    Raises:
        SpecError: nothing matches, a layer has no weight of its own, or a weight is another module's too, which would
            get what the adapter adds.
        FxgrowError: the module computes something else with the merged weight. Nothing is changed then.
    """
    found = selected(model, action.modules)
    inner = [unwrapped(o) for o in optimizers]
    own = [(adapter, adapter.parameters()) for adapter in found]
    gone = {id(p) for _, parameters in own for p in parameters.values()}
    places: dict[int, list[str]] = {}
    for name, tensor in named_tensors(model).items():
        places.setdefault(id(tensor), []).append(name)
    for adapter, parameters in own:
        weight = tensor_of(adapter.layer, "weight")
        if weight is None:
            raise SpecError(f"{adapter.path} has no parameter `weight` that an adapter could be added to")
        there = {f"{p}.weight" for p, m in model.named_modules(remove_duplicate=False) if m is adapter.layer}
        shared = [n for n in places[id(weight)] if n not in there]
        if shared:
            raise SpecError(
                f"{adapter.path}.weight is {shared[0]} as well, which would get what the adapter adds: untie them first"
            )
        for leaf, parameter in parameters.items():
            there = {f"{p}.{leaf}" for p, m in model.named_modules(remove_duplicate=False) if m is adapter.module}
            shared = [n for n in places[id(parameter)] if n not in there]
            if shared and not all(any(n.startswith(f"{a.path}.") for a in found) for n in shared):
                raise SpecError(f"{adapter.path}.{leaf} is {shared[0]} as well, which would lose it: merge both")
    kept: list[tuple[Tensor, Tensor]] = []
    begun: list[Adapter] = []
    try:
        for adapter in found:
            held = [t for leaf in ("weight", "bias") if (t := tensor_of(adapter.layer, leaf)) is not None]
            kept += [(t, t.detach().clone()) for t in held]
            begun.append(adapter)
            _merge(adapter)
    except BaseException:
        with torch.no_grad():
            for tensor, values in reversed(kept):
                tensor.copy_(values)
        for adapter in begun:
            adapter.unmerged()
        raise
    before = sum(p.numel() for p in model.parameters())
    for adapter in found:
        adapter.remove(model)
    for optimizer in inner:
        _forget(optimizer, gone)
    _say(model)
    return {"parameters": before}, {"parameters": sum(p.numel() for p in model.parameters()), "merged": len(found)}


@torch.no_grad()
def _merge(adapter: Adapter) -> None:
    """Add an adapter to its weight, and see that the module computes the same with it silent."""
    module, weight = adapter.module, adapter.layer.get_parameter("weight")
    name, training, entries = f"{adapter.path} ({type(module).__name__})", module.training, adapter.widths[0]
    x: Any
    if adapter.embedding:
        x = torch.arange(min(entries, 64), device=weight.device)
    else:
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(4, entries, generator=draw, dtype=torch.float64).to(weight)
    module.eval()
    try:
        before = trees.tensors_in(module(x))[0]
        adapter.merge()
        after = trees.tensors_in(module(x))[0]
    except FxgrowError:
        raise
    except Exception as error:  # the user's forward: nobody knows what it raises
        raise FxgrowError(f"{name} cannot be tried on its own, and not be merged") from error
    finally:
        module.train(training)
    limit = 1e3 * torch.finfo(before.dtype).eps * float(before.abs().max().clamp(min=1))
    if not torch.allclose(after, before, rtol=0, atol=limit):
        raise FxgrowError(f"{name} computes something else with the adapter in its weight, and cannot be merged")


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


__all__ = ["VOCABULARY", "decay", "fade", "in_vocabulary", "matches", "merge", "scale", "selected"]
