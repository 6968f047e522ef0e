"""A small compiler of its own that grows models between its other passes; see ``compiler.py``."""
