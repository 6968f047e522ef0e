"""The version, for whoever writes it into a file: the face of the package, which says it too, stands above them."""

from __future__ import annotations

__version__ = "0.1.0"
