"""From a graph and its tensors back to a module."""
