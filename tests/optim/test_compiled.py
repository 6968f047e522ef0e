"""``torch.compile(optimizer.step)`` steps as the optimizer does uncompiled, whatever growths left behind."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxgrow
from fxgrow.optim import slice_rates
from tests.optim.nets import HIDDEN, STREAM, VARIANTS, grown, loss_of, sized, step

pytestmark = pytest.mark.compile

MORE = {"op": "widen", "axis": "up.weight:0", "factor": 2}


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch.compiler.reset()


def carried(name: str, policy: str, **how: Any) -> tuple[nn.Module, Any]:
    model = sized()
    optimizer = VARIANTS[name](model.parameters())
    for k in range(2):
        step(model, optimizer, k)
    growth = grown(model, {**HIDDEN, "noise": {"scale": 1e-2}} if policy == "asymmetric" else HIDDEN, STREAM)
    growth.carry_(optimizer, policy, **how)
    return growth.module, optimizer


def apart(module: nn.Module, optimizer: Any, run: Callable[[], Any], steps: int, clip: bool = False) -> float:
    """Largest difference of any entry from a copy that steps uncompiled."""
    other, plain = copy.deepcopy((module, optimizer))
    worst = 0.0
    for k in range(10, 10 + steps):
        for m, o, take in ((module, optimizer, run), (other, plain, plain.step)):
            o.zero_grad()
            loss_of(m, k).backward()
            if clip and o is plain:
                fxgrow.optim.clip_grad_norm_(plain, 1e-3)
            take()
        pairs = zip(module.parameters(), other.parameters(), strict=True)
        worst = max(worst, *(float((p - q).detach().abs().max()) for p, q in pairs))
    return worst


@pytest.mark.parametrize("how", ["exact", "ramp", "warm-up"])
@pytest.mark.parametrize("name", ["SGD", "AdamW", "AdamW foreach", "AdamW fused"])
def test_while_rates_are_in_force(name: str, how: str) -> None:
    """Under Adam's compiled step torch counts in float32 on its own, so that there the last step is one with rates."""
    policy, options = {
        "exact": ("exact", {}),
        "ramp": ("exact", {"ramp": 6}),
        "warm-up": ("asymmetric", {"warmup": 6, "peak": 1.5}),
    }[how]
    module, optimizer = carried(name, policy, **options)
    steps = 5 if name.startswith("AdamW") else 8
    assert apart(module, optimizer, torch.compile(optimizer.step, backend="eager"), steps) <= 1e-12
    assert (slice_rates(optimizer) is None) == (steps == 8 and how != "exact")


def test_steps_that_are_not_taken_in_pieces() -> None:
    """Two growths are in force at once, of an optimizer that is not torch's idea of a linear one."""
    module, optimizer = carried("Rprop", "exact")
    assert apart(module, optimizer, torch.compile(optimizer.step, backend="eager"), 3) <= 1e-12
    module, optimizer = carried("SGD", "asymmetric", warmup=9)
    growth = grown(module, MORE)
    growth.carry_(optimizer, "asymmetric", warmup=5)
    assert apart(growth.module, optimizer, torch.compile(optimizer.step, backend="eager"), 6) <= 1e-12


def test_a_compiled_function_around_step_and_clipping() -> None:
    module, optimizer = carried("SGD", "exact")

    @torch.compile(backend="eager")
    def run() -> None:
        fxgrow.optim.clip_grad_norm_(optimizer, 1e-3)
        optimizer.step()

    assert apart(module, optimizer, run, 4, clip=True) <= 1e-12


def test_closures() -> None:
    module, optimizer = carried("SGD", "exact")
    other, plain = copy.deepcopy((module, optimizer))
    compiled = torch.compile(optimizer.step, backend="eager")
    for k in range(3):
        for m, o, take in ((module, optimizer, compiled), (other, plain, plain.step)):

            def closure(m: nn.Module = m, o: Any = o, k: int = k) -> torch.Tensor:
                o.zero_grad()
                loss = loss_of(m, k)
                loss.backward()
                return loss

            take(closure)
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_old_entries_that_are_frozen_stand_still() -> None:
    model = sized()
    optimizer = VARIANTS["SGD"](model.parameters())
    growth = grown(model, HIDDEN)
    growth.carry_(optimizer, "copy")
    compiled, before = torch.compile(optimizer.step, backend="eager"), model.up.weight
    weight = growth.module.get_parameter("up.weight")
    with growth.freeze_old():
        for k in range(2):
            optimizer.zero_grad()
            loss_of(growth.module, k).backward()
            compiled()
    assert torch.equal(weight[: len(before)], before)
    assert not torch.equal(weight[len(before) :], before.repeat(2, 1))


FIRST = """
import copy, sys, torch
import fxgrow.optim
from tests.optim.nets import VARIANTS, Sized, loss_of
model, state = torch.load(sys.argv[1])
runs = []
for compiled in (True, False):
    module = Sized(stream=12, hidden=24).double()
    module.load_state_dict(model)
    optimizer = VARIANTS["SGD"](module.parameters())
    optimizer.load_state_dict(copy.deepcopy(state))
    take = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
    for k in range(3):
        optimizer.zero_grad()
        loss_of(module, k).backward()
        take()
    runs.append(module)
print(max(float((p - q).detach().abs().max()) for p, q in zip(runs[0].parameters(), runs[1].parameters())))
"""


def test_a_new_process_whose_first_step_is_compiled(tmp_path: Path) -> None:
    module, optimizer = carried("SGD", "exact")
    torch.save((module.state_dict(), optimizer.state_dict()), tmp_path / "run.pt")
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", FIRST, str(tmp_path / "run.pt")],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(__file__).parents[2],
    )
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) <= 1e-12
