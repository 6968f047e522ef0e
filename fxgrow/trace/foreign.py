"""What a graph cannot hold: custom backwards, and differentiation, transforms and inference mode inside ``forward``."""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fxgrow.errors import CaptureError
from fxgrow.ir import trees
from fxgrow.ir.draws import same_draws, seed
from fxgrow.ir.ops import HigherOrderOperator, OpOverload
from fxgrow.ir.running import run_with
from fxgrow.warn import warn

# custom autograd functions -------------------------------------------------------------------------------------------

#: where the present thread writes down the functions it calls
_USED: ContextVar[set[str] | None] = ContextVar("fxgrow_custom_functions", default=None)
_LOCK = threading.Lock()
_RUNNING: list[Any] = []  # by capture that runs now, what ``apply`` was before the first of them


#: those of custom_op, which a graph keeps; and what holds a checkpoint's inputs, of which nothing is computed
_KEPT = ("torch._library", "torch.utils.checkpoint._NoopSaveInputs")


def _watched(original: Any) -> Any:
    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        used = _USED.get()
        name = f"{cls.__module__}.{cls.__qualname__}"
        if used is not None and not name.startswith(_KEPT):
            used.add(name)
        return original.__get__(None, cls)(*args, **kwargs)  # a classmethod, written in C from torch 2.14 on

    return classmethod(apply)


@contextlib.contextmanager
def custom_backwards() -> Iterator[set[str]]:
    """Names of the ``autograd.Function`` subclasses that this thread calls: export keeps their forward only.

    ``apply`` is replaced while any thread captures; other threads' calls pass through and are written down nowhere.
    """
    function: Any = torch.autograd.Function
    with _LOCK:
        before = _RUNNING[0] if _RUNNING else function.__dict__["apply"]
        if not _RUNNING:
            function.apply = _watched(before)
        _RUNNING.append(before)
    used: set[str] = set()
    token = _USED.set(used)
    try:
        yield used
    finally:
        _USED.reset(token)
        with _LOCK:
            _RUNNING.pop()
            if not _RUNNING:
                function.apply = before


#: whether parameters are memory that nobody has written
_VALUELESS: ContextVar[bool] = ContextVar("fxgrow_valueless", default=False)


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Parameters stand for shapes inside: what is read of them, in a trace that has to measure, is no evidence."""
    token = _VALUELESS.set(True)
    try:
        yield
    finally:
        _VALUELESS.reset(token)


def check_backward(
    model: nn.Module,
    exported: torch.export.ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    used: set[str],
) -> None:
    """Refuse custom backwards, unless the gradients of the graph measure the same as the model's.

    Raises:
        CaptureError: they differ, or cannot be measured (parameters without values, reentrant checkpoints).
    """
    names = ", ".join(sorted(used))
    checkpoint = any("CheckpointFunction" in n for n in used)
    valued = not (_VALUELESS.get() or any(t.is_meta for t in trees.tree_leaves([list(model.parameters()), args])))
    if not checkpoint and valued:
        worst = max(_backward_error(model, exported, (args, kwargs), scale) for scale in (1.0, 8.0))
        if worst <= 1e-4:
            warn(
                f"the model calls the custom autograd function {names}; its backward is replaced by that of its "
                f"forward, whose gradients differ by {worst:.1e} on the example inputs"
            )
            return
    hint = (
        "; use activation checkpointing with use_reentrant=False, and apply it to the grown module's blocks"
        if checkpoint
        else "; register the operation with torch.library.custom_op and register_autograd instead"
    )
    raise CaptureError(f"the model calls the custom autograd function {names}, whose backward a graph loses{hint}")


def _backward_error(model: nn.Module, exported: Any, inputs: tuple[Any, Any], scale: float) -> float:
    """Largest relative difference of gradients between model and graph, with all weights times ``scale``.

    Large weights reach the parts of a function that small ones do not, such as where it saturates.
    """
    there, here = (_output_gradients(module, inputs, scale) for module in (exported.module(), model))
    worst = 0.0 if here else float("inf")
    for name, g in here.items():
        other = there.get(name)
        if g is None or other is None:
            worst = worst if g is other else float("inf")
        elif g.numel():
            error = float((g - other).abs().max()) / max(float(g.abs().max()), 1e-12)
            worst = max(worst, error if error == error else float("inf"))
    return worst


def _output_gradients(module: nn.Module, inputs: tuple[Any, Any], scale: float) -> dict[str, torch.Tensor | None]:
    """Gradients of a fixed random combination of the outputs, with one seed for dropout; empty where there are none.

    Runs on copies of the weights and buffers; the module is left alone.
    """
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    tensors = {n: (p.detach() * scale).requires_grad_(n in trained) for n, p in module.named_parameters()}
    tensors |= {n: b.detach().clone() for n, b in module.named_buffers()}
    with same_draws(), torch.enable_grad():
        result = run_with(module, tensors, *trees.clones(inputs))
        floats = [t for t in trees.tensors_in(result) if t.requires_grad]
        if not floats:
            return {}
        seed(1)
        total = sum(((t * torch.randn(t.shape).to(t)).sum() for t in floats), start=torch.zeros(()))
        names = sorted(trained)
        found = torch.autograd.grad(total, [tensors[n] for n in names], allow_unused=True)
    return dict(zip(names, found, strict=True))


# what forward does besides computing ----------------------------------------------------------------------------------


class Watch(TorchFunctionMode):
    """Notices what a trace leaves out or cannot follow; ``reason`` says what it was, and where.

    A mode, so that it sees what the present thread does and nothing else.
    """

    def __init__(self, where: Callable[[Any], str]) -> None:
        super().__init__()
        self.where, self.reason = where, ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.reason:
            if torch.is_inference_mode_enabled():
                self._note("enters torch.inference_mode", "use torch.no_grad, which a graph can keep")
            elif func in (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward):
                self._note("differentiates", "write the derivative as a computation, or capture the part without it")
        return func(*args, **(kwargs or {}))

    def _note(self, what: str, instead: str) -> None:
        lines = [line for frame in traceback.extract_stack() if (line := self.where(frame))]
        self.reason = f"the model {what} inside forward" + (f" at {lines[-1]}" if lines else "") + f"; {instead}"


#: parts of an error of PyTorch's, and what they mean
_WORDS = (
    (
        "functorch tensor",
        "the model applies a function transform (torch.func.grad, vjp, jacrev, vmap) inside forward; write out what it "
        "computes, or capture the part without it",
    ),
    (
        "higher order operator doesn't work unless",
        "the model runs control flow on data (torch.cond, while_loop, scan, map), which is no part of a graph that can "
        "grow; write it without (torch.where of both branches, an unrolled loop), or capture the parts around it",
    ),
    (
        "FlexAttention does not support backward on CPU",
        "flex_attention cannot be traced with gradients on the CPU; use scaled_dot_product_attention",
    ),
)


def in_words(error: str) -> str:
    """What an error of ``torch.export`` means, where that is known; else empty."""
    return next((words for part, words in _WORDS if part in error), "")


def check_ops(graph: torch.fx.Graph, where: Callable[[str], str]) -> None:
    """Refuse calls that only make sense while PyTorch's function transforms run.

    Raises:
        CaptureError: the graph calls something that is neither an operator nor arithmetic of sizes.
    """
    for node in graph.nodes:
        target = node.target
        if node.op != "call_function" or isinstance(target, OpOverload | HigherOrderOperator):
            continue
        name, module = getattr(target, "__name__", str(target)), getattr(target, "__module__", "")
        if module in ("_operator", "math", "builtins") or name.startswith("sym_"):
            continue
        line = where(node.meta.get("stack_trace") or "")
        raise CaptureError(
            "the model applies a function transform (torch.vmap, torch.func.jvp) inside forward"
            + (f" at {line}" if line else "")
            + "; write the batch dim out (einsum, broadcasting), or capture the part without it"
        )
