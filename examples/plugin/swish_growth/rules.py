"""What fxgrow has to know of the op: it works element by element, and is zero where ``x`` is."""

from __future__ import annotations

import fxgrow
from fxgrow.rules import Pointwise

fxgrow.register_rule("swish.gated.default", Pointwise(zero=True))
