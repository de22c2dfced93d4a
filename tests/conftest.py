"""Settings of all tests, and fixtures of several folders."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from mikv.ops import native

# The same examples in every run, so that a failure can be repeated; no deadline, so that a busy machine does not fail.
settings.register_profile("mikv", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("mikv")

_ALL_THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """One thread, except for real models: the tensors of unit tests are too small to share."""
    torch.set_num_threads(_ALL_THREADS if request.node.get_closest_marker("bundled") else 1)


@pytest.fixture(params=native.module.isas_available() if native.module else ["missing"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this processor has."""
    assert native.module is not None, native.reason
    before = native.module.isa()
    native.module.use_isa(request.param)
    yield request.param
    native.module.use_isa(before)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random chat model."""
    from tiny_chat import save_chat_model  # with transformers, which most tests do without

    return save_chat_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> int:
    """The last-level cache of a machine that is so small that reading twice of it takes no time, in bytes."""
    from mikv.bench import attention, matmul, streaming

    num_bytes = 1 << 19
    for module in (attention, matmul, streaming):
        monkeypatch.setattr(module, "last_level_cache_bytes", lambda: num_bytes)
    return num_bytes
