"""Capture: names, ties, buffers, modes, source lines, and one clear error where a model cannot be traced."""

from __future__ import annotations

import contextlib
import copy
import functools
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import fxgrow
from fxgrow.algebra import is_static
from fxgrow.emit.module import regenerate
from fxgrow.ir.nodes import info_of
from fxgrow.ir.sizes import shape_of
from fxgrow.trace.lines import source_line
from tests.models import assert_same, small_cnn, small_gpt, tokens, trained


def rebuilt(program: fxgrow.Program) -> Any:
    return regenerate(program, {n: t.detach().clone() for n, t in program.tensors.items()})


def test_names_ties_and_source_lines() -> None:
    model = small_gpt()
    program = fxgrow.capture(model, tokens())
    assert set(program.parameters) == {n for n, _ in model.named_parameters()}
    assert program.aliases == {"lm_head.weight": "transformer.wte.weight"}
    linear = [n for n in program.graph.nodes if "linear" in str(n.target)]
    assert info_of(linear[0]).module_path == "transformer.h.0.attn.c_attn"
    assert "model.py:" in info_of(linear[0]).source
    assert "c_attn" in info_of(linear[0]).source


def test_one_tensor_passed_twice_is_two_inputs() -> None:
    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.a(x) - self.b(y)

    model = Add()
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    module = rebuilt(fxgrow.capture(model, (x, x)))
    assert_same(module(x, y), model(x, y))


def test_what_depends_on_no_input_is_computed_once() -> None:
    """ALiBi's slopes are made of consecutive numbers, which cannot grow; their values can."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            numbers = torch.arange(6, device=x.device)
            order = torch.zeros(6, dtype=torch.long)
            order[2:] = 1  # written to: stays computed
            slopes = torch.pow(torch.tensor(0.5), numbers.to(x.dtype))
            return self.down(self.up(x) * slopes.view(1, 6)) + order.sum()

    model, x = Scaled().double(), torch.randn(5, 4, dtype=torch.float64)
    program = fxgrow.capture(model, (x,))
    folded = [t for t in program.constants.values() if t.numel() == 6]
    assert len(folded) == 1
    torch.testing.assert_close(folded[0].flatten(), 0.5 ** torch.arange(6, dtype=torch.float64))
    assert not any("arange" in str(n.target) for n in program.graph.nodes)
    assert_same(rebuilt(program)(x), model(x))
    assert "constant" not in ", ".join(rebuilt(program).state_dict())
    for request in ({"factor": 2}, {"to": 9}, {"by": 4, "fill": "add"}):
        growth = fxgrow.grow(program, {"op": "widen", "axis": "up.weight:0", **request})
        assert growth.receipt.error_float64 is not None
        assert growth.receipt.error_float64 <= 1e-12


def test_weights_that_are_read_out_of_a_list_are_refused() -> None:
    """PyTorch traces them as constants, so that the graph would learn nothing there."""

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 6)
            self.weights = [self.up.weight]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weights[0], self.up.bias)

    with pytest.raises(fxgrow.CaptureError, match=r"reads up.weight through .* read it as self\.up\.weight"):
        fxgrow.capture(Listed(), (torch.randn(3, 4),))


@pytest.mark.parametrize("flash", [True, False])
def test_train_and_eval_share_one_graph(flash: bool) -> None:
    model = small_gpt(dropout=0.3, flash=flash)
    program = fxgrow.capture(model, tokens())
    assert program.mode_reason == ""
    assert len(program.calls) == 1
    module = rebuilt(program)
    x, y = tokens(3, batch=2, length=5)
    for mode in (True, False, True):
        model.train(mode)
        module.train(mode)
        torch.manual_seed(5)
        expected = model(x, y)[0]
        torch.manual_seed(5)
        assert_same(module(x, y)[0], expected)
    model.train()
    torch.manual_seed(5)
    first = module.train()(x, y)[0]
    torch.manual_seed(6)
    assert not torch.equal(module(x, y)[0], first)


def test_dropout_that_never_sleeps_stays_awake() -> None:
    class MonteCarlo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(self.fc(x), 0.5, training=True)

    module = rebuilt(fxgrow.capture(MonteCarlo(), (torch.randn(3, 4),))).eval()
    assert bool((module(torch.ones(50, 4)) == 0).any())


def test_batch_norm_updates_its_statistics_in_train_mode_only() -> None:
    model = small_cnn(torch.float32)
    x = torch.randn(4, 3, 8, 8)
    module = rebuilt(fxgrow.capture(model, (x,)))
    model.train()
    module.train()
    for _ in range(2):
        assert_same(model(x), module(x))
    module.eval()
    model.eval()
    assert_same(model(x), module(x))
    state = module.state_dict()
    assert_same([state[name] for name in model.state_dict()], [*model.state_dict().values()])
    assert int(module.state_dict()["1.num_batches_tracked"]) == 2


def test_buffers_keep_their_persistence_and_gradients_their_flags() -> None:
    class Buffers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.fc.bias.requires_grad_(False)
            self.register_buffer("kept", torch.randn(4))
            self.register_buffer("dropped", torch.randn(4), persistent=False)
            self.unused = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) * self.kept + self.dropped

    model = Buffers()
    x = torch.randn(3, 4)
    module = rebuilt(fxgrow.capture(model, (x,)))
    assert set(module.state_dict()) == set(model.state_dict())
    assert_same(module(x), model(x))
    assert {n: p.requires_grad for n, p in module.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }


def test_dynamic_batch_and_sequence() -> None:
    model = small_gpt().eval()
    module = rebuilt(fxgrow.capture(model, tokens())).eval()
    for batch, length in ((1, 4), (5, 12), (2, 1)):
        args = tokens(1, batch=batch, length=length)
        assert_same(module(*args)[0], model(*args)[0])


def test_no_grad_regions_stay_without_gradient() -> None:
    class Region(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                gate = torch.sigmoid(self.a(x))
            return self.b(x) * gate

    model = Region()
    x = torch.randn(3, 4)
    module = rebuilt(fxgrow.capture(model, (x,)))
    assert_same(module(x), model(x))
    module(x).sum().backward()
    assert module.a.weight.grad is None
    assert module.b.weight.grad is not None


def test_what_a_no_grad_region_writes_into_a_buffer_holds_no_gradients() -> None:
    class Average(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.register_buffer("seen", torch.zeros(4))
            self.register_buffer("last", torch.zeros(3, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.tanh(self.a(x))
            with torch.no_grad():
                self.seen.mul_(0.9).add_(h.mean(0))
                self.last.copy_(h)
            return h - self.seen

    model = Average()
    x = torch.randn(3, 4)
    module = rebuilt(fxgrow.capture(model, (x,)))
    for _ in range(2):
        for one in (model, module):
            one(x).sum().backward()
        for name in ("seen", "last"):
            buffer = module.get_buffer(name)
            assert not buffer.requires_grad and buffer.grad_fn is None, "else every call's graph would be kept"
            assert_same(buffer, model.get_buffer(name))
    assert_same(module.a.weight.grad, model.a.weight.grad)
    assert_same(module.a.bias.grad, model.a.bias.grad)


def test_keyword_arguments_and_named_outputs() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None, flag: bool = True) -> dict[str, Any]:
            y = self.fc(x)
            return {"y": y if scale is None else y * scale, "parts": (y, [y + 1]), "none": None}

    model = Named()
    x, s = torch.randn(3, 4), torch.randn(3, 1)
    module = rebuilt(fxgrow.capture(model, (x,), {"scale": s}))
    a, b = model(x, scale=s), module(x, scale=s)
    assert a.keys() == b.keys()
    assert_same(b, a)


def test_a_model_that_cannot_be_traced_gives_one_error_with_its_line() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 0:  # data-dependent
                return self.fc(x)
            return x

    with pytest.raises(fxgrow.CaptureError, match=r"(?s)Branch.*test_capture\.py:\d+ in forward: if x\.sum\(\) > 0"):
        fxgrow.capture(Branch(), (torch.randn(2, 4),))


def test_source_lines_are_of_the_model_wherever_it_is_installed() -> None:
    installed = Path(sysconfig.get_paths()["purelib"])
    frames = [
        ("/home/me/train.py", "return self.backbone(x)"),
        (installed / "torchvision/models/resnet.py", "x = self.layer1(x)"),
        (Path(torch.__file__).parent / "nn/modules/conv.py", "return F.conv2d(input, weight)"),
        (Path(contextlib.__file__), "return func(*args, **kwds)"),
        (Path(fxgrow.__file__).parent / "cli" / "models.py", "return self.module(x)"),
    ]
    trace = "\n".join(f'  File "{file}", line {i}, in forward\n    {code}' for i, (file, code) in enumerate(frames))
    assert source_line(trace) == f"{frames[1][0]}:1: x = self.layer1(x)"
    beside = trace.replace(str(installed / "torchvision"), "/home/me/torch/fxgrow")  # a folder of the user's, named so
    assert source_line(beside) == "/home/me/torch/fxgrow/models/resnet.py:1: x = self.layer1(x)"


def test_a_refusal_inside_an_installed_package_names_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a package of models is installed: code that torch's own modules call."""
    package = tmp_path / "site-packages"
    package.mkdir()
    (package / "modelzoo.py").write_text(
        "from torch import nn\n\n\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv = nn.Sequential(nn.Conv2d(3, 4, 3))\n\n"
        "    def forward(self, x):\n"
        "        return self.conv(x).mean((1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(str(package))
    modelzoo = __import__("modelzoo")
    program = fxgrow.capture(modelzoo.Net(), (torch.randn(2, 3, 6, 6),))
    reason = str(program.axes["conv.0/kernel"].reason)
    assert "modelzoo.py:10: return self.conv(x)" in reason


def test_only_the_batch_is_dynamic_where_asked_or_where_tracing_all_dims_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small_cnn().float(), torch.randn(2, 3, 16, 16)

    def open_dims(program: fxgrow.Program) -> list[bool]:
        (node,) = [n for n in program.graph.nodes if n.op == "placeholder"]
        return [not is_static(s) for s in shape_of(node.meta["val"])]

    assert open_dims(fxgrow.capture(model, (x,))) == [True, False, True, True]
    assert open_dims(fxgrow.capture(model, (x,), dynamic="batch")) == [True, False, False, False]
    export = torch.export.export

    def picky(*args: Any, dynamic_shapes: Any, **options: Any) -> Any:
        if any(len(dims) > 1 for dims in dynamic_shapes.values()):
            raise NotImplementedError("an inequality that sympy cannot solve")
        return export(*args, dynamic_shapes=dynamic_shapes, **options)

    monkeypatch.setattr(torch.export, "export", picky)
    with pytest.warns(UserWarning, match="an inequality that sympy cannot solve; captured with every input dim but"):
        program = fxgrow.capture(model, (x,))
    assert open_dims(program) == [True, False, False, False]
    batch = torch.randn(5, 3, 16, 16)
    assert torch.allclose(rebuilt(program).eval()(batch), model.eval()(batch))


def test_variable_arguments() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, *inputs: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
            return self.fc(sum(inputs) + named["bias"])

    model, x = Sum(), torch.randn(3, 4)
    module = rebuilt(fxgrow.capture(model, (x, x + 1), {"bias": torch.randn(3, 4)}))
    y, bias = torch.randn(5, 4), torch.randn(5, 4)
    assert torch.allclose(module(y, y * 2, bias=bias), model(y, y * 2, bias=bias))


def test_custom_backwards_are_refused() -> None:
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clamp(-1, 1)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return gradient

    class Net(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.fc, self.reentrant = nn.Linear(4, 4), reentrant

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.reentrant:
                return torch.utils.checkpoint.checkpoint(self.fc, x, use_reentrant=True)
            return Straight.apply(self.fc(x))

    before = torch.autograd.Function.__dict__["apply"]
    with pytest.raises(fxgrow.CaptureError, match="Straight, whose backward a graph loses"):
        fxgrow.capture(Net(False), (torch.randn(3, 4),))
    with pytest.raises(fxgrow.CaptureError, match="use_reentrant=False"):
        fxgrow.capture(Net(True), (torch.randn(3, 4),))
    assert torch.autograd.Function.__dict__["apply"] is before


def test_a_custom_backward_that_equals_its_forwards_is_measured_and_kept() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return 2 * ctx.saved_tensors[0] * gradient

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Square.apply(self.norm(self.fc(x)))

    model = Net()
    before = {n: (t.clone(), t._version) for n, t in model.state_dict(keep_vars=True).items()}
    with pytest.warns(UserWarning, match="Square; its backward is replaced"):
        module = rebuilt(fxgrow.capture(model, (torch.randn(3, 4),)))
    for name, t in model.state_dict(keep_vars=True).items():
        assert torch.equal(before[name][0], t)
        assert before[name][1] == t._version, "the measurement left the model alone"
    x = torch.randn(5, 4)
    assert_same(module.eval()(x), model.eval()(x))


def test_bad_input_is_named() -> None:
    with pytest.raises(fxgrow.CaptureError, match=r"write \(x,\)"):
        fxgrow.capture(nn.Linear(2, 2), torch.randn(2, 2))  # type: ignore[arg-type]
    with pytest.raises(fxgrow.CaptureError, match=r"needs an nn\.Module"):
        fxgrow.capture(torch.relu, (torch.randn(2),))  # type: ignore[arg-type]


def test_devices_are_not_baked() -> None:
    model = small_gpt(torch.float32)
    module = rebuilt(fxgrow.capture(model, tokens()))
    assert "device(type" not in module.code
    on_meta = module.to("meta")
    x, y = tokens()
    assert on_meta(x.to("meta"), y.to("meta"))[0].device.type == "meta"


def test_a_changed_regenerated_module_is_traced_anew() -> None:
    model = trained(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    x = torch.randn(5, 4)
    growth = fxgrow.grow(model, [{"op": "widen", "axis": "*/hidden", "factor": 2}], (x,))
    assert fxgrow.capture(growth.module, (x,)).graph is growth.program.graph
    node = next(n for n in growth.module.graph.nodes if "relu" in str(n.target))
    node.target = torch.ops.aten.tanh.default
    growth.module.recompile()
    again = fxgrow.grow(growth.module, [{"op": "widen", "axis": "*/hidden", "factor": 2}], (x,))
    assert any("tanh" in str(n.target) for n in again.program.graph.nodes)
    assert torch.allclose(again.module(x), growth.module(x), atol=1e-6)


WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "dtype": ((torch.randn(4, 5, dtype=torch.float64),), {}, r"itself raises .*float64 \(4, 5\) on cpu.*dtype"),
    "half": ((torch.randn(4, 5).half(),), {}, r"itself raises .*float16"),
    "size": ((torch.randn(4, 6),), {}, r"itself raises .*mat1 and mat2 shapes cannot be multiplied \(4x6 and 5x8\)"),
    "rank": ((torch.tensor(1.0),), {}, r"itself raises .*float32 \(\)"),
    "device": ((torch.randn(4, 5, device="meta"),), {}, r"itself raises .*on meta"),
    "too many": ((torch.randn(4, 5),) * 3, {}, r"does not fit Two\.forward\(x, y=None\): too many"),
    "missing": ((), {}, r"does not fit Two\.forward\(x, y=None\): missing a required argument: 'x'"),
    "unknown": ((torch.randn(4, 5),), {"z": torch.randn(4)}, r"does not fit Two\.forward.*'z'"),
    "sizes that disagree": ((torch.randn(4, 5), torch.randn(7, 3)), {}, r"itself raises .*\(4\) must match .*\(7\)"),
    "no tensor": (([1.0, 2.0],), {}, r"itself raises .*'list' object has no attribute"),
}


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x, y=None):  # type: ignore[no-untyped-def]
        h = self.out(torch.tanh(self.up(x.clone())))
        return h if y is None else h + y


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_example_gives_one_message(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    args, kwargs, words = WRONG[name]
    with pytest.raises(fxgrow.CaptureError, match=f"(?s){words}") as caught:
        fxgrow.capture(Two(), args, kwargs)
    text = str(caught.value)
    assert "torch.export" not in text
    assert len(text.splitlines()) <= 2
    if "itself raises" in words:
        assert "test_capture.py" in text
    out, err = capfd.readouterr()
    assert out == err == ""


class Cache:
    """What pytree cannot take apart, as transformers' caches are until somebody registers them."""

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []


class Cached(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.up, self.out, self.form = nn.Linear(5, 8), nn.Linear(8, 3), form

    def forward(self, x: torch.Tensor, use_cache: bool = True) -> Any:
        cache = Cache()
        cache.keys.append(torch.tanh(self.up(x)))
        y = self.out(cache.keys[0])
        kept = cache if use_cache else None
        return {"dict": {"y": y, "cache": kept}, "tuple": (y, kept), "alone": cache, "named": Result(y, kept)}[
            self.form
        ]


class Result(NamedTuple):
    y: torch.Tensor
    cache: Any


@pytest.mark.parametrize("form", ["dict", "tuple", "named"])
def test_a_cache_among_the_results_is_left_out_with_a_note(form: str) -> None:
    model = trained(Cached(form).double()).eval()
    x = torch.randn(4, 5, dtype=torch.float64)
    with pytest.warns(UserWarning, match="returns a Cache, .* None in its place"):
        module = fxgrow.grow(model, {"op": "widen", "axis": "up.weight:0", "factor": 2}, (x,)).module
    for rows in (1, 7):
        x = torch.randn(rows, 5, dtype=torch.float64)
        result, expected = module(x), model(x)
        assert type(result) is type(expected)
        y, kept = (result["y"], result["cache"]) if form == "dict" else result
        assert kept is None
        torch.testing.assert_close(y, expected["y"] if form == "dict" else expected[0], rtol=0, atol=1e-12)
    assert "forward" not in model.__dict__


def test_a_result_that_nobody_can_take_apart_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(fxgrow.CaptureError, match="returns a Cache, which PyTorch cannot take apart"):
        fxgrow.capture(Cached("alone"), (torch.randn(4, 5),))

    class OnData(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum().item() > 0 else x

    with pytest.raises(
        fxgrow.CaptureError, match=r"(?s)data-dependent.*test_capture.py.*must not depend on tensor values"
    ):
        fxgrow.capture(OnData(), (torch.randn(4, 5),))
    out, err = capfd.readouterr()
    assert out == err == ""


def test_a_transformers_model_as_everybody_builds_it() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=65, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = trained(transformers.LlamaForCausalLM(config)).eval()
    ids = torch.randint(65, (2, 7), generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="returns a DynamicCache"):
        growth = fxgrow.grow(model, {"op": "widen", "axis": "*/hidden", "factor": 2}, (), {"input_ids": ids})
    assert growth.receipt.error_float64 is not None
    assert growth.receipt.error_float64 <= 1e-12
    assert "past_key_values" not in growth.module(input_ids=ids)


class Remembers(nn.Module):
    """Shares a list with its part, and makes a table at its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 3)
        self.config, self.shapes, self.last = {"width": 8, "seen": [1]}, [()], None
        self.up.config = self.config

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(x.shape))
        self.config["seen"].append(2)
        self.config["more"] = 1
        if not hasattr(self, "table"):
            self.table = torch.ones(1, dtype=x.dtype)
        self.last = self.up(x) * self.table
        return self.down(self.last.tanh())


@pytest.mark.parametrize("verify", ["native", "float64"])
def test_a_trace_leaves_attributes_as_they_were(verify: str) -> None:
    model, x = Remembers().double(), torch.randn(4, 5, dtype=torch.float64)
    config, shapes = model.config, model.shapes
    fxgrow.grow(model, {"op": "widen", "axis": "up.weight:0", "factor": 2}, (x,), verify=verify)
    assert model.config is model.up.config is config and config == {"width": 8, "seen": [1]}
    assert model.shapes is shapes and shapes == [()] and model.last is None
    assert not hasattr(model, "table")


@functools.lru_cache(maxsize=4)
def angles(size: int) -> torch.Tensor:
    return torch.linspace(1, 2, size, dtype=torch.float64)


class Looked(nn.Module):
    """Reads tables that a cache holds by size."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 3)

    @staticmethod
    @functools.lru_cache
    def more(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x) * angles(4)[:1]
        return self.down((h + self.more(3)[0]).tanh())


def test_caches_keep_no_tables_of_a_trace() -> None:
    model, x = trained(Looked().double()), torch.randn(4, 5, dtype=torch.float64)
    before = copy.deepcopy(model)
    fxgrow.grow(model, {"op": "widen", "axis": "up.weight:0", "factor": 2}, (x,)).apply_(model)
    torch.testing.assert_close(model(x), before(x), rtol=0, atol=1e-12)


class Grouped(nn.Module):
    """Grouped queries whose keys are what is left, which may be nothing."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.qkv, self.heads = nn.Linear(8, 16), heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.qkv(x).unflatten(-1, (8, 2)).transpose(1, 2)
        q, k, v = y[:, : self.heads], y[:, self.heads :], y[:, self.heads :]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def test_a_call_that_would_end_the_process_raises() -> None:
    """PyTorch divides by the number of heads of the keys, also in a trace."""
    fxgrow.capture(Grouped(4), (torch.randn(2, 3, 8),))
    with pytest.raises(fxgrow.CaptureError, match="keys or values of no heads"):
        fxgrow.capture(Grouped(8), (torch.randn(2, 3, 8),))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"args": (), "kwargs": [torch.randn(2, 3)]}, "kwargs must be a dict, by name, and is a list"),
        (
            {"args": (torch.randn(2, 3),), "calls": [(torch.randn(2, 3),)]},
            "calls must be a dict, by name, and is a list",
        ),
    ],
)
def test_examples_that_are_not_given_as_they_should_be(how: dict[str, Any], expected: str) -> None:
    with pytest.raises(fxgrow.CaptureError, match=expected):
        fxgrow.capture(torch.nn.Linear(3, 2), **how)
