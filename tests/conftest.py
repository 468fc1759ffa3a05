"""What every test shares: one thread, and a look at pyro's parameter store before and after."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def parameter_store_stays_empty() -> Iterator[None]:
    import pyro

    yield
    left = sorted(pyro.get_param_store().keys())
    pyro.clear_param_store()
    assert not left, f"the process-wide parameter store was left with {left}"
