"""What all tests of the run share."""

import torch
from tests.loading import one_at_a_time

# Tensors this small are computed faster by one thread, whatever else the machine does.
torch.set_num_threads(1)
one_at_a_time()
