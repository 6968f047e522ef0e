"""Plans of known growths, kept word for word: ``python -m tests.plans`` compares, ``--write`` keeps today's.

Each file of ``tests/fixtures/plans`` holds the plans of one model and one spec (or of several, one growth after the
other): digests of their JSON text, and the same in words, so that a difference can be read. What a plan says is
decided by names, sizes and patterns. Numbers that are computed from a model's values, or by functions that processors
round differently, are kept to nine digits. Names of nodes are those of one PyTorch; under another the graph changes are
not compared, and all else is.

    python -m tests.plans                    # compare
    python -m tests.plans gpt-heads          # some of them
    python -m tests.plans --write            # on purpose: look at the difference before it is committed
"""

from __future__ import annotations

import argparse
import difflib
import functools
import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.emit.module import regenerate
from fxgrow.plan import DimPlan, GrowthPlan, Step, TensorPlan
from tests.models import small_cnn, small_gpt, tokens
from tests.zoo.zoo import NORMS, ZOO, floats, rotate_half, trained

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "fixtures" / "plans"
#: the PyTorch whose graphs the kept plans change
TORCH = "2.13"

Made = tuple[nn.Module, tuple[Any, ...]]
Operations = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A model and the growths that it is put through, one after the other; ``dynamic``: see ``fxgrow.capture``."""

    make: Callable[[], Made]
    growths: list[Operations]
    dynamic: Literal["all", "batch"] = "all"


# models ---------------------------------------------------------------------------------------------------------------


@functools.cache
def _zoo(name: str) -> Callable[[], Made]:
    def make() -> Made:
        example = ZOO[name]()
        return example.model, example.args

    return make


def _seeded(make: Callable[[], nn.Module], *shapes: tuple[int, ...]) -> Callable[[], Made]:
    def made() -> Made:
        torch.manual_seed(0)
        return trained(make()), tuple(floats(*s) for s in shapes)

    return made


class Recurrent(nn.Module):
    """An LSTM between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rnn, self.head = nn.Linear(3, 6), nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.first(x))[0])  # type: ignore[no-any-return]


class Attending(nn.Module):
    """Two heads of one stream that read another."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.query, self.key = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.value, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = (
            z.unflatten(-1, (2, 4)).transpose(1, 2) for z in (self.query(x), self.key(memory), self.value(memory))
        )
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class EncoderDecoder(nn.Module):
    """Two streams: every layer of the decoder reads what the encoder made."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Attending(), nn.ModuleList([Attending(), Attending()])
        self.source, self.target, self.head = nn.Embedding(11, 8), nn.Embedding(13, 8), nn.Linear(8, 13)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, x = self.source(source), self.target(target)
        memory = self.encoder(memory, memory)
        for layer in self.decoder:
            x = layer(x, memory)
        return self.head(x)  # type: ignore[no-any-return]


def _encoder_decoder() -> Made:
    torch.manual_seed(0)
    return trained(EncoderDecoder()), (torch.randint(11, (2, 5)), torch.randint(13, (2, 4)))


class Experts(nn.Module):
    """Every expert on every token, weighed by a router."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gate, self.head = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 4)
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 6)), nn.Parameter(torch.randn(3, 6, 8))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        weights = self.gate(y).softmax(-1)
        hidden = torch.nn.functional.silu(torch.einsum("bc,ecf->bef", y, self.up))
        return self.head(x + torch.einsum("bef,efc,be->bc", hidden, self.down, weights))  # type: ignore[no-any-return]


class Written(nn.Module):
    """Layer norm as models write it out, between an embedding and a head that residuals are added to."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down, self.head = nn.Linear(5, 8), nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)
        self.norm, self.last = NORMS["layer-var"](8), NORMS["rms-written"](8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(self.last(x))  # type: ignore[no-any-return]


class Rotary(nn.Module):
    """Tables of cosines and sines, and a mask: as many rows as there are positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.head = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 11)
        angles = torch.outer(torch.arange(9).double(), 100.0 ** (-torch.arange(0, 8, 2).double() / 8))
        self.register_buffer("cos", torch.cat((angles, angles), -1).cos())
        self.register_buffer("sin", torch.cat((angles, angles), -1).sin())
        self.register_buffer("mask", torch.tril(torch.ones(9, 9)).bool())

    def forward(self, idx: Tensor) -> Tensor:
        x, t = self.embed(idx), idx.shape[1]
        x = x * self.cos[:t] + rotate_half(x) * self.sin[:t]
        y = self.up(x)
        scores = (y @ y.transpose(1, 2)).masked_fill(~self.mask[:t, :t], float("-inf"))
        return self.head(scores.softmax(-1) @ torch.relu(y))  # type: ignore[no-any-return]


def _rotary() -> Made:
    torch.manual_seed(0)
    return trained(Rotary()), (torch.randint(11, (2, 6)),)


def _chain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(96, 3))


def _example_gpt() -> Made:
    return small_gpt(), tokens()


def _cnn() -> Made:
    model = small_cnn().eval()
    return model, (floats(2, 3, 8, 8),)


# growths --------------------------------------------------------------------------------------------------------------


def _widen(axis: str, **options: Any) -> dict[str, Any]:
    return {"op": "widen", "axis": axis, **(options or {"factor": 2})}


_NOISE = {"kind": "antisymmetric", "scale": 0.1, "relative": True, "seed": 3}
_GPT = "transformer.h.*"

CASES: dict[str, Case] = {
    "gpt-hidden": Case(_example_gpt, [[_widen(f"{_GPT}.mlp/hidden", factor=2, noise=_NOISE)]]),
    "gpt-heads": Case(_example_gpt, [[_widen("*/heads")]]),
    "gpt-residual-by-half": Case(_example_gpt, [[_widen("*/residual", factor=1.5)]]),
    "gpt-add": Case(_example_gpt, [[_widen("*/hidden", by=6, fill="add", seed=5)]]),
    "gpt-add-with-zero": Case(
        _example_gpt, [[_widen("*/hidden", by=3, fill="add", fan_in="random", fan_out="zero", seed=5)]]
    ),
    "gpt-uneven": Case(_example_gpt, [[_widen("*/hidden", factor=3, split="uneven")]]),
    "gpt-deepen": Case(_example_gpt, [[{"op": "deepen", "stack": "transformer.h", "factor": 2}]]),
    "gpt-extend": Case(
        _example_gpt,
        [
            [
                {"op": "extend", "axis": "*/vocab", "by": 7, "preserve": "approximate"},
                {"op": "extend", "axis": "*/positions", "factor": 2},
            ]
        ],
    ),
    "gpt-all-at-once": Case(
        _example_gpt,
        [
            [
                _widen(f"{_GPT}.mlp/hidden"),
                _widen("*/heads"),
                _widen("*/residual", to=40),
                {"op": "deepen", "stack": "transformer.h", "after": [0]},
            ]
        ],
    ),
    "gpt-schedule": Case(
        _example_gpt,
        [
            [_widen(f"{_GPT}.mlp/hidden", factor=2, noise=_NOISE)],
            [_widen("./residual", factor=2, noise={**_NOISE, "seed": 4})],
            [{"op": "deepen", "stack": "transformer.h", "factor": 2, "order": "append"}],
        ],
    ),
    "written-norm": Case(_seeded(Written, (4, 5)), [[_widen("*/hidden"), _widen("*/residual")]]),
    "llama-heads-and-stream": Case(_zoo("llama"), [[_widen("*/kv_heads"), _widen("*/residual", to=24)]]),
    "rotary-tables-extend": Case(
        _rotary, [[{"op": "extend", "axis": "cos:0", "factor": 2}, _widen("*/rank", factor=2)]]
    ),
    "vit": Case(_zoo("vit"), [[_widen("*/heads"), _widen("fc1.weight:0", by=4, fill="add"), _widen("*/residual")]]),
    "cnn": Case(_cnn, [[_widen("*/channels"), _widen("*/hidden", by=4, fill="add")]], "batch"),
    "resnet-grouped": Case(_zoo("resnet-kind=grouped"), [[_widen("*/channels")]], "batch"),
    "group-norm": Case(_zoo("group-norm"), [[_widen("./channels")]], "batch"),
    "unet": Case(_zoo("unet"), [[_widen("*/channels", factor=1.5)]], "batch"),
    "insert-then-widen": Case(
        _seeded(_chain, (2, 3, 8, 8)),
        [[{"op": "insert", "layer": "conv", "after": "1"}, _widen("0.weight:0", factor=2)]],
    ),
    "rnn": Case(_seeded(Recurrent, (2, 4, 3)), [[_widen("*/hidden", factor=2)]]),
    "experts": Case(_seeded(Experts, (4, 5)), [[_widen("*/hidden"), _widen("*/residual", by=4)]]),
    "encoder-decoder": Case(
        _encoder_decoder,
        [
            [_widen("*/heads"), _widen("*/hidden", factor=1.5)],
            [{"op": "deepen", "stack": "decoder", "by": 1}, _widen("./residual")],
        ],
        "batch",
    ),
    "autoencoder": Case(_zoo("autoencoder"), [[_widen("w1:0")]]),
    "siamese": Case(_zoo("siamese-norm=False"), [[_widen("*/hidden"), _widen("encoder.3.weight:0", factor=3)]]),
}


@functools.cache
def captured(make: Callable[[], Made], dynamic: Literal["all", "batch"]) -> tuple[fxgrow.Program, tuple[Any, ...]]:
    """What a maker makes, captured once: tracing takes most of the time."""
    model, args = make()
    return fxgrow.capture(model.eval(), args, dynamic=dynamic), args


def plans_of(case: Case) -> list[GrowthPlan]:
    """The plan of each growth of a case; each but the last is carried out."""
    specs = [fxgrow.GrowthSpec.parse({"operations": operations}) for operations in case.growths]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program, args = captured(case.make, case.dynamic)
        plans = []
        for spec in specs[:-1]:
            growth = fxgrow.grow(regenerate(program, program.tensors), spec, args, verify=False)
            plans.append(growth.plan)
            program = fxgrow.capture(growth.module, args)
        return [*plans, fxgrow.plan_growth(program, specs[-1])[0]]


# a plan in words ------------------------------------------------------------------------------------------------------

#: fields of a plan whose numbers come from functions that processors round differently
_ROUNDED = ("frequencies",)


def data_of(plan: GrowthPlan) -> dict[str, Any]:
    """What the plan's JSON text says, with rounded numbers where a machine has a say."""

    def plain(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: plain(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [plain(v, key) for v in value]
        if isinstance(value, str):
            return value.replace(f"{ROOT}/", "")  # lines of this checkout
        return float(f"{value:.9g}") if key in _ROUNDED and isinstance(value, float) else value

    return dict(plain(json.loads(plan.to_json())))


def digest(value: Any) -> str:
    """16 hex digits of the value's JSON text; keys in order, so that the order of fields does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def words(plan: GrowthPlan) -> Iterator[str]:
    """The plan, line by line: each line that changes says what changed."""
    data = data_of(plan)
    steps, tensors = data.pop("steps"), data.pop("tensors")
    yield f"plan of {plan.model}: {plan.parameters_before:,} to {plan.parameters_after:,} parameters"
    yield f"  rest {digest(data)}, tensors {digest(tensors)}, order of tensors {digest(list(tensors))}"
    for step, raw in zip(plan.steps, steps, strict=True):
        changes = raw.pop("changes", [])
        yield f"step {step.op}, {step.exactness}: {digest(raw)}"
        yield from _step(step)
        for change, said in zip(step.changes, changes, strict=True):
            yield f"  change {change.kind} {_change(said)}"
    for name, tensor in plan.tensors.items():
        if not tensor.trivial:
            yield f"tensor {name} {_tensor(tensor)} [{digest(tensors[name])}]"
    kept = sum(t.trivial for t in plan.tensors.values())
    yield f"{kept} of {len(plan.tensors)} tensors as they are; aliases {plan.aliases}"


def _step(step: Step) -> Iterator[str]:
    for a in step.axes:
        gradients = "" if a.exact_gradients else ", other gradients"
        born = f", {a.newborn} newborn ({a.newborn_content})" if a.newborn else ""
        yield f"  axis {a.name} ({a.role}) {a.old} to {a.new}, {a.fill}, {a.split}, copies {a.copies}{born}{gradients}"
    for o in step.outputs:
        yield f"  output {o.output}:{o.dim} {o.old} to {o.new}"
    if step.changed_outputs:
        yield f"  changed outputs {step.changed_outputs}"
    for note in step.notes:
        yield f"  note {note}"


def _change(said: dict[str, Any]) -> str:
    rest = {k: v for k, v in said.items() if k != "kind"}
    return json.dumps(rest, sort_keys=True, ensure_ascii=False)


def _tensor(t: TensorPlan) -> str:
    parts = [f"{t.shape} from {t.source or t.init}"]
    parts += [f"dim {i}: {_dim(d)}" for i, d in enumerate(t.dims) if d is not None]
    if t.scale != 1.0 or t.gradient_scale != 1.0:
        parts.append(f"scale {t.scale:.12g}, gradients {t.gradient_scale:.12g}")
    parts += [f"zero, level {t.level}"] if t.zero else []
    parts += [f"noise {t.noise.kind} {t.noise.scale} seed {t.noise.seed}"] if t.noise is not None else []
    parts += [f"continued: {t.continuation.words}"] if t.continuation is not None else []
    parts += [f"{len(t.stages)} stages"] if t.stages else []
    return "; ".join(parts)


def _dim(d: DimPlan) -> str:
    """Runs of the index, and the distinct factors."""
    runs = d.model_dump(mode="json", exclude_none=True)
    out = " ".join(f"{s}+{c}" if s >= 0 else f"new{s}+{c}" for s, c in runs["index"])
    for name in ("split", "gradient", "fill"):
        if name in runs:
            out += f", {name} " + " ".join(f"{v:.6g}x{c}" for v, c in runs[name][:6])
            out += " ..." if len(runs[name]) > 6 else ""
    return out


def text_of(name: str) -> str:
    """What the fixture of a case holds."""
    lines = [line for plan in plans_of(CASES[name]) for line in words(plan)]
    return "\n".join(lines) + "\n"


def compared(text: str, same_torch: bool) -> list[str]:
    """The lines that hold here: under another PyTorch nodes have other names, and so have the changes."""
    return [line for line in text.splitlines() if same_torch or not line.startswith(("  change", "step"))]


def difference(name: str) -> str:
    """A unified diff between the plan that is kept and today's; "" where they are the same."""
    kept = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    same_torch = torch.__version__.startswith(TORCH + ".")
    a, b = compared(kept, same_torch), compared(text_of(name), same_torch)
    return "\n".join(difflib.unified_diff(a, b, f"kept/{name}", f"now/{name}", lineterm="", n=1))


def main(argv: list[str] | None = None) -> int:
    """Compare or write; exit status 1 where a plan differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.plans", description=__doc__, formatter_class=_Raw)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(CASES)}")
    parser.add_argument("--write", action="store_true", help="keep today's plans")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    chosen = options.names or list(CASES)
    if unknown := set(chosen) - set(CASES):
        parser.error(f"no such plans: {', '.join(sorted(unknown))}")
    if options.write:
        FOLDER.mkdir(parents=True, exist_ok=True)
        for name in chosen:
            (FOLDER / f"{name}.txt").write_text(text_of(name), encoding="utf-8")
        return 0
    different = [d for name in chosen if (d := difference(name))]
    print("\n".join(different) if different else f"{len(chosen)} plans are as they were")
    return bool(different)


_Raw = argparse.RawDescriptionHelpFormatter

if __name__ == "__main__":
    sys.exit(main())
