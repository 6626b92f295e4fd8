"""Ranks that are threads of one process: the same calls as between processes, without starting any."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cytosae.sae.world import World
from tests.support.patience import patience


class _Meeting:
    """Where the threads exchange values."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.values: list[Any] = [None] * size


class ThreadWorld(World):
    """One of several threads."""

    def __init__(self, rank: int, size: int, meeting: _Meeting) -> None:
        self.rank, self.size, self._meeting = rank, size, meeting

    def _exchange(self, value: Any) -> list[Any]:
        self._meeting.values[self.rank] = value
        self._meeting.barrier.wait(patience())
        found = list(self._meeting.values)
        self._meeting.barrier.wait(patience())
        return found

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        first, *further = self._exchange(tensor.detach().clone())
        total = first.clone()
        for part in further:
            total += part
        return total

    def total(self, term: torch.Tensor) -> torch.Tensor:
        return _Total.apply(term, self)

    def gather(self, tensor: torch.Tensor, *, only_first: bool = False) -> list[torch.Tensor]:
        found = self._exchange(tensor.detach().clone())
        return [] if only_first and self.rank else found

    def gather_texts(self, text: str) -> list[str]:
        return self._exchange(text)

    def broadcast_(self, tensor: torch.Tensor) -> None:
        first = self._exchange(tensor.detach().clone())[0]
        with torch.no_grad():
            tensor.copy_(first)

    def gather_numbers(self, numbers: Sequence[int]) -> list[list[int]]:
        return self._exchange(list(numbers))


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, term, world):
        return world.sum(term)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def run_ranks(size: int, work: Callable[[World], Any]) -> list[Any]:
    """What `work` returns on every rank, each a thread; an error of any rank is raised."""
    meeting, results, errors = _Meeting(size), [None] * size, []

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadWorld(rank, size, meeting))
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    real = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    if errors:
        raise (real or errors)[0]
    return results
