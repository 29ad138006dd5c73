"One thread each: results are exact for one number of threads, and tests that run side by side do not wait for each other."
import os

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pipe(): # a generator of 16 px that has learned nothing
    from cemiface.generation.conditioning import GENERATORS
    from cemiface.generation.pipeline import untrained_pipeline
    return untrained_pipeline(GENERATORS["smoke"])
