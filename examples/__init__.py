"""Worked examples: run them from the root of the repository with ``python -m examples.<name>.train``."""
