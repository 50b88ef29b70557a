"""gpu_memory.alone on a stand-in of the GPU's memory."""

from concurrent.futures import ThreadPoolExecutor

import gpu_memory
import pytest
import torch
from filelock import Timeout


@pytest.fixture
def memory(monkeypatch):
    """[bytes free, bytes that PyTorch keeps]"""
    state = [80e9, 0]

    def empty_cache():
        state[:] = [sum(state), 0]

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (state[0], 80e9))
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    return state


def is_taken() -> bool:
    """Asked by another holder, as another process is one."""

    def ask() -> bool:
        try:
            with gpu_memory.lock().acquire(timeout=0):
                return False
        except Timeout:
            return True

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(ask).result()


def test_nobody_else_looks_while_one_has_the_memory(memory):
    def fails():
        memory[:] = [10e9, 70e9]
        assert is_taken()
        raise ZeroDivisionError

    memory[:] = [59e9, 21e9]  # of the tests before
    with pytest.raises(ZeroDivisionError), gpu_memory.alone(60e9):
        fails()
    assert memory == [80e9, 0]
    assert not is_taken()


def test_too_little_is_a_skip_that_keeps_no_lock(memory):
    memory[0] = 59e9
    with pytest.raises(pytest.skip.Exception, match="less than 60 GB free on the GPU"), gpu_memory.alone(60e9):
        pytest.fail("it ran")
    assert not is_taken()
