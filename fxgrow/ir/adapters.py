"""What a growth adds to a module's own class by forward hooks: low-rank adapters, and gates of blocks.

An adapter (LoRA, Hu et al. 2021, section 4.1: y + (alpha / r) B A x) is a forward hook on the module that it adapts,
and two parameters of that module, ``lora_A`` (rank, in) and ``lora_B`` (out, rank), by the names of loralib. The module
stays the object and the class that it was: whoever holds it, its weight or its state dict goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxgrow.ir import trees
from fxgrow.ir.libraries import Adapter, libraries

DOWN, UP = "lora_A", "lora_B"


class LowRank:
    """The hook: adds the low-rank product to what the module computes.

    Args:
        alpha: the product is multiplied by alpha / rank, whatever the rank grows to.
        dropout: probability with which entries of the input are dropped, in train mode.
        embedding: the module looks its input up, instead of multiplying by it.
        transposed: the module's weight is (in, out).
        padding: number of the entry of an embedding that does not learn.

    Attributes:
        factor: on alpha, while it is changed from step to step.
        fading: the step at which such a change began, over how many steps, and the factor at its end.
    """

    def __init__(
        self,
        alpha: float,
        dropout: float = 0.0,
        embedding: bool = False,
        transposed: bool = False,
        padding: int | None = None,
    ) -> None:
        self.alpha, self.dropout, self.embedding, self.transposed = alpha, dropout, embedding, transposed
        self.padding = padding
        self.factor = 1.0
        self.fading: tuple[int, int, float] | None = None

    def scale(self, rank: int) -> float:
        """What the product is multiplied by."""
        return self.alpha * self.factor / rank

    def fade(self, step: int) -> None:
        """Bring the factor to where it is at a step."""
        if self.fading is None:
            return
        start, steps, end = self.fading
        done = min(1.0, (step - start) / steps)
        self.factor = 1 + (end - 1) * done
        if done == 1:
            self.alpha, self.factor, self.fading = self.alpha * end, 1.0, None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        down, up = module.get_parameter(DOWN), module.get_parameter(UP)
        # which of several it is, is proved by the graph: a layer takes one value that its weight is multiplied by
        x = next(t for t in trees.tensors_in((args, kwargs)) if t.is_floating_point() != self.embedding)
        if self.embedding:
            low = F.embedding(x, down.transpose(0, 1), self.padding)
        else:
            low = F.linear(F.dropout(x, self.dropout, module.training) if self.dropout else x, down)
        added = F.linear(low, up) * self.scale(down.shape[0])
        first = output[0] if isinstance(output, tuple) else output  # with a bias, say, that is added elsewhere
        return _with_first(output, first + added)


def _with_first(output: Any, value: Tensor) -> Any:
    """What a module hands on, with another value in the place of its own, or of the first of several."""
    if not isinstance(output, tuple):
        return value
    values = (value, *output[1:])
    return type(output)(*values) if hasattr(output, "_fields") else values


class Gate:
    """A hook that lets a block's result in by a parameter of the block: x + alpha (f(x) - x), nothing at alpha 0.

    Args:
        name: of the parameter.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        first = output[0] if isinstance(output, tuple) else output
        return _with_first(output, x + (first - x) * module.get_parameter(self.name))


def attach_gate(block: nn.Module, name: str, gate: nn.Parameter) -> None:
    """Give a block a gate."""
    block.register_parameter(name, gate)
    block.register_forward_hook(Gate(name), with_kwargs=True)
    forget_compiled()


def forget_compiled() -> None:
    """Have what is compiled compiled again: Dynamo does not see that a module's hooks are others than they were.

    (``torch._dynamo.config.skip_nnmodule_hook_guards``.) Code of before a growth would leave out what it has added.
    """
    torch.compiler.reset()


def is_own(hook: Any) -> bool:
    """Whether a hook is part of what a growth made."""
    return isinstance(hook, LowRank | Gate)


def adapter_of(module: nn.Module) -> LowRank | None:
    """A module's adapter."""
    return next((hook for hook in module._forward_hooks.values() if isinstance(hook, LowRank)), None)


def adapters_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, LowRank]]:
    """Every module that has an adapter, by path, and the adapter."""
    for path, module in model.named_modules():
        hook = adapter_of(module)
        if hook is not None:
            yield path, module, hook


class Hooked:
    """An adapter that is a hook, see :class:`~fxgrow.ir.libraries.Adapter`."""

    def __init__(self, path: str, module: nn.Module, hook: LowRank) -> None:
        self.path, self.module, self.layer, self.hook = path, module, module, hook
        self.embedding = hook.embedding

    @property
    def alpha(self) -> float:
        """Without what fades."""
        return self.hook.alpha

    @property
    def widths(self) -> tuple[int, int]:
        """Entries or a width, and the width that it writes."""
        return self.module.get_parameter(DOWN).shape[1], self.module.get_parameter(UP).shape[0]

    def parameters(self) -> dict[str, nn.Parameter]:
        """The two."""
        return {name: self.module.get_parameter(name) for name in (DOWN, UP)}

    def scale_by(self, factor: float) -> None:
        """Multiply alpha."""
        self.hook.alpha *= factor

    def begin_fade(self, step: int, steps: int, to: float) -> None:
        """From where it is."""
        hook = self.hook
        hook.fade(step)
        hook.alpha, hook.factor = hook.alpha * hook.factor, 1.0
        hook.fading = (step, steps, to)

    def fade(self, step: int) -> bool:
        """Bring the factor to where it is at a step."""
        fades = self.hook.fading is not None
        self.hook.fade(step)
        return fades

    @torch.no_grad()
    def merge(self) -> None:
        """Add the product to the weight."""
        self.module.get_parameter("weight").add_(product(self.module, self.hook))
        self._silent, self.hook.factor = self.hook.factor, 0.0

    def unmerged(self) -> None:
        """Let the factor be what it was."""
        self.hook.factor = self.__dict__.pop("_silent", self.hook.factor)

    def remove(self, model: nn.Module) -> None:
        """Take hook and parameters away."""
        detach(self.module)


def all_adapters(model: nn.Module) -> list[Adapter]:
    """Every adapter in a model, those of other libraries' classes as well."""
    own: list[Adapter] = [Hooked(*each) for each in adapters_of(model)]
    return own + [adapter for library in libraries() for adapter in library.adapters(model)]


def attach(module: nn.Module, hook: LowRank, down: nn.Parameter, up: nn.Parameter) -> None:
    """Give a module an adapter."""
    module.register_parameter(DOWN, down)
    module.register_parameter(UP, up)
    module.register_forward_hook(hook, with_kwargs=True)
    forget_compiled()


def detach(module: nn.Module) -> None:
    """Take a module's adapter away."""
    for number, hook in list(module._forward_hooks.items()):
        if isinstance(hook, LowRank):
            del module._forward_hooks[number]
            module._forward_hooks_with_kwargs.pop(number, None)
    del module._parameters[DOWN], module._parameters[UP]
    forget_compiled()


@torch.no_grad()
def product(module: nn.Module, hook: LowRank) -> Tensor:
    """What an adapter adds to its module's weight, in the weight's shape."""
    down, up = module.get_parameter(DOWN), module.get_parameter(UP)
    added = up @ down * hook.scale(down.shape[0])
    return added.t() if hook.embedding or hook.transposed else added


__all__ = [
    *("DOWN", "UP", "Gate", "Hooked", "LowRank", "adapter_of", "adapters_of", "all_adapters", "attach", "attach_gate"),
    *("detach", "is_own", "product"),
]
