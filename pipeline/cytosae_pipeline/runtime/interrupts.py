"""Ctrl-C and SIGTERM deferred until stopping is safe."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class HeldInterrupts:
    """While entered, the first Ctrl-C or SIGTERM is only recorded; `check` raises it. A second one raises at once.

    An update of parameters that is interrupted half-way could not be resumed exactly. A signal that is ignored, as
    Ctrl-C is by a background job of a script, stays ignored. Outside the main thread, where Python allows no signal
    handlers, nothing is deferred.

    Args:
        repeated: Whether signals come more than once, as torchrun sends on what the terminal has sent to all processes
            already: then a second one changes nothing, and after the end all are ignored if one came.
    """

    def __init__(self, *, repeated: bool = False) -> None:
        self.pending = False
        """Whether an interrupt was recorded."""
        self._repeated = repeated
        self._previous: dict[signal.Signals, Any] = {}
        self.torn = False
        """Whether an interrupt was raised at an arbitrary point, perhaps in the middle of a step."""

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if self._repeated and self.pending else handler)

    def check(self) -> None:
        """Raise a recorded interrupt.

        Raises:
            KeyboardInterrupt: If one came.
        """
        if self.pending:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.pending and not self._repeated:
            self.torn = True
            raise KeyboardInterrupt
        self.pending = True
