"""Names of processes that hold beyond a machine, a container and a start: a number alone is soon another program's."""

import hashlib
import os
import socket
from pathlib import Path

_PROC = Path("/proc")


def name_process(number: int | None = None) -> str:
    """A name of a running process of this place, without dots; of this one without a number.

    In a container numbers begin anew at every start, so that on Linux when it began is part of the name.
    """
    number = os.getpid() if number is None else number
    return f"{_name_place()}-{number}-{_read_start(number)}"


def is_running(name: str) -> bool:
    """Whether the process of that name runs in this place."""
    place, number, start = _split(name)
    if place != _name_place() or not number.isdecimal():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return start == _read_start(int(number))


def is_gone(name: str) -> bool:
    """Whether the process of that name ran in this place and no longer does; of other places nothing is known."""
    return _split(name)[0] == _name_place() and not is_running(name)


def _split(name: str) -> tuple[str, str, str]:
    place, _, rest = name.partition("-")
    number, _, start = rest.partition("-")
    return place, number, start


def _name_place() -> str:
    """Where process numbers are counted: this machine, and in it this container."""
    try:
        namespace = os.readlink(_PROC / "self/ns/pid")
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).hexdigest()[:8]


def _read_start(number: int) -> str:
    """When a process began: the machine's start, and clock ticks since; empty where there is no /proc."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text()[:8]
        stat = (_PROC / str(number) / "stat").read_text()
    except OSError:
        return ""
    return f"{boot}{stat.rpartition(')')[2].split()[19]}"  # field 22, counted after the name in brackets
