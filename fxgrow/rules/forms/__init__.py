"""The forms of rules: how a row of the table is read. Each derives ``relate``, ``grow`` and ``resize`` once."""

from fxgrow.rules.forms.along import Along, along_of
from fxgrow.rules.forms.cast import Cast
from fxgrow.rules.forms.loss import ElementLoss
from fxgrow.rules.forms.made import Made
from fxgrow.rules.forms.opaque import Opaque
from fxgrow.rules.forms.pattern import Pattern, parse_pattern
from fxgrow.rules.forms.pointwise import Pointwise
from fxgrow.rules.forms.structural import Structural
from fxgrow.rules.forms.written import Written

__all__ = [
    "Along",
    "Cast",
    "ElementLoss",
    "Made",
    "Opaque",
    "Pattern",
    "Pointwise",
    "Structural",
    "Written",
    "along_of",
    "parse_pattern",
]
