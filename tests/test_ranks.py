"""What ranks do together: errors reach all of them, and values are held against each other."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch.distributed as dist

from fxgrow.errors import FxgrowError, GrowthRefused, RankError, SpecError
from fxgrow.ranks import ALONE, agree, agree_by_name, gathered, shared, size, together
from tests.processes import run_ranks, said


def raising(error: Exception | None) -> None:
    with together("the growth"):
        if error is not None:
            raise error


def early(rank: int) -> None:
    """One rank fails where the other has come to the next place already."""
    with together("the growth"):
        if rank == 1:
            raise SpecError("before the plan")
        agree("the plan", rank)


def talk(rank: int) -> dict[str, Any]:
    first = dist.new_group([0])
    found: dict[str, Any] = {"size": [size(), size(first)], "gathered": gathered(rank * 10)}
    found["shared"] = shared("a number", lambda: rank + 1)
    found["fine"] = said(lambda: raising(None))
    found["one"] = said(lambda: raising(SpecError("no such axis") if rank == 1 else None))
    found["unexpected"] = said(lambda: raising(ValueError("of the user's") if rank == 0 else None))
    found["same"] = said(lambda: raising(GrowthRefused(f"it is {rank}")))
    found["other"] = said(lambda: raising(SpecError("this") if rank else GrowthRefused("that")))
    found["nested"] = said(lambda: shared("outer", lambda: raising(SpecError("deep") if rank == 1 else None)))
    found["early"] = said(lambda: early(rank))
    found["elsewhere"] = said(lambda: shared("loading" if rank else "saving", lambda: rank))
    found["agreed"] = said(lambda: agree("the plan", {"a": [1, 2]}))
    found["apart"] = said(lambda: agree("the plan", f"plan {rank}"))
    found["by name"] = said(lambda: agree_by_name("the parameter", {"a": 1, "b": rank} if rank else {"a": 1}))
    found["by itself"] = gathered("one", ALONE)
    # the first rank alone
    found["alone"] = said(lambda: shared("alone", lambda: raising_alone(rank, first), first)) if rank == 0 else ""
    dist.barrier()  # in step after all of that
    if rank == 1:
        os._exit(0)
    found["gone"] = said(lambda: gathered(1))
    return found


def raising_alone(rank: int, group: Any) -> None:
    agree("what one has", rank, group)
    with together("what one does", group):
        raise FxgrowError("alone")


def test_all_ranks_raise_what_one_of_them_raises() -> None:
    found, none = run_ranks(2, talk)
    assert none is None
    gone = found.pop("gone")
    assert gone.startswith("RankError: another of the 2 ranks has ended"), gone
    assert found == {
        "size": [2, 1],
        "gathered": [0, 10],
        "shared": [1, 2],
        "fine": "",
        "one": "RankError: the growth: rank 1 of 2 failed: no such axis",
        "unexpected": "RankError: the growth: rank 0 of 2 failed: ValueError: of the user's",
        "same": "GrowthRefused: it is 0",
        "other": "RankError: the growth: rank 0 of 2 failed: that; rank 1 of 2 failed: this",
        "nested": "RankError: the growth: rank 1 of 2 failed: deep",
        "early": "RankError: the growth: rank 1 of 2 failed: before the plan",
        "elsewhere": "RankError: the ranks do not do the same: rank 0 of 2 is at saving; rank 1 of 2 is at loading",
        "agreed": "",
        "apart": "RankError: the plan is not the same on all ranks: rank 0 of 2 has 'plan 0'; rank 1 of 2 has 'plan 1'",
        "by name": "RankError: the parameter b is not the same on all ranks: rank 0 of 2 has None; rank 1 of 2 has 1",
        "by itself": ["one"],
        "alone": "FxgrowError: alone",
    }


def test_without_ranks_nothing_is_exchanged() -> None:
    assert size() == 1 and gathered("x") == ["x"] and shared("a number", lambda: 3) == [3]
    agree("the plan", object())
    with pytest.raises(KeyError, match="own"), together("the growth"):
        raise KeyError("own")
    assert issubclass(RankError, FxgrowError)
