"""Models compiled block by block: what shares code, what a growth compiles anew, and that results stay."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxgrow
from fxgrow.compile import blocks_of, compile_regions
from fxgrow.errors import FxgrowError, SpecError
from fxgrow.ir.compiled import shared_of
from fxgrow.ir.flops import flops_of
from tests.models import small_gpt, tokens

pytestmark = pytest.mark.compile

HIDDEN = {"op": "widen", "axis": "*/hidden", "factor": 2}
DEEPER = {"op": "deepen", "stack": "transformer.h", "by": 2}


class Counting:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _alone() -> Any:
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self, width: int, number: int, slope: float = 0.1) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(width, 6), nn.Linear(6, width), nn.LeakyReLU(slope)
        self.number = number  # its place, which no forward reads

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


class Stack(nn.Module):
    """Two stacks of one class and two widths; layers of the second may be recomputed."""

    def __init__(self, first: int = 3, second: int = 3, again: bool = False, slopes: tuple[float, ...] = ()) -> None:
        super().__init__()
        slopes = slopes or (0.1,) * first
        self.into = nn.Linear(4, 4)  # so that every block's input has a gradient
        self.first = nn.ModuleList([Block(4, i, slopes[i]) for i in range(first)])
        self.between = nn.Linear(4, 5)
        self.second = nn.ModuleList([Block(5, i) for i in range(second)])
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in self.first:
            x = block(x)
        x = self.between(x)
        for block in self.second:
            x = checkpoint(block, x, use_reentrant=False) if self.again and self.training else block(x)
        return x


def step(model: nn.Module, args: tuple[Any, ...]) -> Tensor:
    """Output of a training step, whose gradients are left on the parameters."""
    model.zero_grad()
    out = model(*args)
    out = out[1] if isinstance(out, tuple) else out.square().mean()
    out.backward()
    return out.detach()


def test_a_grown_model_compiles_what_has_changed_and_nothing_else() -> None:
    model, args, backend = small_gpt(torch.float64, n_layer=2), tokens(), Counting()
    start = step(model, args)
    assert compile_regions(model, backend=backend) is model
    assert torch.allclose(step(model, args), start)
    assert backend.graphs == 1, "two equal blocks are one compilation"
    growth = fxgrow.grow(model, DEEPER, args, verify=False)
    growth.apply_(model)
    assert torch.allclose(step(model, args), start)
    assert backend.graphs == 1, "new blocks run the code of the old ones"
    assert len({id(shared_of(b)) for b in model.transformer.h}) == 1 and shared_of(model.transformer.h[3])
    growth = fxgrow.grow(model, HIDDEN, args, verify=False)
    growth.apply_(model)
    assert torch.allclose(step(model, args), start)
    assert backend.graphs == 2


def test_many_growths_stay_compiled() -> None:
    """PyTorch gives up on a code object after eight compilations, and ``Module.compile`` compiles the class's code."""
    model, x, backend = Stack(2, 0), (torch.randn(3, 4),), Counting()
    compile_regions(model, backend=backend)
    for number in range(1, 10):
        growth = fxgrow.grow(model, {"op": "widen", "axis": "first.*/hidden", "by": 1}, x, verify=False)
        growth.apply_(model)
        step(model, x)
        assert backend.graphs == number


def test_what_a_growth_hooks_on_is_in_what_was_compiled_by_hand() -> None:
    """Dynamo does not look at hooks again, and a growth's adapters are hooks."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    net[0].compile(backend="eager")
    x, counting = torch.randn(5, 3, dtype=torch.float64), Counting()
    model = torch.compile(net, backend=counting)
    before = model(x)
    fxgrow.grow(net, [{"op": "lora", "modules": "*", "rank": 2}], (x,)).apply_(net)
    assert torch.equal(model(x), before) and counting.graphs == 2
    model(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_regenerated_module_and_a_model_compile_alike() -> None:
    model, args = small_gpt(torch.float64, n_layer=2), tokens()
    start = step(model, args)
    growth = fxgrow.grow(model, [HIDDEN, DEEPER], args, verify=False)
    growth.apply_(model)
    for compiled in (growth.compile, lambda **o: growth.compile(model, **o)):
        for again in (False, True):
            backend = Counting()
            module = compiled(backend=backend, checkpoint=again)
            assert torch.allclose(step(module, args), start)
            gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
            assert backend.graphs == 1
            module.eval()
            assert torch.allclose(module(*args)[1], start)
            module.train()
            same = copy.deepcopy(model)  # runs as it is written
            assert all(shared_of(m) is None for m in same.modules())
            step(same, args)
            for name, p in same.named_parameters():
                torch.testing.assert_close(gradients[name], p.grad)
    restored = pickle.loads(pickle.dumps(growth.module))
    assert torch.allclose(step(restored, args), start)


def test_what_a_trace_or_a_counter_intercepts_stays_compiled() -> None:
    model, x, backend = Stack(2, 2), (torch.randn(3, 4),), Counting()
    compile_regions(model, backend=backend)
    fxgrow.grow(model, {"op": "widen", "axis": "first.0/hidden", "factor": 2}, x)
    with flops_of(model) as counter:
        step(model, x)
    assert backend.graphs == 0 and counter.get_total_flops() > 0
    step(model, x)
    assert backend.graphs == 2


def test_blocks_share_code_by_structure() -> None:
    x = (torch.randn(3, 4),)

    def graphs(model: nn.Module, **options: Any) -> int:
        backend = Counting()
        expected = step(model, x)
        assert torch.allclose(step(compile_regions(model, backend=backend, **options), x), expected, atol=1e-6)
        return backend.graphs

    assert graphs(Stack(3, 3)) == 2, "two widths of one class"
    assert graphs(Stack(3, 2, slopes=(0.1, 0.2, 0.1))) == 3, "another number is another code"
    assert graphs(Stack(12, 1, slopes=tuple(i / 20 for i in range(12)))) == 13, "as many as there are"
    assert graphs(Stack(2, 3, again=True)) == 2, "recomputed by the model itself"
    shared = Stack(1, 1)
    shared.first.append(shared.first[0])  # one block, twice
    assert graphs(shared) == 2 and len(blocks_of(shared)) == 2
    tied = Stack(3, 1)
    tied.first[1].up.weight = tied.first[0].up.weight
    assert graphs(tied) == 2
    frozen = Stack(3, 1)
    frozen.first[0].requires_grad_(False)
    assert graphs(frozen) == 3
    assert graphs(nn.Sequential(nn.Linear(4, 3), nn.Tanh())) == 1, "no blocks: compiled whole"


def test_sizes_modes_and_autocast() -> None:
    model, backend = Stack(3, 3), Counting()
    plain = copy.deepcopy(model)
    compile_regions(model, backend=backend)
    for rows in (3, 5, 7, 9):
        x = (torch.randn(rows, 4),)
        assert torch.allclose(step(model, x), step(plain, x))
    assert backend.graphs == 4, "the second length makes it dynamic"
    before = backend.graphs
    with torch.autocast("cpu", torch.bfloat16):
        assert model(*x).dtype == plain(*x).dtype == torch.bfloat16
        assert torch.equal(model(*x), plain(*x))
    assert backend.graphs == before + 2
    once = Counting()
    compile_regions(model, backend=once, dynamic=True)
    for rows in (3, 5, 7):
        step(model, (torch.randn(rows, 4),))
    assert once.graphs == 2, "options go to torch.compile"


def test_stages_are_taken_apart_where_their_blocks_repeat() -> None:
    def stage(width: int, repeats: int) -> nn.Module:
        return nn.Sequential(*[Block(width, i) for i in range(repeats)])

    paths = [p for p, _ in blocks_of(nn.Sequential(stage(4, 3), nn.Linear(4, 5), stage(5, 1)))]
    assert paths == ["0.0", "0.1", "0.2", "2"]
    assert [p for p, _ in blocks_of(nn.Sequential(Block(4, 0), Block(4, 1), Block(5, 2)))] == ["0", "1", "2"]


def test_what_fails_is_taken_back() -> None:
    model, x, backend = Stack(2, 2), (torch.randn(3, 4),), Counting()
    compile_regions(model, backend=backend)
    start = step(model, x)
    growth = fxgrow.grow(model, {"op": "deepen", "stack": "first", "by": 1}, x, verify=False)
    with pytest.raises(ZeroDivisionError), growth.applied(model):
        1 // (len(model.first) - 3)
    assert torch.equal(step(model, x), start) and backend.graphs == 2


@pytest.mark.slow
def test_a_package_runs_without_the_model(tmp_path: Path) -> None:
    model, x = Stack(2, 1).double(), torch.randn(3, 4, dtype=torch.float64)
    growth = fxgrow.grow(model, {"op": "widen", "axis": "first.0/hidden", "factor": 2}, (x,), verify=False)
    with pytest.raises(SpecError, match=r"\*\.pt2"):
        growth.package(tmp_path / "model.so")
    path = growth.package(tmp_path / "model.pt2")
    assert growth.module.training
    run = torch._inductor.aoti_load_package(str(path))
    for rows in (3, 5):
        x = torch.randn(rows, 4, dtype=torch.float64)
        torch.testing.assert_close(run(x), model(x))
    with pytest.raises(FxgrowError, match="cannot be packaged"):
        growth.package(tmp_path / "other.pt2", nn.Linear(7, 2).double())
