"""A small GPT that is trained on English text and grown while it learns."""

import os

# Read by OpenMP when torch is first imported: idle threads sleep instead of spinning. On a quiet machine that costs
# little; beside another busy process, steps of a few milliseconds become several times faster.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
