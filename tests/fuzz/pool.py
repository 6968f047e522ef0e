"""Workers: models in processes of their own, which may crash or hang without ending the run."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

_FORK = multiprocessing.get_context("fork")

#: models after which a worker is replaced: PyTorch keeps what it has traced
LIFETIME = 60


def each(
    job: Callable[[int], Any], numbers: Iterator[int], jobs: int, timeout: float
) -> Iterator[tuple[int, Any, str]]:
    """(number, result, problem) of each job as it is done; the problem is a crash or a timeout, or empty."""
    running: dict[Connection, list[Any]] = {}  # pipe: process, number, deadline, how many it has had
    free: list[tuple[Any, Connection, int]] = []
    more = True
    try:
        while True:
            while more and len(running) < jobs:
                number = next(numbers, None)
                if number is None:
                    more = False
                    break
                process, pipe, had = free.pop() if free else _start(job)
                pipe.send(number)
                running[pipe] = [process, number, time.monotonic() + timeout, had + 1]
            if not running:
                return
            ready = wait(list(running), timeout=1.0)
            for pipe in list(running):
                process, number, deadline, had = running[pipe]
                if pipe in ready:
                    del running[pipe]
                    try:
                        result = pipe.recv()
                    except EOFError:
                        process.join()
                        yield number, None, f"crashed with signal {-(process.exitcode or 0)}"
                        continue
                    if had >= LIFETIME:
                        _stop(process, pipe)
                    else:
                        free.append((process, pipe, had))
                    yield number, result, ""
                elif time.monotonic() > deadline:
                    del running[pipe]
                    process.kill()
                    process.join()
                    yield number, None, f"longer than {timeout:.0f} s"
    finally:
        for pipe, (process, *_) in running.items():
            process.kill()
        for process, pipe, _ in free:
            _stop(process, pipe)


def _start(job: Callable[[int], Any]) -> tuple[Any, Connection, int]:
    mine, theirs = _FORK.Pipe()
    process = _FORK.Process(target=_work, args=(job, theirs, mine), daemon=True)
    process.start()
    theirs.close()
    return process, mine, 0


def _stop(process: Any, pipe: Connection) -> None:
    pipe.close()
    process.join(timeout=5)
    if process.is_alive():
        process.kill()


def _work(job: Callable[[int], Any], pipe: Connection, other: Connection) -> None:
    import torch

    other.close()
    nowhere = os.open(os.devnull, os.O_WRONLY)  # what a trace that fails prints is pages long
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        try:
            number = pipe.recv()
        except EOFError:
            return
        pipe.send(job(number))
