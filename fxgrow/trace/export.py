"""Tracing proper: ``torch.export``, once for every call, and once more where eval mode runs other ops."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from fxgrow.errors import CaptureError
from fxgrow.ir import trees
from fxgrow.ir.guards import Guard, find_guards, has_mixed_sizes, settle_sizes, weigh
from fxgrow.ir.quiet import quiet
from fxgrow.ir.replay import BothModes
from fxgrow.ir.running import attributes_free, attributes_kept, autocast_kept, in_mode, plain_tensors_kept
from fxgrow.ir.symbolic import ON_DATA, oblivious_sizes
from fxgrow.ir.traced import Call
from fxgrow.ir.trail import Replica
from fxgrow.trace.crashes import NoCrashes
from fxgrow.trace.dtypes import Dtypes
from fxgrow.trace.foreign import Watch, check_backward, check_ops, custom_backwards, in_words
from fxgrow.trace.lines import place_of, source_line, user_line
from fxgrow.trace.modes import Flags, align
from fxgrow.warn import warn


def export_less(
    model: nn.Module, calls: list[Call], dynamic: str, error: CaptureError
) -> tuple[list[list[Exported]], str]:
    """What can be traced of a model that cannot be traced whole, and how that was done.

    Raises:
        CaptureError: nothing; the one that was raised first.
    """
    with contextlib.suppress(CaptureError):
        if dynamic != "batch" and not isinstance(error.__cause__, ON_DATA):
            return export_calls(model, calls, "batch"), "captured with every input dim but the first as it is"
    with contextlib.suppress(CaptureError):
        return export_calls(
            model, calls, dynamic, (False,)
        ), "captured in eval mode only: call the grown module in eval mode"
    raise error


@dataclass(frozen=True)
class Exported:
    """One graph of a call.

    Attributes:
        program: as ``torch.export`` returned it.
        guards: for which sizes it is the model.
        training: the mode it serves, None for both.
        flags: of a graph for both, by node the (path, eval literal) pairs where eval mode differs.
        reason: why it serves one mode only.
        asks_dtype: the forward asks for the dtypes of tensors, so that in another one its graph may be another.
    """

    program: torch.export.ExportedProgram
    guards: list[Guard]
    training: bool | None = None
    flags: Flags = field(default_factory=dict)
    reason: str = ""
    asks_dtype: bool = False


def export_calls(
    model: nn.Module, calls: list[Call], dynamic: str, modes: tuple[bool, ...] = (True, False)
) -> list[list[Exported]]:
    """Every call in the given modes: one graph where it can serve both. The modules' own modes are put back."""
    with attributes_kept(model):
        return [_export_call(model, call, dynamic, modes) for call in calls]


def _export_call(model: nn.Module, call: Call, dynamic: str, modes: tuple[bool, ...]) -> list[Exported]:
    found = []
    for mode in modes:
        with in_mode(model, mode), custom_backwards() as used:
            program, flags, asks = _export(model, call.args, call.kwargs, dynamic, both=mode and False in modes)
        with in_mode(model, mode):
            check_ops(program.graph, source_line)
            if used:
                check_backward(model, program, call.args, call.kwargs, used)
        guards = find_guards(program, user_line)
        replicas = [Replica(model, program, call.args, call.kwargs, mode)]
        if flags is not None and not used:
            replicas.append(replicas[0].in_eval(flags))
            return [Exported(program, weigh(guards, replicas), None, flags, asks_dtype=asks)]
        found.append(Exported(program, weigh(guards, replicas), mode, asks_dtype=asks))
    if len(found) == 1:
        return found
    train, evaluation = found
    same, reason, flags = align(train.program, evaluation.program)
    if not same:
        return [replace(one, reason=reason) for one in found]
    guards = list(dict.fromkeys([*train.guards, *evaluation.guards]))
    return [replace(train, guards=guards, training=None, flags=flags)]


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: str, both: bool = False
) -> tuple[torch.export.ExportedProgram, Flags | None, bool]:
    """A graph of the model in the mode it is in.

    Args:
        both: find out on the way whether eval mode runs the same ops.

    Returns:
        The graph; where eval mode differs, None where that is not known; and whether the forward asks for dtypes.
    """

    def one(x: Any) -> dict[int, Any] | None:
        if not isinstance(x, torch.Tensor):
            return None
        wanted = x.shape if dynamic == "all" else x.shape[:1]
        return {i: None if size == 1 else Dim.AUTO for i, size in enumerate(wanted)}

    def dims(value: Any) -> Any:
        return trees.tree_map(one, value)

    def export(oblivious: bool, replay: BothModes | None = None) -> torch.export.ExportedProgram:
        with (
            warnings.catch_warnings(),
            quiet(),
            plain_tensors_kept(model),
            attributes_kept(model),
            attributes_free(),
            autocast_kept(),
            _traceable_forward(model, kwargs, left_out, dtypes, replay),
            oblivious_sizes(oblivious),
            watch,
        ):
            warnings.simplefilter("ignore")
            bound = inspect.signature(model.forward).bind(*args, **kwargs)
            shapes = {name: dims(value) for name, value in bound.arguments.items()}
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes or None, strict=False)
            settle_sizes(exported)
            return exported

    def twice(oblivious: bool) -> tuple[torch.export.ExportedProgram, Flags | None]:
        """Once where the second run of the forward leaves the trace as it is, else once more without it."""
        if both and _REPLAY:
            replay = BothModes(model, watch)
            with contextlib.suppress(Exception):
                traced = export(oblivious, replay)
                if not replay.spoilt:
                    return traced, replay.flags_in(traced)
            left_out.clear()
            watch.reason = ""
        return export(oblivious), None

    watch, dtypes = Watch(user_line), Dtypes()
    left_out: set[str] = set()
    try:
        exported, flags = twice(True)
        if has_mixed_sizes(exported):  # the plain trace may pin them
            with contextlib.suppress(Exception):
                plain, pinned = twice(False)
                exported, flags = (exported, flags) if has_mixed_sizes(plain) else (plain, pinned)
    except Exception as error:
        try:
            if watch.reason or isinstance(error, ON_DATA):
                raise error
            exported, flags = twice(False)
        except Exception:
            raise CaptureError(watch.reason or _capture_message(model, error)) from error
    if watch.reason:
        raise CaptureError(watch.reason)
    if left_out:
        returned = exported.graph_signature.user_outputs
        if not any(isinstance(name, str) for name in returned):
            raise CaptureError(
                f"{type(model).__name__} returns a {left_out.pop()}, which PyTorch cannot take apart into tensors; "
                "return a tuple, list or dict of them, or register the class (torch.export.register_dataclass)"
            )
        warn(
            f"{type(model).__name__} returns a {', a '.join(sorted(left_out))}, which PyTorch cannot take apart: the "
            "grown module returns None in its place. Register the class with pytree to keep it"
        )
    return exported, flags, dtypes.asked


#: whether to learn of eval mode from the trace in train mode; else each mode is traced
_REPLAY = True

#: what a graph can return
_LEAVES = (torch.Tensor, bool, int, float, complex, str, torch.SymInt, torch.SymFloat, torch.SymBool)


@contextlib.contextmanager
def _traceable_forward(
    model: nn.Module,
    kwargs: Mapping[str, Any],
    left_out: set[str],
    dtypes: Dtypes,
    replay: BothModes | None = None,
) -> Iterator[None]:
    """Give ``forward`` a form that ``torch.export`` takes, on this instance and while it is traced.

    ``forward(x, **kwargs)`` gets a signature that names the keywords, which dims are looked up by. Objects among the
    results that pytree cannot take apart, such as a cache of keys and values, become None; ``left_out`` gets their
    types. With ``replay`` it runs in eval mode as well.
    """
    forward, own = model.forward, model.__dict__.get("forward")
    signature = inspect.signature(forward)
    parameters = list(signature.parameters.values())
    extra = [k for k in kwargs if k not in signature.parameters]
    if extra and any(p.kind is p.VAR_KEYWORD for p in parameters):
        plain = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
        named = [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY) for k in extra]
        signature = signature.replace(parameters=[*plain, *named])

    def known(leaf: Any) -> Any:
        if leaf is None or isinstance(leaf, _LEAVES):
            return leaf
        left_out.add(type(leaf).__name__)
        return None

    def known_results(*args: Any, **keywords: Any) -> Any:
        with dtypes, NoCrashes():
            results = forward(*args, **keywords)
        return trees.tree_map(known, results)

    @functools.wraps(forward)
    def traceable(*args: Any, **keywords: Any) -> Any:
        if replay is not None:
            return replay.run(known_results, args, keywords)
        return known_results(*args, **keywords)

    traceable.__signature__ = signature  # type: ignore[attr-defined]
    model.__dict__["forward"] = traceable
    try:
        yield
    finally:
        del model.__dict__["forward"]
        if own is not None:
            model.__dict__["forward"] = own


def _capture_message(model: nn.Module, error: Exception) -> str:
    text = str(error).strip()
    reason = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    location = place_of(error, text)
    if in_words(text):
        return f"cannot capture {type(model).__name__}: {in_words(text)}{location}"
    return (
        f"torch.export cannot trace {type(model).__name__}: {type(error).__name__}: {reason}{location}\n"
        "  The graph must not depend on tensor values; see https://pytorch.org/docs/stable/export.html"
    )
