"""What models do beyond single ops, each feature a few lines with random choices; :data:`FEATURES` names them all."""

from __future__ import annotations

from collections.abc import Callable

from tests.fuzz.compose import Composer
from tests.fuzz.features import attention, casts, indexing, layers, modes, sharing, sizes, state, streams

FEATURES: dict[str, Callable[[Composer], None]] = {
    f"{module.__name__.rpartition('.')[2]}.{name}": f
    for module in (attention, casts, indexing, layers, modes, sharing, sizes, state, streams)
    for name, f in sorted(vars(module).items())
    if callable(f) and getattr(f, "__module__", "") == module.__name__ and not name.startswith("_")
}
