"""Settings that all tests share."""

import os

import torch
from hypothesis import settings

# A loaded machine is no failure, and the same examples every time make none of somebody else's change.
# To search for new ones: HYPOTHESIS_PROFILE=explore.
settings.register_profile("fmlit", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fmlit"))
torch.set_num_threads(1)  # tests are small: threads would only wait for each other
