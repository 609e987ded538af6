"""What every test runs under: one thread (the tensors are small), and the same examples each time."""

from __future__ import annotations

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("fluvial", deadline=None, derandomize=True, max_examples=60, database=None)
hypothesis.settings.load_profile("fluvial")
