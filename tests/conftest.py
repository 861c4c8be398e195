import os

import torch
from families import LEFT_OUT
from hypothesis import settings

# No deadline: the time that a test takes is the machine's, not the code's.
settings.register_profile("tensors", deadline=None, max_examples=50)
settings.load_profile("tensors")

# The models are small: on one thread they run as fast. Two threads that wait for each other while another process has
# their core are many times slower. The variable is for the programs that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_report_header():
    return [f"left out of the families: {kind}: {reason}" for kind, reason in LEFT_OUT.items()]
