"""Keep finished stages of a run on disk, each with its inputs, so that a killed run can resume.

A stage is one file of a folder, with a checksum. A stage that a killed run has finished is read from its file if its
inputs are the same and the file is not damaged; else the reason is printed, the stage is done again and the file is
replaced. A run that ends clears the folder.
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
"""Inputs of a stage, by names that users know; plain types."""

_ENDING = ".stage"
"""Ending of the files, which are safetensors inside: weights in a folder that a user names must survive clearing it."""
_UNSAFE = r"[^\w.]+"
"""Characters that become a hyphen in file names of stages."""
_SHOWN = 30
"""Longest input that is shown when it has changed; hashes and lists are longer."""


@dataclass(frozen=True)
class StageResult:
    """Result of a stage.

    Args:
        facts: plain types, for JSON.
        tensors: tensors by name, on the CPU.
    """

    facts: Any = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class StageCache:
    """The stages of a run in a folder, which every rank may read and rank 0 writes; without a folder none are kept.

    In a process group every rank must make the same calls; a stage counts as finished if every rank sees its file.

    Args:
        folder: folder of the stages; it is created when the first one is written.
        device: device that the process group reduces on.
        part: part of the run, the prefix of its stages' names.
        inputs: inputs of all stages.
        origin: where finished stages come from, in part of a sentence.
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
        """Whether stages are kept, because there is a folder."""
        return self.folder is not None

    def of(self, part: str, inputs: Inputs) -> "StageCache":
        """Return the stages of one part of the run, which all depend on further inputs."""
        name = f"{self._part}{part} " if part else self._part
        return StageCache(self.folder, self.device, name, {**self._inputs, **inputs}, self._origin)

    def recall(self, name: str, inputs: Inputs, do: Callable[[], StageResult]) -> StageResult:
        """Read a finished stage, or do it and keep the result.

        Args:
            name: name of the stage, in a sentence.
            inputs: inputs of the stage.
            do: function that does it.
        """
        if self.find([name], inputs, name):
            return self.read(name)
        stage = do()
        self.write(name, inputs, stage)
        return stage

    def find(self, names: Sequence[str], inputs: Inputs, group: str) -> list[str]:
        """Find which stages are finished with the same inputs; print them, and why others are done again.

        Args:
            names: names of the stages.
            inputs: inputs of all of them.
            group: name of all of them together, in a sentence.
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
                console.print(f"{self._part}{group}: {part} already done, {self._origin}")
            if reasons:
                console.print(f"{self._part}{group}: done again, because {reasons[0]}")
        return found

    def read(self, name: str) -> StageResult:
        """Read a stage that `find` has returned."""
        tensors, metadata = read_tensors(self._locate(name))
        return StageResult(json.loads(metadata["facts"]), tensors)

    def write(self, name: str, inputs: Inputs, stage: StageResult) -> None:
        """Write a stage, atomically; if the folder cannot be written, print that instead of raising an error."""
        if self.folder is None or get_rank_and_world_size()[0] != 0:
            return
        metadata = {"inputs": json.dumps(self._describe(inputs)), "facts": json.dumps(stage.facts)}
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in stage.tensors.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._locate(name), pack_tensors(tensors, metadata))
        except OSError as error:  # the run works without the file
            console.print(f"{name} is not kept for a resumed run: {first_line(error)}")

    def forget(self, *names: str) -> None:
        """Remove stages that are no longer needed, by the beginnings of their names."""
        if self.folder is None or get_rank_and_world_size()[0] != 0:
            return
        for name in names:
            for path in self.folder.glob(f"*{re.sub(_UNSAFE, '-', name)}*{_ENDING}"):
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all stages, once they are no longer needed."""
        if self.folder is None or get_rank_and_world_size()[0] != 0 or not self.folder.is_dir():
            return
        for pattern in (f"*{_ENDING}", f".*{_ENDING}.*"):  # also unfinished files of a killed run
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _locate(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / (re.sub(_UNSAFE, "-", self._part + name) + _ENDING)

    def _describe(self, inputs: Inputs) -> dict[str, Any]:
        """Return all inputs of a stage, as JSON returns them."""
        versions = {f"version of {name}": version(name) for name in ("gqaprune", "torch", "transformers")}
        processes = {"number of processes": get_rank_and_world_size()[1]}
        described: dict[str, Any] = json.loads(json.dumps({**self._inputs, **inputs, **versions, **processes}))
        return described

    def _find_difference(self, name: str, wanted: Inputs) -> str | None:
        """Return why a stage on disk cannot be used; empty if it can, None if there is none."""
        try:
            return describe_change(json.loads(read_tensors(self._locate(name))[1]["inputs"]), wanted)
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return "its file is damaged"


def describe_change(old: Inputs, new: Inputs) -> str:
    """Describe the differences of two sets of inputs, in part of a sentence."""
    changes = []
    for name in {**old, **new}:
        was, now = (json.dumps(inputs.get(name)) for inputs in (old, new))
        if was != now:
            is_long = max(len(was), len(now)) > _SHOWN
            changes.append(f"{name} has changed" if is_long else f"{name} was {was}, is {now}")
    return ", ".join(changes)
