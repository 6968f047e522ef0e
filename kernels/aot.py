"""Ahead-of-time compilation of the Triton kernels, with no GPU: what the machine code of each variant costs.

Run as a module it prints one JSON row per variant. It needs a process in which TRITON_INTERPRET is not set when Triton
is imported: use `table`, which starts one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TARGETS: dict[str, tuple[str, Any, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
    "gfx950": ("hip", "gfx950", 64),
}
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "float64": "*fp64"}


@dataclass(frozen=True)
class Variant:
    """One kernel to compile. ``kernel``: copy (whole copies), pair, triple, quad, woven (interleaved pairs), gather."""

    kernel: str
    dtype: str
    noise: bool


VARIANTS = [
    *(Variant("copy", d, False) for d in ("float32", "bfloat16", "float64")),  # float16 is bfloat16's code
    *(Variant("pair", d, True) for d in POINTERS),
    Variant("pair", "bfloat16", False),
    *(Variant(k, d, True) for k in ("triple", "quad", "woven") for d in ("float32", "bfloat16", "float64")),
    Variant("woven", "bfloat16", False),
    Variant("gather", "bfloat16", False),
    *(Variant("gather", d, True) for d in ("float32", "bfloat16", "float64")),
]


@dataclass(frozen=True)
class Row:
    """What the machine code of a variant says. ``spills``: instructions that touch local (scratch) memory."""

    target: str
    kernel: str
    dtype: str
    noise: str
    registers: int
    spills: int
    shared_bytes: int
    instructions_per_output: float
    widest_load_bits: int
    widest_store_bits: int


def _signature(variant: Variant, block: int, target: int) -> tuple[Any, dict[str, str], dict[str, Any], list[str]]:
    import triton.language as tl

    from fxgrow.kernels import triton_kernels as kernels

    element = POINTERS[variant.dtype]
    compute = tl.float64 if variant.dtype == "float64" else tl.float32
    if variant.kernel != "gather":
        leaves = {"copy": 2, "pair": 2, "woven": 2, "triple": 3, "quad": 4}[variant.kernel]
        types = {"source": element, "target": element, "parameters": "*fp64", "columns": "i32"}
        types |= dict.fromkeys(
            ("source_stride", "target_stride", "row_step", "row_offset", "row_base", "row_linear"), "i64"
        )
        types |= {"key0": "i32", "key1": "i32"}
        constants: dict[str, Any] = {
            "LEAVES": leaves,
            "SPLIT": variant.kernel != "copy",
            "NOISE": variant.noise,
            "LEAN": int(leaves == 3),
            "INTERLEAVED": variant.kernel == "woven",
            "ROW_COPIES": 1,
            "DIST": 0,
            "BLOCK": block,
            "C": compute,
            "TARGET": target,
            "ROWS_LAST": False,
        }
        aligned = ["source", "target", "parameters", "columns", "source_stride", "target_stride", "row_linear"]
        return kernels.scatter, types, constants, aligned
    types = {"source": element, "target": element, "means": "*fp64" if variant.dtype == "float64" else "*fp32"}
    types |= {"row_offsets": "*i64", "row_factors": "*fp64", "row_flags": "*u8", "units": "*i64", "codes": "*u8"}
    types |= {"scales": "*fp64", "copies": "*u8", "tree_nodes": "*i32", "tree_numbers": "*fp64", "pairs": "*i32"}
    types |= {"parameters": "*fp64", "columns": "i32", "column_stride": "constexpr", "column_offset": "i32"}
    types |= {"mean_stride0": "constexpr", "mean_stride1": "constexpr", "levels": "i32", "entries": "i32"}
    types |= dict.fromkeys(("key0", "key1", "random0", "random1"), "i32")
    flags = ["INDEXED", "HAS_SOURCE", "HAS_BIRTHS", "HAS_MEANS", "HAS_FACTOR", "HAS_SCALES"]
    constants = {"column_stride": 1, "mean_stride0": 1, "mean_stride1": 0, **dict.fromkeys(flags, variant.noise)}
    constants |= {"INDEXED": True, "HAS_SOURCE": True, "SPLIT": int(variant.noise), "TREE": variant.noise}
    constants |= {"TREE_NOISE": variant.noise, "PAIRS": variant.noise, "INDEPENDENT": False, "COLUMN_COPIES": False}
    constants |= {"BITS": False, "DIST": 0, "BLOCK": block, "C": compute, "TARGET": target}
    aligned = [n for n, t in types.items() if t.startswith("*")]
    return kernels.gather, types, constants, aligned


def compile_variant(variant: Variant, target: str) -> Row:
    """Compile one variant for one target and read its machine code.

    Raises:
        RuntimeError: a disassembler is missing (see `tools`).
    """
    import triton
    from triton.backends.compiler import GPUTarget

    from fxgrow.kernels.gpu import GATHER_TILE, TILE, TILES, tile_name

    backend, arch, lanes = TARGETS[target]
    block, warps = TILES.get(tile_name(variant.dtype, variant.noise, variant.kernel == "woven"), TILE)
    if variant.kernel == "gather":
        block, warps = GATHER_TILE
    kernel, types, constants, aligned = _signature(variant, block, 1 if backend == "cuda" else 2)
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = triton.compiler.ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    done = triton.compile(source, target=GPUTarget(backend, arch, lanes), options=options)
    outputs = block * (1 if variant.kernel == "gather" else constants["LEAVES"]) / (warps * lanes)
    read = _read_sass(done.asm["cubin"]) if backend == "cuda" else _read_amd(done.asm["amdgcn"])
    registers, spills, instructions, load, store = read
    noise = "antisymmetric" if variant.noise else "none"
    per, shared = round(instructions / outputs, 2), int(done.metadata.shared)
    return Row(target, variant.kernel, variant.dtype, noise, registers, spills, shared, per, load, store)


def tools() -> dict[str, str | None]:
    """Paths of the disassemblers: those in the Triton wheel, else those on PATH."""
    folder = None
    with contextlib.suppress(ImportError):
        import triton

        folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found: dict[str, str | None] = {}
    for name in ("cuobjdump", "nvdisasm"):
        bundled = folder / name if folder is not None else None
        found[name] = str(bundled) if bundled is not None and bundled.exists() else shutil.which(name)
    return found


def _read_sass(cubin: bytes) -> tuple[int, int, int, int, int]:
    at = tools()
    if not (at["cuobjdump"] and at["nvdisasm"]):
        raise RuntimeError(
            "cuobjdump and nvdisasm are needed to read NVIDIA machine code; neither Triton nor PATH has them"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def output(*command: str) -> str:
            return subprocess.run([*command, str(path)], capture_output=True, text=True, check=True).stdout

        usage = output(str(at["cuobjdump"]), "-res-usage")
        listing = output(str(at["nvdisasm"]), "-c")
    numbers = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    lines = [line for line in listing.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line) and "NOP" not in line]
    exits = [i for i, line in enumerate(lines) if re.search(r"\bEXIT\b", line) and "@" not in line]
    lines = lines[: exits[-1] + 1] if exits else lines  # behind it stands an endless loop of padding
    code = "\n".join(lines)
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code)) + numbers["STACK"] + numbers["LOCAL"]
    return numbers["REG"], spills, len(lines), _widest(code, r"LDG\S*"), _widest(code, r"STG\S*")


def _widest(code: str, pattern: str) -> int:
    widths = [0]
    for name in re.findall(rf"\b{pattern}", code):
        size = re.search(r"\.(128|64|U16|S16|U8|S8|256)(?:\.|$)", name)
        widths.append({"U16": 16, "S16": 16, "U8": 8, "S8": 8}.get(size[1], 0) or int(size[1]) if size else 32)
    return max(widths)


def _read_amd(text: str) -> tuple[int, int, int, int, int]:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    body = text.split(".section", 2)[0] if ".section" in text else text
    ends = [found.end() for found in re.finditer(r"s_endpgm", text)]
    body = text[: ends[-1]] if ends else body
    lines = [x for x in body.splitlines() if re.match(r"\s+(?:v|s|global|buffer|flat|ds|scratch)_\w+", x)]
    code = "\n".join(lines)
    spills = number("vgpr_spill_count") + number("sgpr_spill_count") + len(re.findall(r"\bscratch_", code))

    def widest(kind: str) -> int:
        sizes = {
            "dwordx4": 128,
            "dwordx3": 96,
            "dwordx2": 64,
            "dword": 32,
            "short": 16,
            "ushort": 16,
            "byte": 8,
            "ubyte": 8,
        }
        names = re.findall(rf"(?:global|buffer|flat)_{kind}_([a-z]+?(?:x\d)?)(?:_d16\w*)?\s", code)
        return max((sizes.get(name, 0) for name in names), default=0)

    return number("vgpr_count"), spills, len(lines), widest("load"), widest("store")


def table(targets: Iterable[str] = TARGETS, variants: Iterable[Variant] = tuple(VARIANTS)) -> list[dict[str, Any]]:
    """Rows (as dicts) of the variants on the targets, compiled in a process of its own.

    Raises:
        RuntimeError: the compilation failed; the message has the end of its error output.
    """
    request = json.dumps({"targets": list(targets), "variants": [asdict(v) for v in variants]})
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "fxgrow.kernels.aot"], input=request, capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"ahead-of-time compilation failed:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> int:
    """Read a request on the standard input, print rows."""
    request = json.loads(sys.stdin.read() or "{}")
    variants = [Variant(**v) for v in request["variants"]] if "variants" in request else VARIANTS
    for target in request.get("targets", list(TARGETS)):
        for variant in variants:
            print(json.dumps(asdict(compile_variant(variant, target))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
