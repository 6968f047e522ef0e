"""Numbers of the graph that a growth changed, and the attributes of the living model that they may come from."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fxgrow.ir.nodes import info_of
from fxgrow.ir.ops import bound_arguments
from fxgrow.ir.traced import Traced
from fxgrow.landing.living import Living, attributes_of, configs_of

Number = int | float | None


@dataclass(frozen=True)
class Literal:
    """A number that a module's op has to be given in place of another.

    Attributes:
        path: the module that the op ran in.
        old, new: the numbers; ``old`` is what the class computes now.
        line: the user's line.
        node, argument: where it stands in the graph.
    """

    path: str
    old: Number
    new: Number
    line: str = ""
    node: str = ""
    argument: str = ""


@dataclass(frozen=True)
class Candidate:
    """An attribute that may hold a literal, and what it would have to be.

    Attributes:
        holder: a module, or a bundle of settings.
        index: of the entry, where the attribute is a tuple or list.
        rank: the lower, the likelier.
        rivals: other attributes that are as likely to hold the literal.
        keyed: it is an entry of a table of the module's own, by a key that no code names.
    """

    holder: Any
    name: str
    index: int | None
    value: Number
    rank: tuple[int, ...]
    rivals: int = 0
    keyed: bool = False

    @property
    def key(self) -> tuple[int, str, int | None]:
        return id(self.holder), self.name, self.index

    @property
    def is_direct(self) -> bool:
        """Whether it holds the number itself."""
        return self.rank[0] == 0

    @property
    def is_sure(self) -> bool:
        """Whether it is the module's own, holds the number itself, and is read in the line."""
        return self.rank[:3] == (0, 0, 0)

    def put(self, living: Living) -> bool:
        """Set the attribute, if it can be."""
        if self.index is None:
            return living.attribute(self.holder, self.name, self.value)
        whole = attributes_of(self.holder)[self.name]
        entries = [self.value if i == self.index else v for i, v in enumerate(whole)]
        return living.attribute(self.holder, self.name, type(whole)(entries))


def changed_literals(before: Traced, grown: Traced) -> list[Literal]:
    """The numbers among the arguments of the ops of a program that a growth changed."""
    known = {n.name: n for n in before.graph.nodes if n.op == "call_function"}
    found: dict[Literal, None] = {}
    for node in grown.graph.nodes:
        old = known.get(node.name)
        if old is None or node.op != "call_function":
            continue
        there = dict(_numbers(old))
        for argument, value in _numbers(node):
            was = there.get(argument)
            if was is None and argument.startswith("split_sizes"):
                was = there.get("split_size")  # equal parts that have become a list of them
            if was is not None and was != value:
                info = info_of(old)
                found[Literal(info.module_path, was, value, info.source, node.name, argument)] = None
    return list(found)


def steady_attributes(before: Traced, grown: Traced, model: nn.Module) -> dict[tuple[str, str], Number]:
    """Whole numbers that the graph holds as before, by module path and the attribute that its code may read them of."""
    known = {n.name: n for n in before.graph.nodes if n.op == "call_function"}
    found: dict[tuple[str, str], Number] = {}
    spoilt = set()
    for node in grown.graph.nodes:
        old = known.get(node.name)
        if old is None or node.op != "call_function":
            continue
        info, there = info_of(old), dict(_numbers(old))
        module = model.get_submodule(info.module_path)
        held = attributes_of(module)
        names = [n for n in names_in_code(type(module)) if type(held.get(n)) is int]  # type: ignore[arg-type]
        for argument, value in _numbers(node):
            for name in names if argument.startswith(_SIZES) else ():
                if held[name] == there.get(argument):
                    found[info.module_path, name] = value
                    if value != held[name]:
                        spoilt.add((info.module_path, name))
    return {k: v for k, v in found.items() if k not in spoilt}


#: arguments of ops that are sizes, not places
_SIZES = ("shape", "size", "split_size", "normalized_shape")


def moved(literals: Sequence[Literal], model: nn.Module, origin: Mapping[str, str]) -> list[Literal]:
    """Literals of a model whose blocks were numbered anew: at their modules' paths now, and at those of their copies.

    Args:
        origin: module path now to the path that it had, or was copied from, where they differ.
    """
    now: dict[str, list[str]] = {}
    for path, _ in model.named_modules(remove_duplicate=False):
        now.setdefault(origin.get(path, path), []).append(path)
    return [dataclasses.replace(x, path=path) for x in literals for path in now.get(x.path, [])]


def _numbers(node: fx.Node) -> Iterator[tuple[str, Number]]:
    for name, value in bound_arguments(node).items():
        yield from _inside(name, value)


def _inside(name: str, value: Any) -> Iterator[tuple[str, Number]]:
    if isinstance(value, list | tuple):
        for i, v in enumerate(value):
            yield from _inside(f"{name}[{i}]", v)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


# attributes ---------------------------------------------------------------------------------------------------------


def candidates(model: nn.Module, literal: Literal) -> list[Candidate]:
    """Attributes that may hold a literal: those that do and that the code reads first, of the nearest module first."""
    out = []
    path = literal.path
    distance = 0
    line, words, names = names_in_line(literal.line), words_in_line(literal.line), set[str]()
    argument = literal.argument.partition("[")[0]
    while True:
        module = model.get_submodule(path)
        names |= names_in_code(type(module))  # type: ignore[arg-type]
        near = [module, *configs_of(module)]
        tables = {id(v): n for n, v in vars(module).items() if type(v) is dict}  # numbers of the module's by some key
        for step, holder in enumerate(near):
            table = tables.get(id(holder), "")
            for name, index, value in _held(holder):
                same = name == argument and not distance  # ``groups`` of a convolution
                read = 0 if same or name in line or table in words else 1 if {name, table} & names else 2
                keyed = bool(table) and name not in line | names
                derived = read == 0 or (read == 1 and not distance)
                for wanted, how in _fitting(literal, value, read == 0, derived):
                    out.append(Candidate(holder, name, index, wanted, (how, read, distance, step), keyed=keyed))
        if not path:
            break
        path, distance = path.rpartition(".")[0], distance + 1
    best: dict[tuple[Any, ...], Candidate] = {}
    for c in sorted(out, key=lambda c: c.rank):
        best.setdefault((*c.key, c.value), c)
    return list(best.values())


def _held(holder: Any) -> Iterator[tuple[str, int | None, Number]]:
    read = names_in_code(type(holder))  # type: ignore[arg-type]
    for name, value in list(attributes_of(holder).items()):
        if not isinstance(name, str) or (name.startswith("_") and name not in read):
            continue  # a private one is what a property reads, or is not the user's
        if value is None or type(value) in (int, float):
            yield name, None, value
        elif type(value) in (tuple, list) and len(value) <= 8 and all(type(v) in (int, float) for v in value):
            for i, v in enumerate(value):
                yield name, i, v


def _fitting(literal: Literal, value: Number, in_line: bool, derived: bool) -> Iterator[tuple[Number, int]]:
    """What an attribute would have to be, and how: 0 the literal itself, 1 a part or function of it (``derived``)."""
    if literal.old is None or literal.new is None or value is None:
        if value is literal.old and in_line:  # a default that the line passes on
            yield literal.new, 0
        return
    if _same(value, literal.old):
        yield (literal.new if type(value) is float or type(literal.new) is int else type(value)(literal.new)), 0
        return
    if not derived or not value or not literal.old:
        return
    ratio = literal.new / literal.old
    if type(value) is int and type(literal.old) is int and type(literal.new) is int:
        multiple = literal.old % value == 0 or value % literal.old == 0
        grown = value * ratio
        if multiple and math.isclose(grown, round(grown), rel_tol=1e-12) and round(grown) != value:
            yield round(grown), 1
    elif type(value) is float and literal.new > 0:
        for power in (1, -1, 2, -2, 0.5, -0.5):
            if _same(value**power if value > 0 else math.nan, literal.old):
                yield float(literal.new ** (1 / power)), 1
                return


def _same(a: float, b: float) -> bool:
    if type(a) is int and type(b) is int:
        return a == b
    return math.isclose(a, b, rel_tol=1e-12) and (type(a) is float or type(b) is int or float(b).is_integer())


# the user's code ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def names_in_line(line: str) -> frozenset[str]:
    """Attributes and entries that a line of the user's reads: ``n_head`` of ``x.view(B, T, self.n_head, -1)``."""
    code = line.partition(": ")[2]
    return frozenset(re.findall(r"\.\s*([A-Za-z_]\w*)", code) + re.findall(r"\[\s*['\"]([A-Za-z_]\w*)['\"]\s*\]", code))


@functools.lru_cache(maxsize=4096)
def words_in_line(line: str) -> frozenset[str]:
    """All names in a line of the user's, those of its variables as well: ``scaling = self.scaling[name]`` before it."""
    return frozenset(re.findall(r"[A-Za-z_]\w*", line.partition(": ")[2]))


@functools.lru_cache(maxsize=1024)
def names_in_code(kind: type) -> frozenset[str]:
    """Attributes that the methods of a class may read, those of its bases up to PyTorch's included.

    Not what is named where an instance is made: it is written there.
    """
    found: set[str] = set()
    for cls in kind.__mro__:
        if cls is nn.Module:
            break
        for name, member in vars(cls).items():
            if name == "__init__":
                continue
            function: Any = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            function = member.func if isinstance(member, functools.cached_property) else function
            code = getattr(inspect.unwrap(function), "__code__", None)
            if code is not None:
                found |= _names_of(code)
    return frozenset(found)


def _names_of(code: Any) -> set[str]:
    found = set(code.co_names)
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            found |= _names_of(constant)
    return found


def mirrored(living: Living, holder: Any, name: str, old: Number, new: Number) -> list[Any]:
    """Set what has the same name and the same old value in a config, which the attribute was taken from.

    Returns:
        The configs.
    """
    found = []
    for module in living.model.modules():
        for config in configs_of(module):
            here = attributes_of(config).get(name)
            alike = config is not holder and type(here) is type(old) and here == old
            if alike and living.attribute(config, name, new):
                found.append(config)
    return found


__all__ = ["Candidate", "Literal", "candidates", "changed_literals", "mirrored", "moved", "steady_attributes"]
