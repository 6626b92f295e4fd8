"""Interrupts are held back until it is safe, and a second one comes through."""

import os
import signal
import threading

import pytest

from cytosae_pipeline.runtime.interrupts import HeldInterrupts


@pytest.fixture(autouse=True)
def _signals_are_heard():
    """A test run in a script's background inherits an ignored Ctrl-C."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_is_remembered_and_raised_where_it_is_safe(number):
    before = signal.getsignal(number)
    with HeldInterrupts() as interrupts:
        interrupts.check()
        os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
        assert not interrupts.torn
    assert signal.getsignal(number) is before


def test_the_second_comes_through_at_once():
    with HeldInterrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.torn


def test_other_threads_are_left_alone():
    errors = []

    def run():
        try:
            with HeldInterrupts() as interrupts:
                interrupts.check()
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not errors


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with HeldInterrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        interrupts.check()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
