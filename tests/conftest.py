"""Tests run on one thread each, so that they are fast side by side and the same every time."""

import torch

torch.set_num_threads(1)
