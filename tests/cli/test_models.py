"""What a user types of a model: its reference, arguments and example inputs."""

from __future__ import annotations

import pytest
import torch

from fxgrow.cli.models import find_callable, parse_input, parse_settings
from fxgrow.errors import SpecError


def test_example_inputs() -> None:
    torch.manual_seed(0)
    name, value = parse_input("x=int64[2,16]<65")
    assert (
        name == "x" and value.dtype == torch.int64 and value.shape == (2, 16) and 0 <= value.min() <= value.max() < 65
    )
    name, value = parse_input("bfloat16[3, 4]")
    assert name is None and value.dtype == torch.bfloat16 and value.shape == (3, 4)
    assert parse_input("bool[2]")[1].dtype == torch.bool and parse_input("float32[]")[1].shape == ()
    assert parse_input("scale=0.5") == ("scale", 0.5) and parse_input("none") == (None, None)
    for bad in ("float[2", "floaty[2]", "float32[2]<3", "tensor[2]", "hello"):
        with pytest.raises(SpecError, match=r"--input"):
            parse_input(bad)


def test_settings_and_references() -> None:
    parsed = parse_settings(["a=4", "b=false", "c=[1, 2]", "d=gelu", "e=1e-3", "f="])
    assert parsed == {"a": 4, "b": False, "c": [1, 2], "d": "gelu", "e": 1e-3, "f": None}
    with pytest.raises(SpecError, match="--hyper 'x'"):
        parse_settings(["x"], "--hyper")
    assert find_callable("tests/cli/test_commands.py:Net") is find_callable("tests.cli.test_commands:Net")
    with pytest.raises(SpecError, match="cannot be called"):
        find_callable("tests.cli.test_commands:IMAGE")
