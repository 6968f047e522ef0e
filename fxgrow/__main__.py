"""``python -m fxgrow``: the command line."""

from __future__ import annotations

from fxgrow.cli import main

if __name__ == "__main__":
    main()
