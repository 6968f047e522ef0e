"""The growth plan: every decision of a growth, as data.

A plan says how each axis grows (:class:`AxisGrowth`), how each tensor of the new model is made of tensors of the old
one (:class:`TensorPlan`, one map per dim), and how the graph changes (:class:`Edit`, :class:`CloneBlock`,
:class:`InsertLayer`). Parameters, buffers, optimizer moments and checkpoints are all made by the same tensor plans.
Plans round-trip through JSON; index maps are run-length encoded there.

One growth of an axis has three forms. :class:`AxisMap` is where planning begins: which old unit each new one copies,
and with which share. In every tensor that has the axis it becomes the :class:`DimPlan` of a dim, which is what a plan
holds and the file says; the kernels take it as arrays (:class:`fxgrow.kernels.DimMap`). :class:`AxisGrowth` is the
account of it for people: its name, and its size before and after.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Discriminator, Field, PlainSerializer, PlainValidator, ValidationError

from fxgrow.errors import CheckpointError, SpecError
from fxgrow.limits import UNITS, check_elements
from fxgrow.reading import first_problem, parse_json

# What a plan's file says; the kernels use the same numbers.
FILL_ZERO, FILL_RANDOM, FILL_MEAN, FILL_CONSTANT = 0, 1, 2, 3


def _encode_index(index: np.ndarray) -> list[list[int]]:
    """Runs [start, count]; old units run upwards from start, newborn ones (negative) downwards."""
    if len(index) == 0:
        return []
    step = np.diff(index)
    up = (step == 1) & (index[:-1] >= 0) & (index[1:] >= 0)
    down = (step == -1) & (index[:-1] < 0) & (index[1:] < 0)
    starts = np.flatnonzero(np.concatenate([[True], ~(up | down)]))
    counts = np.diff(np.concatenate([starts, [len(index)]]))
    return [[int(index[s]), int(c)] for s, c in zip(starts, counts, strict=True)]


def _decode_index(value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value.astype(np.int64)
    runs = [np.arange(s, s + c) if s >= 0 else np.arange(s, s - c, -1) for s, c in _runs(value, int)]
    return np.concatenate(runs).astype(np.int64) if runs else np.zeros(0, np.int64)


def _runs(value: Any, kind: type[int] | type[float]) -> list[tuple[Any, int]]:
    """Pairs [value, count] as JSON has them, checked before anything is made of them."""
    if not isinstance(value, list) or not all(isinstance(run, list) and len(run) == 2 for run in value):
        raise ValueError("expected a list of pairs [value, count]")
    total = 0
    start: Any
    for start, count in value:
        whole = type(count) is int or (type(count) is float and count.is_integer())
        if not whole or count < 1 or (type(start) is not int and type(start) is not kind):
            raise ValueError(f"not a pair [value, count]: {str([start, count])[:80]}")
        total += count
        if total > UNITS or not abs(start) <= (UNITS if kind is int else math.inf):
            raise ValueError(f"beyond the {UNITS:,} units that an axis may have")
    return [(start, int(count)) for start, count in value]


def encode_values(values: np.ndarray) -> list[list[float]]:
    """Runs [value, count]."""
    if len(values) == 0:
        return []
    starts = np.flatnonzero(np.concatenate([[True], np.diff(values) != 0]))
    counts = np.diff(np.concatenate([starts, [len(values)]]))
    return [[values[s].item(), int(c)] for s, c in zip(starts, counts, strict=True)]


def decode_values(value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    runs = _runs(value, float)
    return np.concatenate([np.full(c, v, dtype=np.float64) for v, c in runs]) if runs else np.zeros(0)


IndexVector = Annotated[np.ndarray, PlainValidator(_decode_index), PlainSerializer(_encode_index)]
ValueVector = Annotated[np.ndarray, PlainValidator(decode_values), PlainSerializer(encode_values)]


class _Model(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", ser_json_inf_nan="strings")


class DimPlan(_Model):
    """How one dim of a tensor grows.

    Attributes:
        index: int64 (new size,): the old entry each new one copies, or ``-id - 1`` for a newborn one.
        split: float64 (new size,): the share of its source that each entry takes; shares of a group add up to 1.
        gradient: float64 (new size,): the factor by which the gradient of an entry differs from its source's.
        fill: (new size,): fill code of newborn entries.
    """

    index: IndexVector
    split: ValueVector | None = None
    gradient: ValueVector | None = None
    fill: ValueVector | None = None

    @property
    def size(self) -> int:
        return len(self.index)

    @property
    def newborn(self) -> np.ndarray:
        """Boolean (new size,): entries that are not the first copy of an old one."""
        out = np.ones(len(self.index), bool)
        old = np.flatnonzero(self.index >= 0)
        _, first = np.unique(self.index[old], return_index=True)
        out[old[first]] = False
        return out

    def after(self, earlier: DimPlan, unique: int) -> DimPlan:
        """This map applied to the result of ``earlier``; ``unique`` keeps newborn ids of the two apart."""
        old = self.index >= 0
        take = np.where(old, self.index, 0)
        index = np.where(old, earlier.index[take], self.index - unique)
        # numbered anew without gaps: kernels keep a table entry for every id up to the largest
        newborn = index < 0
        index[newborn] = -1 - np.unique(-1 - index[newborn], return_inverse=True)[1]

        def times(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
            if a is None and b is None:
                return None
            left = np.ones(len(index)) if a is None else a
            right = np.ones(len(index)) if b is None else np.where(old, b[take], 1.0)
            return left * right

        fill = None
        if self.fill is not None or earlier.fill is not None:
            mine = np.zeros(len(index)) if self.fill is None else self.fill
            theirs = np.zeros(len(index)) if earlier.fill is None else earlier.fill[take]
            fill = np.where(old, theirs, mine)
        return DimPlan(
            index=index,
            split=times(self.split, earlier.split),
            gradient=times(self.gradient, earlier.gradient),
            fill=fill,
        )


class NoisePlan(_Model):
    """Noise of one tensor; ``relative`` scales are multiples of the source's standard deviation."""

    kind: Literal["antisymmetric", "independent"]
    scale: float
    relative: bool = False
    distribution: Literal["bytes", "normal", "rademacher"] = "bytes"
    seed: int = 0


class Continuation(_Model):
    """The pattern by which a buffer goes on, along dims whose new entries no training decides.

    Attributes:
        kind: ``line``: x[i] = x[0] + i (x[1] - x[0]). ``band``: a function of column - row, constant far from the
            diagonal. ``waves``: cos(i w) or sin(i w), a frequency per column. ``unknown``: planned without values.
        dims: those that have new entries.
        rows, columns: dims of the matrix that a band or waves fill.
        frequencies, sines, dtype: of waves; ``sines`` is 1 where a column holds the sine.
    """

    kind: Literal["line", "band", "waves", "unknown"]
    dims: list[int]
    rows: int | None = None
    columns: int | None = None
    frequencies: list[float] | None = None
    sines: list[bool] | None = None
    dtype: Literal["float32", "float64"] = "float32"

    @property
    def words(self) -> str:
        """What the pattern is, for people."""
        return {
            "line": "a constant or evenly spaced numbers",
            "band": "a band along the diagonal",
            "waves": "cosines and sines of the position",
            "unknown": "a pattern not looked at, as there are no values",
        }[self.kind]


class Stage(_Model):
    """One of several growths of a tensor, each applied to the result of the one before: see :class:`TensorPlan`."""

    dims: list[DimPlan | None] = Field(default_factory=list)
    scale: float = 1.0
    random_std: float | None = None
    random_seed: int = 0
    constant: float = 0.0
    paired: bool = False
    noise: NoisePlan | None = None

    def closes(self, dims: Iterable[int], draws: bool) -> bool:
        """Whether a growth of these dims cannot be another map on top; ``draws``: it scales, or draws noise."""
        new = {i for i, d in enumerate(self.dims) if d is not None and bool((d.index < 0).any())}
        constant = any(d is not None and d.fill is not None and FILL_CONSTANT in d.fill for d in self.dims)
        return self.paired or self.noise is not None or constant or bool(new & set(dims)) or (bool(new) and draws)


#: what PyTorch's own wrappers put into the names of what is inside
_WRAPPERS = {"_checkpoint_wrapped_module", "_orig_mod"}


def key_of(name: str) -> int:
    """What a tensor's draws are keyed by: the same, whatever of PyTorch's own is wrapped around a part of the model."""
    return zlib.crc32(".".join(part for part in name.split(".") if part not in _WRAPPERS).encode())


class TensorPlan(Stage):
    """How one tensor of the grown model is made.

    ``new[i, j, ...] = scale * split_0[i] * split_1[j] ... * old[index_0[i], index_1[j], ...]``, newborn entries by
    their fill codes, plus noise. Dims that are None stay as they are.

    Attributes:
        source: name of the old tensor; None for one that is made from nothing (``init``).
        shape: of the new tensor.
        scale, gradient_scale: factor of the values, and of the gradients on top of the dims' own.
        shift: is added to every entry in the end: c (1 + w) is 1 + w' with w' = c w + (c - 1).
        zero: the tensor is all zeros whatever its source holds (last projections of an identity block).
        level: what such a tensor holds instead of zeros: -1 for the weight w of a norm that multiplies by 1 + w.
        fresh: it belongs to an inserted block or layer, so that its optimizer state starts empty.
        inserted: it belongs to an inserted block that is a plain copy, optimizer state and all.
        random_std: standard deviation of random newborn entries; None: the source's own.
        random_seed: of random newborn entries.
        constant: value of newborn entries with the constant fill.
        paired: newborn entries that share an id read with weights +z and -z.
        appended: dims whose newborn entries all come after the old ones, and are not seen by old inputs.
        continuation: makes the newborn entries of those dims, instead of the fills.
        initial: the shape in which ``init`` makes the tensor, before the maps of ``dims``; None: ``shape``.
        stages: where several growths of the tensor draw noise or fill entries, each of them by itself. They are what
            the values are made by; ``dims`` and ``scale`` then say the same of old entries, all at once.
    """

    source: str | None = None
    shape: list[int]
    gradient_scale: float = 1.0
    shift: float = 0.0
    zero: bool = False
    level: float = 0.0
    fresh: bool = False
    inserted: bool = False
    init: Literal["zeros", "ones", "identity", "dirac"] | None = None
    initial: list[int] | None = None
    stages: list[Stage] = Field(default_factory=list)
    appended: list[int] = Field(default_factory=list)
    continuation: Continuation | None = None
    key: int = 0
    requires_grad: bool = True
    dtype: str | None = None
    device: str | None = None

    def check(self, name: str) -> None:
        """Whether the parts fit together, where they were not made together but read.

        Raises:
            ValueError, SpecError: they do not.
        """
        if any(size < 0 for size in self.shape):
            raise ValueError(f"tensors.{name}.shape: {self.shape} has a negative size")
        check_elements(f"tensors.{name}", self.shape)
        if (self.source is None) == (self.init is None):
            raise ValueError(f"tensors.{name}: give one of source and init")
        if self.source is not None and len(self.dims) != len(self.shape):
            raise ValueError(f"tensors.{name}: {len(self.dims)} dims for the shape {self.shape}")
        self._check_sizes(f"tensors.{name}", self, self.shape)
        sizes: list[int | None] = list(self.shape)
        for number, stage in reversed(list(enumerate(self.stages))):
            where = f"tensors.{name}.stages.{number}"
            if len(stage.dims) != len(sizes):
                raise ValueError(f"{where}: {len(stage.dims)} dims for the shape {self.shape}")
            self._check_sizes(where, stage, sizes)
            # what a dim has before it grows is not known here
            sizes = [n if dim is None else None for n, dim in zip(sizes, stage.dims, strict=True)]

    @staticmethod
    def _check_sizes(where: str, stage: Stage, sizes: Sequence[int | None]) -> None:
        """Whether the vectors of every dim are as long as its index, and as the size where that is known."""
        for i, (dim, size) in enumerate(zip(stage.dims, sizes, strict=False)):
            if dim is None:
                continue
            size = len(dim.index) if size is None else size
            for vector in (dim.index, dim.split, dim.gradient, dim.fill):
                if vector is not None and len(vector) != size:
                    raise ValueError(f"{where}.dims.{i}: {len(vector)} entries for the size {size}")

    @property
    def last(self) -> Stage:
        """The growth that was added last: what it draws and fills is set here."""
        return self.stages[-1] if self.stages else self

    def begin(self, dims: Iterable[int], draws: bool) -> None:
        """A further growth of these dims follows; it becomes a stage of its own where it has to."""
        if not self.last.closes(dims, draws):
            return
        if not self.stages:
            names = Stage.model_fields
            self.stages = [Stage(**{n: getattr(self, n) for n in names if n != "dims"}, dims=list(self.dims))]
            for name in names:
                if name not in ("dims", "scale"):
                    setattr(self, name, names[name].default)
        self.stages.append(Stage(dims=[None] * len(self.shape)))

    def grow(self, i: int, dim: DimPlan, unique: int) -> None:
        """Put a map of one dim on top; ``unique`` keeps newborn ids apart from those there are."""
        for layer in (self, self.last) if self.stages else (self,):
            before = layer.dims[i]
            layer.dims[i] = dim if before is None else dim.after(before, unique)
        self.shape[i] = dim.size

    def multiply(self, factor: float, about: float = 0.0) -> None:
        """Scale what there is, or its sum with a number (``about``)."""
        for layer in (self, self.last) if self.stages else (self,):
            layer.scale *= factor
        self.shift = factor * self.shift + (factor - 1.0) * about

    def noiseless(self) -> TensorPlan:
        """The same without noise."""
        stages = [s.model_copy(update={"noise": None}) for s in self.stages]
        return self.model_copy(update={"noise": None, "stages": stages})

    @property
    def trivial(self) -> bool:
        """The new tensor equals the old one."""
        return (
            self.source is not None
            and all(d is None for d in self.dims)
            and self.scale == 1.0
            and self.shift == 0.0
            and not self.zero
            and self.init is None
        )


class AxisGrowth(_Model):
    """One axis, before and after."""

    name: str
    role: str
    old: int
    new: int
    fill: Literal["copy", "add", "append"]
    split: Literal["even", "uneven"]
    copies: int = Field(description="whole copies of every old unit; 0 where units have unequal numbers of copies")
    newborn: int = Field(description="entries that copy nothing")
    newborn_content: str = ""
    exact_gradients: bool = Field(True, description="gradients of the grown model are those of the small one, mapped")
    how: str = ""


class Edit(_Model):
    """Change of a call in the graph: arguments by schema name (node references as {"$node": name}, with
    "$times" where a dynamic size is multiplied), target."""

    kind: Literal["edit"] = "edit"
    node: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    target: str | None = None
    why: str = ""


class Rescale(_Model):
    """A multiplication by a constant after a node, seen by all its users or by one alone.

    Whole numbers are divided by ``divisor`` instead, which leaves no remainder, so that they stay whole numbers.
    """

    kind: Literal["rescale"] = "rescale"
    node: str
    factor: float
    divisor: int | None = None
    name: str
    user: str | None = None
    why: str = ""


class Unscale(_Model):
    """A multiplication that an earlier growth inserted is taken out again: weights have its factor now."""

    kind: Literal["unscale"] = "unscale"
    node: str


class CloneBlock(_Model):
    """A copy of a block of a repeated stack, placed right after it (or after another one)."""

    kind: Literal["clone"] = "clone"
    stack: str
    source: int = Field(description="number of the block that is copied, before renumbering")
    after: int = Field(description="number of the block it is placed after, before renumbering")
    number: int = Field(description="its number afterwards")
    init: Literal["zero", "gate", "stack"]
    gate: str | None = Field(None, description="name of the gate's parameter")
    why_gate: str | None = Field(None, description="the op, and its line, that nothing but a gate makes the identity")


class Renumber(_Model):
    """Modules renamed to make room: old prefix to new prefix."""

    kind: Literal["renumber"] = "renumber"
    prefixes: dict[str, str]


class InsertLayer(_Model):
    """An identity layer after a module's output."""

    kind: Literal["insert"] = "insert"
    layer: Literal["linear", "conv", "batch_norm"]
    after: str
    node: str = Field(description="graph node whose value is passed on")
    path: str = Field(description="module path of the new layer")
    dim: int
    size: int
    rank: int
    kernel_size: int = 3
    bias: bool = True
    activation: str | None = Field(None, description="op repeated after the layer")


class Adapt(_Model):
    """A low-rank adapter beside a layer."""

    kind: Literal["adapt"] = "adapt"
    path: str = Field(description="module path of the layer, and of the adapter's weights")
    input: str = Field(description="graph node whose value the layer takes")
    output: str = Field(description="graph node whose value it hands on")
    rank: int
    alpha: float = Field(description="the product is multiplied by alpha / rank")
    dropout: float = 0.0
    embedding: bool = False
    transposed: bool = Field(False, description="the layer's weight is (in, out)")
    padding: int | None = Field(None, description="number of the entry of an embedding that does not learn")
    sizes: list[int] = Field(
        description="what the adapter reads from, entries or a width, and the width that it writes"
    )


Change = Annotated[Edit | Rescale | Unscale | CloneBlock | Renumber | InsertLayer | Adapt, Discriminator("kind")]


class OutputGrowth(_Model):
    """An output that gets further entries after its old ones; outputs are numbered over all calls."""

    output: int
    dim: int
    old: int
    new: int


class Constant(_Model):
    """A number in the grown graph that the model's class, built larger, would not compute.

    Attributes:
        node, argument: where it stands; a multiplication that growth inserted has the argument ``other``, and a tensor
            that is not saved with the weights (then ``node`` is its name) none.
        op, line: of the node, and the user's line.
        own: what the class computes there; None: nothing (it does not multiply), or what the op implies.
        value: what stands there.
        why: it could not be folded into weights.
    """

    node: str
    argument: str = ""
    op: str
    line: str = ""
    own: float | None = None
    value: float | None = None
    why: str = ""

    def __str__(self) -> str:
        default = "nothing" if self.argument == "other" else "what the op implies"
        own = default if self.own is None else f"{self.own:g}"
        value = "what the op implies" if self.value is None else f"{self.value:g}"
        at = f" at {self.line}" if self.line else ""
        if not self.argument:
            return f"{self.node} is a {self.op} that the model's class computes by itself: {self.why}"
        return f"{self.node}.{self.argument} is {value}, where the model's class computes {own}{at}: {self.why}"


class Step(_Model):
    """One operation of the spec, decided.

    Attributes:
        outputs: those with further entries along a dim.
        changed_outputs: numbers of the outputs to which an approximate step's change is confined.
    """

    op: str
    request: dict[str, Any]
    axes: list[AxisGrowth] = Field(default_factory=list)
    changes: list[Change] = Field(default_factory=list)
    exactness: Literal["exact", "approximate", "lossy"] = "exact"
    eval_only: bool = Field(False, description="exact in eval mode only (an inserted batch norm)")
    notes: list[str] = Field(default_factory=list)
    outputs: list[OutputGrowth] = Field(default_factory=list)
    changed_outputs: list[int] = Field(default_factory=list)


class GrowthPlan(_Model):
    """Everything a growth does. ``tensors`` is keyed by the names of the grown model.

    ``constants`` are the numbers of the grown graph without which the grown weights, in a larger model of the same
    class, compute something else.
    """

    version: Literal[1] = 1
    model: str
    steps: list[Step] = Field(default_factory=list)
    tensors: dict[str, TensorPlan] = Field(default_factory=dict)
    aliases: dict[str, str] = Field(default_factory=dict)
    constants: list[Constant] = Field(default_factory=list)
    parameters_before: int = 0
    parameters_after: int = 0

    @property
    def exactness(self) -> Literal["exact", "approximate", "lossy"]:
        kinds = {s.exactness for s in self.steps}
        return "lossy" if "lossy" in kinds else "approximate" if "approximate" in kinds else "exact"

    @property
    def changed_outputs(self) -> set[int]:
        """Outputs that an approximate growth changes, where it leaves all others exact."""
        return {n for s in self.steps for n in s.changed_outputs}

    @property
    def eval_only(self) -> bool:
        """A step is exact in eval mode only."""
        return any(s.eval_only for s in self.steps)

    @property
    def exact_elsewhere(self) -> bool:
        """Every output but ``changed_outputs`` is exact."""
        return all(s.exactness == "exact" or s.changed_outputs for s in self.steps)

    @property
    def exact_gradients(self) -> bool:
        return all(a.exact_gradients for s in self.steps for a in s.axes)

    @property
    def axes(self) -> list[AxisGrowth]:
        return [a for s in self.steps for a in s.axes]

    @property
    def notes(self) -> list[str]:
        return list(dict.fromkeys(n for s in self.steps for n in s.notes))

    def to_json(self, indent: int | None = None) -> str:
        return self.model_dump_json(indent=indent, exclude_none=True)

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> GrowthPlan:
        """The inverse of :meth:`to_json`.

        Raises:
            CheckpointError: the text is no plan; it says what is wrong, and where.
        """
        return cls.from_data(parse_json(text, where), where)

    @classmethod
    def from_data(cls, data: Any, where: str = "plan") -> GrowthPlan:
        """The same from what JSON text holds."""
        try:
            plan = cls.model_validate(data)
            for name, tensor in plan.tensors.items():
                tensor.check(name)
        except ValidationError as error:
            raise CheckpointError(f"{where}: {first_problem(error)}") from None
        except (SpecError, ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{where}: {str(error)[:300]}") from None
        return plan


class AxisMap:
    """Growth of one axis from ``old`` to ``new`` units, before it meets any tensor.

    Attributes:
        index: int64 (new,), negative for newborn units.
        share: float64 (new,): what part of its unit's outgoing weight each copy carries.
        copies: number of copies that every old unit has, 0 where the numbers differ.
    """

    def __init__(self, old: int, index: np.ndarray, share: np.ndarray) -> None:
        self.old, self.index, self.share = old, index.astype(np.int64), share
        counts = np.bincount(self.index[self.index >= 0], minlength=old)
        self.counts = counts
        self.copies = int(counts[0]) if np.all(counts == counts[0]) else 0
        self.newborn = int(np.sum(self.index < 0))

    @property
    def new(self) -> int:
        return len(self.index)

    @property
    def ids(self) -> int:
        """Number of distinct newborn ids."""
        return int(-self.index.min()) if self.newborn else 0

    @classmethod
    def copy(cls, old: int, new: int, split: str, remainder: Literal["copy", "newborn"] = "copy") -> AxisMap:
        """Whole copies laid end to end; the remainder is copies of the first units, or newborn."""
        index = np.arange(new) % old
        whole = new - new % old
        if remainder == "newborn":
            index[whole:] = -1 - np.arange(new - whole)
        number = np.arange(new) // old
        counts = np.bincount(index[index >= 0], minlength=old)
        weight = (number + 1.0) if split == "uneven" else np.ones(new)
        total = np.bincount(index[index >= 0], weights=weight[index >= 0], minlength=old)
        share = np.where(index >= 0, weight / total[np.maximum(index, 0)], 1.0)
        assert np.all(counts >= 1)
        return cls(old, index, share)

    @classmethod
    def add(cls, old: int, new: int, paired: bool) -> AxisMap:
        """New units after the old ones; paired ones share an id two by two."""
        extra = new - old
        ids = np.arange(extra) % (extra // 2) if paired else np.arange(extra)
        share = np.concatenate([np.ones(old), np.full(extra, 0.5 if paired else 1.0)])
        return cls(old, np.concatenate([np.arange(old), -1 - ids]), share)


def resolve_references(value: Any, named: Callable[[str], Any], times: Callable[[Any, int], Any]) -> Any:
    """An argument of an :class:`Edit` with the nodes of a graph for their names.

    ``named`` finds a node, ``times`` makes the op that multiplies a dynamic size by a number.
    """
    if isinstance(value, dict) and "$node" in value:
        node = named(value["$node"])
        return times(node, value["$times"]) if "$times" in value else node
    if isinstance(value, list):
        return [resolve_references(v, named, times) for v in value]
    return value
