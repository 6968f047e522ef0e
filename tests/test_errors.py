"""Errors: the words of a refusal."""

from __future__ import annotations

import pickle

from fxgrow.errors import GrowthRefused, InputError, Refusal, reworded


def test_a_refusal_says_what_failed_where_and_why() -> None:
    whole = Refusal("./hidden", "it sums", old=8, new=12, op="aten.sum.default", line="model.py:3: h.sum()")
    assert str(whole) == "cannot grow ./hidden from 8 to 12: aten.sum.default at model.py:3: h.sum(): it sums"
    assert whole.reason == "aten.sum.default at model.py:3: h.sum(): it sums"
    assert (
        str(Refusal("./hidden", "it sums", op="aten.sum.default")) == "cannot grow ./hidden: aten.sum.default: it sums"
    )
    assert str(Refusal("blocks", "they differ", "deepen")) == "cannot deepen blocks: they differ"
    assert str(Refusal("./hidden", "it is frozen", new=12)) == "cannot grow ./hidden to 12: it is frozen"


def test_an_error_keeps_the_parts_of_its_message() -> None:
    refusal = Refusal("./hidden", "it sums", old=8, new=12)
    error = pickle.loads(pickle.dumps(GrowthRefused(refusal)))
    assert str(error) == str(refusal)
    assert error.refusal == refusal
    assert GrowthRefused("the plan belongs to another graph").refusal is None
    assert str(reworded(error, "operations.1: no")) == "operations.1: no"
    assert reworded(error, "operations.1: no").refusal == refusal  # type: ignore[attr-defined]
    assert type(reworded(InputError("x"), "y")) is InputError
