"""Calls that would end the process in PyTorch's own code, where they should raise."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class NoCrashes(TorchFunctionMode):
    """Raises instead.

    A class that is tried with numbers of another size may come to such a call, and so may a model that is wrong.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and kwargs.get("enable_gqa"):
            keys = [kwargs[n] for n in ("key", "value") if n in kwargs]
            if any(_has_no_heads(t) for t in (*args[1:3], *keys)):
                raise RuntimeError(
                    "scaled_dot_product_attention(..., enable_gqa=True) is given keys or values of no heads, by whose "
                    "number PyTorch divides"
                )
        return func(*args, **kwargs)


def _has_no_heads(keys: Any) -> bool:
    heads = keys.shape[-3] if isinstance(keys, torch.Tensor) and keys.dim() > 2 else 1
    return isinstance(heads, int) and heads == 0


__all__ = ["NoCrashes"]
