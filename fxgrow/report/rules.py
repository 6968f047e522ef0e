"""The table of rules in words: for ``fxgrow rules`` and docs/rules.md."""

from __future__ import annotations

import enum
import fnmatch
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fxgrow.ir.traits import traits_of
from fxgrow.rules.base import FAMILIES, RULES, Row, Rule

#: the family of rules that others registered
PLUGGED_IN = "plug-ins"


@dataclass(frozen=True)
class Entry:
    """One rule and the ops that share it.

    Attributes:
        family: the file of ``fxgrow/rules`` that it stands in; ``plug-ins`` for those of others.
        ops: names, sorted.
        form: the form of the row, or the name of the class.
        says: the relation between operands and results; for a class the first line of its docstring.
        columns: what the row says beyond that, as JSON values.
        special: why it is a class; empty for a row.
        traits: by op, its traits.
    """

    family: str
    ops: tuple[str, ...]
    form: str
    says: str
    columns: dict[str, Any]
    special: str
    traits: dict[str, list[str]]

    @property
    def is_row(self) -> bool:
        return not self.special

    def json(self) -> list[dict[str, Any]]:
        """One object for each op."""
        return [
            {
                "op": op,
                "family": self.family,
                "row": self.is_row,
                "form": self.form,
                "says": self.says,
                **({"columns": self.columns} if self.is_row else {"special": self.special}),
                "traits": self.traits.get(op, []),
            }
            for op in self.ops
        ]


def entries(name: str = "*") -> list[Entry]:
    """The rules of the ops that a name or pattern matches, by family and in the order of their tables.

    Args:
        name: part of a name (``silu``), or a pattern with ``*`` and ``?`` (``aten.conv*``).
    """
    pattern = name if any(c in name for c in "*?[") else f"*{name}*"
    shared: dict[int, tuple[Rule, list[str]]] = {}
    for op, rule in RULES.items():
        if fnmatch.fnmatchcase(op, pattern):
            shared.setdefault(id(rule), (rule, []))[1].append(op)
    found = [_entry(rule, ops) for rule, ops in shared.values()]
    return sorted(found, key=lambda e: (e.family == PLUGGED_IN, e.family))


def _entry(rule: Rule, ops: list[str]) -> Entry:
    row = isinstance(rule, Row)
    first = (inspect.getdoc(type(rule)) or type(rule).__name__).partition("\n")[0]
    return Entry(
        family=FAMILIES.get(ops[0], PLUGGED_IN),
        ops=tuple(ops),
        form=type(rule).__name__,
        says=rule.notation if isinstance(rule, Row) else first,
        columns={k: _value(v) for k, v in rule.columns().items()} if isinstance(rule, Row) else {},
        special="" if row else rule.special or "no form says it",
        traits={op: sorted(t.name.lower() for t in found) for op in ops if (found := traits_of(op))},
    )


def _value(value: Any) -> Any:
    """A column as JSON; a function is what its docstring says first."""
    if callable(value) and not isinstance(value, enum.Enum):
        return (inspect.getdoc(value) or getattr(value, "__name__", str(value)).strip("_").replace("_", " ")).partition(
            "\n"
        )[0]
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(k): _value(v) for k, v in value.items()}
    if isinstance(value, frozenset | set):
        return sorted(map(_value, value))
    if isinstance(value, list | tuple):
        return [_value(v) for v in value]
    return value


def in_words(columns: Mapping[str, Any]) -> str:
    """Columns in a line: ``zero, mean, jumps: the divisor``."""
    return ", ".join(k if v is True else f"{k}: {_words(v)}" for k, v in columns.items())


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{k}={_words(v)}" for k, v in value.items())
    if isinstance(value, list):
        return " ".join(map(_words, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def counts(found: list[Entry]) -> str:
    """``760 ops: 700 in rows of 5 forms, 60 in 30 classes``."""
    rows, classes = [e for e in found if e.is_row], [e for e in found if not e.is_row]
    many, apart = (sum(len(e.ops) for e in part) for part in (rows, classes))
    forms, kinds = (len({e.form for e in part}) for part in (rows, classes))
    words = [f"{many} in {_many(len(rows), 'row')} of {_many(forms, 'form')}"] if many else []
    words += [f"{apart} in {_many(kinds, 'class', 'es')}"] if apart else []
    return f"{_many(many + apart, 'op')}: {', '.join(words)}"


def _many(n: int, word: str, ending: str = "s") -> str:
    return f"{n} {word}{ending if n != 1 else ''}"


def markdown() -> str:
    """The whole table, as docs/rules.md shows it."""
    lines = []
    family = ""
    for entry in entries():
        if entry.family == PLUGGED_IN:
            continue
        if entry.family != family:
            family = entry.family
            lines += ["", f"**{family}**", "", "| ops | form | says | columns |", "|---|---|---|---|"]
        ops = " ".join(op.removeprefix("aten.").removesuffix(".default") for op in entry.ops)
        cells = (ops, entry.form, entry.says, in_words(entry.columns) if entry.is_row else f"a class: {entry.special}")
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join([*lines[1:], ""])
