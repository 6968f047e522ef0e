"""What the Triton kernels compile to, with no GPU: registers, spills, shared memory, widths, instructions per output.

Compiles every variant ahead of time for sm_80, sm_90, sm_100, gfx942 and gfx950. A target whose machine code cannot be
read on this machine is left out, with the reason.
"""

from __future__ import annotations

from benchmarks import common
from fxgrow.kernels import aot


def run(argv: list[str]) -> int:
    """Entry of ``python -m benchmarks machine_code``."""
    parser = common.parser("machine_code", __doc__)
    parser.add_argument("--target", action="append", choices=list(aot.TARGETS), help="only these; may be repeated")
    options = parser.parse_args(argv)
    variants = aot.VARIANTS
    if options.quick:
        variants = [aot.Variant("copy", "float32", False), aot.Variant("pair", "float32", True)]
    rows, skipped = [], {}
    for target in options.target or aot.TARGETS:
        try:
            rows += aot.table([target], variants)
        except RuntimeError as error:
            skipped[target] = str(error).strip().splitlines()[-1]
            print(f"skipped {target}: {skipped[target]}")
    shown = ["registers", "spills", "shared_bytes", "instructions_per_output", "widest_load_bits", "widest_store_bits"]
    heads = ["variant", "registers", "spills", "shared", "instr/output", "load", "store"]
    lines = [
        [" ".join(str(r[c]) for c in ("target", "kernel", "dtype", "noise")), *(r[c] for c in shown)] for r in rows
    ]
    common.table("machine code", heads, lines)
    common.save(options.json, {"environment": common.environment(), "rows": rows, "skipped": skipped})
    return 0 if rows else 1
