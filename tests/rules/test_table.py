"""The table of rules as a whole: what is a row, what is a class and says why, and the page that lists it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path

import fxgrow.rules
from fxgrow.report.rules import PLUGGED_IN, entries, in_words
from fxgrow.rules import RULES
from fxgrow.rules.base import FAMILIES, Row, Rule
from tests.rules.table import PAGE

FAMILY_FILES = sorted(
    f
    for f in Path(fxgrow.rules.__file__).parent.glob("*.py")
    if "register_table(" in f.read_text(encoding="utf-8") and f.name != "base.py"
)


def test_nine_ops_in_ten_are_rows() -> None:
    own = {op: RULES[op] for op in FAMILIES}
    rows = sum(isinstance(rule, Row) for rule in own.values())
    assert len(own) > 700
    assert rows >= 0.9 * len(own)


def test_what_is_no_row_says_why() -> None:
    silent = {op for op in FAMILIES if not isinstance(RULES[op], Row) and not RULES[op].special}
    assert not silent


def test_rows_are_of_the_forms_themselves() -> None:
    """A subclass of a form for a few ops would be a class that hides."""
    forms = {cls for name in dir(fxgrow.rules.forms) if inspect.isclass(cls := getattr(fxgrow.rules.forms, name))}
    assert not {op for op in FAMILIES if isinstance(RULES[op], Row) and type(RULES[op]) not in forms}


def test_a_family_shows_its_table_first() -> None:
    families = set(FAMILIES.values()) - {"base", "aliases"}
    assert families <= {f.stem for f in FAMILY_FILES}
    for file in FAMILY_FILES:
        if file.stem not in families:
            continue
        made = [
            x for x in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(x, ast.FunctionDef | ast.ClassDef)
        ]
        assert made[0].name == "table", file.name


def test_an_op_is_found_by_its_name() -> None:
    """``grep aten.silu`` finds the row: no name is put together."""
    text = "".join(f.read_text(encoding="utf-8") for f in FAMILY_FILES)
    families = set(FAMILIES.values()) - {"base", "aliases"}
    for op, family in FAMILIES.items():
        if family in families:
            packet = op.rpartition(".")[0]
            assert packet in text or packet.removesuffix("_") + "(_)" in text, op


def test_functions_of_a_row_say_what_they_are() -> None:
    for entry in entries():
        if entry.family != PLUGGED_IN:
            assert "<lambda>" not in entry.says + in_words(entry.columns), entry.ops


def test_the_table_is_json() -> None:
    assert len(json.loads(json.dumps([op for e in entries() for op in e.json()]))) == len(RULES)


def test_the_page_lists_the_table() -> None:
    """In a process of its own: other tests register rules."""
    code = (
        "from tests.rules.table import MARKED, PAGE, listed; assert MARKED.search(PAGE.read_text()).group() == listed()"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=PAGE.parents[1], capture_output=True, text=True, check=False)
    assert run.returncode == 0, "docs/rules.md: python -m tests.rules.table --write"


def test_every_fact_of_a_rule_is_a_column_of_a_row() -> None:
    """They stand twice, as attributes that a class may set or define and as the fields of a row, and have to agree."""
    facts = {name: getattr(Rule, name) for name in Rule.__annotations__ if name != "special"}
    columns = {
        c.name: c.default_factory() if callable(c.default_factory) else c.default for c in dataclasses.fields(Row)
    }
    assert columns == facts
