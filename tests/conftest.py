from collections.abc import Iterator

import pytest

from tests.workers import POOL


@pytest.fixture(autouse=True, scope="session")
def _workers_end_with_the_session() -> Iterator[None]:
    yield
    POOL.close()
