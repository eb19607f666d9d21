import gc
import os
from collections.abc import Iterator

import pytest
import torch

from tests.support.workers import POOL

# Of the processes that tests start: threads that wait for each other take the other cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """What was imported and collected stays: looking through it again and again took a third."""
    torch.set_num_threads(1)  # tensors are small, and the other core has tests of its own
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _workers_end_with_the_session() -> Iterator[None]:
    yield
    POOL.close()
