"""A training loop of nanoGPT's shape, and the same one growing: ``train.py`` and ``train_growing.py``."""
