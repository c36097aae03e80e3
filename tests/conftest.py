"""One thread: the shapes are tiny, and threads that wait for each other on a busy machine cost more than they bring.

Tests that are about threads set their own number.
"""

import torch

torch.set_num_threads(1)
