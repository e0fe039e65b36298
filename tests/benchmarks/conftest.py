"""What benchmarks share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def stated_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compute with as many threads as the module states in ``THREADS``; one that states none is left alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(getattr(request.module, "THREADS", before))
    yield
    torch.set_num_threads(before)
