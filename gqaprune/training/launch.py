"""Share decisions of rank 0 with the other ranks before they have a process group."""

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

_DECISION = "GQAPRUNE_DECISION"
"""Environment variable in which rank 0 passes its decision to the ranks that it starts."""
_LAUNCHER = "GQAPRUNE_LAUNCHER"
"""Environment variable with the process id of rank 0, if Lightning starts the others from it."""
_POLL = 0.5
"""Seconds between checks whether rank 0 is alive."""
_GRACE = 6.0
"""Seconds in which a rank that is connected to rank 0 can clean up and end by itself."""
_PATIENCE = timedelta(minutes=5)
"""How long ranks that a launcher starts beside rank 0 wait for its decision."""

_stores: list[Store] = []
"""Kept, so that the process group can use the same port."""


def decide_on_rank_0(decide: Callable[[bool], str]) -> str:
    """Let rank 0 decide for all ranks.

    Ranks that Lightning starts from rank 0 read its decision from their environment. Ranks that `torchrun` or SLURM
    start together share it through the store of their process group. Without either, each rank decides.

    Args:
        decide: function that makes the decision; its argument says whether this is rank 0.
    """
    environment = next((one() for one in (TorchElasticEnvironment, SLURMEnvironment) if one.detect()), None)
    if environment is not None and (ranks := environment.world_size()) > 1:
        rank = environment.global_rank()
        address = f"tcp://{environment.main_address}:{environment.main_port}"
        store, _, _ = next(rendezvous(address, rank=rank, world_size=ranks, timeout=_PATIENCE))
        _stores.append(store)
        if rank == 0:
            store.set(_DECISION, decide(True))
        return str(store.get(_DECISION).decode())
    is_rank_0 = all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "NODE_RANK"))
    if is_rank_0 or _DECISION not in os.environ:
        os.environ[_DECISION] = decide(is_rank_0)
    return os.environ[_DECISION]


def end_with_launcher() -> None:
    """End this rank if the process that started it is killed; before ranks are connected nothing else detects that.

    A process that is not a rank itself is recorded as the launcher of the ranks that it may start.
    """
    if "LOCAL_RANK" not in os.environ:
        os.environ[_LAUNCHER] = str(os.getpid())
        return
    launcher = int(os.environ.get(_LAUNCHER, 0))
    if launcher in (0, os.getpid()) or (os.getppid() != launcher and Path(f"/proc/{launcher}").exists()):
        return  # started by another program

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_POLL)
        time.sleep(_GRACE)
        os.write(2, b"gqaprune: error: rank 0 has ended, and the other ranks with it: it was killed\n")
        os._exit(1)

    threading.Thread(target=watch, name="launcher", daemon=True).start()
