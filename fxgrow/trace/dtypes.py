"""What a trace knows of dtypes: casts that do nothing in the dtype of the trace, and whether code asks for dtypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

_ALIAS = torch.ops.aten.alias.default
_Tensor = torch.Tensor

#: return what they are given where it has the dtype already
_CASTS = {_Tensor.to, _Tensor.type, _Tensor.type_as, _Tensor.float, _Tensor.double, _Tensor.half, _Tensor.bfloat16}

#: what depends on a dtype and shows no trace of it in the graph
_QUESTIONS = {
    *(getattr(_Tensor, n).__get__ for n in ("dtype", "itemsize", "nbytes")),
    *(
        _Tensor.new_tensor,
        _Tensor.element_size,
        _Tensor.is_floating_point,
        torch.is_floating_point,
        torch.result_type,
        torch.can_cast,
    ),
}
_WORDS = {"dtype", "element_size", "is_floating_point", "itemsize", "nbytes", "finfo", "result_type"}


class Dtypes(TorchFunctionMode):
    """Keeps a cast that does nothing apart from what it is given, and notices questions.

    ``x.float()`` is ``x`` itself where that is float32, and a trace then takes one for the other from there on, which
    in another dtype they are not.

    Attributes:
        asked: the forward asked for a dtype, or for what follows from one: in another dtype its graph may be another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CASTS and args:
            other = func is _Tensor.to and any(isinstance(a, _Tensor) for a in (*args[1:], *kwargs.values()))
            self.asked |= other or (func is _Tensor.type and len(args) == 1 and not kwargs)
            if args[0].layout is torch.strided:
                args = (_ALIAS(args[0]), *args[1:])
        elif func in _QUESTIONS:
            self.asked = True
        elif not self.asked:
            # of a function in Python, the mode sees the whole and nothing that it asks
            code = getattr(func, "__code__", None)
            self.asked = code is not None and not _WORDS.isdisjoint(code.co_names)
        return func(*args, **kwargs)


def join_casts(graph: fx.Graph) -> None:
    """Let casts read what they were given: the inverse of what :class:`Dtypes` did to tell the two apart."""
    for node in list(graph.nodes):
        if node.target is _ALIAS:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
