from __future__ import annotations

import pytest

from funlora_hf.continual import time_limit
from funlora_hf.continual.time_limit import TimeLimit


def test_time_is_counted_from_the_start_in_minutes(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time_limit, "monotonic", lambda: now[0])
    limit = TimeLimit(1.5)
    for seconds, is_over in ((0, False), (89.9, False), (90, True), (1e6, True)):
        now[0] = 1000.0 + seconds
        assert limit.is_over is is_over
    assert "`time_limit_minutes` 1.5 is over: stopped here." in str(limit.reached("here"))


def test_no_limit_is_never_over(monkeypatch):
    monkeypatch.setattr(time_limit, "monotonic", lambda: pytest.fail("nobody has to look at the clock"))
    monkeypatch.setattr(TimeLimit, "__init__", lambda self, minutes: setattr(self, "minutes", minutes))
    assert not TimeLimit(None)
    assert not TimeLimit(None).is_over
