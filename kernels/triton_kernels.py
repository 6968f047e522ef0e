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
def _philox(quad, node, purpose: tl.constexpr, key0, key1):
    """Four tensors of 32-bit words for int64 quads; Philox 4x32-10."""
    c0 = quad.to(tl.uint32)
    c1 = (quad >> 32).to(tl.uint32)
    c2 = node.to(tl.uint32) + tl.zeros_like(c0)
    c3 = tl.full(c0.shape, purpose, tl.uint32)
    k0 = key0.to(tl.uint32)
    k1 = key1.to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
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
def _draw(words, DIST: tl.constexpr, TARGET: tl.constexpr):
    """float32 draws of a distribution: 0 bytes, 1 normal, 2 rademacher."""
    if DIST == 0:
        # 2^23 + sum by its bits: conversions from integers run at a fraction of the rate of additions
        if TARGET == 1:
            raised = tl.inline_asm_elementwise(
                "dp4a.u32.u32 $0, $1, 0x01010101, 0x4B000000;", "=r,r", [words], dtype=tl.uint32, is_pure=True, pack=1
            )
        else:
            pairs = (words & 0x00FF00FF) + ((words >> 8) & 0x00FF00FF)
            raised = ((pairs & 0xFFFF) + (pairs >> 16)) | 0x4B000000
        return raised.to(tl.float32, bitcast=True) - 8389118.0
    elif DIST == 2:
        return 1.0 - (words >> 31).to(tl.int32).to(tl.float32) * 2.0
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
        return tl.where(w < 5.0, p, q) * x


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
def _flip(e, sign, C: tl.constexpr):
    """e with its sign bit turned where `sign` has it."""
    return (_bits(e, C) ^ sign).to(C, bitcast=True)


@triton.jit
def _halve(w, m, D: tl.constexpr, C: tl.constexpr, TARGET: tl.constexpr):
    """Two non-negative halves that sum to w exactly; the left one is the bigger where m >= 0."""
    big = tl.minimum(_round(w * 0.5 + tl.abs(m), D, C, TARGET), w)
    small = tl.where(w == float("inf"), w, w - big)
    swap = m < 0
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
    D: tl.constexpr,
    TARGET: tl.constexpr,
):
    """Draws at [linear, linear + BLOCK), linear a multiple of 4: one Philox call per four values.

    The shapes follow the stores: a thread holds 16 bytes of neighbours, eight values of a 16-bit type, so that no value
    has to change threads.
    """
    if D.primitive_bitwidth == 16:
        quad = (linear >> 2) + 2 * tl.arange(0, BLOCK // 8)
        a0, a1, a2, a3 = _philox(quad, node, PURPOSE, key0, key1)
        b0, b1, b2, b3 = _philox(quad + 1, node, PURPOSE, key0, key1)
        even = tl.join(tl.join(a0, b0), tl.join(a2, b2))
        odd = tl.join(tl.join(a1, b1), tl.join(a3, b3))
    else:
        quad = (linear >> 2) + tl.arange(0, BLOCK // 4)
        w0, w1, w2, w3 = _philox(quad, node, PURPOSE, key0, key1)
        even = tl.join(w0, w2)
        odd = tl.join(w1, w3)
    return _draw(tl.reshape(tl.join(even, odd), (BLOCK,)), DIST, TARGET)


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
    row = tl.program_id(1 if ROWS_LAST else 0).to(tl.int64)
    start = tl.program_id(0 if ROWS_LAST else 1) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    inside = offsets < columns
    raw = tl.load(source + row * source_stride + offsets, mask=inside)
    if not SPLIT:
        # every place gets the same bits
        value = _narrow(_widen(raw, C, TARGET), D, TARGET) if raw.dtype != D else raw
        for copy in tl.static_range(ROW_COPIES):
            place = target + (row * row_step + copy * row_offset) * target_stride
            if INTERLEAVED and LEAVES == 2:
                _store_interleaved(place, value, value, start, columns, BLOCK)
            else:
                for k in tl.static_range(LEAVES):
                    tl.store(place + k * columns + offsets, value, mask=inside)
    else:
        x = _widen(raw, C, TARGET)
        x = _round(x, D, C, TARGET) if raw.dtype != D else x
        sign = _sign(x, C)
        whole = tl.abs(x)
        for copy in tl.static_range(ROW_COPIES):
            to_row = row * row_step + copy * row_offset
            place = target + to_row * target_stride
            linear = (row_base + to_row) * row_linear + start
            left, right = _cut(
                whole, sign, linear, 1, 0, parameters, key0, key1, NOISE, LEAN, DIST, BLOCK, D, C, TARGET
            )
            if LEAVES == 2:
                if INTERLEAVED:
                    a = _narrow((_bits(left, C) | sign).to(C, bitcast=True), D, TARGET)
                    b = _narrow((_bits(right, C) | sign).to(C, bitcast=True), D, TARGET)
                    _store_interleaved(place, a, b, start, columns, BLOCK)
                else:
                    _put(place, left, sign, offsets, inside, D, C, TARGET)
                    _put(place + columns, right, sign, offsets, inside, D, C, TARGET)
            else:
                first, second = _cut(
                    left, sign, linear, 2, 1, parameters, key0, key1, NOISE, LEAN, DIST, BLOCK, D, C, TARGET
                )
                _put(place, first, sign, offsets, inside, D, C, TARGET)
                _put(place + columns, second, sign, offsets, inside, D, C, TARGET)
                if LEAVES == 3:
                    _put(place + 2 * columns, right, sign, offsets, inside, D, C, TARGET)
                else:
                    third, fourth = _cut(
                        right, sign, linear, 3, 2, parameters, key0, key1, NOISE, LEAN, DIST, BLOCK, D, C, TARGET
                    )
                    _put(place + 2 * columns, third, sign, offsets, inside, D, C, TARGET)
                    _put(place + 3 * columns, fourth, sign, offsets, inside, D, C, TARGET)


@triton.jit
def _cut(
    w,
    sign,
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
    D: tl.constexpr,
    C: tl.constexpr,
    TARGET: tl.constexpr,
):
    m = tl.zeros_like(w)
    if LEAN >> which & 1:
        m = tl.load(parameters + 2 * which).to(C) * w
    if NOISE:
        spread = tl.load(parameters + 2 * which + 1).to(C)
        e = _flip(
            _quads(linear, tl.full((), node, tl.uint32), key0, key1, DIST, 0, BLOCK, D, TARGET).to(C) * spread, sign, C
        )
        if LEAN >> which & 1:
            m = m + e
        else:
            m = e
    return _halve(w, m, D, C, TARGET)


@triton.jit
def _put(place, magnitude, sign, offsets, inside, D: tl.constexpr, C: tl.constexpr, TARGET: tl.constexpr):
    value = (_bits(magnitude, C) | sign).to(C, bitcast=True)
    tl.store(place + offsets, _narrow(value, D, TARGET), mask=inside)


@triton.jit
def _store_interleaved(place, a, b, start, columns, BLOCK: tl.constexpr):
    both = tl.interleave(a, b)
    at = 2 * start + tl.arange(0, 2 * BLOCK)
    tl.store(place + at, both, mask=at < 2 * columns)


@triton.jit
def _draw_at(linear, node, key0, key1, DIST: tl.constexpr, PURPOSE: tl.constexpr, TARGET: tl.constexpr):
    """Draws at arbitrary linear indices: one Philox call each."""
    w0, w1, w2, w3 = _philox(linear >> 2, node, PURPOSE, key0, key1)
    lane = linear & 3
    words = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return _draw(words, DIST, TARGET)


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
    offsets = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
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
            born = _draw_at(tl.load(table + 2) + unit, tl.full((), 0, tl.uint32), random0, random1, 0, 3, TARGET)
            x = tl.where(code == 1, born.to(C) * tl.load(parameters).to(C), x)
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
            sign = _sign(x, C)
            w = tl.abs(x)
            for level in range(levels):
                at = level * entries + entry
                node = tl.load(tree_nodes + at, mask=inside, other=0)
                m = tl.load(tree_numbers + 2 * at, mask=inside, other=0.0).to(C) * w
                if TREE_NOISE:
                    spread = tl.load(tree_numbers + 2 * at + 1, mask=inside, other=0.0).to(C)
                    raw = _draw_at(linear, tl.abs(node), key0, key1, DIST, 0, TARGET)
                    m = m + _flip(raw.to(C) * spread, sign, C)
                left, right = _halve(w, m, D, C, TARGET)
                half = tl.where(node < 0, right, left)
                w = tl.where((node != 0) & (w < float("inf")), half, w)
            x = (_bits(w, C) | sign).to(C, bitcast=True)
        if PAIRS:
            pair = tl.load(pairs + entry, mask=inside, other=0)
            raw = _draw_at(linear, tl.abs(pair), key0, key1, DIST, 1, TARGET)
            z = _round(raw.to(C) * tl.load(parameters + 1).to(C), D, C, TARGET)
            x = tl.where(pair == 0, x, tl.where(pair < 0, -z, z))
        if INDEPENDENT:
            raw = _draw_at(
                tl.load(table + 4) + offsets + column_offset, tl.full((), 0, tl.uint32), key0, key1, DIST, 2, TARGET
            )
            later = tl.zeros((BLOCK,), tl.int1) | (tl.load(row_flags + row * 3 + 2) != 0)
            if COLUMN_COPIES:
                later = later | (tl.load(copies + offsets, mask=inside, other=0) != 0)
            x = tl.where(later, x + raw.to(C) * tl.load(parameters + 2).to(C), x)
        tl.store(place, _narrow(x, D, TARGET), mask=inside)
