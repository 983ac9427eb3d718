"""The ranks of a run hear at once when one of them ends, whatever they wait for: collectives hear late, or never.

Every rank keeps a connection to rank 0, which passes on what it hears. A rank that fails says why; one that is killed
says nothing, and the system closes its connection. What is heard is raised in the main thread; where that does not
return from a collective, the process ends without it.
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
"""Seconds between two looks at child processes."""
_OWN_END = 1.0
"""Seconds that a rank has to end by itself, for the same reason as the one that it heard of."""
_PATIENCE = 3.0
"""Seconds that the main thread then has to leave what it waits for."""
_CHILDREN = 8.0
"""Seconds that child processes have to end, after all of that."""


_HELLO = 64
"""Bytes that a rank sends first: a key that it has from rank 0, and its number."""
_STOPPED = "stopped by a signal"


@dataclass(frozen=True)
class RankEnd:
    """How a rank ended.

    Args:
        rank: which one.
        code: exit code; 0 where it has done its work.
        reason: in words.
    """

    rank: int
    code: int
    reason: str = ""

    def make_error(self) -> BaseException:
        """What other ranks raise."""
        return Stopped(self.code - 128) if self.reason == _STOPPED else RankEndedError(self)


class RankEndedError(RuntimeError):
    """Another rank of the run has ended, so that this one cannot go on."""

    def __init__(self, end: RankEnd) -> None:
        super().__init__(f"rank {end.rank} has ended, and the other ranks with it: {end.reason}")
        self.code = end.code


class Ranks:
    """Listens to the other ranks from `start` to `close`.

    Attributes:
        heard: how the first rank ended that did not end well; None as long as there is none.
    """

    def __init__(self) -> None:
        self.heard: RankEnd | None = None
        self.rank = 0
        self._children: Sequence[subprocess.Popen[Any]] = ()
        self._selector = selectors.DefaultSelector()
        self._peers: dict[socket.socket, int] = {}
        self._has_heard, self._is_closed = threading.Event(), threading.Event()

    def start(self, children: Sequence["subprocess.Popen[Any]"] = ()) -> None:
        """Begin to listen; to child processes that a launcher made, too, which end with this one."""
        self._children = children
        if children:
            atexit.register(self._end_children)
        threading.Thread(target=self._listen, name="ranks", daemon=True).start()

    def connect(self, rank: int, world_size: int, host: str, share: Callable[[str], str]) -> None:
        """Connect to rank 0. Every rank calls it.

        Args:
            rank: of this process.
            world_size: number of ranks.
            host: of rank 0, as the others know it.
            share: gives every rank what rank 0 gave it.
        """
        self.rank = rank
        server = _open_server(host, world_size) if rank == 0 else None
        port, _, key = share("" if server is None else f"{server.getsockname()[1]} {secrets.token_hex(16)}").partition(
            " "
        )
        if server is not None:
            self._selector.register(server, selectors.EVENT_READ, lambda: self._accept(server, key))
            return
        with suppress(OSError):  # behind a firewall collectives alone say it
            peer = socket.create_connection((host, int(port)), _PATIENCE)
            peer.sendall(f"{key} {rank}".ljust(_HELLO).encode())
            self._add(peer, 0)

    def tell(self, code: int, reason: str) -> None:
        """Let the other ranks end with this one."""
        self._is_closed.set()
        if self.heard is None:
            self._send(asdict(RankEnd(self.rank, code, reason)))

    def tell_stopped(self, number: int) -> None:
        """Let the other ranks stop with this one, for its signal."""
        self.tell(128 + number, _STOPPED)

    def close(self) -> None:
        """Stop listening, after work that is done."""
        self.tell(0, "")
        atexit.unregister(self._end_children)
        for peer in self._peers:
            peer.close()

    def wait(self) -> RankEnd | None:
        """Wait a moment to hear whether another rank is why a collective failed."""
        self._has_heard.wait(_OWN_END)
        return self.heard

    def _accept(self, server: socket.socket, key: str) -> None:
        peer, _ = server.accept()
        peer.settimeout(_PATIENCE)
        try:
            own_key, _, rank = peer.recv(_HELLO, socket.MSG_WAITALL).decode().partition(" ")
            if hmac.compare_digest(own_key, key):
                return self._add(peer, int(rank))
        except (OSError, ValueError):
            pass
        peer.close()  # of another program

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
        self._hear(end or RankEnd(rank, 1, "it was killed, or its machine is gone"))

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
        """End this process for another rank's sake, by its main thread if that can."""
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
        """Wait for child processes, which have heard that they are to end; kill those that do not."""
        until = time.monotonic() + _CHILDREN
        for child in self._children:
            if not self._peers:  # they could not hear it
                child.terminate()
            try:
                child.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()


def _open_server(host: str, world_size: int) -> socket.socket:
    """A port for the other ranks, which other machines see only where there are ranks on some."""
    if host == "localhost" or host.startswith("127."):
        return socket.create_server((host, 0), backlog=world_size)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=world_size, dualstack_ipv6=both)


def _describe_exit(rank: int, code: int) -> RankEnd:
    """How a child process ended that said nothing to the other ranks."""
    reason = "its own message says why" if code > 0 else f"signal {-code} killed it"
    return RankEnd(rank, code if code > 0 else 128 - code, reason)
