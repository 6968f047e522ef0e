"""What a plan says about one tensor: a map per dim, the noise, and the tables the backends read.

Everything here is one-dimensional and small: it is made once per dim, on the host, with numpy, and cached per `DimMap`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FILL_ZERO, FILL_RANDOM, FILL_MEAN, FILL_CONSTANT = 0, 1, 2, 3
OLD = 255  # fill code of an entry that has a source coordinate

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class DimMap:
    """How one dim of a tensor grows.

    Attributes:
        index: int64 ``(new_size,)``. ``>= 0``: the source coordinate this entry copies; ``< 0``: a newborn unit with id
            ``-index - 1``. Copies of one newborn unit share the id.
        split: float64 ``(new_size,)``: the share of its source that each entry takes. Entries of equal index form a
            group; the shares of a group sum to 1, or are all 1 (plain copies). At most one dim of a tensor has a split.
        scale: float64 ``(new_size,)``: a free factor per entry, equal within a split group.
        fill: uint8 ``(new_size,)``: `FILL_ZERO` …, read where ``index < 0``; ``None`` is `FILL_ZERO` throughout.
    """

    index: Tensor
    split: Tensor | None = None
    scale: Tensor | None = None
    fill: Tensor | None = None


@dataclass(frozen=True)
class Noise:
    """Noise that lets copies part, drawn with Philox 4x32-10 from global coordinates: equal under any sharding.

    Attributes:
        kind: ``antisymmetric`` noise sums to exactly zero over the copies of a split group; ``independent`` noise goes
            on every copy but the first and changes what the copies sum to.
        scale: standard deviation of the noise of one copy. Antisymmetric noise is cut where it would turn a sign.
        newborn_scale: standard deviation of the (+z, -z) pairs put into groups of zero-filled newborn entries of the
            split dim; an odd one out stays 0.
        distribution: ``bytes`` (sum of four random bytes), ``normal`` (inverse CDF of 24 bits) or ``rademacher``.
        seed: any 64-bit integer.
        relative: the two scales are fractions of the source's standard deviation instead of absolute values.
    """

    kind: Literal["antisymmetric", "independent"]
    scale: float
    newborn_scale: float = 0.0
    distribution: Literal["bytes", "normal", "rademacher"] = "bytes"
    seed: int = 0
    relative: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("antisymmetric", "independent"):
            raise ValueError(f"noise kind {self.kind!r}: choose antisymmetric or independent")
        if self.distribution not in ("bytes", "normal", "rademacher"):
            raise ValueError(f"noise distribution {self.distribution!r}: choose bytes, normal or rademacher")
        for name in ("scale", "newborn_scale"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= 0):
                raise ValueError(f"noise {name} is {value}: it must be finite and not negative")


@dataclass(frozen=True, eq=False)
class Tree:
    """Recursive halving of the groups of the split dim: level by level, which half an entry is in.

    All arrays are ``(levels, new_size)``. At a level, the running value w of an entry's subgroup is cut in two; the
    left half takes ``1/2 + lean`` of it plus ``spread`` standard deviations of noise. ``node`` numbers the cut (heap
    order, root 1).
    """

    node: npt.NDArray[np.int32]
    right: Bools
    lean: Floats
    spread: Floats
    active: Bools

    @property
    def levels(self) -> int:
        return int(self.node.shape[0])


@dataclass(frozen=True, eq=False)
class Dim:
    """A `DimMap` made ready: virtual coordinates count the source's units first, then the newborn ones.

    Attributes:
        size: entries in the destination. source: coordinates in the source. virtual: source plus newborn units.
        index: ``(size,)`` virtual coordinate of each entry, or ``None`` for the identity.
        fill: ``(size,)`` fill code per entry, `OLD` where there is a source coordinate; ``None`` if nothing is newborn.
        scale: ``(size,)`` factors, or ``None``.
        copy: ``(size,)`` true for every entry but the first of its group; ``None`` if no unit is copied.
        tree: how split groups are cut, or ``None``.
        pair: ``(size,)`` 0 for no pair, otherwise ``+(k+1)`` or ``-(k+1)`` for the two members of newborn pair k of the
            group; ``None`` if there is none.
    """

    size: int
    source: int
    virtual: int
    index: Ints | None = None
    fill: Bytes | None = None
    scale: Floats | None = None
    copy: Bools | None = None
    tree: Tree | None = None
    pair: npt.NDArray[np.int32] | None = None
    has_split: bool = False

    @property
    def identity(self) -> bool:
        return self.index is None


def _vector(values: Tensor, dtype: torch.dtype, size: int | None, what: str) -> npt.NDArray[np.generic]:
    values = torch.as_tensor(values)
    if values.dim() != 1 or (size is not None and values.shape[0] != size):
        raise ValueError(f"{what} must be one-dimensional of length {size}, got shape {tuple(values.shape)}")
    if dtype == torch.int64 and values.is_floating_point():
        raise ValueError(f"{what} must be integers, got {values.dtype}")
    return cast("npt.NDArray[np.generic]", values.detach().to("cpu", dtype).numpy())


@dataclass(frozen=True, eq=False)
class Cuts:
    """How a group of n copies is halved, parents before children: cut k parts ``[lo, hi)`` at ``mid``.

    ``spread`` is the standard deviation of the noise of a cut that gives every copy zero-sum noise of deviation 1: that
    of the sum of one half of n exchangeable values that sum to zero, given the sum of both halves.
    """

    node: Ints
    lo: Ints
    mid: Ints
    hi: Ints
    depth: Ints
    spread: Floats


@functools.lru_cache(maxsize=256)
def cuts_of(n: int) -> Cuts:
    """The cuts of a group of `n`; every array is ``(n - 1,)``."""
    rows: list[tuple[int, int, int, int, int]] = []

    def visit(node: int, lo: int, hi: int, depth: int) -> None:
        if hi - lo > 1:
            mid = lo + (hi - lo + 1) // 2
            rows.append((node, lo, mid, hi, depth))
            visit(2 * node, lo, mid, depth + 1)
            visit(2 * node + 1, mid, hi, depth + 1)

    visit(1, 0, n, 0)
    table = np.array(rows, np.int64).reshape(-1, 5)
    node, lo, mid, hi, depth = (np.ascontiguousarray(table[:, k]) for k in range(5))
    spread = np.sqrt(n / max(n - 1, 1) * (mid - lo) * (hi - mid) / (hi - lo))
    return Cuts(node, lo, mid, hi, depth, spread)


def _build_tree(order: Ints, start: Ints, count: Ints, shares: Floats, size: int) -> Tree | None:
    """Cut every group that shares its source. `order` sorts entries by unit; groups are consecutive in it."""
    tables: list[tuple[Ints, Cuts, Floats]] = []
    levels = 0
    for n in np.unique(count):
        if n < 2:
            continue
        members = order[start[count == n][:, None] + np.arange(n)]  # (groups, n)
        share = shares[members]
        plain = (share == 1.0).all(axis=1)
        members, share = members[~plain], share[~plain]
        if not len(members):
            continue
        total = share.sum(axis=1)
        if (share < 0).any() or (share > 1).any() or (abs(total - 1) > 1e-6).any():
            bad = int(np.argmax((share < 0).any(axis=1) | (share > 1).any(axis=1) | (abs(total - 1) > 1e-6)))
            raise ValueError(
                f"split: the shares of entries {members[bad].tolist()} are {share[bad].tolist()}; "
                "shares of one unit lie in [0, 1] and sum to 1, or are all 1"
            )
        upto = np.concatenate([np.zeros((len(share), 1)), np.cumsum(share, axis=1)], axis=1)
        cuts = cuts_of(int(n))
        whole = upto[:, cuts.hi] - upto[:, cuts.lo]
        with np.errstate(invalid="ignore", divide="ignore"):
            part = (upto[:, cuts.mid] - upto[:, cuts.lo]) / whole
            part = np.where(whole > 0, part, (cuts.mid - cuts.lo) / (cuts.hi - cuts.lo))
        lean = np.clip(part, 0, 1) - 0.5
        lean[abs(lean) < 1e-12] = 0.0
        levels = max(levels, int(cuts.depth.max()) + 1)
        tables.append((members, cuts, lean))
    if not levels:
        return None
    tree = Tree(
        node=np.zeros((levels, size), np.int32),
        right=np.zeros((levels, size), np.bool_),
        lean=np.zeros((levels, size)),
        spread=np.zeros((levels, size)),
        active=np.zeros((levels, size), np.bool_),
    )
    for members, cuts, lean in tables:
        for k, (lo, mid, hi) in enumerate(zip(cuts.lo, cuts.mid, cuts.hi, strict=True)):
            level, at = cuts.depth[k], members[:, lo:hi]
            tree.node[level, at] = cuts.node[k]
            tree.right[level, at] = np.arange(lo, hi) >= mid
            tree.lean[level, at] = lean[:, k, None]
            tree.spread[level, at] = cuts.spread[k]
            tree.active[level, at] = True
    return tree


def _prepare(dim_map: DimMap, source: int | None, where: str) -> Dim:
    index = cast("Ints", _vector(dim_map.index, torch.int64, None, f"{where}: index"))
    size = len(index)
    if source is None:
        source = int(index.max(initial=-1)) + 1
    if size and int(index.max()) >= source:
        raise ValueError(f"{where}: index {int(index.max())} is outside the source dim of size {source}")
    newborn = index < 0
    births = int(-index.min(initial=0))
    virtual = source + births
    unit = np.where(newborn, source - index - 1, index)
    scale = None
    if dim_map.scale is not None:
        scale = cast("Floats", _vector(dim_map.scale, torch.float64, size, f"{where}: scale"))
        if (scale == 1).all():
            scale = None
    fill: Bytes | None = None
    if newborn.any():
        codes = np.zeros(size, np.uint8)
        if dim_map.fill is not None:
            codes = cast("Bytes", _vector(dim_map.fill, torch.uint8, size, f"{where}: fill")).copy()
        if (codes[newborn] > FILL_CONSTANT).any():
            raise ValueError(f"{where}: fill code {int(codes[newborn].max())} is not one of 0 (zero) to 3 (constant)")
        codes[~newborn] = OLD
        fill = codes
    order = np.argsort(unit, kind="stable")
    ordered = unit[order]
    start = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if size else np.zeros(0, np.int64)
    count = np.diff(np.append(start, size))
    rank = np.empty(size, np.int64)
    rank[order] = np.arange(size) - np.repeat(start, count)
    copy = rank > 0 if (rank > 0).any() else None
    if fill is not None and copy is not None:
        first = fill[order[start]]
        if (fill[order] != np.repeat(first, count)).any():
            raise ValueError(f"{where}: copies of one newborn unit must have the same fill code")
    tree, pair = None, None
    if dim_map.split is not None:
        shares = cast("Floats", _vector(dim_map.split, torch.float64, size, f"{where}: split"))
        single = order[start[count == 1]]
        if (shares[single] != 1).any():
            entry = int(single[np.argmax(shares[single] != 1)])
            raise ValueError(
                f"{where}: entry {entry} is the only copy of its unit but takes a share of {shares[entry]}"
            )
        tree = _build_tree(order, start, count, shares, size)
        if tree is not None and scale is not None:
            first_scale = np.repeat(scale[order[start]], count)
            if ((scale[order] != first_scale) & tree.active[0][order]).any():
                raise ValueError(f"{where}: scale must be equal for all entries of a split group")
        if fill is not None and copy is not None:
            grown = np.empty(size, np.int64)
            grown[order] = np.repeat(count, count)
            paired = (fill == FILL_ZERO) & (rank < grown // 2 * 2)
            if paired.any():
                pair = np.where(paired, np.where(rank % 2 == 0, 1, -1) * (rank // 2 + 1), 0).astype(np.int32)
    if size == source and not newborn.any() and scale is None and tree is None and (unit == np.arange(size)).all():
        return Dim(size, source, virtual, has_split=dim_map.split is not None)
    return Dim(size, source, virtual, unit, fill, scale, copy, tree, pair, dim_map.split is not None)


_prepared: weakref.WeakKeyDictionary[DimMap, dict[int | None, Dim]] = weakref.WeakKeyDictionary()


def prepare_dim(dim_map: DimMap | None, source: int | None, new_size: int | None, where: str) -> Dim:
    """Make one dim ready. `source` is the source dim's size, or ``None`` without a source; then `new_size` tells.

    Raises:
        ValueError: an index outside the source, shares that do not sum to 1, arrays of the wrong length.
    """
    if dim_map is None:
        size = source if source is not None else new_size
        if size is None:
            raise ValueError(f"{where}: without a source and without a map, shape= must give the size")
        return Dim(size, size, size)
    known = _prepared.setdefault(dim_map, {})
    if source not in known:
        known[source] = _prepare(dim_map, source, where)
    return known[source]


def row_major(sizes: Sequence[int]) -> list[int]:
    """Strides of a contiguous array of `sizes`, in elements."""
    strides, step = [0] * len(sizes), 1
    for d in reversed(range(len(sizes))):
        strides[d] = step
        step *= sizes[d]
    return strides
