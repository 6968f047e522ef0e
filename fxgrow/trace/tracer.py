"""From an ``nn.Module`` and example inputs to a :class:`~fxgrow.ir.traced.Traced`: one clean ATen graph with names.

Capture goes through ``torch.export`` (non-strict, every input dim ``Dim.AUTO``) in train mode, on whose trace the
forward is replayed in eval mode (:mod:`fxgrow.ir.replay`). Where the two differ only in literals, the literal is
rewired to the module's own ``training`` flag, so that one graph serves both modes. Where they may differ in more, eval
mode is traced as well; where the ops differ (stochastic depth), the graphs stand side by side, like those of several
named calls, and constrain one set of axes. Parameters are ``get_attr`` nodes under their own names; ties are
kept.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx, nn

from fxgrow.errors import CaptureError
from fxgrow.ir.provenance import edited, provenance_of
from fxgrow.ir.traced import Call, Traced, matching_calls, program_of
from fxgrow.rules.base import implied_arguments
from fxgrow.trace.examples import as_calls, check_example, check_plain, check_signature, strange_dtypes
from fxgrow.trace.export import export_calls, export_less
from fxgrow.trace.graph import Trace, traced_from
from fxgrow.warn import warn
from fxgrow.weights.materialise import check_readable


def trace(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    calls: Mapping[str, Any] | None = None,
    dynamic: Literal["all", "batch"] = "all",
) -> Traced:
    """Trace a model as it is called; see :func:`fxgrow.capture`.

    Raises:
        CaptureError: the model cannot be exported; the message carries PyTorch's reason and the source line.
    """
    start = time.perf_counter()
    if isinstance(args, torch.Tensor):
        raise CaptureError("args must be a tuple of inputs, got a tensor: write (x,)")
    wanted = as_calls(args, kwargs, calls)
    check_plain(model)
    check_readable({**dict(model.named_parameters()), **dict(model.named_buffers())}, CaptureError)
    known = _remembered(model, wanted)
    if known is not None:
        known.seconds = time.perf_counter() - start
        return known
    was_training = model.training
    for call in wanted:
        check_signature(model, call)
        if strange_dtypes(model, call):
            check_example(model, call)
    refused = ""
    try:
        exported = export_calls(model, wanted, dynamic)
    except CaptureError as error:
        refused = str(error)
        for call in wanted:
            check_example(model, call)
        exported, how = export_less(model, wanted, dynamic, error)
        warn(f"{str(error).partition(chr(10))[0]}; {how}")
    traces: list[Trace] = []
    served: list[Call] = []
    reasons: list[str] = []
    for call, graphs in zip(wanted, exported, strict=True):
        for one in graphs:
            own = replace(call, training=one.training, inputs=[], constants={}, sizes={}, guards=one.guards)
            traces.append((one.program, one.flags))
            served.append(own)
        reasons += [r for r in (graphs[0].reason,) if r]
        if len(graphs) == 1 and graphs[0].training is False:
            reasons.append(f"train mode cannot be traced ({refused.partition(chr(10))[0]})")
            was_training = False
    program = traced_from(model, traces, served)
    asked = any(one.asks_dtype for graphs in exported for one in graphs)
    # an op may take a number from its operand's dtype, where it is given none
    program.asks_dtype = asked or any(implied_arguments(n) for n in program.graph.nodes if n.op == "call_function")
    program.training, program.mode_reason = was_training, next(iter(reasons), "")
    program.seconds = time.perf_counter() - start
    return program


def _remembered(model: nn.Module, calls: list[Call]) -> Traced | None:
    """The program a regenerated module was made from, with the module's present tensors.

    It keeps what a new trace of generated code would lose: module paths inside blocks, and the user's source lines.
    """
    found = provenance_of(model)
    if found is None or not isinstance(model, fx.GraphModule):
        return None
    before = found.program
    if edited(model):
        return None  # somebody changed it: trace what is there now
    examples: dict[int, Call] = {}
    for call in calls:
        fitting = matching_calls(before, call.args, call.kwargs)
        if not fitting:
            return None
        examples |= dict.fromkeys(fitting, call)
    if any(k not in examples and c.args == () and c.kwargs == {} for k, c in enumerate(before.calls)):
        return None  # one of its calls has no example left to verify it with
    return replace(
        program_of(model, before),
        calls=[
            replace(c, args=examples[k].args, kwargs=examples[k].kwargs) if k in examples else c
            for k, c in enumerate(before.calls)
        ],
        args=calls[0].args,
        kwargs=calls[0].kwargs,
    )
