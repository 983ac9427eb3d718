"""Keep finished stages of a run on disk, each with what it depends on, so that a killed run resumes where it was.

A stage is one file of a folder, with a checksum. What a killed run has finished is read back if it depends on the same
things and is as it was written; else what changed is said, it is done again, and the file is replaced. A run that ends
clears the folder.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from gqaprune.common.atomic_files import write_atomically
from gqaprune.common.checked_tensors import pack_tensors, read_tensors
from gqaprune.common.console import console
from gqaprune.common.distributed import get_rank_and_world_size, sum_across_ranks
from gqaprune.common.errors import first_line

Inputs = Mapping[str, Any]
"""What a stage depends on, by the name that a user knows it by; plain types."""

_ENDING = ".stage"
"""Of files that are safetensors inside: a folder that a user names may hold weights, which clearing it leaves alone."""
_UNSAFE = r"[^\w.]+"
"""What file names of stages have a hyphen for."""
_SHOWN = 30
"""Characters of an input that are shown at most when it has changed: hashes and lists are not."""


@dataclass(frozen=True)
class StageResult:
    """What a stage gave.

    Args:
        facts: plain types, as JSON holds them.
        tensors: by name, on the CPU.
    """

    facts: Any = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class StageCache:
    """The stages of a run in a folder, which every rank may read and rank 0 writes; nothing is kept without one.

    In a process group every rank has to make the same calls; a stage is there if every rank sees it.

    Args:
        folder: where they are; it is made when the first one is written.
        device: that the process group reduces on.
        part: of the run, what the names of its stages begin with.
        inputs: what all of them depend on.
        origin: where stages that are there come from, in part of a sentence.
    """

    def __init__(
        self,
        folder: Path | None = None,
        device: torch.device | str = "cpu",
        part: str = "",
        inputs: Inputs = MappingProxyType({}),
        origin: str = "from a run that did not end",
    ) -> None:
        self.folder, self.device, self._part, self._inputs = folder, device, part, inputs
        self._origin = origin

    @property
    def are_kept(self) -> bool:
        """Whether there is a folder."""
        return self.folder is not None

    def of(self, part: str, inputs: Inputs) -> "StageCache":
        """The stages of one part of the run, all of which depend on some inputs."""
        name = f"{self._part}{part} " if part else self._part
        return StageCache(self.folder, self.device, name, {**self._inputs, **inputs}, self._origin)

    def recall(self, name: str, inputs: Inputs, do: Callable[[], StageResult]) -> StageResult:
        """Read a stage back, or do and keep it.

        Args:
            name: of the stage, in a sentence.
            inputs: what it depends on.
            do: does it.
        """
        if self.find([name], inputs, name):
            return self.read(name)
        stage = do()
        self.write(name, inputs, stage)
        return stage

    def find(self, names: Sequence[str], inputs: Inputs, group: str) -> list[str]:
        """Which of some stages are there with the same inputs; says so, and what is wrong with others that are there.

        Args:
            names: of the stages.
            inputs: what all of them depend on.
            group: what they are together, in a sentence.
        """
        if self.folder is None:
            return []
        wanted = self._describe(inputs)
        differences = [self._find_difference(name, wanted) for name in names]
        is_same = [difference == "" for difference in differences]
        are_there = torch.tensor(is_same, dtype=torch.float32, device=self.device)
        are_there = sum_across_ranks({"there": are_there})["there"] == get_rank_and_world_size()[1]
        found = [name for name, is_there in zip(names, are_there.tolist(), strict=True) if is_there]
        reasons = [difference for difference in differences if difference]
        if get_rank_and_world_size()[0] == 0:
            if found:
                part = f"{len(found)} of {len(names)} are" if len(names) > 1 else "is"
                console.print(f"{self._part}{group}: {part} there already, {self._origin}")
            if reasons:
                console.print(f"{self._part}{group}: done again, for {reasons[0]}")
        return found

    def read(self, name: str) -> StageResult:
        """A stage that `find` has found."""
        tensors, metadata = read_tensors(self._locate(name))
        return StageResult(json.loads(metadata["facts"]), tensors)

    def write(self, name: str, inputs: Inputs, stage: StageResult) -> None:
        """Keep a stage, whole or not at all; a folder that cannot be written is said, and no error."""
        if self.folder is None or get_rank_and_world_size()[0] != 0:
            return
        metadata = {"inputs": json.dumps(self._describe(inputs)), "facts": json.dumps(stage.facts)}
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in stage.tensors.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._locate(name), pack_tensors(tensors, metadata))
        except OSError as error:  # the run itself needs no file
            console.print(f"{name} is not kept for a resumed run: {first_line(error)}")

    def forget(self, *names: str) -> None:
        """Remove the stages whose names begin like one of some, which nothing needs any more."""
        if self.folder is None or get_rank_and_world_size()[0] != 0:
            return
        for name in names:
            for path in self.folder.glob(f"*{re.sub(_UNSAFE, '-', name)}*{_ENDING}"):
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all stages, once they are no longer needed."""
        if self.folder is None or get_rank_and_world_size()[0] != 0 or not self.folder.is_dir():
            return
        for pattern in (f"*{_ENDING}", f".*{_ENDING}.*"):  # what a killed run was writing, too
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _locate(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / (re.sub(_UNSAFE, "-", self._part + name) + _ENDING)

    def _describe(self, inputs: Inputs) -> dict[str, Any]:
        """All that a stage depends on, as JSON gives it back."""
        versions = {f"version of {name}": version(name) for name in ("gqaprune", "torch", "transformers")}
        processes = {"number of processes": get_rank_and_world_size()[1]}
        described: dict[str, Any] = json.loads(json.dumps({**self._inputs, **inputs, **versions, **processes}))
        return described

    def _find_difference(self, name: str, wanted: Inputs) -> str | None:
        """Why a stage on disk is not the one that is wanted, empty where it is; null where there is none."""
        try:
            return describe_change(json.loads(read_tensors(self._locate(name))[1]["inputs"]), wanted)
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return "its file is damaged"


def describe_change(old: Inputs, new: Inputs) -> str:
    """What differs between two sets of inputs, in part of a sentence."""
    changes = []
    for name in {**old, **new}:
        was, now = (json.dumps(inputs.get(name)) for inputs in (old, new))
        if was != now:
            is_long = max(len(was), len(now)) > _SHOWN
            changes.append(f"{name} is another one" if is_long else f"{name} was {was}, is {now}")
    return ", ".join(changes)
