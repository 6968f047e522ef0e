"""Callbacks that carry a schedule out in other people's training loops.

``from fxgrow.integrations.transformers import GrowthCallback`` for ``transformers.Trainer``, ``from
fxgrow.integrations.lightning import GrowthCallback`` for Lightning. Neither library is needed by fxgrow itself. What is
known of PEFT's classes needs no import: it is there once PEFT is.
"""
