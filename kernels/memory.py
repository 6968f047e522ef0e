"""Whether a tensor's values can be read from memory: the one question to ask before anything reads a pointer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parameter import Parameter, is_lazy


def unreadable(tensor: Tensor) -> str | None:
    """Why a tensor has no values in memory of its own, or None if it has. A meta tensor has shapes only, and is fine.

    Strided tensors of any strides, offset, dtype or device are readable, whoever owns the memory. Subclasses that
    compute in their own way (DTensor, fake tensors, quantised weights) are not: what their memory holds is for them to
    say. Nothing is read and nothing is raised.
    """
    kind = type(tensor)
    if kind is not Tensor and kind is not Parameter:
        if is_lazy(tensor):
            return "it is not initialised yet; run the model on one batch first"
        if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            hint = _HINTS.get(kind.__name__, "a tensor subclass that computes in its own way; grow the plain model")
            return f"it is a {kind.__name__}, {hint}"
    if tensor.is_nested:
        return "it is a nested tensor"
    if tensor.layout is not torch.strided:
        return f"its layout is {tensor.layout}, not strided; use .to_dense()"
    if tensor.is_quantized:
        return f"it is quantised ({tensor.dtype}); grow the model before quantising it"
    if tensor.is_meta or not tensor.numel():
        return None
    try:
        held, address = tensor.untyped_storage().nbytes(), tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # of function transforms, and of devices that have no pointers
        return "it has no memory that can be read"
    last = tensor.storage_offset() + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (last + 1) * tensor.element_size()
    if held >= needed and address:
        return None
    if held == 0:
        return "its memory has been freed (by a growth with consume=True, or by a wrapper such as FSDP)"
    return f"its memory holds {held} bytes of the {needed} it needs" if held < needed else "it has no memory of its own"


_HINTS = {
    "DTensor": "sharded over a device mesh; grow the plain model before sharding it, or gather it first (full_tensor)",
    "FakeTensor": "which has no values; build the model on the meta device to plan with shapes alone",
}


def release(tensor: Tensor) -> None:
    """Let go of a tensor's memory, keeping its shape. Memory that other tensors live in goes with the last of them.

    The tensor that a view was made of (``_base``) counts as one of them: autograd keeps it as long as the view.
    """
    shape, stride = tensor.shape, tensor.stride()
    tensor.data = tensor.data.new_empty(0)
    bare = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device)  # pages that nothing touches
    bare.untyped_storage().resize_(0)
    tensor.data = bare


__all__ = ["release", "unreadable"]
