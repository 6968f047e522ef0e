"""Nested values as JSON: with a mark, mappings stand for themselves."""

from __future__ import annotations

import json
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch

from fxgrow.errors import CheckpointError
from fxgrow.ir.values import decode_value, encode_value

Point = namedtuple("Point", "x y")


def there_and_back(value: Any, mark: str) -> Any:
    return decode_value(json.loads(json.dumps(encode_value(value, mark=mark), allow_nan=False)), {}, mark=mark)


@pytest.mark.parametrize("mark", ["", "$"])
@pytest.mark.parametrize(
    "value",
    [{"tuple": 1}, {"dict": [["a", 1]]}, {"$tuple": [1]}, {"$x": 1, "y": (2.0, float("inf"))}, {}, {"": torch.int8}],
    ids=str,
)
def test_mappings_that_look_like_something_else(value: Any, mark: str) -> None:
    assert there_and_back(value, mark) == value


def test_a_mark_lets_mappings_stand_for_themselves_and_have_numbers_for_keys() -> None:
    assert encode_value({"a": {"b": [1]}}, mark="$") == {"a": {"b": [1]}}
    assert there_and_back(OrderedDict({0: (1,), 1.5: {"a": 2}}), "$") == {0: (1,), 1.5: {"a": 2}}
    with pytest.raises(CheckpointError, match="value is of the class dict"):
        encode_value({0: 1})


def test_the_place_is_named() -> None:
    for value in ({"a": [1, Point(1, 2)]}, {"a": [1, {2}]}):
        with pytest.raises(CheckpointError, match=r"state\.a\.1 is of the class (Point|set), which"):
            encode_value(value, "state")


def test_references_are_by_kind_and_name() -> None:
    x = torch.zeros(2)
    data = encode_value([x, (x,)], "v", lambda v, where: ("tensor", where) if v is x else None, "$")
    assert data == [{"$tensor": "v.0"}, {"$tuple": [{"$tensor": "v.1.0"}]}]
    assert decode_value(data, {"tensor": {"v.0": 1, "v.1.0": 2}}, mark="$") == [1, (2,)]
    for damaged in ({"$tensor": "w"}, {"$tensor": ["v.0"]}, {"$node": "v.0"}, {"$dict": [[[], 1]]}, {"$dict": [[0]]}):
        with pytest.raises(CheckpointError):
            decode_value(damaged, {"tensor": {"v.0": 1}}, mark="$")
