"""Run a module and leave it and its inputs as they were, but for what its forward writes itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxgrow.ir import trees


@contextlib.contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Train or eval mode for the time being; parts in eval mode of a module in train mode stay so in train mode."""
    modes = {name: m.training for name, m in module.named_modules()}
    try:
        if not (training and module.training):
            module.train(training)
        yield
    finally:
        for name, m in module.named_modules():
            m.training = modes[name]


def run_eval(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a module returns in eval mode for copies of the inputs, without gradients."""
    copies = trees.clones((tuple(args), dict(kwargs)))
    with in_mode(module, False), torch.no_grad():
        return module(*copies[0], **copies[1])
