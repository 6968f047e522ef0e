"""The CPU backend: `native.cpp`, built where no library of it is found, and the tables it reads.

Nothing is built at import. `get_ready` starts a build in the background where one is needed; until it has ended, the
torch backend, which makes the same bits, does what is not worth waiting for.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fxgrow.kernels import builder
from fxgrow.kernels.builder import NoCompiler
from fxgrow.kernels.job import FLOATS, Job
from fxgrow.kernels.maps import FILL_MEAN, OLD, Bytes, Dim, Floats, Ints, Tree, cuts_of
from fxgrow.kernels.philox import DISTRIBUTIONS, UNIT

HUGE = 4 << 20  # bytes; fresh destinations from here on ask for huge pages
DEAR = (8e-4, 2e-3)  # CPU seconds that 2 MiB may take: as a huge page, as small ones after huge ones were dear
PATIENCE = (64 << 20, 1 << 30)  # bytes of destinations with small pages before huge ones are tried again; at most
FRESH = 1 << 20  # bytes; the pages of smaller fresh destinations come by faults, if they are new at all
STREAM = 1 << 20  # bytes; smaller destinations are left in the cache for whoever reads them next
ALONE = 1 << 15  # elements; smaller tensors share one call
SHARE = 1 << 16  # elements that are worth a thread of their own: one costs about 20 microseconds
BUILD = 8.0  # seconds that a build usually takes
TORCH = 1e-7  # seconds an element costs the torch backend, with noise
EXPAND = 64  # trailing elements of an ungrown dim (a convolution's kernel) that are folded into the columns
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

_int, _ptr, _float = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


# native.cpp, field by field
class _Outer(ctypes.Structure):
    _fields_ = [
        ("groups", _int),
        *_fields(_ptr, "unit start entry leaf code shape lean lean_at paired scale copy"),
        *_fields(_int, "source_stride target_stride virtual_linear split_linear target_linear offset"),
    ]


class _Segment(ctypes.Structure):
    _fields_ = [
        *_fields(_int, "first count"),
        ("units", _ptr),
        *_fields(_int, "leaves split paired code"),
        ("base", _ptr),
        ("step", _int),
        *_fields(_ptr, "scatter lean"),
        ("lean_step", _int),
        ("scale", _ptr),
    ]


class _Cuts(ctypes.Structure):
    _fields_ = [("leaves", _int), *_fields(_ptr, "node lo mid spread")]


class _Task(ctypes.Structure):
    _fields_ = [
        *_fields(_ptr, "source target"),
        *_fields(_int, "source_type target_type item_bytes"),
        ("outer", _Outer * 3),
        *_fields(_int, "rows_outer segments"),
        ("segment", _ptr),
        *_fields(_int, "column_source_stride columns column_offset"),
        ("column_copy", _ptr),
        ("cut", _ptr),
        ("split_outer", _int),
        *_fields(_float, "scale constant random_amplitude pair_amplitude independent_amplitude"),
        *_fields(_int, "tree_noise pair_noise independent distribution"),
        ("noise_key", ctypes.c_uint32 * 2),
        ("random_key", ctypes.c_uint32 * 2),
        ("means", _ptr * 16),
        ("mean_stride", (_int * 4) * 16),
        *_fields(_int, "stream threads"),
        ("constant_bits", ctypes.c_uint64 * 2),
    ]


_ABI = ctypes.sizeof(_Task) * 10000 + ctypes.sizeof(_Segment) * 100 + ctypes.sizeof(_Outer) % 100


def _open(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.fxgrow_run.argtypes = [ctypes.POINTER(_Task)]
    loaded.fxgrow_run_many.argtypes = [ctypes.POINTER(_Task), ctypes.c_int64, ctypes.c_int64]
    loaded.fxgrow_take_pages.argtypes = [_ptr, _int, _int, _float, _float, _int]
    loaded.fxgrow_take_pages.restype = _int
    if loaded.fxgrow_abi() != _ABI:
        raise OSError(f"{path}: structures of another layout than expected ({loaded.fxgrow_abi()} against {_ABI})")
    return loaded


class _Library:
    """The library of this process: looked for, built, loaded and, where that cannot be, why not; each once."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._found: ctypes.CDLL | NoCompiler | None = None
        self._level = ""
        self._target: Path | None = None  # of the build
        self._build: subprocess.Popen[str] | None = None
        self._process = 0  # that started it: a child of fork() cannot ask how it went
        self._began = 0.0

    def get_ready(self, background: bool = True) -> None:
        """Look for the library, and start to build it where there is none. Does not wait, and raises nothing."""
        with self._lock:
            if self._found is not None or self._target is not None:
                return
            try:
                self._level = builder.level()
                if self._look():
                    return
                builder.compiler()
                self._target = builder.writable(self._level)
                self._began = time.monotonic()
                if background and sys.executable:
                    self._build, self._process = builder.start(self._level, self._target), os.getpid()
            except NoCompiler as error:
                self._found = error
            except OSError as error:
                self._found = NoCompiler(f"the library cannot be built: {error}")

    def _look(self) -> bool:
        """Load what lies in one of the places for it."""
        for path in builder.candidates(self._level):
            if path.exists():
                with contextlib.suppress(OSError):  # of another system, or damaged
                    self._found = _open(path)
                    return True
        return False

    def finish(self) -> None:
        """Wait until it is there, or is known not to come."""
        with self._lock:
            self.get_ready(background=False)
            if self._found is not None:
                return
            assert self._target is not None
            try:
                if not self._ended():
                    builder.build(self._level, self._target)  # waits for one that is being built
                    self._settle("")
            except NoCompiler as error:
                self._found = error
            except OSError as error:
                self._found = NoCompiler(f"the built library cannot be kept or loaded: {error}")

    def _ended(self) -> bool:
        """Whether the process that builds has ended; then it is known how."""
        if self._build is None or self._process != os.getpid() or self._build.poll() is None:
            return False
        assert self._build.stderr is not None
        with self._build.stderr as stream:
            self._settle(stream.read().strip())
        self._build = None
        return True

    def _settle(self, why: str) -> None:
        assert self._target is not None
        try:
            self._found = _open(self._target)
        except OSError as error:
            self._found = NoCompiler(why or f"the built library cannot be kept or loaded: {error}")

    def found(self) -> ctypes.CDLL | NoCompiler | None:
        """It, or why there is none, or None while it is being built."""
        with self._lock:
            self.get_ready()
            if self._found is None and self._target is not None and not self._ended() and self._target.exists():
                self._settle("")  # whoever built it
            return self._found

    def rest(self) -> float:
        """Seconds that the build may still take."""
        return max(BUILD - (time.monotonic() - self._began), 0.5)


_library = _Library()


def get_ready() -> None:
    """Have the library built in the background, in a process of its own, where there is none: for later calls.

    Returns at once, and says nothing where that cannot be: what needs the library then does.
    """
    if os.environ.get("FXGROW_KERNELS", "cpu") == "cpu":
        _library.get_ready()


def library() -> ctypes.CDLL:
    """The built library, waited for.

    Raises:
        NoCompiler: there is no compiler, it fails, or the library cannot be kept; tried once a process.
    """
    _library.finish()
    found = _library.found()
    if isinstance(found, NoCompiler):
        raise found.with_traceback(None)
    assert found is not None
    return found


def is_there() -> bool:
    """Whether the library is there now."""
    return isinstance(_library.found(), ctypes.CDLL)


def sooner(elements: int) -> bool:
    """Whether so many elements are made sooner here than by the torch backend, waiting for the library included.

    Raises:
        NoCompiler: there is none and there will be none.
    """
    found = _library.found()
    if isinstance(found, NoCompiler):
        raise found.with_traceback(None)
    return found is not None or elements * TORCH > _library.rest()


class HugePages:
    """Whether fresh destinations ask for huge pages, from how that went before.

    Each page is timed as it is taken. Where they were dear, the next destinations have small pages, twice as many bytes
    as the last time: free memory that a hypervisor has taken back comes back by use.

    Attributes:
        left: bytes of destinations that are still to have small pages.
    """

    def __init__(self) -> None:
        self.left = 0
        self.patience = PATIENCE[0]

    def take(self, tensor: Tensor) -> bool:
        """Take the pages under a fresh, untouched tensor from the system; whether most of them are huge."""
        size = tensor.numel() * tensor.element_size()
        if size < FRESH:
            return False
        ask = size >= HUGE and self.left == 0
        self.left = max(0, self.left - size)
        huge = library().fxgrow_take_pages(tensor.data_ptr(), size, ask, *DEAR, torch.get_num_threads())
        if ask and 2 * huge > size:
            self.patience = PATIENCE[0]
        elif ask:
            self.left = self.patience
            self.patience = min(2 * self.patience, PATIENCE[1])
        return bool(2 * huge > size)


huge_pages = HugePages()


# ---- tables ----


def _address(values: np.ndarray | None) -> int | None:
    if values is None:
        return None
    assert values.flags.c_contiguous
    return int(values.__array_interface__["data"][0])  # several times faster than .ctypes.data


@dataclass(eq=False)
class _Groups:
    """Units of a dim with local entries: ``members`` are entries of the whole dim, sorted by unit, then by place."""

    order: Ints  # (size,) entries sorted by unit
    start: Ints  # (units,) first position in order
    count: Ints  # (units,)
    unit: Ints  # (units,)


@dataclass(eq=False)
class Loop:
    """A loop of the nest that fills a tensor: dims after merging neighbours, the local range, strides in elements."""

    dim: Dim
    offset: int
    local: int
    source_stride: int
    target_stride: int
    linear: tuple[int, int, int]  # virtual, split, target
    split: bool
    parts: list[int]  # original dims

    @property
    def whole(self) -> bool:
        return self.offset == 0 and self.local == self.dim.size


def loops(job: Job, out: Tensor) -> list[Loop]:
    """The dims of a job as loops, ungrown neighbours merged; trailing ones of a few elements fold into a grown dim."""
    result: list[Loop] = []
    for d, dim in enumerate(job.dims):
        loop = Loop(
            dim,
            job.offset[d],
            job.local[d],
            0 if job.source is None else job.source.stride(d),
            out.stride(d),
            (job.virtual_strides[d], job.split_strides[d], job.target_strides[d]),
            d == job.split,
            [d],
        )
        if result:
            loop = _merge(job, result[-1], loop, result) or loop
        result.append(loop)
    if not result:
        return [Loop(Dim(1, 1, 1), 0, 1, 1, 1, (1, 1, 1), False, [])]
    return result


def _merge(job: Job, left: Loop, right: Loop, into: list[Loop]) -> Loop | None:
    """`left` and `right` as one loop (taking `left` off the list), or ``None`` where they do not merge."""
    if not (right.dim.identity and right.whole):
        return None
    n = right.dim.size
    strided = job.source is None or left.source_stride == right.source_stride * n or left.dim.source <= 1
    if not strided or (left.target_stride != right.target_stride * n and left.local > 1):
        return None
    if n == 1:
        merged = left.dim
    elif left.dim.identity:
        merged = Dim(left.dim.size * n, left.dim.source * n, left.dim.virtual * n)
    else:
        last = right.parts[-1] == len(job.dims) - 1
        mean = left.dim.fill is not None and bool((left.dim.fill == FILL_MEAN).any())
        if not last or mean or n > EXPAND or left.dim.size * n > 1 << 22:
            return None
        merged = _expanded(left.dim, n)
    into.pop()
    one = n == 1 and not left.dim.identity
    return Loop(
        merged,
        left.offset * n,
        left.local * n,
        left.source_stride if one else right.source_stride,
        left.target_stride if one else right.target_stride,
        left.linear if one else right.linear,
        left.split,
        left.parts + right.parts,
    )


_expansions: weakref.WeakKeyDictionary[Dim, dict[int, Dim]] = weakref.WeakKeyDictionary()


def _expanded(dim: Dim, n: int) -> Dim:
    """A grown dim and a trailing ungrown one of n elements, as one grown dim."""
    known = _expansions.setdefault(dim, {})
    if n not in known:

        def repeat(values: Any) -> Any:
            return None if values is None else np.repeat(values, n, axis=-1)

        assert dim.index is not None
        tree = dim.tree
        known[n] = Dim(
            dim.size * n,
            dim.source * n,
            dim.virtual * n,
            (dim.index[:, None] * n + np.arange(n)).ravel(),
            repeat(dim.fill),
            repeat(dim.scale),
            repeat(dim.copy),
            None
            if tree is None
            else Tree(*(repeat(v) for v in (tree.node, tree.right, tree.lean, tree.spread, tree.active))),
            repeat(dim.pair),
            dim.has_split,
        )
    return known[n]


def _group(dim: Dim) -> _Groups:
    units = np.arange(dim.size) if dim.index is None else dim.index
    order = np.argsort(units, kind="stable") if dim.index is not None else units
    ordered = units[order]
    start = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if dim.size else np.zeros(0, np.int64)
    return _Groups(order, start, np.diff(np.append(start, dim.size)), ordered[start])


def _leans(tree: Tree, members: Ints) -> Floats:
    """(groups, n - 1) leans of the cuts of groups given by their members (groups, n)."""
    cuts = cuts_of(members.shape[1])
    return tree.lean[cuts.depth[None, :], members[:, cuts.lo]]


@dataclass(eq=False)
class OuterTable:
    """Arrays of `_Outer`; `sizes` are the group sizes that are cut."""

    unit: Ints
    start: Ints
    entry: Ints
    leaf: Ints
    code: Bytes
    shape: Ints
    lean: Floats
    lean_at: Ints
    paired: Ints | None
    scale: Floats | None
    copy: Bytes | None
    sizes: set[int]

    @functools.cached_property
    def addresses(self) -> list[int | None]:
        """Of the arrays, in the order of `_Outer`."""
        outer = (self.unit, self.start, self.entry, self.leaf, self.code, self.shape, self.lean, self.lean_at)
        return [_address(a) for a in (*outer, self.paired, self.scale, self.copy)]


def outer_table(loop: Loop, default: int, paired: bool) -> OuterTable:
    dim, lo, hi = loop.dim, loop.offset, loop.offset + loop.local
    if dim.index is None:
        n = loop.local
        zeros, at = np.zeros(n, np.int64), np.arange(n + 1)
        code, lean = np.full(n, default, np.uint8), np.zeros(1)
        return OuterTable(at[:-1] + lo, at, at[:-1], zeros, code, zeros, lean, zeros, None, None, None, set())
    groups = _group(dim)
    rank = np.arange(dim.size) - np.repeat(groups.start, groups.count)
    of_group = np.repeat(np.arange(len(groups.start)), groups.count)
    size = groups.count[of_group]
    entry = groups.order
    is_pair = np.zeros(dim.size, bool) if dim.pair is None or not paired else dim.pair[entry] != 0
    pair_group = np.zeros(len(groups.start), bool)
    np.logical_or.at(pair_group, of_group, is_pair)
    is_cut = np.zeros(dim.size, bool) if dim.tree is None else dim.tree.active[0][entry]
    together = is_cut | pair_group[of_group] | (not loop.split)
    here = (entry >= lo) & (entry < hi)
    # groups that are not cut in a split dim fall apart into single entries
    label = np.where(together, of_group, len(groups.start) + np.arange(dim.size))[here]
    first = np.concatenate([[True], label[1:] != label[:-1]]) if len(label) else np.zeros(0, bool)
    starts = np.flatnonzero(first)
    picked = entry[here]
    head = picked[starts]
    shape = np.where(is_cut & ~pair_group[of_group], size, 0)[here][starts]
    lean_at = np.zeros(len(starts), np.int64)
    leans: list[Floats] = [np.zeros(1)]
    length = 1
    whole = of_group[here][starts]
    for n in np.unique(shape[shape > 0]):
        at = np.flatnonzero(shape == n)
        members = groups.order[groups.start[whole[at]][:, None] + np.arange(n)]
        assert dim.tree is not None
        block = _leans(dim.tree, members)
        lean_at[at] = length + np.arange(len(at)) * (n - 1)
        leans.append(block.ravel())
        length += block.size
    return OuterTable(
        np.ascontiguousarray(dim.index[head]),
        np.append(starts, len(picked)).astype(np.int64),
        picked - lo,
        np.ascontiguousarray(rank[here]),
        np.full(len(starts), default, np.uint8) if dim.fill is None else dim.fill[head],
        shape.astype(np.int64),
        np.concatenate(leans),
        lean_at,
        np.where(pair_group[of_group], size, 0)[here][starts].astype(np.int64) if pair_group.any() else None,
        None if dim.scale is None else np.ascontiguousarray(dim.scale[lo:hi]),
        None if dim.copy is None else np.ascontiguousarray(dim.copy[lo:hi]).view(np.uint8),
        {int(n) for n in np.unique(shape) if n},
    )


@dataclass(eq=False)
class Piece:
    """One `_Segment` in numpy."""

    first: int
    count: int
    units: Ints | None
    leaves: int
    split: bool
    paired: bool
    code: int
    base: Ints
    step: int
    scatter: Ints | None
    lean: Floats
    lean_step: int
    scale: Floats | None

    @functools.cached_property
    def segment(self) -> _Segment:
        """Its arrays must outlive it."""
        units, base, scatter, lean, scale = map(_address, (self.units, self.base, self.scatter, self.lean, self.scale))
        flags = (self.leaves, self.split, self.paired, self.code)
        return _Segment(self.first, self.count, units, *flags, base, self.step, scatter, lean, self.lean_step, scale)


def gather_pieces(loop: Loop, default: int) -> list[Piece]:
    """Columns in destination order, one destination per column: for noise addressed by destination columns."""
    dim, lo, hi = loop.dim, loop.offset, loop.offset + loop.local
    if dim.index is None:
        return [_run(lo, loop.local, 0, default, None)]
    unit = dim.index[lo:hi]
    code = np.full(hi - lo, default, np.uint8) if dim.fill is None else dim.fill[lo:hi]
    scale = None if dim.scale is None else dim.scale[lo:hi]
    code_ends = np.flatnonzero(code[1:] != code[:-1]) + 1
    unit_ends = np.flatnonzero((unit[1:] != unit[:-1] + 1) | (code[1:] != code[:-1])) + 1
    affine = len(unit_ends) + 1 <= max(8, (hi - lo) // 32)
    ends = unit_ends if affine else code_ends
    pieces = []
    for a, b in zip([0, *ends.tolist()], [*ends.tolist(), hi - lo], strict=True):
        factors = None if scale is None else np.ascontiguousarray(scale[a:b])
        piece = _run(int(unit[a]), b - a, a, int(code[a]), factors)
        if not affine:
            piece.units = np.ascontiguousarray(unit[a:b])
        pieces.append(piece)
    return pieces


def _run(first: int, count: int, base: int, code: int, scale: Floats | None) -> Piece:
    return Piece(first, count, None, 1, False, False, code, np.array([base]), 1, None, np.zeros(1), 0, scale)


def scatter_pieces(loop: Loop, default: int, paired: bool) -> list[Piece] | None:
    """Columns in source order, each with all its destinations; ``None`` where copies have scales of their own."""
    dim, lo, hi = loop.dim, loop.offset, loop.offset + loop.local
    if dim.index is None:
        return gather_pieces(loop, default)
    groups = _group(dim)
    many = groups.count > 1
    if dim.scale is not None and many.any():
        ordered = dim.scale[groups.order]
        if (ordered != np.repeat(ordered[groups.start], groups.count)).any():
            return None
    head = groups.order[groups.start]
    code = np.full(len(head), default, np.uint8) if dim.fill is None else dim.fill[head]
    split = np.zeros(len(head), bool) if dim.tree is None else dim.tree.active[0][head]
    pair = np.zeros(len(head), bool) if dim.pair is None or not paired else dim.pair[head] != 0
    split &= ~pair
    here = (groups.order >= lo) & (groups.order < hi)
    alive = np.logical_or.reduceat(here, groups.start) if dim.size else np.zeros(0, bool)
    pieces: list[Piece] = []
    kinds = np.stack([groups.count, split, pair, code], 1)[alive]
    chosen = np.flatnonzero(alive)
    # columns of one multiplicity and kind form classes; a class is cut into affine runs if these are long
    classes, label = np.unique(kinds, axis=0, return_inverse=True)
    for k, (n, is_split, is_pair, c) in enumerate(classes.tolist()):
        at = chosen[label.ravel() == k]
        members = groups.order[groups.start[at][:, None] + np.arange(n)]  # (columns, n)
        target = np.where((members >= lo) & (members < hi), members - lo, -1)
        unit = groups.unit[at]
        lean = _leans(dim.tree, members) if is_split and dim.tree is not None else np.zeros((len(at), max(n - 1, 1)))
        scale = None if dim.scale is None else dim.scale[members[:, 0]]
        ends, steps = _affine(unit, target)
        if len(ends) <= max(8, len(at) // 32):
            bounds = list(zip([0, *ends[:-1]], ends, steps, strict=True))
        else:
            bounds = [(0, len(at), 0)]
        for a, b, step in bounds:
            leans = lean[a:b].T
            constant = bool((leans == leans[:, :1]).all())
            pieces.append(
                Piece(
                    int(unit[a]),
                    b - a,
                    None if step else np.ascontiguousarray(unit[a:b]),
                    n,
                    bool(is_split),
                    bool(is_pair),
                    c,
                    np.ascontiguousarray(target[a]),
                    step or 1,
                    None if step else np.ascontiguousarray(target[a:b].T),
                    np.ascontiguousarray(leans[:, 0] if constant else leans),
                    0 if constant else 1,
                    None if scale is None else np.ascontiguousarray(scale[a:b]),
                )
            )
    pieces.sort(key=lambda piece: piece.first)
    return pieces


def _affine(unit: Ints, target: Ints) -> tuple[list[int], list[int]]:
    """Ends of runs in which units go up by 1 and every destination by one same step, and the steps."""
    n = len(unit)
    change = target[1:] - target[:-1]
    present = (target[1:] >= 0) & (target[:-1] >= 0)
    absent = (target[1:] < 0) & (target[:-1] < 0)
    step = np.where(present, change, 0).max(axis=1, initial=0)
    good = (unit[1:] == unit[:-1] + 1) & (step > 0) & (((change == step[:, None]) & present) | absent).all(axis=1)
    step = np.where(good, step, 0)  # step[i] joins columns i and i + 1
    turns = np.flatnonzero(step[1:] != step[:-1]) + 1
    ends: list[int] = []
    steps: list[int] = []
    if len(turns) > n // 8 + 8:
        return list(range(1, n + 1)), [1] * n  # too ragged to walk
    done = 0  # columns before this one are in a run
    for lo, hi in zip([0, *turns.tolist()], [*turns.tolist(), n - 1], strict=True):
        if lo < hi and step[lo] > 0:
            if max(done, lo) < hi:
                ends += list(range(done + 1, lo + 1)) + [hi + 1]
                steps += [1] * (lo - done) + [int(step[lo])]
                done = hi + 1
        else:
            ends += list(range(done + 1, hi + 1))
            steps += [1] * max(hi - done, 0)
            done = max(done, hi)
    ends += list(range(done + 1, n + 1))
    steps += [1] * (n - done)
    return ends, steps


# ---- the call ----

_tables: weakref.WeakKeyDictionary[Dim, dict[tuple[Any, ...], Any]] = weakref.WeakKeyDictionary()


def _cached(loop: Loop, kind: str, *arguments: Any) -> Any:
    make = {"outer": outer_table, "gather": gather_pieces, "scatter": scatter_pieces}[kind]
    if loop.dim.index is None:
        return make(loop, *arguments)  # type: ignore[operator]
    known = _tables.setdefault(loop.dim, {})
    key = (kind, loop.offset, loop.local, loop.split, *arguments)
    if key not in known:
        known[key] = make(loop, *arguments)  # type: ignore[operator]
    return known[key]


def mean_layout(job: Job, nest: list[Loop]) -> list[tuple[set[int], list[int], Tensor]]:
    """The tables of means: loops averaged over, stride per loop (0 for those), table."""
    result = []
    for over, means in job.means.items():
        averaged: set[int] = set()
        strides = [0] * len(nest)
        for d, loop in enumerate(nest):
            if any(over >> part & 1 for part in loop.parts):
                averaged.add(d)
            else:
                real = [part for part in loop.parts if means.shape[part] > 1]
                strides[d] = means.stride(real[-1]) if real else 0
        result.append((averaged, strides, means))
    return result


class Unsupported(Exception):
    """A call this backend leaves to the torch backend."""


def task_of(job: Job, out: Tensor) -> tuple[_Task, list[Any]]:
    """The structure for one call, and the arrays that must outlive it.

    Raises:
        Unsupported: more than four dims that do not merge, or a destination whose last dim is strided.
    """
    computed = job.dtype in FLOATS and not (job.plain and job.source is not None and job.source.dtype == job.dtype)
    if job.source is not None and job.source.dtype != job.dtype and not {job.source.dtype, job.dtype} <= set(FLOATS):
        raise Unsupported("conversion between types that are not floating")
    if out.is_complex() or (not computed and out.element_size() not in (1, 2, 4, 8, 16)) or out.is_quantized:
        raise Unsupported(f"{out.dtype}")
    nest = loops(job, out)
    if len(nest) > 4:
        raise Unsupported("more than four grown dims")
    column = nest[-1]
    if column.target_stride != 1 and column.local > 1:
        raise Unsupported("a destination with a strided last dim")
    task = _Task()
    keep: list[Any] = []
    fill = OLD if job.source is not None or job.births else job.fill
    task.source = _source_address(job)
    task.target = out.data_ptr()
    task.item_bytes = 0 if computed else out.element_size()
    if computed:
        task.source_type = TYPES[job.source.dtype] if job.source is not None else 0
        task.target_type = TYPES[job.dtype]
    elif job.constant:
        bits = torch.tensor([job.constant]).to(job.dtype).view(torch.uint8)
        ctypes.memmove(task.constant_bits, bits.data_ptr(), bits.numel())
    task.rows_outer = len(nest) - 1
    task.split_outer = -1
    sizes: set[int] = set()
    for d, loop in enumerate(nest[:-1]):
        table = _cached(loop, "outer", fill, job.pair_noise)
        keep.append(table)
        spans = (loop.source_stride, loop.target_stride, *loop.linear, loop.offset)
        task.outer[d] = _Outer(len(table.unit), *table.addresses, *spans)
        if loop.split:
            task.split_outer = d
            sizes = table.sizes
    by_target = task.split_outer >= 0 and (job.tree_noise or job.pair_noise)
    pieces: list[Piece] | None = None if by_target else _cached(column, "scatter", fill, job.pair_noise)
    if pieces is None:
        if column.split and not by_target:
            raise Unsupported("copies with scales of their own in the split dim")
        pieces = cast("list[Piece]", _cached(column, "gather", fill))
    keep.append(pieces)
    segments = (_Segment * len(pieces))(*(piece.segment for piece in pieces))
    task.segments, task.segment = len(pieces), ctypes.addressof(segments)
    if column.split:
        sizes = {piece.leaves for piece in pieces if piece.split}
    task.column_source_stride = column.source_stride
    task.columns, task.column_offset = column.local, column.offset
    later = None
    if job.independent and column.dim.copy is not None:
        later = np.ascontiguousarray(column.dim.copy[column.offset : column.offset + column.local]).view(np.uint8)
    task.column_copy = _address(later)
    task.scale, task.constant = job.scale, job.constant
    task.random_amplitude = job.random_std * UNIT["bytes"]
    amplitude = 0.0
    if job.noise is not None:
        amplitude = job.amplitude(job.noise.scale)
        task.pair_amplitude = job.amplitude(job.noise.newborn_scale)
        task.independent_amplitude = amplitude
        task.distribution = DISTRIBUTIONS[job.noise.distribution]
    task.tree_noise, task.pair_noise, task.independent = job.tree_noise, job.pair_noise, job.independent
    task.noise_key[:] = job.noise_key
    task.random_key[:] = job.random_key
    cuts = []
    for n in sorted(sizes):
        tree = cuts_of(n)
        arrays: list[np.ndarray] = [tree.node, tree.lo, tree.mid, tree.spread * amplitude]
        keep.append(arrays)
        cuts.append(_Cuts(n, *(_address(a) for a in arrays)))
    table_of_cuts = (_Cuts * max(len(cuts), 1))(*cuts)
    task.cut = ctypes.addressof(table_of_cuts)
    for over, strides, means in mean_layout(job, nest):
        places = sum(1 << (3 if loop is column else d) for d, loop in enumerate(nest) if d in over)
        task.means[places] = means.data_ptr()
        task.mean_stride[places][:] = strides[:-1] + [0] * (4 - len(strides)) + strides[-1:]
    size = out.numel() * out.element_size()
    task.stream = int(size >= STREAM and not job.independent)
    task.threads = max(1, min(torch.get_num_threads(), out.numel() // SHARE))
    return task, [*keep, segments, table_of_cuts, later, job]


def _source_address(job: Job) -> int | None:
    """Where the first entry of the whole source is, or would be, of which a rectangle may be all there is."""
    if job.source is None or not job.source.numel():
        return None
    before = sum(a * n for a, n in zip(job.start, job.source.stride(), strict=False))
    return (job.source.data_ptr() - before * job.source.element_size()) % (1 << 64)


def run(job: Job, out: Tensor, fresh: bool = False) -> None:
    """Fill `out` (CPU, shape ``job.local``) as `job` says.

    `fresh`: nothing has touched `out` yet, so that its pages are still to be taken from the system.

    Raises:
        Unsupported: see `task_of`.
        NoCompiler: the library cannot be built.
    """
    if out.numel() == 0:
        return
    task, keep = task_of(job, out)
    if fresh:
        huge_pages.take(out)
    if library().fxgrow_run(ctypes.byref(task)):
        raise MemoryError("the native kernel ran out of memory")
    del keep


def run_many(jobs: list[tuple[Job, Tensor]]) -> None:
    """Fill many small destinations at once: one call, each tensor on one thread.

    Raises:
        Unsupported, NoCompiler: as `run`; some destinations may be filled already.
    """
    built = [task_of(job, out) for job, out in jobs if out.numel()]
    tasks = (_Task * max(len(built), 1))(*(task for task, _ in built))
    for task in tasks:
        task.threads = 1
    if library().fxgrow_run_many(tasks, len(built), torch.get_num_threads()):
        raise MemoryError("the native kernel ran out of memory")


def available() -> str | None:
    """``None`` if the backend works here, otherwise why not."""
    try:
        library()
    except NoCompiler as error:
        return str(error)
    return None
