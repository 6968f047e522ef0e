"""Tensors whose values are not in plain memory stop at the gate; memory that tensors share is freed with the last."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import fxgrow
from fxgrow import kernels
from fxgrow.errors import CaptureError, CheckpointError, GrowthRefused

SPEC = {"op": "widen", "axis": "up.weight:0", "factor": 2}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(5, 8).double(), nn.Linear(8, 3).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.up(x)))


def small() -> Small:
    torch.manual_seed(0)
    return Small()


X = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
OTHER = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


class Wrapper(torch.Tensor):
    """A subclass that computes with another tensor and has no memory of its own."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = pytree.tree_map(lambda x: x.inner if isinstance(x, Wrapper) else x, (args, kwargs or {}))
        result = func(*plain[0], **plain[1])
        return pytree.tree_map(lambda x: Wrapper(x) if isinstance(x, torch.Tensor) else x, result)


class Doubled(torch.Tensor):
    """A subclass that has memory of its own, which holds half of what it computes with."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(x: Any) -> Any:
            return x.as_subclass(torch.Tensor) * 2 if isinstance(x, Doubled) else x

        return func(*pytree.tree_map(plain, args), **pytree.tree_map(plain, kwargs or {}))


class Labelled(nn.Parameter):
    """A subclass that only adds attributes: plain memory."""


def fake() -> torch.Tensor:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(8, 5)


def freed(nbytes: int = 0) -> torch.Tensor:
    t = torch.randn(8, 5)
    t.untyped_storage().resize_(nbytes)
    return t


def view_of_freed() -> torch.Tensor:
    t = torch.randn(8, 5)
    view = t[4:]
    t.untyped_storage().resize_(80)
    return view


def nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.randn(2), torch.randn(3)])


UNREADABLE = {
    "wrapper subclass": (lambda: Wrapper(torch.randn(8, 5)), "Wrapper, a tensor subclass"),
    "subclass with memory": (lambda: torch.randn(8, 5).as_subclass(Doubled), "Doubled, a tensor subclass"),
    "fake": (fake, "no values"),
    "freed": (freed, "has been freed"),
    "half freed": (lambda: freed(80), "holds 80 bytes of the 160"),
    "view of freed": (view_of_freed, "holds 80 bytes of the 160"),
    "sparse": (lambda: torch.randn(8, 5).to_sparse(), "sparse_coo"),
    "csr": (lambda: torch.randn(8, 5).to_sparse_csr(), "sparse_csr"),
    "quantised": (lambda: torch.quantize_per_tensor(torch.randn(8, 5), 0.1, 0, torch.qint8), "quantised"),
    "nested": (nested, "nested"),
    "lazy": (nn.UninitializedParameter, "not initialised"),
    "zero tensor": (lambda: torch._efficientzerotensor(8, 5), "no memory of its own"),  # type: ignore[attr-defined]
}


def mapped(tmp_path: Path) -> torch.Tensor:
    torch.save(torch.randn(8, 5), tmp_path / "t.pt")
    loaded: torch.Tensor = torch.load(tmp_path / "t.pt", mmap=True)
    return loaded


READABLE = {
    "plain": lambda _: torch.randn(8, 5),
    "expanded": lambda _: torch.randn(1, 5).expand(8, 5),
    "one value": lambda _: torch.randn(()).expand(8, 5),
    "transposed": lambda _: torch.randn(5, 8).t(),
    "strided": lambda _: torch.randn(16, 15)[::2, 1::3],
    "leaf view": lambda _: torch.randn(60)[7:47].view(8, 5).requires_grad_(),
    "conjugated": lambda _: torch.randn(8, 5, dtype=torch.complex64).conj(),
    "negated": lambda _: torch.randn(8, 5, dtype=torch.complex128).conj().imag,
    "mapped": mapped,
    "numpy": lambda _: torch.from_numpy(torch.randn(8, 5).numpy()),
    "bytearray": lambda _: torch.frombuffer(bytearray(160), dtype=torch.float32).view(8, 5) + 0.5,
    "shared between processes": lambda _: torch.randn(8, 5).share_memory_(),
    "bfloat16": lambda _: torch.randn(8, 5).bfloat16(),
    "int64": lambda _: torch.arange(40).view(8, 5),
    "inference": lambda _: torch.inference_mode()(torch.randn)(8, 5),
    "parameter subclass": lambda _: Labelled(torch.randn(8, 5)),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_has_no_plain_memory_is_named(kind: str) -> None:
    make, words = UNREADABLE[kind]
    tensor = make()
    assert words in (kernels.unreadable(tensor) or "")
    rank = 2 if kind in ("lazy", "nested") else tensor.dim()
    with pytest.raises(ValueError, match="the source cannot be read"):
        kernels.materialise(tensor, [None] * rank)
    if kind not in ("lazy", "nested", "sparse", "csr", "quantised", "fake"):
        with pytest.raises(ValueError, match="out cannot be written"):
            kernels.materialise(torch.randn(tensor.shape), [None] * rank, out=tensor)


@pytest.mark.parametrize("kind", READABLE)
@pytest.mark.parametrize("backend", ["torch", None])
def test_every_other_tensor_is_read_as_its_values_are(kind: str, backend: str | None, tmp_path: Path) -> None:
    torch.manual_seed(3)
    tensor = READABLE[kind](tmp_path)
    assert kernels.unreadable(tensor) is None
    index = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 0, 3])
    made = kernels.materialise(tensor, [kernels.DimMap(index=index), None], backend=backend)
    assert torch.equal(made, tensor.detach().resolve_conj().resolve_neg()[index])
    assert type(made) is torch.Tensor


def test_empty_tensors_and_tensors_without_dims_are_readable() -> None:
    assert kernels.unreadable(torch.empty(0, 5)) is None
    assert kernels.unreadable(torch.tensor(3.0)) is None
    assert kernels.unreadable(torch.empty(8, 5, device="meta")) is None


@pytest.mark.parametrize("kind", ["wrapper subclass", "fake", "freed", "sparse", "lazy", "quantised"])
def test_capture_refuses_by_name(kind: str) -> None:
    make, words = UNREADABLE[kind]
    model = small()
    if kind == "quantised":
        model.register_buffer("scales", make())
    else:
        tensor = make()
        model.up.weight = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
    with pytest.raises(CaptureError, match=rf"cannot read (up\.weight|scales): .*{words}"):
        fxgrow.capture(model, (X,))


def test_programs_and_checkpoints_ask_too(tmp_path: Path) -> None:
    model = small()
    program = fxgrow.capture(model, (X,))
    growth = fxgrow.grow(model, SPEC, (X,), verify=False)
    model.out.weight.untyped_storage().resize_(0)
    with pytest.raises(GrowthRefused, match=r"cannot read out\.weight: its memory has been freed"):
        fxgrow.grow(program, SPEC, verify=False)
    growth.module.get_parameter("up.weight").untyped_storage().resize_(8)
    with pytest.raises(CheckpointError, match=r"cannot read up\.weight: its memory holds 8 bytes of the 640"):
        fxgrow.save(growth, tmp_path / "grown", examples=False)
    assert not (tmp_path / "grown").exists()


class WithView(Small):
    """A buffer that lives in a parameter's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", self.up.bias.detach()[:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.up(x) + self.seen))


def flattened(model: nn.Module) -> torch.Tensor:
    """Every parameter becomes a view of one flat tensor, as optimizers with flat buffers and FSDP1 have it."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    at = 0
    for name, p in list(model.named_parameters()):
        path, _, own = name.rpartition(".")
        setattr(model.get_submodule(path), own, nn.Parameter(flat[at : at + p.numel()].view_as(p)))
        at += p.numel()
    return flat


@pytest.mark.parametrize("make", [small, WithView])
@pytest.mark.parametrize("flat", [False, True])
def test_memory_that_tensors_share_is_freed_with_the_last_of_them(make: Any, flat: bool) -> None:
    torch.manual_seed(0)
    model = make()
    if flat:
        flattened(model)
    # autograd keeps what a buffer is a view of; parameters made of views have no such base
    based = {b._base.untyped_storage().data_ptr() for b in model.buffers() if b._base is not None}
    storages = [
        torch.UntypedStorage._weak_ref(p.untyped_storage())
        for p in model.parameters()
        if p.untyped_storage().data_ptr() not in based
    ]
    expected = model(OTHER).detach()
    growth = fxgrow.grow(model, SPEC, (X,), consume=True, verify=False)
    assert (growth.module(OTHER) - expected).abs().max() < 1e-13
    assert all(p.untyped_storage().nbytes() == 0 and p.shape for p in model.parameters())
    assert storages and all(torch.UntypedStorage._expired(s) for s in storages), "something keeps the old memory alive"
    with pytest.raises(CaptureError, match="has been freed"):
        fxgrow.grow(model, SPEC, (X,), verify=False)


def test_memory_that_others_hold_stays_theirs() -> None:
    model = small()
    flat = flattened(model)
    kept = flat.clone()
    fxgrow.grow(model, SPEC, (X,), consume=True, verify=False)
    assert torch.equal(flat, kept)
    other = small()
    other.up.weight = nn.Parameter(torch.from_numpy(other.up.weight.detach().numpy().copy()))  # cannot be resized
    expected = other(OTHER).detach()
    growth = fxgrow.grow(other, SPEC, (X,), consume=True, verify=False)
    assert (growth.module(OTHER) - expected).abs().max() < 1e-13


def test_a_negated_buffer_keeps_its_sign() -> None:
    class Negated(Small):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("gate", torch.randn(8, dtype=torch.complex128).conj().imag)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.tanh(self.up(x)) * self.gate)

    torch.manual_seed(0)
    model = Negated()
    assert model.get_buffer("gate").is_neg()
    growth = fxgrow.grow(model, SPEC, (X,), verify=False)
    assert (growth.module(OTHER) - model(OTHER)).abs().max() < 1e-13


PROCESS = """
import os, sys, torch, fxgrow
from torch import nn
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from tests.weights.test_memory import SPEC, X, WithView, flattened, small

def refused(name, call):
    try:
        call()
    except fxgrow.FxgrowError as error:
        print(name, "refused", type(error).__name__, flush=True)
    else:
        print(name, "ran", flush=True)

model = small(); flattened(model)
refused("flat", lambda: fxgrow.grow(model, SPEC, (X,), consume=True, verify=False))
refused("flat again", lambda: fxgrow.grow(model, SPEC, (X,), verify=False))
refused("view", lambda: fxgrow.grow(WithView(), SPEC, (X,), consume=True, verify=False))
program = fxgrow.capture(small(), (X,))
refused("program", lambda: fxgrow.grow(program, SPEC, consume=True, verify=False))
refused("program again", lambda: fxgrow.grow(program, SPEC, verify=False))

dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
mesh = init_device_mesh("cpu", (1,))
model = small(); fully_shard(model, mesh=mesh)
refused("sharded", lambda: fxgrow.grow(model, SPEC, (X,), verify=False))
model = small(); fully_shard(model, mesh=mesh); model(X); model.unshard()
refused("unsharded", lambda: fxgrow.grow(model, SPEC, (X,), verify=False))
module = fxgrow.grow(small(), SPEC, (X,), verify=False).module; fully_shard(module, mesh=mesh)
refused("sharded grown", lambda: fxgrow.grow(module, SPEC, (X,), verify=False))
refused("sharded saved", lambda: fxgrow.save(module, sys.argv[1]))
model = small()
model.up.weight = nn.Parameter(distribute_tensor(model.up.weight.detach(), mesh, [Shard(0)]))
refused("dtensor", lambda: fxgrow.grow(model, SPEC, (X,), verify=False))
dist.destroy_process_group()
"""


def test_nothing_ends_the_process(tmp_path: Path) -> None:
    """Each of these was a segmentation fault."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(PROCESS), str(tmp_path / "grown")],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        "flat ran",
        "flat again refused CaptureError",
        "view ran",
        "program ran",
        "program again refused GrowthRefused",
        *(f"{name} ran" for name in ("sharded", "unsharded", "sharded grown")),  # shard by shard
        "sharded saved refused CheckpointError",
        "dtensor ran",
    ]
