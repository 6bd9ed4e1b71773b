"""Settings for all tests. With MANN_FAST_POISON set, memory that nobody has written yet is NaN, in torch and in the kernels."""

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    if not os.environ.get("MANN_FAST_POISON"):
        yield
        return
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
