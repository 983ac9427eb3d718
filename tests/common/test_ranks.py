"""Ranks that hear of one another's end, in processes of their own."""

import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from gqaprune.common.ranks import RankEnd, RankEndedError, Ranks
from gqaprune.common.stop_signals import Stopped


def join(rank: int, folder: Path, end: str) -> None:
    """Be one of three ranks, of which the last ends in some way; write what is heard."""

    def share(address: str) -> str:
        if rank == 0:
            (folder / "new").write_text(address)
            (folder / "new").rename(folder / "address")
        while not (folder / "address").exists():
            time.sleep(0.01)
        return (folder / "address").read_text()

    ranks = Ranks()
    ranks.start()
    ranks.connect(rank, 3, "127.0.0.1", share)
    if rank == 0:
        port = int((folder / "address").read_text().split()[0])
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b"no key 1".ljust(64))
    (folder / f"ready-{rank}").touch()
    while len(list(folder.glob("ready-*"))) < 3:
        time.sleep(0.01)
    time.sleep(0.5)  # rank 0 accepts in a thread of its own
    if rank == 2 and end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 2 and end == "done":
        ranks.close()
    elif rank == 2:
        ranks.tell(3, end)
    else:
        heard = ranks.wait()
        ranks.tell(0, "")
        (folder / f"heard-{rank}").write_text("" if heard is None else f"{heard.rank} {heard.code} {heard.reason}")
    os._exit(0)


@pytest.mark.parametrize(
    ("end", "heard"),
    [("killed", "2 1 it was killed, or its machine cannot be reached"), ("disk full", "2 3 disk full"), ("done", "")],
)
def test_every_rank_hears_how_one_ends_that_did_not_end_well(
    end: str, heard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gqaprune.common.ranks._OWN_END", 3.0 if heard == "" else 60.0)
    context = multiprocessing.get_context("fork")
    processes: list[Any] = [context.Process(target=join, args=(rank, tmp_path, end)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [(tmp_path / f"heard-{rank}").read_text() for rank in (0, 1)] == [heard, heard]


def test_a_stop_is_raised_as_a_stop_and_a_failure_as_an_error() -> None:
    error = RankEnd(1, 1, "disk full").make_error()
    assert isinstance(error, RankEndedError) and error.code == 1
    assert str(error) == "rank 1 has ended, and the other ranks with it: disk full"
    stop = RankEnd(1, 143, "stopped by a signal").make_error()
    assert isinstance(stop, Stopped) and stop.code == 143
