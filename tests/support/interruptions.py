"""Training that is interrupted at a step, as by Ctrl-C."""

import contextlib
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def interrupted_at_step(number: int) -> Iterator[None]:
    """Let the training step of this number, counted from 1 over all trainers, be interrupted."""
    from cytosae.training.step import TrainStep

    original, calls = TrainStep.step, []

    def interrupted(self, *arguments, **more):
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return original(self, *arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "step", interrupted)
        yield
