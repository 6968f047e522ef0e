"""Several ranks on this machine: a function runs in each, over gloo, and what it returns comes back."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

#: seconds that a rank waits for another; and that all of them have together
WAIT, LIMIT = 60, 240


def run_ranks(count: int, function: Callable[..., Any], *args: Any, limit: float = LIMIT) -> list[Any]:
    """Run ``function(rank, *args)`` in so many processes, forked from this one.

    Args:
        limit: seconds after which those that have not ended are killed.

    Returns:
        What each returned, in their order; None of a rank that was killed, or killed itself.

    Raises:
        AssertionError: one raised, or did not end in time; with its traceback.
    """
    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="fxgrow-ranks-") as folder:
        ends, started = [], []
        for rank in range(count):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(rank, count, folder, there, function, args))
            process.start()
            there.close()
            ends.append(here)
            started.append(process)
        results, failures = list[Any](), list[str]()
        for rank, (here, process) in enumerate(zip(ends, started, strict=True)):
            try:
                late = ("failed", f"has not ended after {limit} seconds")
                kind, value = pickle.loads(here.recv_bytes()) if here.poll(limit) else late
            except EOFError:
                kind, value = "ended", None
            results.append(value)
            if kind == "failed":
                failures.append(f"rank {rank}: {value}")
                limit = 5
        for process in started:
            process.join(5)
            process.kill()
            process.join()
    assert not failures, "\n".join(failures)
    return results


def _run(rank: int, count: int, folder: str, end: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    try:
        store = dist.FileStore(str(Path(folder) / "store"), count)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=WAIT))
        end.send_bytes(pickle.dumps(("done", function(rank, *args))))  # send would share the memory of tensors
        dist.destroy_process_group()
    except BaseException:
        end.send_bytes(pickle.dumps(("failed", traceback.format_exc())))
    finally:
        end.close()
        os._exit(0)  # never back into the caller's stack


def said(function: Callable[[], Any]) -> str:
    """What a function raises, with its class; "" where it raises nothing."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
