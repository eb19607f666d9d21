from collections.abc import Iterator

import pytest
import torch

from tests.workers import POOL


@pytest.fixture(autouse=True, scope="session")
def _workers_end_with_the_session() -> Iterator[None]:
    yield
    POOL.close()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For files of small tensors, where two threads spend their time on waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
