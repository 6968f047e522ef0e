"""Guards: for which inputs a traced graph is the model.

A trace follows one path through the model's code. Where the path was chosen by a size (``if x.shape[1] > 4``), or an op
needed sizes to agree, ``torch.export`` keeps the condition. It is part of the function: a graph is only run where its
guards hold. They are kept as text, conditions over the inputs' shapes such as ``x.shape[1] <= 4``, so that they can be
stored; reading one back admits integer arithmetic and comparisons, nothing that could run code.
"""

from __future__ import annotations

import ast
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational
from torch import fx
from torch.export.graph_signature import InputKind
from torch.fx.experimental.sym_node import SymNode
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from fxgrow.errors import CaptureError, InputError
from fxgrow.ir.nodes import note
from fxgrow.ir.trail import Replica
from fxgrow.ir.traits import Trait, traits_of

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Guard:
    """A condition on the shapes of inputs.

    ``source`` is the user's line that asked for it, empty where an op did. ``edge`` marks the end of the model's domain
    (beyond it the model itself raises), which a growth that lengthens what limits it moves.
    """

    condition: str
    source: str = ""
    edge: bool = False


def find_guards(exported: torch.export.ExportedProgram, where: Callable[[Any], str]) -> list[Guard]:
    """The guards of a trace over its tensor inputs' names; sizes that the trace fixed are not among them.

    Args:
        exported: as ``torch.export`` returned it.
        where: from a frame of the trace's stack to the user's line, empty for a frame of a library.

    Raises:
        CaptureError: a condition on something else than the inputs' sizes.
    """
    specs = {str(s.arg.name): s for s in exported.graph_signature.input_specs}
    names: dict[sympy.Symbol, str] = {}  # a size's symbol to the first input dim that has it
    derived: list[tuple[str, sympy.Expr]] = []
    environment = None
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and environment is None:
            environment = getattr(getattr(value, "fake_mode", None), "shape_env", None)
        if node.op != "placeholder" or specs[node.name].kind is not InputKind.USER_INPUT:
            continue
        for i, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if not isinstance(size, torch.SymInt) or size.node.expr.is_number:
                continue
            text = f"{node.name}.shape[{i}]"
            if isinstance(size.node.expr, sympy.Symbol) and size.node.expr not in names:
                names[size.node.expr] = text
            else:
                derived.append((text, size.node.expr))
    found: dict[str, Guard] = {}

    def add(condition: sympy.Basic, source: str = "") -> None:
        condition = _simple(condition)
        if condition == sympy.true:
            return
        text = _text(condition, names)
        if text not in found or (source and not found[text].source):
            found[text] = Guard(text, source)

    for text, size in derived:
        unknown = size.free_symbols - names.keys()
        if unknown:  # a size such as 4 * k, whose k is the size of nothing: solved for it
            (k,) = unknown if len(unknown) == 1 else (None,)
            slope = sympy.diff(size, k) if k is not None else None
            if slope is None or not slope.is_Integer or slope == 0:
                raise CaptureError(f"the trace found {text} to be {size}, which cannot be checked when the graph runs")
            offset = size.subs(k, 0)
            found[f"({text} - {offset}) % {slope} == 0"] = Guard(f"({text} - {offset}) % {slope} == 0")
            names[k] = f"(({text} - {offset}) // {slope})"
        else:
            condition = f"{text} == {_text(size, names)}"
            found[condition] = Guard(condition)
    if environment is not None:
        for guard in environment.guards:
            frame = guard.sloc.framework_loc if guard.sloc is not None else None
            add(environment.replace(guard.expr), where(frame))
    for size in _squeezed(exported.graph):
        if not size.free_symbols - names.keys():
            add(sympy.Ne(size, 1))
    for symbol, bounds in exported.range_constraints.items():
        if symbol in names:
            if bounds.lower > 0:
                add(sympy.Ge(symbol, bounds.lower))
            if bounds.upper.is_Integer:
                add(sympy.Le(symbol, bounds.upper))
    return list(found.values())


def _squeezed(graph: fx.Graph) -> Iterator[Any]:
    """Dynamic sizes that ``squeeze`` takes not to be 1: it leaves no guard, and its result has another rank else."""
    for node in graph.nodes:
        if not str(node.target).startswith("aten.squeeze"):
            continue
        shape = node.args[0].meta["val"].shape
        wanted = node.args[1] if len(node.args) > 1 else range(len(shape))
        for dim in [wanted] if isinstance(wanted, int) else wanted:
            if shape and isinstance(shape[dim], torch.SymInt) and not shape[dim].node.expr.is_number:
                yield shape[dim].node.expr


_BOUND = re.compile(r"(\w+)\.shape\[(\d+)\] <= (\d+)")


def weigh(guards: Sequence[Guard], replicas: Sequence[Replica]) -> list[Guard]:
    """Drop guards that do not matter, and mark upper bounds beyond which the model itself raises.

    With a replica for each mode that a graph serves, both in all of them.

    Ops compare sizes with one another to choose strides and kernels; such a guard does not matter, which is shown by
    running the model and the graph, without data, at sizes that break it. Of the upper bounds only those that are a
    size of one of the model's tensors are tried: no other can move.
    """
    inputs, leaves = replicas[0].inputs, replicas[0].leaves
    examples = {n.name: tuple(x.shape) for n, x in zip(inputs, leaves, strict=True) if isinstance(x, torch.Tensor)}
    symbols: dict[str, Any] = {}  # an input's dim, as text, to its size in the graph
    for node in inputs:
        for i, size in enumerate(node.meta["val"].shape if node.name in examples else ()):
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                symbols.setdefault(f"{node.name}.shape[{i}]", size.node.expr)

    known = {  # the example's own sizes
        symbol: examples[text.partition(".")[0]][int(text.rpartition("[")[2][:-1])] for text, symbol in symbols.items()
    }

    def run_at(values: Mapping[Any, int]) -> Callable[[Any, int], int]:
        def size(symbolic: Any, n: int) -> int:
            if not isinstance(symbolic, torch.SymInt):
                return n
            expression = symbolic.node.expr
            if expression.is_Symbol:
                return values.get(expression, n)
            if not expression.free_symbols & values.keys() or expression.free_symbols - known.keys():
                return n
            return int(expression.xreplace({**known, **values}))

        return size

    def does_not_matter(guard: Guard, others: list[Guard]) -> bool:
        names = list(dict.fromkeys(re.findall(r"\w+\.shape\[\d+\]", guard.condition)))
        if not set(names) <= symbols.keys() or len(names) > 3:
            return False
        found: list[Callable[[Any, int], int]] = []
        for sizes in itertools.product(range(1, 9), repeat=len(names)):
            if len(found) == 3:
                break
            at = run_at({symbols[n]: v for n, v in zip(names, sizes, strict=True)})
            shapes = {
                node.name: tuple(at(s, n) for s, n in zip(node.meta["val"].shape, examples[node.name], strict=True))
                for node in inputs
                if node.name in examples
            }
            if broken([guard], shapes) is not None and broken(others, shapes) is None:
                found.append(at)
        return all(replica.agrees(at) for replica in replicas for at in found)

    def is_edge(guard: Guard) -> bool:
        bound = _BOUND.fullmatch(guard.condition)
        if bound is None or not any(int(bound[3]) in t.shape for t in replicas[0].state.values()):
            return False
        symbol, most = symbols.get(f"{bound[1]}.shape[{bound[2]}]"), int(bound[3])
        if symbol is None:
            return False
        length = examples[bound[1]][int(bound[2])]

        def same(symbolic: Any, _: int) -> bool:
            return isinstance(symbolic, torch.SymInt) and bool(symbolic.node.expr == symbol)

        def alike(symbolic: Any, n: int) -> bool:  # targets are as long as tokens, though only their product need agree
            return isinstance(symbolic, torch.SymInt) and n == length

        def raises(replica: Replica, which: Callable[[Any, int], bool], new: int) -> bool:
            return replica.raises(lambda s, n: new if which(s, n) else n)

        which = next((w for w in (same, alike) if not raises(replicas[0], w, most)), None)
        return which is not None and all(raises(r, which, n) for r in replicas for n in (most + 1, 2 * most))

    kept = list(guards)
    for guard in guards:
        if not guard.source and any(f" {sign} " in guard.condition for sign in ("!=", "<", ">", ">=")):
            others = [g for g in kept if g is not guard]
            if does_not_matter(guard, others):
                kept = others
    return [replace(g, edge=True) if is_edge(g) else g for g in kept]


def settle_sizes(exported: torch.export.ExportedProgram) -> None:
    """Sizes become simpler by what the guards say: ``Min(12, s)`` is ``s`` where ``s`` is at most 12.

    So is ``4 * ((s + (-s) % 4) // 4)``, a length padded to whole chunks, where ``s`` is a multiple of 4.

    What was settled is left in the nodes' metadata, as ``sizes`` and ``result_sizes``.
    """
    values = [n.meta.get("val") for n in exported.graph.nodes]
    environment = next((e for v in values if (e := getattr(getattr(v, "fake_mode", None), "shape_env", None))), None)
    if environment is None:
        return
    ranges = dict(environment.var_to_range)
    residues: dict[sympy.Symbol, tuple[int, int]] = {}
    for guard in environment.guards:
        fact = _simple(environment.replace(guard.expr))
        residues |= _residue(fact)
        if isinstance(fact, sympy.Le | sympy.Ge) and isinstance(fact.lhs, sympy.Symbol) and fact.rhs.is_Integer:
            bound = ValueRanges(-int_oo, fact.rhs) if isinstance(fact, sympy.Le) else ValueRanges(fact.rhs, int_oo)
            ranges[fact.lhs] = ranges[fact.lhs] & bound

    def settle(size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr
        for part in expression.atoms(Max, Min):
            bounds = {a: bound_sympy(a, ranges) for a in part.args}
            for one in part.args:
                others = [b for a, b in bounds.items() if a != one]
                if (isinstance(part, Min) and all(bounds[one].upper <= b.lower for b in others)) or (
                    isinstance(part, Max) and all(bounds[one].lower >= b.upper for b in others)
                ):
                    expression = expression.xreplace({part: one})
                    break
        if expression.atoms(Mod, PythonMod, FloorDiv):
            for symbol in expression.free_symbols & residues.keys():
                expression = _at_residue(expression, symbol, *residues[symbol])
        return int(expression) if expression.is_number else expression

    def sizes(value: torch.Tensor) -> list[Any]:
        return [settle(s) for s in value.shape]

    def unsettled(value: Any) -> bool:
        return isinstance(value, torch.SymInt) and settle(value) != value.node.expr

    for node, value in zip(exported.graph.nodes, values, strict=True):
        if isinstance(value, torch.Tensor) and any(map(unsettled, value.shape)):
            note(node, sizes=sizes(value))
        elif isinstance(value, list | tuple):
            if any(unsettled(s) for v in value if isinstance(v, torch.Tensor) for s in v.shape):
                note(node, result_sizes=[sizes(v) if isinstance(v, torch.Tensor) else None for v in value])
        elif unsettled(value):
            size = settle(value)
            hint = value.node.hint
            node.meta["val"] = size if isinstance(size, int) else torch.SymInt(SymNode(size, environment, int, hint))


def _residue(fact: Any) -> dict[sympy.Symbol, tuple[int, int]]:
    """``{s: (r, m)}`` where a fact says that the size s is r more than a multiple of m, and nothing else."""
    if len(fact.free_symbols) != 1 or not isinstance(fact, sympy.Eq | sympy.Le):  # others may be dropped by weigh
        return {}
    (s,) = fact.free_symbols
    inner = {f for f in fact.atoms(Mod, PythonMod) if f.args[0] == s and f.args[1].is_Integer}
    period = math.lcm(*(int(f.args[1]) for f in inner)) if inner else 0
    if not 1 < period <= 1024 or fact.xreplace({f: sympy.Dummy(integer=True) for f in inner}).has(s):
        return {}
    left = [r for r in range(period) if fact.xreplace({s: sympy.Integer(r)}) == sympy.true]
    return {s: (left[0], period)} if len(left) == 1 else {}


def _at_residue(size: sympy.Expr, s: sympy.Symbol, r: int, m: int) -> sympy.Expr:
    """A size where s is r more than a multiple of m."""
    k = sympy.Dummy(integer=True, positive=True)
    at = size.xreplace({s: m * k + r})
    if not at.atoms(Mod, PythonMod, FloorDiv):
        whole = sympy.expand(at.xreplace({k: (s - r) / sympy.Integer(m)}))
        if all(term.as_coeff_Mul()[0].is_Integer for term in sympy.Add.make_args(whole)):
            return whole
    return at.xreplace({k: FloorDiv(s - r, m)})


def has_mixed_sizes(exported: torch.export.ExportedProgram) -> bool:
    """Whether a size divides a product of several dynamic ones, or a reshape is right for some sizes only.

    Such sizes belong to no dim of the input's, so that nothing can be proved of them while they are dynamic.
    """
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        for one in value if isinstance(value, list | tuple) else [value]:
            for size in one.shape if isinstance(one, torch.Tensor) else ():
                if isinstance(size, torch.SymInt) and any(
                    _is_product(f.args[0]) for f in size.node.expr.atoms(FloorDiv)
                ):
                    return True
        if Trait.RESHAPES in traits_of(node.target) and not _same_count(node.args[0].meta["val"].shape, value.shape):
            return True
    return False


def _same_count(before: Sequence[Any], after: Sequence[Any]) -> bool:
    """Whether two shapes have as many entries, whatever their dynamic sizes."""
    old, new = ([s.node.expr if isinstance(s, torch.SymInt) else s for s in shape] for shape in (before, after))
    for size in list(old):
        if size in new:
            old.remove(size)
            new.remove(size)
    return bool(sympy.expand(sympy.prod(old) - sympy.prod(new)) == 0)


def _is_product(size: sympy.Expr) -> bool:
    """Whether a size has a term of several dynamic factors."""

    def degree(factor: sympy.Expr) -> int:
        power = factor.exp if factor.is_Pow else sympy.Integer(1)
        return 0 if not factor.free_symbols else int(power) if power.is_Integer else 2

    return any(sum(map(degree, sympy.Mul.make_args(t))) > 1 for t in sympy.Add.make_args(sympy.expand(size)))


def _simple(condition: Any) -> Any:
    """``32 * s != 32`` says ``s != 1``, ``s == min(n, s)`` that ``s <= n``, ``s > n`` that ``s >= n + 1``: one form."""
    condition = _without_factor(condition)
    if isinstance(condition, sympy.Gt | sympy.Lt) and condition.lhs.is_Symbol and condition.rhs.is_Integer:
        strict = isinstance(condition, sympy.Gt)
        return sympy.Ge(condition.lhs, condition.rhs + 1) if strict else sympy.Le(condition.lhs, condition.rhs - 1)
    if isinstance(condition, sympy.Eq):
        for one, other in (condition.args, condition.args[::-1]):
            if isinstance(other, Max | Min) and one in other.args and len(other.args) == 2:
                (bound,) = [a for a in other.args if a != one]
                return sympy.Le(one, bound) if isinstance(other, Min) else sympy.Ge(one, bound)
    return condition


def _without_factor(condition: Any) -> Any:
    """A relation of sums without the whole number that all of their terms have as a factor."""
    if not isinstance(condition, Relational):
        return condition
    sides = [sympy.Add.make_args(side) for side in condition.args]
    factors = [term.as_coeff_Mul()[0] for side in sides for term in side]
    common = math.gcd(*map(int, factors)) if all(f.is_Integer for f in factors) else 1
    if common <= 1:
        return condition
    reduced = condition.func(*(sympy.Add(*(term / common for term in side)) for side in sides))
    return reduced if isinstance(reduced, Relational) else condition


def _text(expression: Any, names: Mapping[sympy.Symbol, str]) -> str:
    unknown = expression.free_symbols - names.keys()
    if unknown:
        raise CaptureError(f"the trace depends on {expression}, of which {unknown} is the size of no input")
    known = {str(s): n for s, n in names.items()}
    text = str(PythonPrinter().doprint(expression))
    text = re.sub(r"\b[A-Za-z_]\w*\b(?!\()", lambda m: known.get(m.group(), m.group()), text)
    try:
        return ast.unparse(_checked(text))
    except ValueError as error:
        raise CaptureError(f"the trace depends on {text}, which cannot be checked when the graph runs") from error


# reading --------------------------------------------------------------------------------------------------------------

_FUNCTIONS: dict[str, Any] = {"min": min, "max": max, "abs": abs, "round": round, "int": int, "float": float}
_MATH = ("ceil", "floor", "trunc", "sqrt", "log", "log2", "exp")
_NODES = (
    *(ast.Expression, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.And, ast.Or, ast.Not, ast.USub),
    *(ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Load),
    *(ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Div, ast.Mod, ast.Pow),
)


def _checked(text: str) -> ast.Expression:
    """The syntax tree of a condition.

    Raises:
        ValueError: it holds anything but shapes of inputs, numbers, arithmetic and comparisons.
    """
    if not isinstance(text, str) or len(text) > 2000:
        raise ValueError("not a condition")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text[:80]!r} is not a condition") from error

    def check(node: ast.AST) -> None:
        if _shape(node) is not None:
            return
        if isinstance(node, ast.Constant):
            if type(node.value) not in (int, float):
                raise ValueError(f"a constant {node.value!r}")
            return
        if isinstance(node, ast.Call):
            function = node.func
            known = isinstance(function, ast.Name) and function.id in _FUNCTIONS
            if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
                known = function.value.id == "math" and function.attr in _MATH
            if not known or node.keywords:
                raise ValueError("a call")
            for argument in node.args:
                check(argument)
            return
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            power = node.right.value if isinstance(node.right, ast.Constant) else None
            if type(power) is not int or not 0 <= power <= 8:
                raise ValueError("a power")
        if not isinstance(node, _NODES):
            raise ValueError(type(node).__name__)
        for child in ast.iter_child_nodes(node):
            check(child)

    try:
        check(tree)
    except RecursionError as error:
        raise ValueError("a condition that is nested too deep") from error
    return tree


def _shape(node: ast.AST) -> tuple[str, int] | None:
    """``x.shape[1]`` as ("x", 1)."""
    if (
        isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr == "shape"
        and isinstance(node.value.value, ast.Name)
        and isinstance(node.slice, ast.Constant)
        and type(node.slice.value) is int
    ):
        return node.value.value.id, node.slice.value
    return None


class _Sizes(ast.NodeTransformer):
    """``x.shape[1]`` becomes ``shapes['x'][1]``."""

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        if node.attr != "shape":
            return node
        assert isinstance(node.value, ast.Name)
        name = ast.Constant(node.value.id)
        return ast.Subscript(value=ast.Name("shapes", ast.Load()), slice=name, ctx=ast.Load())


_COMPILED: dict[str, Callable[[Shapes], bool]] = {}


def compile_condition(text: str) -> Callable[[Shapes], bool]:
    """A condition as a function of the inputs' shapes by name.

    Raises:
        ValueError: it is not one.
    """
    if text not in _COMPILED:
        body = _Sizes().visit(_checked(text)).body
        code = f"lambda shapes: {ast.unparse(body)}"
        value = eval(code, {**_FUNCTIONS, "math": math, "__builtins__": {}})

        def holds(shapes: Shapes) -> bool:
            try:
                return bool(value(shapes))
            except ZeroDivisionError:  # a size that another is to be a multiple of is zero
                return False

        _COMPILED[text] = holds
    return _COMPILED[text]


@functools.lru_cache(maxsize=1024)
def inputs_of(condition: str) -> tuple[str, ...]:
    """The inputs whose shapes a condition speaks of, in order."""
    found = [s[0] for n in ast.walk(_checked(condition)) if (s := _shape(n)) is not None]
    return tuple(dict.fromkeys(found))


# checking -------------------------------------------------------------------------------------------------------------


def broken(guards: Iterable[Guard], shapes: Shapes) -> Guard | None:
    """The first guard that shapes break; None where all hold."""
    return next((g for g in guards if not compile_condition(g.condition)(shapes)), None)


def check_guards(inputs: Sequence[torch.Tensor], names: Sequence[str], *guards: tuple[str, str, bool]) -> None:
    """Check guards, given as (condition, source, edge), when a graph runs.

    Raises:
        InputError: one does not hold; the message names the input, its shape and the condition.
    """
    shapes = {name: value.shape for name, value in zip(names, inputs, strict=True)}
    for condition, source, edge in guards:
        if not _COMPILED[condition](shapes):
            raise InputError(_message(shapes, condition, source, edge))


def _message(shapes: Shapes, condition: str, source: str, edge: bool) -> str:
    told = " and ".join(f"input {n} has shape {tuple(map(int, shapes[n]))}" for n in inputs_of(condition))
    at = f" ({source})" if source else ""
    if edge:
        return f"{told}; the model takes only {condition}{at}"
    return (
        f"{told}; this graph was captured where {condition}{at}, and the model may compute something else elsewhere. "
        "Capture it with an example of these sizes as well: calls={'short': (x,), 'long': (y,)}"
    )


def bound_of(guard: Guard) -> tuple[str, int] | None:
    """A guard that is an upper bound of one size: the size as text, and the bound."""
    found = _BOUND.fullmatch(guard.condition)
    return None if found is None else (f"{found[1]}.shape[{found[2]}]", int(found[3]))


def moved(guards: Sequence[Guard], old: int, new: int) -> list[Guard]:
    """The guards after a growth from ``old`` to ``new`` entries of what limits an input's size."""

    def move(guard: Guard) -> Guard:
        bound = _BOUND.fullmatch(guard.condition)
        if not guard.edge or bound is None or int(bound[3]) != old:
            return guard
        return replace(guard, condition=f"{bound[1]}.shape[{bound[2]}] <= {new}")

    return [move(g) for g in guards]
