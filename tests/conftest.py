"""Settings of all tests."""

import pytest
import torch
from hypothesis import settings

# The same examples in every run, so that a failure can be repeated; no deadline, so that a busy machine does not fail.
settings.register_profile("mikv", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("mikv")

_ALL_THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """One thread, except for real models: the tensors of unit tests are too small to share."""
    torch.set_num_threads(_ALL_THREADS if request.node.get_closest_marker("bundled") else 1)
