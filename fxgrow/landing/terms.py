"""Two graphs in one form: values that are computed alike have the same number, whichever graph they are of.

A value's number stands for the op, its literals and the numbers of its operands (value numbering, as compilers do it).
What can be written in several ways is brought to one first: views by the sizes of their results, parts of a split as
slices, arguments by name with their defaults, sizes as expressions of the inputs' sizes. A value whose memory is
written carries the last write before it is read, so that equal numbers mean equal orders of writes, too.
"""

from __future__ import annotations

import bisect
import math
import operator
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from fxgrow.algebra import Size, same_size
from fxgrow.ir.memory import Memory, writes
from fxgrow.ir.nodes import info_of
from fxgrow.ir.ops import bound_arguments, op_name, schema_of
from fxgrow.ir.sizes import computed_size, literal_size, result_sizes, shape_of, sizes_of
from fxgrow.ir.traced import Call, Traced
from fxgrow.ir.traits import Trait, is_dropout_probability, traits_of
from fxgrow.rules.base import casts, copies, detaches, implied_arguments, value_of
from fxgrow.verify.execute import draws

#: floats are equal up to this, relatively: that much is lost where a constant is computed in another order
TOLERANCE = 1e-12


@dataclass(frozen=True)
class Literal:
    """A number or other plain value among an op's arguments: ``form`` is compared, ``written`` is what stands there."""

    form: Hashable
    written: Any


@dataclass(frozen=True, eq=False)
class Operand:
    """A value that an op reads, and the last write into its memory before that; None where nobody writes."""

    term: Term
    write: Term | None = None

    @property
    def key(self) -> Hashable:
        return self.term.number, None if self.write is None else self.write.number


@dataclass(eq=False)
class Term:
    """A value of a graph.

    Attributes:
        number: equal for equal values.
        op: the op's name in the common form.
        node: the node that computes it.
        literals, operands: arguments by name and place: ``size[2]``.
        sizes: of the tensor, where it is one.
        origin: the node whose arguments say what the literals are: the split that a slice is part of.
        argument: the argument of ``origin`` that says it, where the literals are not named after arguments.
    """

    number: int
    op: str
    node: fx.Node
    literals: dict[str, Literal] = field(default_factory=dict)
    operands: dict[str, Operand] = field(default_factory=dict)
    sizes: tuple[Size, ...] | None = None
    origin: fx.Node | None = None
    argument: str = ""

    @property
    def is_leaf(self) -> bool:
        return self.op in (INPUT, STATE, CONSTANT)

    @property
    def named(self) -> fx.Node:
        return self.origin or self.node


INPUT, STATE, CONSTANT, SLICE, RESHAPE = "input", "state", "constant", "slice", "reshape"


class Numbers:
    """Numbers for values, shared by the graphs that are compared."""

    def __init__(self) -> None:
        self._values: dict[Hashable, int] = {}
        self._floats: list[float] = []
        self._constants: list[torch.Tensor] = []

    def of(self, key: Hashable) -> int:
        return self._values.setdefault(key, len(self._values))

    def form(self, value: Any) -> Hashable:
        """What a literal is compared by: numbers by value, whatever their type; floats up to :data:`TOLERANCE`."""
        if isinstance(value, bool) or value is None or isinstance(value, str):
            return value, type(value).__name__
        if isinstance(value, int):
            return "number", value
        if isinstance(value, float):
            return "number", self._float(value)
        if isinstance(value, complex):
            return "complex", self._float(value.real), self._float(value.imag)
        if isinstance(value, sympy.Basic):
            return "size", sympy.expand(value)
        if isinstance(value, tuple | list):
            return (type(value).__name__, *map(self.form, value))
        return type(value).__name__, str(value)

    def _float(self, value: float) -> Hashable:
        if math.isnan(value) or math.isinf(value) or (value == 0 and math.copysign(1, value) < 0):
            return str(value)
        near = round(value)
        if abs(value - near) <= TOLERANCE * abs(value):
            return near
        at = bisect.bisect_left(self._floats, value)
        for known in self._floats[max(at - 1, 0) : at + 1]:
            if abs(known - value) <= TOLERANCE * abs(value):
                return known
        self._floats.insert(at, value)
        return value

    def contents(self, tensor: torch.Tensor) -> Hashable:
        """A number for what a constant holds; one of its own for one without values."""
        if not tensor.is_meta:
            for number, known in enumerate(self._constants):
                if known.dtype == tensor.dtype and known.shape == tensor.shape and _equal(known, tensor):
                    return number
        self._constants.append(tensor.detach())
        return len(self._constants) - 1


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.is_meta:
        return False
    b = b.detach().to(a.device)
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    return torch.allclose(a.double(), b.double(), rtol=TOLERANCE, atol=0, equal_nan=True)


class Form:
    """A program in the common form, call by call."""

    def __init__(self, program: Traced, numbers: Numbers) -> None:
        self.program, self.numbers = program, numbers
        self.memory = Memory(program.graph)
        ties: dict[str, list[str]] = {}
        for alias, name in program.aliases.items():
            ties.setdefault(name, [name]).append(alias)
        #: tied tensors go by the first of their names, whichever of them the trace kept
        self.first = {name: min(names) for name, names in ties.items()}
        self._devices = _devices(program)

    def call(self, number: int, training: bool | None, fixed: Mapping[str, Sequence[int | None]]) -> CallForm:
        """One call in one mode, or in any.

        Args:
            fixed: sizes of inputs by name, where either program fixed them.
        """
        return CallForm(self, number, training, fixed)

    def name(self, target: str) -> str:
        name = self.program.aliases.get(target, target)
        return self.first.get(name, name)

    def device(self, device: Any) -> str:
        """A device, or "own" for the one that all is on: which it is makes no other function."""
        return "own" if device is not None and len(self._devices) <= 1 else str(device)


def _devices(program: Traced) -> set[str]:
    """The kinds of devices of a program; meta tensors stand for some that are not there yet."""
    named = [n.kwargs.get("device") for n in program.graph.nodes]
    kinds = {d.type for d in (*named, *(t.device for t in program.tensors.values())) if isinstance(d, torch.device)}
    return kinds - {"meta"}


#: arguments that choose strides, memory or timing: no value hangs on them
_STORAGE = frozenset({"memory_format", "pin_memory", "layout", "non_blocking", "implicit", "copy"})

_SPLITS = frozenset({"split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk"})


class CallForm:
    """The values of one call of a program.

    Attributes:
        terms: by node; several nodes may have one value.
        outputs: what the call returns, by place.
        writes: the last write into every memory that outlives the call, by the names of what lies in it.
    """

    def __init__(self, form: Form, number: int, training: bool | None, fixed: Mapping[str, Any]) -> None:
        self._form, self._numbers, self._memory, self._training = form, form.numbers, form.memory, training
        self.info: Call = form.program.calls[number]
        graph = form.program.graph
        nodes = [n for n in graph.nodes if n.op != "output" and (n.op == "get_attr" or info_of(n).call == number)]
        returned: Any = graph.output_node().args[0]
        if len(form.program.calls) > 1:
            returned = returned[number]
        self._symbols = _symbols([n for n in nodes if n.op == "placeholder"], fixed)
        self._alive = _alive(nodes, returned, form.memory)
        self._last: dict[int, tuple[Term, fx.Node]] = {}  # group of memory to the last write into it, and where
        self._count: Counter[Hashable] = Counter()
        self._drawn = 0
        self.terms: dict[fx.Node, Term] = {}
        for node in nodes:
            if node in self._alive and not info_of(node).is_flag:
                self._add(node)
        self.outputs: dict[str, Literal | Operand] = {}
        self._flatten("", returned, self.outputs)
        self.writes: dict[tuple[str, ...], Term] = {}
        for term, operand in self._last.values():
            inside = [self.terms[n] for n in self._memory.sharing(operand) if n in self.terms]
            names = tuple(sorted(str(t.literals["name"].written) for t in inside if t.op in (INPUT, STATE)))
            if names:
                self.writes[names] = term

    def reached(self) -> list[Term]:
        """The terms that outputs and lasting writes hang on, in graph order."""
        todo = [o for o in self.outputs.values() if isinstance(o, Operand)] + [Operand(t) for t in self.writes.values()]
        found: dict[Term, None] = {}
        while todo:
            operand = todo.pop()
            for term in (operand.term, operand.write):
                if term is not None and term not in found:
                    found[term] = None
                    todo.extend(term.operands.values())
        return sorted(found, key=lambda t: self._memory.place[t.node])

    # arguments --------------------------------------------------------------------------------------------------------

    def _flatten(self, name: str, value: Any, out: dict[str, Literal | Operand]) -> None:
        """A value among arguments or results, list by list and dict by dict."""
        if isinstance(value, list | tuple):
            out[f"len({name})"] = Literal(len(value), len(value))
            for i, v in enumerate(value):
                self._flatten(f"{name}[{i}]", v, out)
        elif isinstance(value, dict):
            out[f"keys({name})"] = Literal(tuple(value), list(value))
            for k, v in value.items():
                self._flatten(f"{name}[{k!r}]", v, out)
        elif isinstance(value, slice):
            self._flatten(name, [value.start, value.stop, value.step], out)
        elif isinstance(value, fx.Node):
            out[name] = self._node(value)
        else:
            out[name] = Literal(self._numbers.form(value), value)

    def _node(self, node: fx.Node) -> Literal | Operand:
        if info_of(node).is_flag:
            modes = [m for m in (False, True) if self._training in (None, m)]
            values = [_in_mode(node, m) for m in modes]
            forms = [self._numbers.form(v) for v in values]
            if len(set(forms)) == 1:
                return Literal(forms[0], values[0])
            return Literal(("mode", *forms), {"eval": values[0], "train": values[1]})
        size = self._size(computed_size(node))
        if size is not None:
            return Literal(self._numbers.form(size), size if isinstance(size, int) else str(size))
        return Operand(self.terms[node], self._write(node))

    def _write(self, node: fx.Node) -> Term | None:
        found = self._last.get(self._group(node)) if self._memory.written(node) else None
        return None if found is None else found[0]

    def _group(self, node: fx.Node) -> int:
        return self._memory.place[self._memory.sharing(node)[0]]

    def _size(self, size: Any) -> Any:
        """A size over the inputs' sizes by name."""
        if size is None or isinstance(size, int):
            return size
        out = sympy.expand(size.xreplace(self._symbols))
        return int(out) if out.is_Integer else out

    def _sizes(self, node: fx.Node) -> tuple[Size, ...] | None:
        found = sizes_of(node)
        return None if found is None else tuple(self._size(s) for s in found)

    def _given(self, value: Any) -> Size | None:
        """A size as it stands among arguments."""
        return self._size(computed_size(value) if isinstance(value, fx.Node) else literal_size(value))

    # values -----------------------------------------------------------------------------------------------------------

    def _add(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            name = info_of(node).input or str(node.target)
            term = self._leaf(node, INPUT, name=(name, name))
        elif node.op == "get_attr":
            name = str(node.target)
            tensor = self._form.program.tensor(name)
            if name in self._form.program.constants:
                term = self._leaf(node, CONSTANT, contents=(self._numbers.contents(tensor), tensor))
            else:
                name, shape = self._form.name(name), tuple(tensor.shape)
                term = self._leaf(
                    node, STATE, name=(name, name), shape=(shape, shape), dtype=(str(tensor.dtype), tensor.dtype)
                )
        else:
            found = None if self._touched(node) else self._special(node)
            term = found if found is not None else self._call(node)
        self.terms[node] = term
        if not self._idle(node):
            for operand in writes(node):
                self._last[self._group(operand)] = (term, operand)

    def _leaf(self, node: fx.Node, op: str, **facts: tuple[Hashable, Any]) -> Term:
        return self._made(node, op, {name: Literal(*fact) for name, fact in facts.items()}, {})

    def _made(
        self,
        node: fx.Node,
        op: str,
        literals: dict[str, Literal],
        operands: dict[str, Operand],
        origin: fx.Node | None = None,
        argument: str = "",
    ) -> Term:
        named = frozenset((n, x.form) for n, x in literals.items()), frozenset((n, x.key) for n, x in operands.items())
        key: Hashable = (op, _dtypes(node), named)
        if draws(node):
            self._drawn += 1
            key = (key, "draw", self._drawn)
        if self._memory.written(node):  # two of these are two, though they begin alike
            self._count[key] += 1
            key = (key, "memory", self._count[key])
        return Term(self._numbers.of(key), op, node, literals, operands, self._sizes(node), origin, argument)

    def _call(self, node: fx.Node) -> Term:
        """A call as it stands: arguments by name, with what is implied spelled out."""
        given = {**bound_arguments(node), **implied_arguments(node)}
        value = node.meta.get("val")
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            given = self._attention(node, given)
        flat: dict[str, Literal | Operand] = {}
        for name, argument in given.items():
            if name == "memory_format" or (name in _STORAGE and argument in (None, False, torch.strided)):
                continue
            if name == "device" and not isinstance(argument, fx.Node):
                flat[name] = Literal(self._form.device(argument), argument)
            elif name == "dtype" and isinstance(value, torch.Tensor):  # left out, it is the operand's
                flat[name] = Literal(str(value.dtype), value.dtype)
            else:
                self._flatten(name, argument, flat)
        return self._made(
            node,
            op_name(node.target),
            {n: x for n, x in flat.items() if isinstance(x, Literal)},
            {n: x for n, x in flat.items() if isinstance(x, Operand)},
        )

    def _attention(self, node: fx.Node, given: dict[str, Any]) -> dict[str, Any]:
        """With the scale that the op takes by itself, and no groups of heads where there is one head in each."""
        q, k, v = (self._sizes(given[x]) for x in ("query", "key", "value"))
        if given["scale"] is None and q is not None and isinstance(q[-1], int):
            given["scale"] = 1 / math.sqrt(q[-1])
        if q is not None and k is not None and v is not None and len(q) > 2 and q[-3] == k[-3] == v[-3]:
            given["enable_gqa"] = False
        return given

    # one form for what can be written in several ways ---------------------------------------------------------------

    def _touched(self, node: fx.Node) -> bool:
        """Whether memory of a call's result or operands is written: then it matters what is a view of what."""
        return any(map(self._memory.written, (node, *node.all_input_nodes)))

    def _special(self, node: fx.Node) -> Term | None:
        value, source = node.meta.get("val"), node.args[0] if node.args else None
        if isinstance(source, fx.Node) and node.target is operator.getitem:
            return self._part(node, source)
        if not isinstance(value, torch.Tensor):
            return None
        filled = value_of(node)
        if isinstance(filled, int | float):
            return self._filled(node, filled, value)
        if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), torch.Tensor):
            return None
        before: torch.Tensor = source.meta["val"]
        same_kind = before.dtype == value.dtype and before.device == value.device
        if casts(node):
            if same_kind:
                return self.terms[source]
            literals = {
                "dtype": Literal(str(value.dtype), value.dtype),
                "device": Literal(self._form.device(value.device), value.device),
            }
            return self._made(node, "cast", literals, {"self": self._operand(source)})
        if (copies(node) and not detaches(node)) or (same_kind and self._changes_nothing(node)):
            return self.terms[source]
        if same_kind and Trait.RESHAPES in traits_of(node.target):
            return self._reshaped(node, source)
        one_form = _FORMS.get(op_name(node.target))
        return one_form(self, node, source) if one_form is not None else None

    def _operand(self, node: fx.Node) -> Operand:
        return Operand(self.terms[node], self._write(node))

    def _changes_nothing(self, node: fx.Node) -> bool:
        """Dropout of nothing, products with 1, and what is repeated once."""
        given = bound_arguments(node)
        if node.target is torch.ops.aten.repeat_interleave.self_int:
            return given["repeats"] == 1 and given["dim"] is not None and not self._touched(node)
        if node.target in _PRODUCTS:
            other = given["other"]
            return not isinstance(other, fx.Node) and self._numbers.form(other) == self._numbers.form(1)
        schema = schema_of(node.target)
        dropped = [v for n, v in given.items() if schema is not None and is_dropout_probability(schema, n)]
        if len(dropped) != 1 or "dropout" not in op_name(node.target).split(".")[1]:
            return False
        p = self._node(dropped[0]) if isinstance(dropped[0], fx.Node) else dropped[0]
        return p == 0 or (isinstance(p, Literal) and p.form == self._numbers.form(0))

    def _idle(self, node: fx.Node) -> bool:
        """Whether a write adds nothing: the count of batches in eval mode."""
        if node.target is not torch.ops.aten.add_.Tensor:
            return False
        other = node.args[1]
        found = self._node(other) if isinstance(other, fx.Node) else Literal(self._numbers.form(other), other)
        return isinstance(found, Literal) and found.form == self._numbers.form(0)

    def _filled(self, node: fx.Node, value: float, result: torch.Tensor) -> Term | None:
        """A tensor of one number, by the op that makes it."""
        sizes, given = self._sizes(node), bound_arguments(node)
        like = given.get("self")
        before = self._sizes(like) if isinstance(like, fx.Node) else None
        if sizes is None or not (self._consistent(given["size"], sizes) if "size" in given else before == sizes):
            return None
        literals = {
            "fill_value": Literal(self._numbers.form(value), value),
            "dtype": Literal(str(result.dtype), result.dtype),
            "device": Literal(self._form.device(result.device), result.device),
            **self._sizes_as("size", sizes),
        }
        return self._made(node, "filled", literals, {})

    def _sizes_as(self, name: str, sizes: Sequence[Size]) -> dict[str, Literal]:
        return {
            f"{name}[{i}]": Literal(self._numbers.form(s), s if isinstance(s, int) else str(s))
            for i, s in enumerate(sizes)
        }

    def _consistent(self, given: Any, sizes: Sequence[Size]) -> bool:
        """Whether sizes among a call's arguments are those that its result is known to have."""
        return (
            isinstance(given, list | tuple)
            and len(given) == len(sizes)
            and sum(v == -1 for v in given) <= 1
            and all(v == -1 or self._given(v) == s for v, s in zip(given, sizes, strict=True))
        )

    def _reshaped(self, node: fx.Node, source: fx.Node) -> Term | None:
        """Views by the sizes of their results: ``-1``, computed sizes and steps in between are gone."""
        sizes, argument = self._sizes(node), "size" if "size" in bound_arguments(node) else "shape"
        if sizes is None or not self._consistent(bound_arguments(node).get(argument), sizes):
            return None
        return self._in_sizes(node, source, sizes, argument)

    def reshaped(self, node: fx.Node, source: fx.Node) -> Term | None:
        """Dims that are merged, or come and go with size 1, by the sizes of the result."""
        sizes = self._sizes(node)
        return None if sizes is None else self._in_sizes(node, source, sizes, "shape")

    def _in_sizes(self, node: fx.Node, source: fx.Node, sizes: Sequence[Size], argument: str) -> Term:
        start = self.terms[source]
        while start.op == RESHAPE:
            start = start.operands["self"].term
        if start.sizes == sizes:
            return start
        return self._made(node, RESHAPE, self._sizes_as(argument, sizes), {"self": Operand(start)})

    def expanded(self, node: fx.Node, source: fx.Node) -> Term | None:
        sizes, given = self._sizes(node), bound_arguments(node)["size"]
        before = self._sizes(source)
        if sizes is None or before is None or not isinstance(given, list | tuple):
            return None
        new = len(sizes) - len(before)
        kept = [before[i - new] if v == -1 and i >= new else self._given(v) for i, v in enumerate(given)]
        if kept != list(sizes):
            return None
        if sizes == before:
            return self.terms[source]
        return self._made(node, "expand", self._sizes_as("size", sizes), {"self": self._operand(source)})

    def sliced(self, node: fx.Node, source: fx.Node) -> Term | None:
        given, before, after = bound_arguments(node), self._sizes(source), self._sizes(node)
        if before is None or after is None or given["step"] != 1:
            return None
        dim = given["dim"] % len(before)
        full = before[dim]
        start, end = 0 if given["start"] is None else self._given(given["start"]), self._given(given["end"])
        if given["end"] is None or (isinstance(end, int) and end >= _TO_THE_END):
            end = full
        if start is None or end is None:
            return None
        start, end = (full + x if isinstance(x, int) and x < 0 else x for x in (start, end))
        if isinstance(end, int) and isinstance(full, int):
            end = min(end, full)
        if not same_size(end - start, after[dim]):
            return None
        return self._piece(node, source, dim, start, end)

    def _piece(
        self, node: fx.Node, source: fx.Node, dim: int, start: Size, end: Size, origin: Any = None, argument: str = ""
    ) -> Term:
        sizes = self._sizes(source)
        if sizes is not None and start == 0 and same_size(end, sizes[dim]):
            return self.terms[source]
        literals = {"dim": Literal(self._numbers.form(dim), dim)}
        for name, size in (("start", start), ("end", end)):
            literals[name] = Literal(self._numbers.form(size), size if isinstance(size, int) else str(size))
        return self._made(node, SLICE, literals, {"self": self._operand(source)}, origin, argument)

    def _part(self, node: fx.Node, split: fx.Node) -> Term | None:
        """A part of a split, however its size was given."""
        packet = op_name(split.target).split(".")
        if len(packet) < 2 or packet[1] not in _SPLITS or self._touched(split):
            return None
        given, parts, source = bound_arguments(split), result_sizes(split), split.args[0]
        if parts is None or not isinstance(source, fx.Node) or not isinstance(given["dim"], int):
            return None
        before = self._sizes(source)
        if before is None:
            return None
        dim = given["dim"] % len(before)
        if any(p is None for p in parts):
            return None
        sizes = [self._size(p[dim]) for p in parts if p is not None]
        argument = next(n for n in ("split_size", "split_sizes", "chunks") if n in given)
        wanted = given[argument]
        if not same_size(sum(sizes), before[dim]):
            return None
        if argument == "split_sizes":
            right = isinstance(wanted, list | tuple) and [self._given(w) for w in wanted] == sizes
        elif argument == "split_size":
            right = all(s == self._given(wanted) for s in sizes[:-1]) and _at_most(sizes[-1], self._given(wanted))
        else:
            right = all(isinstance(s, int) for s in (*sizes, before[dim])) and _chunks(before[dim], wanted) == sizes
        if not right:
            return None
        place = node.args[1]
        if not isinstance(place, int) or place >= len(sizes):
            return None
        start = sum(sizes[:place])
        return self._piece(node, source, dim, start, start + sizes[place], split, argument)

    def permuted(self, node: fx.Node, source: fx.Node) -> Term | None:
        rank, given = len(node.meta["val"].shape), bound_arguments(node)
        dims = list(range(rank))
        if "dims" in given:
            dims = [d % rank for d in given["dims"]]
        elif rank > 1:
            a, b = (given.get(n, d) % rank for n, d in (("dim0", 0), ("dim1", 1)))
            dims[a], dims[b] = dims[b], dims[a]
        if dims == list(range(rank)):
            return self.terms[source]
        literals = {f"dims[{i}]": Literal(self._numbers.form(d), d) for i, d in enumerate(dims)}
        return self._made(node, "permute", literals, {"self": self._operand(source)})


_FORMS: dict[str, Callable[[CallForm, fx.Node, fx.Node], Term | None]] = {
    "aten.expand.default": CallForm.expanded,
    "aten.unsqueeze.default": CallForm.reshaped,
    "aten.squeeze.dim": CallForm.reshaped,
    "aten.flatten.using_ints": CallForm.reshaped,
    "aten.slice.Tensor": CallForm.sliced,
    "aten.permute.default": CallForm.permuted,
    "aten.transpose.int": CallForm.permuted,
    "aten.t.default": CallForm.permuted,
}

_PRODUCTS = (torch.ops.aten.mul.Tensor, torch.ops.aten.mul.Scalar, torch.ops.aten.div.Tensor, torch.ops.aten.div.Scalar)

_TO_THE_END = 1 << 62


def _at_most(size: Size, most: Size | None) -> bool:
    return size == most or (isinstance(size, int) and isinstance(most, int) and size <= most)


def _chunks(size: int, number: int) -> list[int]:
    each = -(-size // number)
    return [min(each, size - start) for start in range(0, size, each)]


def _dtypes(node: fx.Node) -> Hashable:
    value = node.meta.get("val")
    several = value if isinstance(value, list | tuple) else [value]
    return tuple(str(v.dtype) if isinstance(v, torch.Tensor) else type(v).__name__ for v in several)


def _in_mode(node: fx.Node, training: bool) -> Any:
    """What a node that hangs on the mode alone is in it; see :func:`fxgrow.trace.graph.traced_from`."""
    if node.op == "get_attr":
        return training
    args = [_in_mode(a, training) if isinstance(a, fx.Node) else a for a in node.args]
    return node.target(*args)  # type: ignore[operator]


def _symbols(inputs: Sequence[fx.Node], fixed: Mapping[str, Sequence[int | None]]) -> dict[sympy.Symbol, Any]:
    """The symbols of dynamic sizes as sizes of inputs by name, or as the numbers that these are fixed to."""
    known: dict[sympy.Symbol, Any] = {}
    derived: list[tuple[sympy.Expr, Any]] = []
    for node in inputs:
        name, value = info_of(node).input or str(node.target), node.meta.get("val")
        sizes = shape_of(value) if isinstance(value, torch.Tensor) else []
        for i, size in enumerate(sizes):
            if isinstance(size, int):
                continue
            given = fixed[name][i] if name in fixed and i < len(fixed[name]) else None
            own = sympy.Symbol(f"{name}.shape[{i}]", integer=True, positive=True) if given is None else given
            if isinstance(size, sympy.Symbol):
                known.setdefault(size, own)
            else:
                derived.append((size, own))
    for size, own in derived:  # 4 * k, whose k is the size of nothing
        unknown = size.free_symbols - known.keys()
        if len(unknown) == 1:
            (k,) = unknown
            slope = sympy.diff(size, k)
            if slope.is_Integer and slope != 0:
                known[k] = (own - size.subs(k, 0).xreplace(known)) / slope
    return known


def _alive(nodes: Sequence[fx.Node], returned: Any, memory: Memory) -> set[fx.Node]:
    """The nodes that results, or writes into what outlives the call, hang on."""
    found: set[fx.Node] = set()
    todo: list[fx.Node] = []
    fx.map_arg(returned, todo.append)
    writers = [n for n in nodes if writes(n)]

    def lasts(node: fx.Node) -> bool:
        return any(n.op in ("get_attr", "placeholder") or n in found for n in memory.sharing(node))

    while todo:
        while todo:
            node = todo.pop()
            if node not in found:
                found.add(node)
                todo.extend(node.all_input_nodes)
        todo = [w for w in writers if w not in found and any(lasts(x) for x in writes(w))]
    return found
