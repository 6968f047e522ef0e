"""Which backend does the work: by device, by the caller, or by the environment variable FXGROW_KERNELS."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from fxgrow.kernels import gpu, native, reference
from fxgrow.kernels.job import Job
from fxgrow.warn import warn

NAMES = ("torch", "cpu", "triton")
VARIABLE = "FXGROW_KERNELS"


@dataclass(frozen=True)
class Backend:
    """One line of `backends`: a name, whether it works here, for which devices, and why not if not."""

    name: str
    available: bool
    devices: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.devices if self.available else 'not available, ' + self.reason}"


def backends() -> list[Backend]:
    """Every backend, whether it works on this machine, for what it is chosen, and why not.

    Builds the native library if it is not built.
    """
    missing = {"torch": "", "cpu": native.available() or "", "triton": gpu.available() or ""}
    serves = {"torch": "any device", "cpu": "CPU", "triton": gpu.devices()}
    chosen = _chosen(missing)
    return [Backend(name, not missing[name], serves[name] + chosen.get(name, ""), missing[name]) for name in NAMES]


def _chosen(missing: dict[str, str]) -> dict[str, str]:
    """Backend -> what to say of when it is used."""
    forced = os.environ.get(VARIABLE)
    if forced:
        return {forced: f" (used: {VARIABLE} says so)"}
    cpu, cuda = "torch" if missing["cpu"] else "cpu", "torch" if missing["triton"] else "triton"
    if not torch.cuda.is_available():
        return {cpu: " (used)"}
    return {cpu: " (used for CPU tensors)", cuda: " (used for GPU tensors)"} if cpu != cuda else {cpu: " (used)"}


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warn(message, RuntimeWarning)


def run(job: Job, out: Tensor, backend: str | None, fresh: bool) -> None:
    """Fill `out` with the backend asked for, or the best for its device. `fresh`: nothing has touched `out` yet.

    Raises:
        ValueError: an unknown backend, or one that does not serve the device.
        RuntimeError: the backend asked for is not available here.
    """
    forced = backend or os.environ.get(VARIABLE) or None
    if forced is not None and forced not in NAMES:
        origin = "backend" if backend else f"environment variable {VARIABLE}"
        raise ValueError(f"{origin} {forced!r}: choose one of {', '.join(NAMES)}")
    if out.device.type == "meta":
        return  # shapes only
    if forced == "cpu" and out.device.type != "cpu":
        raise ValueError(f"the cpu backend cannot write to {out.device}")
    if forced == "triton" or (forced is None and out.device.type == "cuda"):
        missing = gpu.available()
        if missing is None:
            try:
                gpu.run(job, out)
                return
            except gpu.Unsupported:
                pass
        elif forced:
            raise RuntimeError(f"the triton backend is not available: {missing}")
        else:
            _warn_once(f"growing on the GPU with plain torch, which is slower: {missing}")
    elif forced == "cpu" or (forced is None and out.device.type == "cpu"):
        try:
            if forced or native.sooner(out.numel()):
                native.run(job, out, fresh)
                return
        except native.Unsupported:
            pass
        except native.NoCompiler as error:
            if forced:
                raise RuntimeError(f"the cpu backend is not available: {error}") from error
            _warn_once(f"growing with plain torch, which is slower: {error}")
    reference.run(job, out)


def run_many(jobs: list[tuple[Job, Tensor]], backend: str | None, fresh: list[bool]) -> None:
    """Fill many destinations; the small ones of the CPU backend in one call."""
    small: list[int] = []
    chosen = backend or os.environ.get(VARIABLE) or None
    if chosen in (None, "cpu") and native.is_there():
        small = [k for k, (_, out) in enumerate(jobs) if out.device.type == "cpu" and out.numel() < native.ALONE]
        try:
            native.run_many([jobs[k] for k in small])
        except native.Unsupported:
            small = []
    done = set(small)
    for k, (job, out) in enumerate(jobs):
        if k not in done:
            run(job, out, backend, fresh[k])
