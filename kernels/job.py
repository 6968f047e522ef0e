"""One call of `materialise`, checked and normalised: what every backend receives."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fxgrow.kernels.maps import (
    FILL_CONSTANT,
    FILL_MEAN,
    FILL_RANDOM,
    FILL_ZERO,
    OLD,
    Bytes,
    Dim,
    Ints,
    Noise,
    row_major,
)
from fxgrow.kernels.philox import UNIT

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class NoiseTooSmall(UserWarning):
    """Noise below half a unit in the last place leaves most copies identical."""


@dataclass(eq=False)
class Job:
    """A normalised call. All values are computed in `compute` (float64 for a float64 destination, else float32).

    Attributes:
        source: the source with one dim per entry of `dims`, or ``None``; already on the destination's device.
        start: per dim, the first entry of the whole source that `source` holds: it may be a rectangle of it.
        dims: the prepared dims. offset, local: the rectangle of the destination to make, in elements per dim.
        scale: global factor. fill: code of entries no dim calls newborn, when there is no source.
        random_std, constant: what the fills use. random_key, noise_key: Philox key words.
        noise: with absolute scales, or ``None``. split: the dim whose copies share their source, or ``None``.
        virtual_strides: per dim, of the linear index of virtual coordinates (random fills).
        split_strides: the same with destination coordinates outside the split dim (antisymmetric noise).
        target_strides: of destination coordinates (independent noise).
        means: per set of MEAN dims (bit mask), the table of means, in `compute`; size 1 in the dims averaged over and
            virtual size in the others.
    """

    source: Tensor | None
    dims: list[Dim]
    dtype: torch.dtype
    device: torch.device
    offset: list[int]
    local: list[int]
    scale: float
    fill: int
    random_std: float
    constant: float
    random_key: tuple[int, int]
    noise: Noise | None
    noise_key: tuple[int, int]
    start: list[int] = field(default_factory=list)
    means: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        split = [d for d, dim in enumerate(self.dims) if dim.tree is not None or dim.pair is not None]
        self.split: int | None = split[0] if split else None
        self.compute: torch.dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        sizes = [dim.size for dim in self.dims]
        virtual = [dim.virtual for dim in self.dims]
        self.target_strides = row_major(sizes)
        self.virtual_strides = row_major(virtual)
        self.split_strides = row_major([virtual[d] if d == self.split else n for d, n in enumerate(sizes)])
        self.births: list[int] = [d for d, dim in enumerate(self.dims) if dim.fill is not None]
        antisymmetric = self.noise is not None and self.noise.kind == "antisymmetric"
        tree = self.dims[self.split].tree if self.split is not None else None
        pair = self.dims[self.split].pair if self.split is not None else None
        self.tree_noise: bool = bool(antisymmetric and self.noise and self.noise.scale > 0 and tree is not None)
        self.pair_noise: bool = bool(self.noise and self.noise.newborn_scale > 0 and pair is not None)
        self.independent: bool = bool(
            self.noise
            and self.noise.kind == "independent"
            and self.noise.scale > 0
            and any(dim.copy is not None for dim in self.dims)
        )

    @property
    def trivial(self) -> bool:
        """Whether the result is a slice of the source, converted."""
        return self.source is not None and self.scale == 1 and all(d.identity for d in self.dims)

    @property
    def plain(self) -> bool:
        """Whether every value is a source element as it is: a gather and a conversion."""
        return (
            self.source is not None
            and self.scale == 1
            and not self.births
            and not self.independent
            and all(d.scale is None and d.tree is None for d in self.dims)
        )

    @property
    def partial(self) -> bool:
        """Whether the source is a rectangle of a larger tensor."""
        return self.source is not None and (any(self.start) or list(self.source.shape) != [d.source for d in self.dims])

    def copied(self) -> Tensor:
        """The slice of the source that a trivial job's result is."""
        assert self.source is not None
        first = self.start or [0] * len(self.dims)
        spans = (self.entries(d) for d in range(len(self.dims)))
        return self.source[tuple(slice(s.start - a, s.stop - a) for s, a in zip(spans, first, strict=True))]

    def amplitude(self, scale: float) -> float:
        """Factor from a raw draw to noise of standard deviation `scale`."""
        assert self.noise is not None
        return scale * UNIT[self.noise.distribution]

    def entries(self, d: int, lo: int = 0, n: int | None = None) -> slice:
        """Global entries ``[lo, lo + n)`` of the local rectangle along dim d."""
        start = self.offset[d] + lo
        return slice(start, start + (self.local[d] - lo if n is None else n))

    def units(self, d: int, entries: slice) -> Ints:
        """Virtual coordinates of some entries of dim d."""
        index = self.dims[d].index
        return np.arange(entries.start, entries.stop) if index is None else index[entries]


def combine(codes: Sequence[Bytes | None], shape: Sequence[int], default: int) -> Bytes:
    """Fill code of every element of a block from the codes per dim: zero wins, then constant, mean, random, old."""
    result = np.full((1,) * len(shape), default, np.uint8)
    order = np.zeros(256, np.uint8)
    order[[FILL_ZERO, FILL_CONSTANT, FILL_MEAN, FILL_RANDOM, OLD]] = [0, 1, 2, 3, 4]
    back = np.array([FILL_ZERO, FILL_CONSTANT, FILL_MEAN, FILL_RANDOM, OLD], np.uint8)
    for d, code in enumerate(codes):
        if code is not None:
            lined = code.reshape([-1 if e == d else 1 for e in range(len(shape))])
            result = back[np.minimum(order[result], order[lined])]
    return result


def blocks(local: Sequence[int], target: int) -> Iterator[tuple[list[int], list[int]]]:
    """Cut a rectangle into blocks of about `target` elements, trailing dims whole: yields (lo, size) per block."""
    sizes: list[int] = []
    room = max(target, 1)
    for n in reversed(local):
        sizes.insert(0, max(1, min(n, room)))
        room = max(1, room // max(n, 1))
    for lo in itertools.product(*(range(0, n, size) for n, size in zip(local, sizes, strict=True))):
        yield list(lo), [min(size, n - at) for at, size, n in zip(lo, sizes, local, strict=True)]
