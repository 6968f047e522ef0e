"""What planning costs: Llama-70B shapes and GPT-2 on the meta device, this tree and another revision in one run.

As ``against`` (its options, its rounds, its fresh processes), of capture and planning alone, and bounded on planning:
``python -m benchmarks house --base v0.1.0``.
"""

from __future__ import annotations

from benchmarks import against


def run(argv: list[str]) -> int:
    """Compare; exit status 1 where planning is slower than its bound."""
    return against.run(argv, name="house", doc=__doc__, models=against.HOUSE)
