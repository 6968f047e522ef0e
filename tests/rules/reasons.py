"""Refusals that brute force would have let pass, and why they stay."""

from __future__ import annotations

STRICT = {
    "softmax runs over it": "of a logarithm: copies lower it by log n, which no scale makes up for",
    "attention over a growing sequence": "sums of copies are exact only where all that follows sums over them",
    "the loss averages over it": "an average over copies is the same, but not over anything else",
    "the loss runs over it": "targets number the classes: old numbers stay valid only where copies come last",
    "looked up by number": "old numbers stay valid only where copies come last; see the extend pass",
    "of the input 't": "an index that the caller passes in has its size",
    "runs along a diagonal": "a trace of copies end to end is a multiple, of others it is not",
    "it is rotated": "a square stays one only if both of its dims grow",
    "batch norm takes statistics": "the running variance is unbiased, and so depends on the number of entries",
    "group norm takes statistics": "spatial dims are the caller's",
    "entries are rolled": "whole copies end to end roll alike, other growths do not",
    "entries are reversed": "the same",
    "reduced in a way": "no model has needed it yet",
    "pooling runs over it": "windows of one entry, or of all of them; spatial dims are the caller's",
    "the spatial extent of a convolution": "the same",
    "neighbouring entries are subtracted": "no difference at all was taken, of order 0",
    "sums 'j' of one operand alone": "no model has needed it yet",
    "splits into parts of dynamic or empty size": "the same",
    "its entries are written by number": "which ones are written depends on values; sizes differ",
    "taken or written in their order": "what comes after the last one taken is not looked at",
    "a Fourier transform runs over it": "a length was given, and what is cut off may be anything",
    "its entries are interpolated": "places to look at, whose number is the caller's",
    "instance norm takes statistics": "spatial dims are the caller's",
    "running statistics average over it": "a batch is the caller's",
    "a diagonal is taken of it": "the longer side is not looked at",
    "an index that broadcasts": "no model has needed it yet",
    "entries of a flattened tensor": "the same",
    "depends on the values of its entries": "the same",
    "it is integrated over places of its own": "the same",
    "repeated no times": "a tensor of no entries",
    "drawn at random": "uninitialised memory happened to be equal",
}


def explained(detail: str) -> bool:
    """Whether a refusal is one of those."""
    return any(words in detail for words in STRICT)
