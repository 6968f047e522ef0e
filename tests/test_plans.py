"""Plans of known growths are what they were, bit by bit: see :mod:`tests.plans`."""

from __future__ import annotations

import numpy as np
import pytest

from tests import plans


@pytest.mark.parametrize("name", plans.CASES)
def test_plans_are_what_they_were(name: str) -> None:
    found = plans.difference(name)
    assert not found, f"{found}\n\nwhere this is meant: python -m tests.plans --write {name}"


def test_every_file_has_a_case() -> None:
    assert {p.stem for p in plans.FOLDER.iterdir()} == set(plans.CASES)


def test_a_change_of_one_number_is_seen_and_read() -> None:
    (plan,) = plans.plans_of(plans.CASES["autoencoder"])
    before = list(plans.words(plan))
    tensor, factors = plan.tensors["w2"], np.full(16, 0.5)
    factors[3] *= 1 + 2**-52
    assert tensor.dims[1] is not None
    tensor.dims[1] = tensor.dims[1].model_copy(update={"gradient": factors})
    changed = [b for a, b in zip(before, plans.words(plan), strict=True) if a != b]
    assert len(changed) == 2 and "tensors" in changed[0] and changed[1].startswith("tensor w2 ")
