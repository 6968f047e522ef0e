"""Errors: the words of a refusal."""

from __future__ import annotations

import pickle

from fxgrow.errors import GrowthRefused, InputError, Refusal, did_you_mean, reworded


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


def test_did_you_mean() -> None:
    assert did_you_mean("fator", ["to", "factor", "by"]) == "did you mean factor?"
    assert did_you_mean("zzz", ["to", "by"]) == "known: to, by"
    assert did_you_mean("zzz", []) == "known: none"
    assert did_you_mean("zzz", map(str, range(40))).endswith("15, …")


def test_a_part_that_tells_most_comes_first() -> None:
    names = ["a.b/hidden", "a/heads", "./hidden"]
    assert did_you_mean("a/hiden", names, lambda n: n.rpartition("/")[2]) == "did you mean a.b/hidden or ./hidden?"
    assert did_you_mean("a/head_", names, lambda n: n.rpartition("/")[2]) == "did you mean a/heads?"
