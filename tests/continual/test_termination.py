from __future__ import annotations

import os
import signal
import sys
import time

import pytest
from forks import exit_code

from funlora_hf.continual.termination import Terminated, Termination


def test_outside_of_steps_it_stops_at_once():
    expected = r"SIGTERM: stopped outside the steps of a phase.*--resume_from_checkpoint latest"
    with pytest.raises(Terminated, match=expected), Termination():
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal was not heard")


def test_steps_see_it_and_stop_when_they_can():
    with Termination() as termination, termination.deferred():
        assert not termination.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert termination.requested


def test_a_second_one_changes_nothing():
    """As a launcher and a batch system may both send it."""
    with pytest.raises(Terminated), Termination():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned = True
    assert cleaned


def test_it_is_not_an_error_that_others_catch():
    with Termination(), pytest.raises(Terminated) as raised:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception:
            pytest.fail("caught by somebody who expects errors")
    assert raised.value.code == 143


def test_afterwards_the_signal_is_whose_it_was():
    before = signal.getsignal(signal.SIGTERM)
    with Termination():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_the_process_ignores_stays_ignored(number):
    """As a shell's script has it for what it starts in the background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Termination() as termination:
            os.kill(os.getpid(), number)
            assert not termination.requested
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_process_that_does_not_stop_is_ended():
    """Steps that take too long, or a collective that waits for a process that is gone."""

    def late():
        with Termination(grace=0.2) as termination, termination.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)

    assert exit_code(late) == 143


def test_a_process_that_stops_in_time_is_left_alone():
    def in_time():
        try:
            with Termination(grace=0.2):
                os.kill(os.getpid(), signal.SIGTERM)
        except Terminated:
            time.sleep(0.5)
            sys.exit(7)

    assert exit_code(in_time) == 7


def test_ctrl_c_stops_likewise_with_its_own_code():
    with (
        pytest.raises(
            Terminated, match=r"SIGINT: stopped outside the steps.*--resume_from_checkpoint latest"
        ) as raised,
        Termination(),
    ):
        os.kill(os.getpid(), signal.SIGINT)
    assert raised.value.code == 130
    with Termination() as termination, termination.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # a terminal and a launcher pass on the same one
        assert termination.requested
        assert termination.error("after step 3").code == 130


def test_a_second_ctrl_c_ends_the_process_at_once():
    def pressed_twice():
        with Termination() as termination, termination.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.2)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(600)

    assert exit_code(pressed_twice) == 130


def test_sigterm_after_ctrl_c_still_ends_in_time():
    def interrupted():
        with Termination(grace=0.2) as termination, termination.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)

    assert exit_code(interrupted) == 143
