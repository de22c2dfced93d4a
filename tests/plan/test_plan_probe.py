"""The probe of this machine is quick and finds what is plausible; a plan can be drawn from it."""

from time import perf_counter

import pytest

from mikv.bench import streaming
from mikv.plan.probe import this_machine


@pytest.fixture
def small_buffer(monkeypatch):
    monkeypatch.setattr(streaming, "last_level_cache_bytes", lambda: 16 << 20)


@pytest.mark.usefixtures("small_buffer")
def test_this_machine_is_known_after_the_time_given():
    start = perf_counter()
    machine = this_machine(seconds=0.2)
    assert perf_counter() - start < 5
    assert machine.is_cpu
    assert (machine.most, machine.watts) == (1, None)
    assert 1e8 < machine.bandwidth < 1e13
    assert 1e8 < machine.flops < 1e14
    assert 1 << 28 < machine.memory_bytes < 1 << 50
