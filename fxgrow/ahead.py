"""A growth that is to come, compiled in a background process while the model is trained."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn

from fxgrow.compile import blocks_of, compile_regions, numbers_of
from fxgrow.growth import grow
from fxgrow.ir import trees
from fxgrow.ir.compiled import as_written, structures
from fxgrow.ir.rehearsal import blocks_called, real, settings, stand_in, take, without_weights
from fxgrow.ir.replicas import innermost


class Ahead:
    """A background process that compiles; it ends with this one.

    Attributes:
        compiled: how many blocks it has compiled; None while it works.
        error: why it could not, "" where nothing failed. The growth is compiled when it is needed, then.
    """

    def __init__(self, payload: bytes) -> None:
        self.compiled: int | None = None
        self.error = ""
        context = multiprocessing.get_context("spawn")
        self._answer, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(theirs, payload), daemon=True)
        self._process.start()
        theirs.close()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is done.

        Args:
            timeout: in seconds.

        Returns:
            Whether it is.
        """
        if self.compiled is None and self._answer.poll(timeout):
            try:
                self.compiled, self.error = self._answer.recv()
            except EOFError:
                self.compiled, self.error = 0, f"the process ended with exit code {self._process.exitcode}"
            self._process.join()
        return self.compiled is not None

    def stop(self) -> None:
        """End the process, whatever it has done."""
        self._process.terminate()
        self._process.join()


def compile_ahead(
    model: nn.Module,
    spec: Any,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    calls: Mapping[str, Any] | None = None,
    in_place: bool = True,
    **options: Any,
) -> Ahead:
    """Compile what a model will be after a growth, in a background process, into Inductor's cache on disk.

    The process has the model's shapes, and none of its weights but one block's at a time, as zeros. It calls the
    blocks as the example calls them, in a training step and in eval mode without gradients. When this process compiles
    the same then (``growth.compile(model, **options)``), it finds the code there. What was compiled is found by the
    graph and by what it is called with, so that another growth than the one foreseen is compiled as if nothing
    had been done.

    Args:
        model: as it is now; its class can be imported, and the script that runs can be, too: what it does stands under
            ``if __name__ == "__main__":``.
        spec, args, kwargs, calls: as for :func:`fxgrow.grow`; the example in the sizes in which the model is trained.
        in_place: compile the model's own class, grown; False for ``growth.module``.
        options: for ``torch.compile``, as they will be given to ``compile``; also its ``checkpoint``.

    Raises:
        Exception: the model cannot be pickled, with what ``pickle`` raises.
    """
    calls_given = dict(calls or {})
    cast = {d: torch.get_autocast_dtype(d) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)}
    more = (spec, args, dict(kwargs or {}), calls_given, in_place, options, cast, settings())
    inner = innermost(model)
    with as_written(inner):
        return Ahead(without_weights(inner, more))


def _work(answer: Connection, payload: bytes) -> None:
    """What the process does; answers how many blocks were compiled, and the error that ended it."""
    done = 0
    try:
        with contextlib.suppress(OSError):
            os.nice(10)
        model, (spec, args, kwargs, calls, in_place, options, cast, found) = pickle.loads(payload)
        take(found)
        on_meta = trees.map_tensors(lambda t: t.to("meta"), (args, kwargs, calls))
        growth = grow(model, spec, on_meta[0], on_meta[1], calls=on_meta[2] or None, verify=False)
        module = growth.apply_(model) if in_place else growth.module
        with contextlib.ExitStack() as contexts:
            for device, dtype in cast.items():
                contexts.enter_context(torch.autocast(device, dtype))
            done = rehearse(module, args, kwargs, options)
        answer.send((done, ""))
    except BaseException as error:
        answer.send((done, f"{type(error).__name__}: {error}"))


def rehearse(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Mapping[str, Any]) -> int:
    """Compile a module's blocks as it calls them: a training step, and eval mode without gradients.

    Args:
        module: with weights on meta.
        args, kwargs: one call, with tensors on the device on which the module is going to run.

    Returns:
        How many blocks, one of each structure and kind of call.
    """
    device = next((t.device for t in trees.tensors_in((args, dict(kwargs)))), torch.device("cpu"))
    found = blocks_of(module) or [("", module)]
    keys = structures([b for _, b in found], numbers_of(found))
    known = {id(b): key for (_, b), key in zip(found, keys, strict=True)}
    seen = set()
    for call in blocks_called(module, [b for _, b in found], args, kwargs):
        tensors = trees.tensors_in((call.args, call.kwargs))
        kind = known[id(call.block)], tuple((t.shape, t.stride(), t.dtype, t.requires_grad) for t in tensors)
        if kind in seen:
            continue
        seen.add(kind)
        block = compile_regions(real(call.block, device), **options)
        given = stand_in((call.args, call.kwargs))
        results = [t for t in trees.tensors_in(block.train()(*given[0], **given[1])) if t.requires_grad]
        if results:
            torch.autograd.backward(results, [torch.zeros_like(r) for r in results])
        with torch.no_grad():
            given = trees.map_tensors(torch.Tensor.detach, given)
            block.eval()(*given[0], **given[1])
    return len(seen)


__all__ = ["Ahead", "compile_ahead", "rehearse"]
