"""Tell all ranks of a run at once when one of them ends; collectives notice that late, or never.

Every rank keeps a connection to rank 0, which passes messages on. A rank that fails sends the reason; if a rank is
killed, the system closes its connection. The error is raised in the main thread; if that does not return from a
collective, the process ends without it.
"""

import atexit
import hmac
import json
import os
import secrets
import selectors
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from gqaprune.common.stop_signals import Stopped, stop_signals

_POLL = 0.5
"""Seconds between checks of child processes."""
_OWN_END = 1.0
"""Seconds in which a rank may end by itself, for the same reason as the other rank."""
_PATIENCE = 3.0
"""Seconds in which the main thread then has to leave a collective."""
_CHILDREN = 8.0
"""Seconds in which child processes have to end after that."""


_HELLO = 64
"""Bytes of a rank's first message: a key from rank 0, and its number."""
_STOPPED = "stopped by a signal"


@dataclass(frozen=True)
class RankEnd:
    """How a rank ended.

    Args:
        rank: number of the rank.
        code: exit code; 0 if it has finished its work.
        reason: reason in words.
    """

    rank: int
    code: int
    reason: str = ""

    def make_error(self) -> BaseException:
        """Make the error that other ranks raise."""
        return Stopped(self.code - 128) if self.reason == _STOPPED else RankEndedError(self)


class RankEndedError(RuntimeError):
    """Another rank of the run has ended, so this one cannot continue."""

    def __init__(self, end: RankEnd) -> None:
        super().__init__(f"rank {end.rank} has ended, and the other ranks with it: {end.reason}")
        self.code = end.code


class Ranks:
    """Listens to the other ranks from `start` to `close`.

    Attributes:
        heard: end of the first rank that failed; None if none has failed.
    """

    def __init__(self) -> None:
        self.heard: RankEnd | None = None
        self.rank = 0
        self._children: Sequence[subprocess.Popen[Any]] = ()
        self._selector = selectors.DefaultSelector()
        self._peers: dict[socket.socket, int] = {}
        self._has_heard, self._is_closed = threading.Event(), threading.Event()

    def start(self, children: Sequence["subprocess.Popen[Any]"] = ()) -> None:
        """Begin to listen, also to a launcher's child processes, which end with this one."""
        self._children = children
        if children:
            atexit.register(self._end_children)
        threading.Thread(target=self._listen, name="ranks", daemon=True).start()

    def connect(self, rank: int, world_size: int, host: str, share: Callable[[str], str]) -> None:
        """Connect to rank 0. Every rank calls it.

        Args:
            rank: rank of this process.
            world_size: number of ranks.
            host: address of rank 0 for the other ranks.
            share: broadcasts a string from rank 0.
        """
        self.rank = rank
        server = _open_server(host, world_size) if rank == 0 else None
        port, _, key = share("" if server is None else f"{server.getsockname()[1]} {secrets.token_hex(16)}").partition(
            " "
        )
        if server is not None:
            self._selector.register(server, selectors.EVENT_READ, lambda: self._accept(server, key))
            return
        with suppress(OSError):  # behind a firewall, only collectives notice that a rank has ended
            peer = socket.create_connection((host, int(port)), _PATIENCE)
            peer.sendall(f"{key} {rank}".ljust(_HELLO).encode())
            self._add(peer, 0)

    def tell(self, code: int, reason: str) -> None:
        """Tell the other ranks to end with this one."""
        self._is_closed.set()
        if self.heard is None:
            self._send(asdict(RankEnd(self.rank, code, reason)))

    def tell_stopped(self, number: int) -> None:
        """Tell the other ranks to stop with this one, because of its signal."""
        self.tell(128 + number, _STOPPED)

    def close(self) -> None:
        """Stop listening after the work is finished."""
        self.tell(0, "")
        atexit.unregister(self._end_children)
        for peer in self._peers:
            peer.close()

    def wait(self) -> RankEnd | None:
        """Wait a moment for a message that another rank's end made a collective fail."""
        self._has_heard.wait(_OWN_END)
        return self.heard

    def _accept(self, server: socket.socket, key: str) -> None:
        peer, _ = server.accept()
        peer.settimeout(_PATIENCE)
        try:
            peer_key, _, rank = peer.recv(_HELLO, socket.MSG_WAITALL).decode().partition(" ")
            if hmac.compare_digest(peer_key, key):
                return self._add(peer, int(rank))
        except (OSError, ValueError):
            pass
        peer.close()  # another program connected

    def _add(self, peer: socket.socket, rank: int) -> None:
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._peers[peer] = rank
        lines = peer.makefile()
        self._selector.register(peer, selectors.EVENT_READ, lambda: self._read(peer, lines))

    def _read(self, peer: socket.socket, lines: Any) -> None:
        try:
            line = lines.readline()
            end = RankEnd(**json.loads(line)) if line else None
        except (OSError, ValueError, TypeError):
            end = None
        self._selector.unregister(peer)
        rank = self._peers.pop(peer)
        self._hear(end or RankEnd(rank, 1, "it was killed, or its machine cannot be reached"))

    def _send(self, message: dict[str, Any]) -> None:
        for peer in list(self._peers):
            with suppress(OSError):
                peer.sendall((json.dumps(message) + "\n").encode())

    def _listen(self) -> None:
        while self.heard is None and not self._is_closed.is_set():
            for key, _ in self._selector.select(_POLL):
                key.data()
            for number, child in enumerate(self._children, self.rank + 1):
                if code := child.poll():
                    self._hear(_describe_exit(number, code))
        if self.heard is not None:
            self._end()

    def _hear(self, end: RankEnd) -> None:
        if end.code == 0 or self.heard is not None or self._is_closed.is_set():
            return
        self.heard = end
        self._send(asdict(end))  # before anything can end this process
        self._has_heard.set()

    def _end(self) -> None:
        """End this process because another rank has ended, by its main thread if possible."""
        assert self.heard is not None
        if self._is_closed.wait(_OWN_END):
            return
        error = self.heard.make_error()
        stop_signals.interrupt(error)
        if self._is_closed.wait(_PATIENCE):
            return
        os.write(2, f"gqaprune: {'stopped' if isinstance(error, Stopped) else f'error: {error}'}\n".encode())
        self._end_children()
        os._exit(self.heard.code)

    def _end_children(self) -> None:
        """Wait until child processes end, which have been told to; kill those that do not."""
        until = time.monotonic() + _CHILDREN
        for child in self._children:
            if not self._peers:  # they could not be told
                child.terminate()
            try:
                child.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()


def _open_server(host: str, world_size: int) -> socket.socket:
    """Open a port for the other ranks, which is only visible to other machines if the host is not local."""
    if host == "localhost" or host.startswith("127."):
        return socket.create_server((host, 0), backlog=world_size)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=world_size, dualstack_ipv6=both)


def _describe_exit(rank: int, code: int) -> RankEnd:
    """Describe the end of a child process that sent no message."""
    reason = "see its own error message" if code > 0 else f"signal {-code} killed it"
    return RankEnd(rank, code if code > 0 else 128 - code, reason)
