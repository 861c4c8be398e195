import torch
from hypothesis import settings

# No deadline: the time that a test takes is the machine's, not the code's.
settings.register_profile("tensors", deadline=None, max_examples=50)
settings.load_profile("tensors")

# The models are small: on one thread they run as fast, and do not fight other processes for the second core.
torch.set_num_threads(1)
