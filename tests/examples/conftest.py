from __future__ import annotations

import time

import pytest
from started_runs import Uninterrupted, log_of, operations, started, wait_for, wait_for_work


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory) -> Uninterrupted:
    place = tmp_path_factory.mktemp("uninterrupted")
    with started(place) as process:
        begun = wait_for_work(place, process)
        seconds_of_base = wait_for(place / "out" / "base", process) - begun
        assert process.wait() == 0, log_of(place)
    return Uninterrupted(place / "out", len(operations(place)), time.monotonic() - begun, seconds_of_base)
