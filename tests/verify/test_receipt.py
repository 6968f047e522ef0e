"""What the receipt keeps."""

from __future__ import annotations

from fxgrow.verify.receipt import Receipt, largest


def test_the_largest_of_what_was_measured() -> None:
    assert largest(None, None) is None
    assert largest(None, 0.0) == 0.0 and largest(1e-3, None) == 1e-3 and largest(1e-3, 2.0, 0.5) == 2.0


def test_a_note_is_said_once() -> None:
    receipt = Receipt(exactness="exact")
    for text in ("a", "b", "a"):
        receipt.note(text)
    assert receipt.notes == ["a", "b"]
    assert "relative error not measured in float64" in receipt.summary()
