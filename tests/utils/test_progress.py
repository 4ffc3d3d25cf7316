from __future__ import annotations

import pytest

from funlora_hf.utils import progress
from funlora_hf.utils.progress import Progress, duration


def loop(bar):
    with bar:
        for _ in range(4):
            bar.set_postfix(loss="0.5", refresh=False)
            bar.update()


def test_without_a_terminal_the_log_has_lines_and_stderr_no_bar(capsys, caplog, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 1e-9)
    caplog.set_level("INFO")
    loop(Progress(4, "class_7"))
    assert capsys.readouterr() == ("", "")
    lines = caplog.messages
    assert lines[0].startswith("class_7: 1 of 4 in 00:00, ")
    assert lines[-1].endswith("loss=0.5")
    assert not [line for line in lines if "\r" in line or "\n" in line]


def test_a_short_loop_says_nothing(capsys, caplog):
    caplog.set_level("INFO")
    loop(Progress(4, "class_7"))
    assert (capsys.readouterr(), caplog.messages) == (("", ""), [])


def test_on_a_terminal_there_is_a_bar(capsys, caplog, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    loop(Progress(4, "class_7"))
    assert "class_7:" in capsys.readouterr().err
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (150, "2 min"), (5999, "100 min"), (12_240, "3.4 h")]
)
def test_a_duration_is_in_the_unit_that_suits_it(seconds, text):
    assert duration(seconds) == text
