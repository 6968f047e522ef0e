"""One thread: the folder is small, and results must not depend on the number of threads."""

import torch

torch.set_num_threads(1)
