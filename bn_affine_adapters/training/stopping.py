"""What asks a training run to end early: a signal, Ctrl-C, or the death of its launcher."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

AGAIN = 1.0  # s: launchers pass a signal on that the process group has had already; only a later one is a second one
LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # what accelerate launch and torchrun set


class Stopping:
    """Notes SIGTERM and Ctrl-C while its block runs, for the training loop to ask; a second one ends the process.

    Attributes:
        number: the signal that was noted; 0: none.
    """

    def __init__(self) -> None:
        """Note who started this process."""
        self.number, self._at, self._before = 0, 0.0, {}  # type: ignore[var-annotated]
        launched = any(name in os.environ for name in LAUNCHERS)
        self._launcher = os.getppid() if launched else None

    def __enter__(self) -> "Stopping":
        """Note signals from now on."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # ignored by a shell for its background jobs
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        """Leave signals to who had them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if not self.number:
            self.number, self._at = number, time.monotonic()
        elif time.monotonic() - self._at >= AGAIN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def asked(self) -> int:
        """Return the signal to end by, 0 for none; SIGTERM if the launcher of this process has died."""
        if not self.number and self._launcher is not None and os.getppid() != self._launcher:
            self.number = signal.SIGTERM
        return self.number

    @property
    def reason(self) -> str:
        """What happened, in words."""
        orphan = self._launcher is not None and os.getppid() != self._launcher
        name = signal.Signals(self.number or signal.SIGTERM).name
        return "its launcher has ended" if orphan else f"stopped by {name}"
