"""Run tasks of lm-evaluation-harness (`lm_eval`, the extra `eval`) on a model in memory."""

import importlib.util
import logging
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gqaprune.common.errors import first_line
from gqaprune.models.tokenizer import find_bos

if TYPE_CHECKING:
    pass

_BATCH_SIZE = 8


@dataclass(frozen=True)
class Score:
    """Result of a task.

    Args:
        value: value of the metric.
        error: its standard error; None if the harness reports none.
    """

    value: float
    error: float | None = None


class Tasks:
    """Tasks whose data is loaded.

    Args:
        names: tasks, groups or tags of the harness.
        limit: largest number of documents of each task; None means all.
        folder: folder with YAML files of further tasks.

    Raises:
        ValueError: if `lm_eval` is not installed, a task does not exist, or its data cannot be read.
    """

    def __init__(self, names: list[str], limit: int | None = None, folder: str | None = None) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise ValueError(f"tasks {','.join(names)} need lm_eval: pip install 'gqaprune[eval]'")
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"tasks_folder {folder} is not a folder: use one with the tasks' YAML files")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        from lm_eval.tasks import TaskManager

        self.names, self.limit = names, limit
        self._manager: TaskManager = TaskManager(include_path=folder, include_defaults=False)
        if not set(names) <= set(self._manager.all_tasks):  # reading the harness's own tasks takes long
            self._manager = TaskManager(include_path=folder)
        if unknown := [name for name in names if name not in self._manager.all_tasks]:
            places = "lm_eval" if folder is None else f"lm_eval or {folder}"
            raise ValueError(f"no task {unknown[0]!r} in {places}: `lm_eval ls tasks` lists all tasks")
        try:
            self._manager.load(names)
        except Exception as error:  # tasks have data and code of other projects
            raise ValueError(
                f"tasks {','.join(names)} cannot be read: {first_line(error)}; run once with a connection to the hub "
                "to fill its cache, or set tasks_folder to tasks with local files"
            ) from None

    @property
    def protocol(self) -> str:
        """A description of how scores are measured."""
        limit = "all documents" if self.limit is None else f"first {self.limit:,} documents"
        return f"tasks: lm_eval {version('lm_eval')}, {limit} of each, ± standard error"

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bos: bool | None = None
    ) -> dict[str, Score]:
        """Measure the scores of a model, by `<task> <metric>`.

        Args:
            model: a causal LM.
            tokenizer: its tokenizer.
            bos: whether each question begins with the beginning-of-text token; None follows the model's family.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        begins = {"add_bos_token": True} if find_bos(tokenizer, bos) is not None else {}  # else the harness decides
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH_SIZE, **begins)
        found = simple_evaluate(
            wrapped, tasks=self.names, limit=self.limit, task_manager=self._manager, log_samples=False
        )
        return {label: score for task, row in found["results"].items() for label, score in _read_scores(task, row)}


def _read_scores(task: str, row: dict[str, Any]) -> list[tuple[str, Score]]:
    """Read scores from a row of the harness's results, with keys `metric,filter` and `metric_stderr,filter`."""
    scores = []
    for key, value in row.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = row.get(f"{metric}_stderr,{kind}")
        label = f"{task} {metric}" if kind == "none" else f"{task} {metric} ({kind})"
        scores.append((label, Score(float(value), float(error) if isinstance(error, (int, float)) else None)))
    return scores
