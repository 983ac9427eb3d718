"""Handle signals that ask this process to stop: set a flag during training steps, exit at any other time.

A handler never waits for other processes. If the main thread cannot run it because it is inside a kernel or a
collective, another thread receives the signal: a second signal ends the process at once.
"""

import _thread
import os
import signal
import socket
import threading
import time
from types import FrameType
from typing import Any

STOPS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)  # Windows has two of them
)
"""Signals that stop a run, unless the process ignores them or has other handlers for them."""
_SAME = 0.5
"""Seconds within which signals count as one, because launchers forward signals of a whole process group."""
_PATIENCE = 10.0
"""Seconds in which the process has to end after a signal that is not deferred."""


class Stopped(SystemExit):
    """A signal asked this process to end; its exit code is 128 plus the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


class StopSignals:
    """Handles `STOPS` from `install` to `restore`.

    Attributes:
        number: number of the signal that asked to stop; 0 before any did.
    """

    def __init__(self) -> None:
        self.number = 0
        self._defers = False
        self._raised = False
        self._error: BaseException | None = None  # set by another thread, for the main thread to raise
        self._own = 0  # interrupts by `interrupt`, which are not signals from outside
        self._before: dict[signal.Signals, Any] = {}
        self._wakeup_before = -1
        self._bytes: tuple[socket.socket, socket.socket] | None = None

    @property
    def is_installed(self) -> bool:
        """Whether this object handles the signals."""
        return bool(self._before)

    def install(self) -> None:
        """Handle the signals from now on, if this is the main thread; ignored signals stay ignored."""
        if self.is_installed or threading.current_thread() is not threading.main_thread():
            return
        self.number, self._defers, self._raised, self._error, self._own = 0, False, False, None, 0
        self._bytes = socket.socketpair()
        self._bytes[0].settimeout(_SAME)
        self._bytes[1].setblocking(False)
        for number in STOPS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                self._before[number] = signal.signal(number, self._handle)
        self._wakeup_before = signal.set_wakeup_fd(self._bytes[1].fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(self._bytes[0],), name="stop-signals", daemon=True).start()

    def restore(self) -> None:
        """Restore the earlier handlers."""
        if not self.is_installed or self._bytes is None:
            return
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        for end in self._bytes:
            end.close()
        self._bytes = None

    def defer(self) -> None:
        """Make the next signal only set `number`, which is checked at the end of a step."""
        self._defers = self.is_installed

    def stop_at_once(self) -> None:
        """Make the next signal raise `Stopped`; raise it now if a signal was deferred."""
        self._defers = False
        if self.number and not self._raised:
            self._raised = True
            raise Stopped(self.number)

    def leave_to_end(self) -> None:
        """Ignore signals while the process ends, except that repeated ones still end it."""
        self._defers, self._raised = False, True

    def interrupt(self, error: BaseException) -> None:
        """Raise an error in the main thread as soon as it runs Python; called by another thread."""
        if self.is_installed:
            self._error = error
            self._own += 1
            _thread.interrupt_main(next(iter(self._before)))

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._error is not None:
            error, self._error, self._raised = self._error, None, True
            raise error
        self.number = self.number or number
        if not self._defers and not self._raised:
            self._raised = True
            raise Stopped(self.number)

    def _listen(self, received: socket.socket) -> None:
        """Receive signals while the main thread cannot; runs in its own thread."""
        first, since = 0, 0.0
        while self._bytes is not None and received is self._bytes[0]:
            try:
                numbers = [number for number in received.recv(64) if number in self._before]
            except TimeoutError:
                numbers = []
            except OSError:  # closed by `restore`
                return
            ignored = min(self._own, len(numbers))
            self._own -= ignored
            now = time.monotonic()
            if numbers[ignored:] and first and now - since > _SAME:
                os._exit(128 + first)
            if numbers[ignored:] and not first:
                first, since = numbers[-1], now
            if first and not self._defers and now - since > _PATIENCE:
                os._exit(128 + first)


stop_signals = StopSignals()
"""The signals of this process."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=stop_signals.restore)
