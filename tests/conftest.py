"""Settings that all tests share."""

import torch
from hypothesis import settings

settings.register_profile("fmlit", deadline=None)  # a loaded machine is no failure
settings.load_profile("fmlit")
torch.set_num_threads(1)  # tests are small: threads would only wait for each other
