from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import cluster, missing


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Path of the configuration of a running Slurm."""
    if reason := missing():
        pytest.skip(reason)
    with cluster(tmp_path_factory.mktemp("slurm") / "cluster") as environment:
        yield environment["SLURM_CONF"]
