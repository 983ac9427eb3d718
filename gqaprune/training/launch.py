"""What the ranks of a run do before they have a process group: rank 0 decides, and tells the others."""

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
"""Environment variable in which rank 0 tells the ranks that it starts."""
_LAUNCHER = "GQAPRUNE_LAUNCHER"
"""Environment variable with the process id of rank 0, where Lightning starts the others from it."""
_POLL = 0.5
"""Seconds between two looks at whether rank 0 is there."""
_GRACE = 6.0
"""Seconds for a rank that is connected to rank 0 to end by what it hears, with room to clean up."""
_PATIENCE = timedelta(minutes=5)
"""For rank 0 to decide, which other ranks wait for that a launcher starts beside it."""

_stores: list[Store] = []
"""Kept, so that the process group finds the port as it was."""


def decide_on_rank_0(decide: Callable[[bool], str]) -> str:
    """Let rank 0 decide for all ranks.

    Ranks that Lightning starts from rank 0 have its decision from their environment; `torchrun` and SLURM start all at
    once, which share it through the store of their process group. Where neither is there, each rank decides.

    Args:
        decide: makes the decision; gets whether this is rank 0.
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
    """End this process if the one that started it as a rank is killed: before ranks are connected nothing else tells.

    A process that is no rank yet is noted as the one that may start some, as Lightning does.
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
