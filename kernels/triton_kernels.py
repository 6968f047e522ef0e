# mypy: disable-error-code="no-untyped-def"
# (in a kernel an annotation is a directive to Triton, not a type)
"""The Triton kernels. `gpu.py` launches them; `aot.py` compiles them without a GPU.

TARGET is 0 in the interpreter, 1 for NVIDIA, 2 for AMD.

`scatter` is the fast form: whole-number copies of every column, side by side or interleaved, read once and written to
all their places, with one Philox call per four columns. `gather` is the general form: any map, fill, factor and noise.
Both equal kernels/reference.py to the bit; compile them with ``enable_fp_fusion=False``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _wide(a, M: tl.constexpr, TARGET: tl.constexpr):
    """Low and high word of a * M."""
    if TARGET == 1:  # one instruction; the compiler would compute some of the words apart
        return tl.inline_asm_elementwise(
            "{.reg .b64 p; mul.wide.u32 p, $2, $3; mov.b64 {$0, $1}, p;}",
            "=r,=r,r,r",
            [a, tl.full((), M, tl.uint32)],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    else:
        p = a.to(tl.uint64) * M
        return p.to(tl.uint32), (p >> 32).to(tl.uint32)


@triton.jit
def _philox(quad, node, purpose: tl.constexpr, key0, key1, TARGET: tl.constexpr):
    """Four tensors of 32-bit words for int64 quads; Philox 4x32-10."""
    c0 = quad.to(tl.uint32)
    c1 = (quad >> 32).to(tl.uint32)
    c2 = node.to(tl.uint32) + tl.zeros_like(c0)
    c3 = tl.full(c0.shape, purpose, tl.uint32)
    k0 = key0.to(tl.uint32)
    k1 = key1.to(tl.uint32)
    for _ in tl.static_range(10):
        low0, high0 = _wide(c0, 0xD2511F53, TARGET)
        low1, high1 = _wide(c2, 0xCD9E8D57, TARGET)
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _log(y):
    bits = y.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) - 126).to(tl.float32)
    m = ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    low = m < 0.70710677
    exponent = tl.where(low, exponent - 1.0, exponent)
    m = tl.where(low, m + m, m) - 1.0
    z = m * m
    p = m * 0.0 + 7.0376836292e-2
    p = p * m + -1.1514610310e-1
    p = p * m + 1.1676998740e-1
    p = p * m + -1.2420140846e-1
    p = p * m + 1.4249322787e-1
    p = p * m + -1.6668057665e-1
    p = p * m + 2.0000714765e-1
    p = p * m + -2.4999993993e-1
    p = p * m + 3.3333331174e-1
    p = p * m * z
    p = p + exponent * -2.12194440e-4
    p = p - z * 0.5
    return (m + p) + exponent * 0.693359375


@triton.jit
def _draw(words, DIST: tl.constexpr, C: tl.constexpr, TARGET: tl.constexpr):
    """Draws of a distribution (0 bytes, 1 normal, 2 rademacher): float32 values, in the compute type."""
    if DIST == 0 and TARGET == 1 and tl.float64 == C:
        total = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, 0x01010101, -510;", "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1
        )
        return total.to(tl.float64)
    elif DIST == 0:
        # 2^23 + sum by its bits: conversions from integers run at a fraction of the rate of additions
        if TARGET == 1:
            raised = tl.inline_asm_elementwise(
                "dp4a.u32.u32 $0, $1, 0x01010101, 0x4B000000;", "=r,r", [words], dtype=tl.uint32, is_pure=True, pack=1
            )
        else:
            pairs = (words & 0x00FF00FF) + ((words >> 8) & 0x00FF00FF)
            raised = ((pairs & 0xFFFF) + (pairs >> 16)) | 0x4B000000
        return (raised.to(tl.float32, bitcast=True) - 8389118.0).to(C)
    elif DIST == 2:
        return (1.0 - (words >> 31).to(tl.int32).to(tl.float32) * 2.0).to(C)
    else:
        x = ((words >> 8).to(tl.int32) * 2 - 16777215).to(tl.float32) * 5.9604644775390625e-08
        w = 0.0 - _log((1.0 - x) * (1.0 + x))
        c = w - 2.5
        t = tl.sqrt_rn(w) - 3.0
        p = c * 2.81022636e-08 + 3.43273939e-07
        p = p * c + -3.5233877e-06
        p = p * c + -4.39150654e-06
        p = p * c + 0.00021858087
        p = p * c + -0.00125372503
        p = p * c + -0.00417768164
        p = p * c + 0.246640727
        p = p * c + 1.50140941
        q = t * -0.000200214257 + 0.000100950558
        q = q * t + 0.00134934322
        q = q * t + -0.00367342844
        q = q * t + 0.00573950773
        q = q * t + -0.0076224613
        q = q * t + 0.00943887047
        q = q * t + 1.00167406
        q = q * t + 2.83297682
        return (tl.where(w < 5.0, p, q) * x).to(C)


@triton.jit
def _narrow(x, D: tl.constexpr, TARGET: tl.constexpr):
    """Round to the destination type, to nearest even."""
    if tl.bfloat16 == D and TARGET == 0:  # the interpreter truncates: round in integers
        u = x.to(tl.uint32, bitcast=True)
        r = ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).to(tl.uint16)
        r = tl.where(x != x, 0x7FC0, r).to(tl.uint16)
        return r.to(tl.bfloat16, bitcast=True)
    else:
        return x.to(D)


@triton.jit
def _widen(x, C: tl.constexpr, TARGET: tl.constexpr):
    """To the compute type, exactly."""
    if x.dtype == tl.bfloat16 and TARGET == 0:  # the interpreter loses subnormals: widen in integers
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(C)
    else:
        return x.to(C)


@triton.jit
def _round(x, D: tl.constexpr, C: tl.constexpr, TARGET: tl.constexpr):
    if D == C:
        return x
    elif TARGET == 1 and tl.bfloat16 == D:  # NVIDIA rounds two at a time
        return tl.inline_asm_elementwise(
            "{.reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; and.b32 $1, t, 0xFFFF0000;}",
            "=f,=f,f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return _widen(_narrow(x, D, TARGET), C, TARGET)


@triton.jit
def _bits(x, C: tl.constexpr):
    if tl.float64 == C:
        return x.to(tl.uint64, bitcast=True)
    else:
        return x.to(tl.uint32, bitcast=True)


@triton.jit
def _sign(x, C: tl.constexpr):
    if tl.float64 == C:
        return x.to(tl.uint64, bitcast=True) & 0x8000000000000000
    else:
        return x.to(tl.uint32, bitcast=True) & 0x80000000


@triton.jit
def _flip(e, x, C: tl.constexpr, TARGET: tl.constexpr):
    """e with its sign bit turned where x has it."""
    if TARGET == 1 and tl.float32 == C:  # one instruction; left to itself the compiler makes two
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, 0x80000000, 0x78;", "=f,f,f", [e, x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return (_bits(e, C) ^ _sign(x, C)).to(C, bitcast=True)


@triton.jit
def _signed(magnitude, x, raw, D: tl.constexpr, C: tl.constexpr, TARGET: tl.constexpr):
    """The magnitude with the sign of x, in the destination type. `raw`: x as it was read."""
    if TARGET == 1 and tl.float64 == C:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, x_low, x_high;
            mov.b64 {low, high}, $1;
            mov.b64 {x_low, x_high}, $2;
            lop3.b32 high, high, x_high, 0x80000000, 0xF8;
            mov.b64 $0, {low, high};
            }""",
            "=d,d,d",
            [magnitude, x],
            dtype=tl.float64,
            is_pure=True,
            pack=1,
        )
    elif TARGET == 1:
        if D.primitive_bitwidth == 16 and raw.dtype == D:  # two at a time, sign and all
            if tl.bfloat16 == D:
                return tl.inline_asm_elementwise(
                    "{.reg .b32 t; cvt.rn.bf16x2.f32 t, $2, $1; lop3.b32 $0, t, $3, 0x80008000, 0xF8;}",
                    "=r,f,f,r",
                    [magnitude, raw],
                    dtype=tl.bfloat16,
                    is_pure=True,
                    pack=2,
                )
            else:
                return tl.inline_asm_elementwise(
                    "{.reg .b32 t; cvt.rn.f16x2.f32 t, $2, $1; lop3.b32 $0, t, $3, 0x80008000, 0xF8;}",
                    "=r,f,f,r",
                    [magnitude, raw],
                    dtype=tl.float16,
                    is_pure=True,
                    pack=2,
                )
        else:
            return _narrow(
                tl.inline_asm_elementwise(
                    "lop3.b32 $0, $1, $2, 0x80000000, 0xF8;",
                    "=f,f,f",
                    [magnitude, x],
                    dtype=tl.float32,
                    is_pure=True,
                    pack=1,
                ),
                D,
                TARGET,
            )
    else:
        return _narrow((_bits(magnitude, C) | _sign(x, C)).to(C, bitcast=True), D, TARGET)


@triton.jit
def _halve(w, m, D: tl.constexpr, C: tl.constexpr, TARGET: tl.constexpr):
    """Two halves that sum to w exactly; the left one is the bigger where m >= 0. Infinity gives twice itself.

    They are non-negative, as w is; on NVIDIA in float64 signs do not matter, of w or of the halves.
    """
    if TARGET == 1 and tl.float64 == C:
        # written out: every value is two registers and every operation two instructions, but for signs and predicates
        return tl.inline_asm_elementwise(
            """{
            .reg .pred less, finite, swap, keep;
            .reg .f64 big, small, size;
            .reg .b32 low, high, w_low, w_high, big_low, big_high, left, right, left_high, right_high;
            mov.b64 {w_low, w_high}, $2;
            abs.f64 size, $2;
            abs.f64 small, $3;
            mul.rn.f64 big, size, 0d3FE0000000000000;
            add.rn.f64 big, big, small;
            setp.lt.f64 less, big, size;
            mov.b64 {big_low, big_high}, big;
            selp.b32 big_low, big_low, w_low, less;
            selp.b32 big_high, big_high, w_high, less;
            mov.b64 big, {big_low, big_high};
            abs.f64 big, big;
            sub.rn.f64 small, size, big;
            mov.b64 {low, high}, small;
            setp.lt.f64 finite, size, 0d7FF0000000000000;
            setp.lt.and.f64 swap|keep, $3, 0d0000000000000000, finite;
            selp.b32 left, low, big_low, swap;
            selp.b32 left_high, high, big_high, swap;
            selp.b32 right, low, big_low, keep;
            selp.b32 right_high, high, big_high, keep;
            mov.b64 $0, {left, left_high};
            mov.b64 $1, {right, right_high};
            }""",
            "=d,=d,d,d",
            [w, m],
            dtype=(tl.float64, tl.float64),
            is_pure=True,
            pack=1,
        )
    else:
        big = tl.minimum(_round(w * 0.5 + tl.abs(m), D, C, TARGET), w)
        swap = m < 0
        # infinity has no other half than itself
        small = (
            tl.where(w == float("inf"), w, w - big) if tl.float64 == C else w - tl.minimum(big, 3.4028234663852886e38)
        )
        return tl.where(swap, small, big), tl.where(swap, big, small)


@triton.jit
def _quads(
    linear,
    node,
    key0,
    key1,
    DIST: tl.constexpr,
    PURPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    TARGET: tl.constexpr,
):
    """Draws at [linear, linear + BLOCK), linear a multiple of 4, as a tile (see `_tile`): one Philox call per four.

    A thread draws for the run it holds, so that no value has to change threads.
    """
    if RUN == 8:
        quad = (linear >> 2) + 2 * tl.arange(0, BLOCK // 8)
        a0, a1, a2, a3 = _philox(quad, node, PURPOSE, key0, key1, TARGET)
        b0, b1, b2, b3 = _philox(quad + 1, node, PURPOSE, key0, key1, TARGET)
        even = tl.join(tl.join(a0, b0), tl.join(a2, b2))
        odd = tl.join(tl.join(a1, b1), tl.join(a3, b3))
    else:
        quad = (linear >> 2) + tl.arange(0, BLOCK // 4)
        w0, w1, w2, w3 = _philox(quad, node, PURPOSE, key0, key1, TARGET)
        even = tl.join(w0, w2)
        odd = tl.join(w1, w3)
    runs = tl.reshape(tl.join(even, odd), (BLOCK // RUN, RUN // WIDTH, WIDTH))
    return _draw(tl.permute(runs, (1, 0, 2)), DIST, C, TARGET)


@triton.jit
def _tile(BLOCK: tl.constexpr, RUN: tl.constexpr, WIDTH: tl.constexpr):
    """Columns of a tile, (RUN // WIDTH, BLOCK // RUN, WIDTH).

    A thread holds runs of RUN columns, whole quads of the generator, in pieces of WIDTH, as many as one access moves.
    """
    piece = tl.arange(0, RUN // WIDTH)[:, None, None] * WIDTH
    return piece + tl.arange(0, BLOCK // RUN)[None, :, None] * RUN + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def _reshaped(x, BLOCK: tl.constexpr, RUN: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr):
    """A tile of pieces of FROM columns as one of pieces of TO, FROM a multiple of TO."""
    if FROM == TO:
        return x
    else:
        x = tl.reshape(x, (RUN // FROM, BLOCK // RUN, FROM // TO, TO))
        return tl.reshape(tl.permute(x, (0, 2, 1, 3)), (RUN // TO, BLOCK // RUN, TO))


@triton.jit(do_not_specialize=["key0", "key1", "row_step", "row_offset", "row_base"])
def scatter(
    source,
    target,
    parameters,
    columns,
    source_stride,
    target_stride,
    row_step,
    row_offset,
    row_base,
    row_linear,
    key0,
    key1,
    LEAVES: tl.constexpr,
    SPLIT: tl.constexpr,
    NOISE: tl.constexpr,
    LEAN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROW_COPIES: tl.constexpr,
    DIST: tl.constexpr,
    BLOCK: tl.constexpr,
    C: tl.constexpr,
    TARGET: tl.constexpr,
    ROWS_LAST: tl.constexpr,
):
    """Source row r goes to rows ``r * row_step + copy * row_offset``, its column c, leaf k, to ``c + k * columns``.

    INTERLEAVED: to ``c * LEAVES + k``. `row_base` is the global row of the target's first row. `parameters` is float64:
    lean and spread of the cuts of up to four leaves; bit k of LEAN says that the lean of cut k is not 0.
    """
    D: tl.constexpr = target.dtype.element_ty
    LOAD: tl.constexpr = 128 // D.primitive_bitwidth  # columns of an access
    RUN: tl.constexpr = 8 if LOAD == 8 else 4
    WIDTH: tl.constexpr = LOAD // 2 if INTERLEAVED else LOAD  # interleaved, an access stores half as many columns
    row = tl.program_id(1 if ROWS_LAST else 0).to(tl.int64)
    start = tl.program_id(0 if ROWS_LAST else 1) * BLOCK
    wide = start + _tile(BLOCK, RUN, LOAD)
    raw = _reshaped(tl.load(source + row * source_stride + wide, mask=wide < columns), BLOCK, RUN, LOAD, WIDTH)
    offsets = start + _tile(BLOCK, RUN, WIDTH)
    inside = offsets < columns
    if not SPLIT:
        # every place gets the same bits
        value = _narrow(_widen(raw, C, TARGET), D, TARGET) if raw.dtype != D else raw
        for copy in tl.static_range(ROW_COPIES):
            place = target + (row * row_step + copy * row_offset) * target_stride
            if INTERLEAVED:
                _store_interleaved(place, value, value, start, columns, BLOCK, RUN, WIDTH)
            else:
                for k in tl.static_range(LEAVES):
                    tl.store(place + k * columns + offsets, value, mask=inside)
    else:
        x = _widen(raw, C, TARGET)
        x = _round(x, D, C, TARGET) if raw.dtype != D else x
        whole = x if TARGET == 1 and tl.float64 == C else tl.abs(x)
        for copy in tl.static_range(ROW_COPIES):
            to_row = row * row_step + copy * row_offset
            place = target + to_row * target_stride
            linear = (row_base + to_row) * row_linear + start
            left, right = _cut(
                whole, x, linear, 1, 0, parameters, key0, key1, NOISE, LEAN, DIST, BLOCK, RUN, WIDTH, D, C, TARGET
            )
            if INTERLEAVED:
                a, b = _signed(left, x, raw, D, C, TARGET), _signed(right, x, raw, D, C, TARGET)
                _store_interleaved(place, a, b, start, columns, BLOCK, RUN, WIDTH)
            elif LEAVES == 2:
                tl.store(place + offsets, _signed(left, x, raw, D, C, TARGET), mask=inside)
                tl.store(place + columns + offsets, _signed(right, x, raw, D, C, TARGET), mask=inside)
            else:
                first, second = _cut(
                    left, x, linear, 2, 1, parameters, key0, key1, NOISE, LEAN, DIST, BLOCK, RUN, WIDTH, D, C, TARGET
                )
                tl.store(place + offsets, _signed(first, x, raw, D, C, TARGET), mask=inside)
                tl.store(place + columns + offsets, _signed(second, x, raw, D, C, TARGET), mask=inside)
                if LEAVES == 3:
                    tl.store(place + 2 * columns + offsets, _signed(right, x, raw, D, C, TARGET), mask=inside)
                else:
                    third, fourth = _cut(
                        right,
                        x,
                        linear,
                        3,
                        2,
                        parameters,
                        key0,
                        key1,
                        NOISE,
                        LEAN,
                        DIST,
                        BLOCK,
                        RUN,
                        WIDTH,
                        D,
                        C,
                        TARGET,
                    )
                    tl.store(place + 2 * columns + offsets, _signed(third, x, raw, D, C, TARGET), mask=inside)
                    tl.store(place + 3 * columns + offsets, _signed(fourth, x, raw, D, C, TARGET), mask=inside)


@triton.jit
def _cut(
    w,
    x,
    linear,
    node: tl.constexpr,
    which: tl.constexpr,
    parameters,
    key0,
    key1,
    NOISE: tl.constexpr,
    LEAN: tl.constexpr,
    DIST: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    TARGET: tl.constexpr,
):
    m = tl.zeros_like(w)
    if LEAN >> which & 1:
        m = tl.load(parameters + 2 * which).to(C) * tl.abs(w)
    if NOISE:
        spread = tl.load(parameters + 2 * which + 1).to(C)
        raw = _quads(linear, tl.full((), node, tl.uint32), key0, key1, DIST, 0, BLOCK, RUN, WIDTH, C, TARGET)
        e = _flip(raw * spread, x, C, TARGET)
        if LEAN >> which & 1:
            m = m + e
        else:
            m = e
    return _halve(w, m, D, C, TARGET)


@triton.jit
def _store_interleaved(place, a, b, start, columns, BLOCK: tl.constexpr, RUN: tl.constexpr, WIDTH: tl.constexpr):
    both = tl.reshape(tl.join(a, b), (RUN // WIDTH, BLOCK // RUN, 2 * WIDTH))
    at = 2 * start + _tile(2 * BLOCK, 2 * RUN, 2 * WIDTH)
    tl.store(place + at, both, mask=at < 2 * columns)


@triton.jit
def _draw_at(
    linear, node, key0, key1, DIST: tl.constexpr, PURPOSE: tl.constexpr, C: tl.constexpr, TARGET: tl.constexpr
):
    """Draws at arbitrary linear indices: one Philox call each."""
    w0, w1, w2, w3 = _philox(linear >> 2, node, PURPOSE, key0, key1, TARGET)
    lane = linear & 3
    words = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return _draw(words, DIST, C, TARGET)


@triton.jit
def _one_each(offsets, TARGET: tl.constexpr):
    """The same offsets; that they are neighbours is hidden from the compiler.

    Else it gives each load and store as many neighbours a thread as its type allows, and moves values between threads
    through shared memory.
    """
    if TARGET == 1:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [offsets], dtype=tl.int32, is_pure=True, pack=1)
    elif TARGET == 2:
        return tl.inline_asm_elementwise("v_mov_b32 $0, $1", "=v,v", [offsets], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return offsets


@triton.jit
def _rank(code):
    """Zero wins over constant, constant over mean, mean over random, random over old."""
    return tl.where(code == 0, 0, tl.where(code == 3, 1, tl.where(code == 2, 2, tl.where(code == 1, 3, 4))))


@triton.jit(do_not_specialize=["key0", "key1", "random0", "random1", "columns", "levels", "entries", "column_offset"])
def gather(
    source,
    target,
    means,
    row_offsets,  # int64 (rows, 8): source, target, virtual, split and target linear indices, mean offsets (2), entry
    row_factors,  # float64 (rows,)
    row_flags,  # uint8 (rows, 3): code, literal, copy
    units,  # int64 (columns,)
    codes,  # uint8 (columns,)
    scales,  # float64 (columns,)
    copies,  # uint8 (columns,)
    tree_nodes,  # int32 (levels, entries): node, negative where the right half, 0 where inactive
    tree_numbers,  # float64 (levels, entries, 2): lean, spread times amplitude
    pairs,  # int32 (entries,)
    parameters,  # float64: random amplitude, pair amplitude, independent amplitude, constant
    columns,
    column_stride,
    column_offset,
    mean_stride0,
    mean_stride1,
    levels,
    entries,
    key0,
    key1,
    random0,
    random1,
    INDEXED: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    HAS_BIRTHS: tl.constexpr,
    HAS_MEANS: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    SPLIT: tl.constexpr,  # 0: none, 1: the columns, 2: an outer dim
    TREE: tl.constexpr,
    TREE_NOISE: tl.constexpr,
    PAIRS: tl.constexpr,
    INDEPENDENT: tl.constexpr,
    COLUMN_COPIES: tl.constexpr,
    BITS: tl.constexpr,
    DIST: tl.constexpr,
    BLOCK: tl.constexpr,
    C: tl.constexpr,
    TARGET: tl.constexpr,
):
    """One row of the destination, BLOCK columns: every element finds its own source."""
    D: tl.constexpr = target.dtype.element_ty
    blocks = tl.cdiv(columns, BLOCK)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    offsets = _one_each((program % blocks) * BLOCK + tl.arange(0, BLOCK), TARGET)
    inside = offsets < columns
    table = row_offsets + row * 8
    if INDEXED:
        unit = tl.load(units + offsets, mask=inside, other=0)
    else:
        unit = (offsets + column_offset).to(tl.int64)
    place = target + tl.load(table + 1) + offsets
    if BITS:
        raw = tl.load(source + tl.load(table) + unit * column_stride, mask=inside)
        tl.store(place, raw, mask=inside)
    else:
        code = tl.full((BLOCK,), 255, tl.int32)
        literal = tl.zeros((BLOCK,), tl.int1)
        if HAS_BIRTHS:
            row_code = tl.load(row_flags + row * 3).to(tl.int32)
            column_code = tl.load(codes + offsets, mask=inside, other=255).to(tl.int32)
            code = tl.where(_rank(row_code) <= _rank(column_code), row_code, column_code)
            literal = (tl.load(row_flags + row * 3 + 1) != 0) | (column_code == 1)
        x = tl.zeros((BLOCK,), C)
        if HAS_SOURCE:
            old = inside & (code == 255)
            x = _widen(tl.load(source + tl.load(table) + unit * column_stride, mask=old, other=0.0), C, TARGET)
        if HAS_MEANS:
            column_code = tl.load(codes + offsets, mask=inside, other=255).to(tl.int32)
            over = column_code == 2
            at = tl.where(over, tl.load(table + 6) + unit * mean_stride1, tl.load(table + 5) + unit * mean_stride0)
            x = tl.where(code == 2, tl.load(means + at, mask=inside & (code == 2), other=0.0), x)
        if HAS_FACTOR:
            factor = tl.load(row_factors + row)
            if HAS_SCALES:
                many = (factor * tl.load(scales + offsets, mask=inside, other=1.0)).to(C)
                x = tl.where(literal, x, x * many)
            else:
                x = tl.where(literal, x, x * factor.to(C))
        if HAS_BIRTHS:
            born = _draw_at(tl.load(table + 2) + unit, tl.full((), 0, tl.uint32), random0, random1, 0, 3, C, TARGET)
            x = tl.where(code == 1, born * tl.load(parameters).to(C), x)
            x = tl.where(code == 3, tl.load(parameters + 3).to(C), x)
            x = tl.where(code == 0, tl.zeros((BLOCK,), C), x)
        x = _round(x, D, C, TARGET)
        if SPLIT == 1:
            linear = tl.load(table + 3) + unit
            entry = offsets + tl.zeros((BLOCK,), tl.int64)
        else:
            linear = tl.load(table + 3) + offsets + column_offset
            entry = tl.load(table + 7) + tl.zeros((BLOCK,), tl.int64)
        if TREE:
            w = tl.abs(x)
            for level in range(levels):
                at = level * entries + entry
                node = tl.load(tree_nodes + at, mask=inside, other=0)
                m = tl.load(tree_numbers + 2 * at, mask=inside, other=0.0).to(C) * w
                if TREE_NOISE:
                    spread = tl.load(tree_numbers + 2 * at + 1, mask=inside, other=0.0).to(C)
                    raw = _draw_at(linear, tl.abs(node), key0, key1, DIST, 0, C, TARGET)
                    m = m + _flip(raw * spread, x, C, TARGET)
                left, right = _halve(w, m, D, C, TARGET)
                half = tl.where(node < 0, right, left)
                w = tl.where((node != 0) & (w < float("inf")), half, w)
            x = (_bits(w, C) | _sign(x, C)).to(C, bitcast=True)
        if PAIRS:
            pair = tl.load(pairs + entry, mask=inside, other=0)
            raw = _draw_at(linear, tl.abs(pair), key0, key1, DIST, 1, C, TARGET)
            z = _round(raw * tl.load(parameters + 1).to(C), D, C, TARGET)
            x = tl.where(pair == 0, x, tl.where(pair < 0, -z, z))
        if INDEPENDENT:
            raw = _draw_at(
                tl.load(table + 4) + offsets + column_offset, tl.full((), 0, tl.uint32), key0, key1, DIST, 2, C, TARGET
            )
            later = tl.zeros((BLOCK,), tl.int1) | (tl.load(row_flags + row * 3 + 2) != 0)
            if COLUMN_COPIES:
                later = later | (tl.load(copies + offsets, mask=inside, other=0) != 0)
            x = tl.where(later, x + raw * tl.load(parameters + 2).to(C), x)
        tl.store(place, _narrow(x, D, TARGET), mask=inside)
