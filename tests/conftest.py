from __future__ import annotations

from collections.abc import Iterator

import pyro
import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests run side by side and on small tensors: more threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def empty_param_store() -> Iterator[None]:
    """No test finds or leaves anything in the process-wide parameter store."""
    pyro.clear_param_store()
    yield
    left = sorted(pyro.get_param_store().keys())
    pyro.clear_param_store()
    assert left == [], f"left in pyro's parameter store: {left}"
