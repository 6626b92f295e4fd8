"""What the processes of one training do together: sums, gathered tensors, agreements. A plain run is a world of one.

Every rank calls the same functions in the same order with tensors of the same shapes, unless a docstring allows others.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch


class RankLostError(RuntimeError):
    """Another process of the training has ended, so that nothing can be computed together any more."""


class World:
    """A world of one process: everything is there already."""

    rank = 0
    """Number of this process, from 0."""
    size = 1
    """Number of processes."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, added in the order of their numbers: the same bits on every rank."""
        return tensor

    def total(self, term: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks of a term of the loss, whose gradient reaches this rank's own part."""
        return term

    def gather(self, tensor: torch.Tensor, *, only_first: bool = False) -> list[torch.Tensor]:
        """Every rank's tensor, in the order of their numbers; the first dimension may differ between ranks.

        Args:
            tensor: This rank's.
            only_first: Whether rank 0 alone gets them, and others an empty list.
        """
        return [tensor]

    def broadcast_(self, tensor: torch.Tensor) -> None:
        """Copy rank 0's tensor to all, in place."""

    def gather_numbers(self, numbers: Sequence[int]) -> list[list[int]]:
        """Every rank's numbers, of which all have equally many."""
        return [list(numbers)]

    def add(self, number: int) -> int:
        """The sum of a number over all ranks."""
        return sum(one for (one,) in self.gather_numbers([number]))

    def gather_texts(self, text: str) -> list[str]:
        """Every rank's text."""
        return [text]

    def share(self, n: int) -> slice:
        """This rank's part of `n` things: consecutive, and equal to within one."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)


ALONE = World()
"""The world of a plain run."""


class RankWorld(World):
    """The processes of torch's default process group, which exists already.

    torch.distributed is imported here alone, so that a plain run does not pay for it.

    Raises:
        RankLostError: By every method, if another process has ended.
    """

    def __init__(self) -> None:
        import torch.distributed as dist

        self._dist: Any = dist
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `World`. Each rank adds one part up, so that twice the tensor is sent, however many ranks there are."""
        flat = tensor.detach().flatten()
        length = -(-len(flat) // self.size)
        if not length:
            return tensor
        sent = flat.new_zeros((self.size, length))
        sent.view(-1)[: len(flat)] = flat
        received = torch.empty_like(sent)
        with _peers():
            self._dist.all_to_all_single(received, sent)
        total = received[0].clone()
        for part in received[1:]:
            total += part
        with _peers():
            self._dist.all_gather(list(sent), total)
        return sent.view(-1)[: len(flat)].view(tensor.shape)

    def total(self, term: torch.Tensor) -> torch.Tensor:
        """See `World`."""
        summed: torch.Tensor = _Total.apply(term, self)  # type: ignore[no-untyped-call]
        return summed

    def gather(self, tensor: torch.Tensor, *, only_first: bool = False) -> list[torch.Tensor]:
        """See `World`."""
        lengths = [length for (length,) in self.gather_numbers([len(tensor)])]
        longest = max(lengths)
        if not longest:
            return [tensor] * self.size
        own = tensor.new_zeros((longest, *tensor.shape[1:]))
        own[: len(tensor)] = tensor.detach()
        gets = not (only_first and self.rank)
        parts = [torch.empty_like(own) for _ in lengths] if gets else []
        with _peers():
            if only_first:
                self._dist.gather(own, parts or None, dst=0)
            else:
                self._dist.all_gather(parts, own)
        return [part[:length] for part, length in zip(parts, lengths, strict=True)] if gets else []

    def broadcast_(self, tensor: torch.Tensor) -> None:
        """See `World`."""
        sent = tensor.detach().clone(memory_format=torch.contiguous_format)
        with _peers():
            self._dist.broadcast(sent, src=0)
        with torch.no_grad():
            tensor.copy_(sent)

    def gather_numbers(self, numbers: Sequence[int]) -> list[list[int]]:
        """See `World`. They are sent between hosts' memories, whatever the device: no GPU is waited for."""
        own = torch.tensor(list(numbers), dtype=torch.int64)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        with _peers():
            self._dist.all_gather(parts, own)
        return [part.tolist() for part in parts]

    def gather_texts(self, text: str) -> list[str]:
        """See `World`."""
        encoded = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
        return [bytes(part.tolist()).decode().strip("\0") for part in self.gather(encoded)]


class _Total(torch.autograd.Function):
    """A sum over ranks in the forward pass, and the own part's gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, term: torch.Tensor, world: World) -> torch.Tensor:  # noqa: ANN401
        """The sum."""
        return world.sum(term.reshape(1)).reshape(())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        """The gradient, unchanged."""
        return grads[0], None


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """Say that another process has ended, where torch says that a connection was closed."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"connect|peer|remote|socket", str(error), re.IGNORECASE):
            raise
        raise RankLostError(
            "another process of this training has ended; what it printed, if anything, says why. Run the same torchrun "
            "command again to resume from the last saved state, or give torchrun --max-restarts 3"
        ) from error
