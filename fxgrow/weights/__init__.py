"""Grown tensors, made from a plan."""
