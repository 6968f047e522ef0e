"""The torch backend: the reference the others equal to the bit. Works block by block, with no full-size temporary."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fxgrow.kernels import philox
from fxgrow.kernels.job import FLOATS, Job, blocks, combine
from fxgrow.kernels.maps import FILL_CONSTANT, FILL_MEAN, FILL_RANDOM, FILL_ZERO, OLD, Ints, Tree

PLAIN_BLOCK = 1 << 20  # elements; a block of plain copying
NOISE_BLOCK = 1 << 16  # elements; the int64 temporaries of a block of noise stay in the second-level cache


def run(job: Job, out: Tensor) -> None:
    """Fill `out` (shape ``job.local``) as `job` says."""
    if 0 in job.local:
        return
    if job.trivial and job.source is not None:
        out.copy_(job.copied())
        return
    computed = not job.plain and job.dtype in FLOATS
    for lo, size in blocks(job.local, NOISE_BLOCK if computed else PLAIN_BLOCK):
        target = out[tuple(slice(a, a + n) for a, n in zip(lo, size, strict=True))] if job.dims else out
        entries = [job.entries(d, a, n) for d, (a, n) in enumerate(zip(lo, size, strict=True))]
        if job.plain:
            assert job.source is not None
            target.copy_(_gather(job, job.source, entries, None))
        elif not computed:
            target.copy_(_exact_block(job, entries))
        else:
            target.copy_(_block(job, entries))


def _gather(job: Job, table: Tensor, entries: Sequence[slice], mean_over: int | None) -> Tensor:
    """Elements of the source (or of a table of means) at the virtual coordinates, clamped where newborn."""
    start = job.start if mean_over is None and job.start else [0] * len(entries)
    for d, at in enumerate(entries):
        dim = job.dims[d]
        if mean_over is not None and mean_over >> d & 1:
            continue
        if dim.index is None:
            table = table.narrow(d, at.start - start[d], at.stop - at.start)
    for d, at in enumerate(entries):
        dim = job.dims[d]
        if dim.index is None or (mean_over is not None and mean_over >> d & 1):
            continue
        units = np.clip(dim.index[at] - start[d], 0, max(table.shape[d] - 1, 0))
        table = table.index_select(d, torch.from_numpy(units).to(table.device))
    return table


def _along(values: np.ndarray, d: int, dims: int, job: Job, dtype: torch.dtype | None = None) -> Tensor:
    """A vector laid along dim d of a block."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if dtype is not None:
        tensor = tensor.to(dtype)
    return tensor.to(job.device).reshape([-1 if e == d else 1 for e in range(dims)])


def _codes(job: Job, entries: Sequence[slice]) -> Tensor:
    default = OLD if job.source is not None or job.births else job.fill
    lined = [None if dim.fill is None else dim.fill[at] for dim, at in zip(job.dims, entries, strict=True)]
    return torch.from_numpy(combine(lined, [0] * len(entries), default)).to(job.device)


def _exact_block(job: Job, entries: Sequence[slice]) -> Tensor:
    shape = [at.stop - at.start for at in entries]
    codes = _codes(job, entries)
    filled = torch.zeros((), dtype=job.dtype, device=job.device)
    constant = torch.tensor(job.constant).to(job.dtype).to(job.device)
    x = filled
    if job.source is not None and job.source.numel():
        x = _gather(job, job.source, entries, None).to(job.dtype)
    x = torch.where(codes == FILL_CONSTANT, constant, x)
    return torch.where(codes == FILL_ZERO, filled, x).expand(shape)


def _values(job: Job, entries: Sequence[slice]) -> Tensor:
    """scale · Π scale_d · virtual source, in `job.compute`, before any splitting."""
    n = len(entries)
    shape = [at.stop - at.start for at in entries]
    if job.source is not None and job.source.numel():
        x = _gather(job, job.source, entries, None).to(job.compute)
    else:
        x = torch.zeros(shape, dtype=job.compute, device=job.device)
    factor: Tensor | None = None
    if job.scale != 1 or any(dim.scale is not None for dim in job.dims):
        product = torch.tensor(job.scale, dtype=torch.float64, device=job.device)
        for d, at in enumerate(entries):
            scale = job.dims[d].scale
            if scale is not None:
                product = product * _along(scale[at], d, n, job)
        factor = product.to(job.compute)  # one rounding, whatever the number of factors
    codes = _codes(job, entries)
    present = set(codes.unique().tolist())
    if present <= {OLD}:
        return x if factor is None else x * factor
    random = None
    for over, table in job.means.items():
        mask = torch.ones((1,) * n, dtype=torch.bool, device=job.device)
        for d, at in enumerate(entries):
            fill = job.dims[d].fill
            if fill is not None:
                is_mean = fill[at] == FILL_MEAN
                mask = mask & _along(is_mean if over >> d & 1 else ~is_mean, d, n, job)
        if mask.any():
            x = torch.where(mask, _gather(job, table, entries, over), x)
    literal = torch.zeros((1,) * n, dtype=torch.bool, device=job.device)
    for d, at in enumerate(entries):
        fill = job.dims[d].fill
        if fill is not None:
            literal = literal | _along(fill[at] == FILL_RANDOM, d, n, job)
    if factor is not None:
        x = torch.where(literal, x, x * factor)
    if FILL_RANDOM in present:
        lines = [_along(job.units(d, at) * job.virtual_strides[d], d, n, job) for d, at in enumerate(entries)]
        raw = _draw(job, lines, None, philox.RANDOM, job.random_key, "bytes")
        random = raw.to(job.compute) * torch.tensor(
            job.random_std * philox.UNIT["bytes"], dtype=job.compute, device=job.device
        )
        x = torch.where(codes == FILL_RANDOM, random, x)
    if FILL_CONSTANT in present:
        x = torch.where(codes == FILL_CONSTANT, torch.tensor(job.constant, dtype=job.compute, device=job.device), x)
    if FILL_ZERO in present:
        x = torch.where(codes == FILL_ZERO, torch.zeros((), dtype=job.compute, device=job.device), x)
    return x


def _draw(
    job: Job,
    lines: Sequence[Tensor],
    node: Tensor | None,
    purpose: int,
    key: tuple[int, int],
    distribution: str,
) -> Tensor:
    """float32 draws at L = Σ lines (each along its own dim), with a node per entry of one dim."""
    where: Tensor = torch.zeros((), dtype=torch.int64, device=job.device)
    last = len(lines) - 1
    aligned = last >= 0 and all(not bool((line & 3).any()) for line in lines[:-1])
    if aligned and (node is None or node.shape[last] == node.numel()):
        # the words of a quad are all used: draw once per quad and node of the last dim
        for line in lines[:-1]:
            where = where + line
        columns = lines[-1].flatten()
        nodes = torch.zeros_like(columns) if node is None else node.flatten().expand_as(columns)
        quads = columns >> 2
        first, many = quads.min(), int(nodes.max()) + 1
        distinct, inverse = torch.unique((quads - first) * many + nodes, return_inverse=True)
        quad = (where >> 2) + first + distinct // many
        words = torch.stack(_words(quad, (distinct % many).expand_as(quad), purpose, key), -1).flatten(-2)
        raw = words.index_select(words.dim() - 1, inverse * 4 + (columns & 3))
        return philox.draw(raw, distribution)
    for line in lines:
        where = where + line
    where = where.expand(torch.broadcast_shapes(where.shape, () if node is None else node.shape))
    quad, lane = where >> 2, where & 3
    at = torch.zeros_like(quad) if node is None else node.expand_as(quad)
    w0, w1, w2, w3 = _words(quad, at, purpose, key)
    raw = torch.where(lane < 2, torch.where(lane == 0, w0, w1), torch.where(lane == 2, w2, w3))
    return philox.draw(raw, distribution)


def _words(quad: Tensor, node: Tensor, purpose: int, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return philox.philox(quad & philox.MASK, (quad >> 32) & philox.MASK, node, purpose, key)


def _round(x: Tensor, job: Job) -> Tensor:
    return x if job.dtype == job.compute else x.to(job.dtype).to(job.compute)


def _block(job: Job, entries: Sequence[slice]) -> Tensor:
    n = len(entries)
    shape = [at.stop - at.start for at in entries]
    x = _round(_values(job, entries), job)
    if job.split is not None:
        at = entries[job.split]
        dim = job.dims[job.split]
        lines: list[Tensor] = []
        if job.tree_noise or job.pair_noise:
            for d, span in enumerate(entries):
                units: Ints = job.units(d, span) if d == job.split else np.arange(span.start, span.stop)
                lines.append(_along(units * job.split_strides[d], d, n, job))
        if dim.tree is not None:
            x = _halve(job, dim.tree, x, lines, at, shape)
        if job.pair_noise and dim.pair is not None:
            x = _pairs(job, dim.pair[at], x, lines, shape)
    if job.independent:
        assert job.noise is not None
        lines = [
            _along(np.arange(span.start, span.stop) * job.target_strides[d], d, n, job)
            for d, span in enumerate(entries)
        ]
        raw = _draw(job, lines, None, philox.INDEPENDENT, job.noise_key, job.noise.distribution)
        e = raw.to(job.compute) * _constant(job, job.amplitude(job.noise.scale))
        copy = torch.zeros((1,) * n, dtype=torch.bool, device=job.device)
        for d, span in enumerate(entries):
            if (later := job.dims[d].copy) is not None:
                copy = copy | _along(later[span], d, n, job)
        x = torch.where(copy, x + e, x)
    return x.expand(shape)


def _constant(job: Job, value: float) -> Tensor:
    return torch.tensor(value, dtype=job.compute, device=job.device)


def _halve(job: Job, tree: Tree, x: Tensor, lines: Sequence[Tensor], at: slice, shape: Sequence[int]) -> Tensor:
    """Cut x (values of the destination dtype) down the tree: the halves of every cut sum to it exactly.

    big = rn(|w|/2 + |m|), at most |w|, lies in [|w|/2, |w|], so that |w| - big is exact (Sterbenz 1974), in every dtype
    and for subnormals too.
    """
    n, d = len(shape), job.split
    assert d is not None
    negative, w = x.signbit(), x.abs()
    finite = w.isfinite()
    for level in range(tree.levels):
        active = tree.active[level, at]
        if not active.any():
            break
        m = _along(tree.lean[level, at], d, n, job, job.compute) * w
        if job.tree_noise:
            assert job.noise is not None
            node = _along(tree.node[level, at].astype(np.int64), d, n, job)
            raw = _draw(job, lines, node, philox.SPLIT, job.noise_key, job.noise.distribution)
            spread = tree.spread[level, at] * job.amplitude(job.noise.scale)
            e = raw.to(job.compute) * _along(spread, d, n, job, job.compute)
            m = m + torch.where(negative, -e, e)
        big = torch.minimum(_round(w * 0.5 + m.abs(), job), w)
        half = torch.where((m < 0) == _along(tree.right[level, at], d, n, job), big, w - big)
        w = torch.where(_along(active, d, n, job) & finite, half, w)
    return torch.where(negative, -w, w)


def _pairs(job: Job, pair: np.ndarray, x: Tensor, lines: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """(+z, -z) for the members of each newborn pair."""
    if not pair.any():
        return x
    n, d = len(shape), job.split
    assert d is not None
    assert job.noise is not None
    node = _along(np.abs(pair).astype(np.int64), d, n, job)
    raw = _draw(job, lines, node, philox.PAIR, job.noise_key, job.noise.distribution)
    z = _round(raw.to(job.compute) * _constant(job, job.amplitude(job.noise.newborn_scale)), job)
    sign = _along(pair, d, n, job)
    return torch.where(sign == 0, x, torch.where(sign < 0, -z, z))


def random_means(job: Job, over: tuple[int, ...], table: Tensor) -> None:
    """Into a table of means: at randomly filled newborn coordinates of the other dims, the mean of the draws."""
    units: list[Ints] = []
    random: list[Ints] = []
    for d, dim in enumerate(job.dims):
        born = np.zeros(0, np.int64)
        if d not in over and dim.fill is not None and dim.index is not None:
            born = np.unique(dim.index[dim.fill == FILL_RANDOM])
        random.append(born)
        units.append(np.arange(dim.source) if d in over else np.concatenate([np.arange(dim.source), born]))
    if not any(len(born) for born in random):
        return
    n = len(job.dims)
    count = 1
    for d in over:
        count *= job.dims[d].source
    std = _constant(job, job.random_std * philox.UNIT["bytes"])
    kept = [d for d in range(n) if d not in over]
    for lo, size in blocks([len(units[d]) for d in kept], max(1, NOISE_BLOCK // count)):
        span = {d: units[d][a : a + k] for d, a, k in zip(kept, lo, size, strict=True)}
        born_here = torch.zeros((1,) * n, dtype=torch.bool, device=job.device)
        for d, u in span.items():
            born_here = born_here | _along(u >= job.dims[d].source, d, n, job)
        if not born_here.any():
            continue
        coordinates = [span.get(d, units[d]) for d in range(n)]
        lines = [_along(u * job.virtual_strides[d], d, n, job) for d, u in enumerate(coordinates)]
        raw = _draw(job, lines, None, philox.RANDOM, job.random_key, "bytes")
        mean = (halving_sum((raw.to(job.compute) * std).to(torch.float64), over) / count).to(job.compute)
        block = tuple(_along(np.zeros(1, np.int64) if d in over else coordinates[d], d, n, job) for d in range(n))
        table[block] = torch.where(born_here, mean, table[block])


def halving_sum(x: Tensor, over: Sequence[int]) -> Tensor:
    """Sum over dims by halving: the same bits on every device and with any number of threads."""
    for d in over:
        while (n := x.shape[d]) > 1:
            half = n // 2
            rest = x.narrow(d, 2 * half, n - 2 * half)
            x = x.narrow(d, 0, half) + x.narrow(d, half, half)
            if rest.shape[d]:
                x = torch.cat([x.narrow(d, 0, half - 1), x.narrow(d, half - 1, 1) + rest], d)
    return x
