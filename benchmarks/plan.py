"""What it costs to capture and plan a growth, against the number of layers: Llama-70B shapes on the meta device.

A model of this file's own (grouped queries, rotary positions, RMSNorm written out, SwiGLU) is built on meta tensors,
captured, and its MLP width doubled in a plan, which moves no weights. ``torch.export`` is told apart from fxgrow's own
work. Every depth has a process of its own; memory is the peak over all of it, less what the process held after import.
"""

from __future__ import annotations

import cProfile
import pstats
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import common


@dataclass
class LlamaConfig:
    """Sizes; the defaults are Llama-70B's."""

    vocab: int = 128256
    width: int = 8192
    hidden: int = 28672
    heads: int = 64
    kv_heads: int = 8
    layers: int = 80
    theta: float = 500000.0
    eps: float = 1e-5


SMALL = {"vocab": 256, "width": 128, "hidden": 448, "heads": 8, "kv_heads": 2}


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, half-split layout; x is (batch, heads, time, head width)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head = c.heads, c.kv_heads, c.width // c.heads
        self.q_proj = nn.Linear(c.width, c.heads * self.head, bias=False)
        self.k_proj = nn.Linear(c.width, c.kv_heads * self.head, bias=False)
        self.v_proj = nn.Linear(c.width, c.kv_heads * self.head, bias=False)
        self.o_proj = nn.Linear(c.heads * self.head, c.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, time, _ = x.shape
        group = self.heads // self.kv_heads
        q = rotate(self.q_proj(x).view(batch, time, self.heads, self.head).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(batch, time, self.kv_heads, self.head).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(batch, time, self.kv_heads, self.head).transpose(1, 2)
        shape = (batch, self.kv_heads, group, time, self.head)
        k = k[:, :, None].expand(shape).reshape(batch, self.heads, time, self.head)
        v = v[:, :, None].expand(shape).reshape(batch, self.heads, time, self.head)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, time, self.heads * self.head))


class MLP(nn.Module):
    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.width, c.hidden, bias=False)
        self.up_proj = nn.Linear(c.width, c.hidden, bias=False)
        self.down_proj = nn.Linear(c.hidden, c.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.width, c.eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.width, c.eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A decoder-only transformer with Llama's structure."""

    inv_freq: Tensor

    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab, c.width)
        self.layers = nn.ModuleList([Layer(c) for _ in range(c.layers)])
        self.norm = RMSNorm(c.width, c.eps)
        self.lm_head = nn.Linear(c.width, c.vocab, bias=False)
        head = c.width // c.heads
        self.register_buffer("inv_freq", c.theta ** (-torch.arange(0, head, 2).float() / head), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, time, vocab) of int64 tokens (batch, time)."""
        angles = torch.arange(tokens.shape[1], device=tokens.device)[:, None] * self.inv_freq
        cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, cos.to(x.dtype), sin.to(x.dtype))
        return self.lm_head(self.norm(x))


SPECS: dict[str, list[dict[str, Any]]] = {
    "hidden": [{"op": "widen", "axis": "*/hidden", "factor": 2}],
    "residual": [{"op": "widen", "axis": "*/residual", "factor": 2}],
    "width": [{"op": "widen", "axis": f"*/{a}", "factor": 2} for a in ("hidden", "residual")],
    "depth": [{"op": "deepen", "stack": "layers", "factor": 2}],
}


def measure(layers: int, spec: str, small: bool, profile: str | None = None) -> dict[str, Any]:
    """Capture and plan once on meta; seconds of each part, and peak memory."""
    import fxgrow
    from fxgrow.growth import plan_growth

    torch.set_num_threads(1)
    torch._dynamo  # noqa: B018  # loaded by export anyway: not what is measured
    before = common.resident()
    with torch.device("meta"):
        config = LlamaConfig(layers=layers, **(SMALL if small else {}))
        model = Llama(config).to(torch.bfloat16)
        tokens = torch.zeros(2, 16, dtype=torch.int64)
    export = Export()
    with common.Meter() as capture, export:
        program = fxgrow.capture(model, (tokens,))
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    with common.Meter() as analysis:
        axes = len(list(program.axes))
    with common.Meter() as planning:
        plan, _ = plan_growth(program, fxgrow.GrowthSpec.parse(SPECS[spec]))
    profiler.disable()
    if profile:
        pstats.Stats(profiler).sort_stats(profile).print_stats(35)
    peak = max(capture.peak, analysis.peak, planning.peak)
    return {
        "layers": layers,
        "nodes": len(program.graph.nodes),
        "axes": axes,
        "parameters_before": plan.parameters_before,
        "parameters_after": plan.parameters_after,
        "export": export.seconds,
        "traces": export.count,
        "capture": capture.figures(),
        "analyse": analysis.figures(),
        "plan": planning.figures(),
        "own": capture.wall - export.seconds + analysis.wall + planning.wall,
        "total": capture.wall + analysis.wall + planning.wall,
        "own_cpu": capture.cpu - export.cpu + analysis.cpu + planning.cpu,
        "total_cpu": capture.cpu + analysis.cpu + planning.cpu,
        "export_cpu": export.cpu,
        "peak_bytes": peak - before,
        "peak_process_bytes": peak,
        "plan_json_bytes": len(plan.to_json()),
    }


class Export:
    """Seconds spent in ``torch.export.export``, and how often it ran."""

    seconds = cpu = 0.0
    count = 0

    def __enter__(self) -> Export:
        original = self._original = torch.export.export

        def timed(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.perf_counter(), time.process_time()
            self.count += 1
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - wall
                self.cpu += time.process_time() - cpu

        torch.export.export = timed
        return self

    def __exit__(self, *_: object) -> None:
        torch.export.export = self._original


def run(argv: list[str]) -> int:
    """Measure, print, save."""
    options = common.parser("plan", __doc__)
    options.add_argument("--layers", type=int, nargs="*", default=None)
    options.add_argument("--spec", choices=list(SPECS), default="width")
    options.add_argument("--depth", action="store_true", help="plan a doubled depth as well")
    given = options.parse_args(argv)
    depths = given.layers or ([1, 2] if given.quick else [2, 8, 20, 80])
    kinds = [given.spec, "depth"] if given.depth else [given.spec]
    runs: dict[str, list[dict[str, Any]]] = {
        kind: [
            common.isolated("benchmarks.plan:measure", {"layers": n, "spec": kind, "small": given.quick})
            for n in depths
        ]
        for kind in kinds
    }
    for kind, found in runs.items():
        common.table(
            f"Llama-70B shapes on meta, plan of {_words(kind)}: wall seconds (CPU seconds)",
            [
                "layers",
                "nodes",
                "parameters",
                "traces",
                "export",
                "own: capture",
                "analyse",
                "plan",
                "own / all",
                "all",
                "peak MB",
            ],
            [_row(r) for r in found],
        )
    verdicts = []
    deepest = runs[given.spec][-1]
    if not given.quick and depths[-1] == 80:
        verdicts = [
            common.verdict("80 layers, capture and plan, wall", deepest["total"], 90, " s"),
            common.verdict("80 layers, peak memory", deepest["peak_process_bytes"] / 1e9, 2, " GB"),
            common.verdict("80 layers, own part of the CPU time", deepest["own_cpu"] / deepest["total_cpu"], 1 / 3),
        ]
    with common.figure(given.out, "plan") as (ax,):
        found = runs[given.spec]
        nodes = [r["nodes"] for r in found]
        ax.plot(nodes, [r["total_cpu"] for r in found], "o-", label="all")
        ax.plot(nodes, [r["export_cpu"] for r in found], "s--", label="torch.export")
        ax.plot(nodes, [r["own_cpu"] for r in found], "^-", label="fxgrow's own")
        ax.set_xlabel("nodes of the graph")
        ax.set_ylabel("CPU seconds")
        ax.legend(frameon=False)
    common.save(given.json, {"environment": common.environment(1), "runs": runs, "verdicts": verdicts})
    return 0


def _words(spec: str) -> str:
    return ", ".join(f"{o.get('axis', o.get('stack'))} x{o['factor']}" for o in SPECS[spec])


def _row(r: dict[str, Any]) -> list[str]:
    own = {k: r["capture"][k] - r["export" if k == "wall" else "export_cpu"] for k in ("wall", "cpu")}
    return [
        str(r["layers"]),
        f"{r['nodes']:,}",
        f"{r['parameters_before'] / 1e9:.1f} to {r['parameters_after'] / 1e9:.1f} G",
        str(r["traces"]),
        f"{r['export']:.1f} ({r['export_cpu']:.1f})",
        *[f"{x['wall']:.2f} ({x['cpu']:.2f})" for x in (own, r["analyse"], r["plan"])],
        f"{r['own_cpu'] / r['total_cpu']:.0%}",
        f"{r['total']:.1f} ({r['total_cpu']:.1f})",
        f"{r['peak_process_bytes'] / 1e6:.0f}",
    ]
