from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from fxgrow.warn import warn


def _through(between: dict[str, Any], call: Callable[[], None]) -> None:
    """Make a call from code of a module of some name."""
    exec("def passes_on(call):\n    call()", between)
    between["passes_on"](call)


@pytest.mark.parametrize("name", ["fxgrow.growth", "torch.fx.interpreter", "contextlib", None])
def test_a_warning_is_given_at_the_users_line(name: str | None) -> None:
    between = {} if name is None else {"__name__": name}
    with pytest.warns(UserWarning, match="odd") as said:
        _through(between, functools.partial(warn, "odd"))
    lines, first = inspect.getsourcelines(_through)
    assert (said[0].filename, said[0].lineno) == (__file__, first + len(lines) - 1)


def test_a_line_is_told_once() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(2):
            _through({"__name__": "fxgrow.growth"}, functools.partial(warn, "once"))
    assert [str(s.message) for s in said] == ["once"]
