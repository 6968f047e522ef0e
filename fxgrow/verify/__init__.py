"""Trying to refute a growth."""
