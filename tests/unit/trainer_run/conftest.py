"""What all tests of the run share."""

import torch

# Tensors this small are computed faster by one thread, whatever else the machine does.
torch.set_num_threads(1)
