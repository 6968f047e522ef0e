"""A run that is killed at random moments: see :mod:`tests.run_kills`, which kills more often."""

from __future__ import annotations

import pytest

from tests import run_kills


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_been() -> None:
    found = run_kills.run(5, seed=1)
    assert found.kills == 5 and not found.wrong, found.wrong
