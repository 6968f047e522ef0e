"""FSDP2 by hand, with growth in the loop."""
