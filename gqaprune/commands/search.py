"""`search`: find the split of attention and MLP at which pruning to one budget costs the least perplexity.

The dense model is scored once. Every split is then allocated and measured on validation text: on a copy that is cut
and refitted by least squares, or, without repair, by gates on the dense model, which give the same result as the cut.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.commands.trials import Trial, Trials
from gqaprune.common.distributed import get_rank_and_world_size, is_true_anywhere
from gqaprune.common.stage_cache import StageCache
from gqaprune.data.calibration import CalibrationSet
from gqaprune.evaluation.perplexity import measure_perplexity
from gqaprune.models.architecture import Block, read_geometry
from gqaprune.models.gates import apply_gates
from gqaprune.placement.model_hash import hash_model, hash_tensors
from gqaprune.plan import BlockKey
from gqaprune.planning.allocation import BlockBudget, Budget, Removed, parse_split
from gqaprune.planning.allocation.budget import UnreachableError, find_spared_kind
from gqaprune.planning.config import FREE, PruningConfig
from gqaprune.planning.counts import (
    BoundAllocation,
    bind_allocation,
    measure_curves,
    measure_options,
)
from gqaprune.planning.groups import SwapsConfig
from gqaprune.planning.preflight import check_reachable, check_text
from gqaprune.planning.selection import budget_blocks, make_plan, read_budget, score_blocks, select_blocks
from gqaprune.scoring.damage import make_gates
from gqaprune.scoring.scores import Scores, check_finite_weights
from gqaprune.surgery.compatibility import check_compatibility
from gqaprune.surgery.repair import apply_plan_with_repair

SEARCH_FILE = "search.json"
FIGURE_FILE = "search.png"


@dataclass(frozen=True)
class SearchSettings:
    """How to search for the best split of attention and MLP.

    Args:
        coarse_step: step in tenths between the splits of the first pass, `fine_step` to 10: 1 tries 0:10, 1:9, 2:8 and
            so on.
        fine_step: step in tenths between the splits around the best one, 0.001 to `coarse_step`: 0.1 tries 1.9:8.1,
            2.1:7.9 …
        patience: number of rises of perplexity in a row that end a pass, at least 1.
        folder: folder for `search.json` and `search.png`; a search resumes from its own trials there.

    Raises:
        ValueError: if a setting is out of its bounds.
    """

    coarse_step: float = 1.0
    fine_step: float = 0.1
    patience: int = 3
    folder: str = "lightning_logs/search"

    def __post_init__(self) -> None:
        if not 0.001 <= self.fine_step <= self.coarse_step <= 10:
            raise ValueError(
                "search.fine_step and search.coarse_step must satisfy 0.001 <= fine_step <= coarse_step <= 10, in "
                f"tenths, got {self.fine_step} and {self.coarse_step}; try 0.1 and 1"
            )
        if self.patience < 1:
            raise ValueError(f"search.patience must be at least 1, got {self.patience}; try 3")


def search_split(evaluate: Callable[[str], float], trials: Trials, settings: SearchSettings) -> Trial:
    """Try splits from 0:10 upwards in coarse steps, then from the best split to both sides in fine ones.

    Args:
        evaluate: measures the perplexity of a split; raises UnreachableError if the budget cannot be met with it.
        trials: earlier trials, which are not evaluated again; every new one is added.
        settings: steps and patience.

    Returns:
        The best of all trials.

    Raises:
        ValueError: if no split meets the budget.
    """

    def attempt(attention: float) -> Trial:
        split = f"{attention:g}:{round(10 - attention, 6):g}"
        if split not in trials.trials:
            try:
                trials.add(Trial(split, evaluate(split)))
            except UnreachableError as error:
                trials.add(Trial(split, None, str(error)))
        return trials.trials[split]

    def list_positions(start: float, step: float, end: float) -> list[float]:
        count = math.floor(abs(end - start) / abs(step) + 1e-9)
        return [round(start + i * step, 6) for i in range(count + 1)]

    coarse = _try_positions(attempt, list_positions(0, settings.coarse_step, 10), settings.patience)
    reached = [trial for trial in coarse if trial.perplexity is not None]
    if not reached:
        raise ValueError(
            f"no split meets the budget; the last one tried, {coarse[-1].split}, failed: {coarse[-1].reason}"
        )
    centre = min(reached, key=lambda trial: trial.perplexity or math.inf).attention
    for sign in (-1, 1):
        # Up to the next coarse split, which is already measured.
        end = min(max(centre + sign * (settings.coarse_step - settings.fine_step / 2), 0), 10)
        _try_positions(attempt, list_positions(centre, sign * settings.fine_step, end), settings.patience)
    assert trials.best is not None
    return trials.best


def find_best_split(
    model: PreTrainedModel,
    calibration: CalibrationSet,
    config: PruningConfig,
    settings: SearchSettings,
    validation: Mapping[str, Sequence[Mapping[str, Tensor]]],
    *,
    protocol: str = "",
) -> Trials:
    """Search the split at which pruning a dense model costs the least perplexity, without changing the model.

    If `config.repair` has least squares, every split is refitted with them on a copy of the model. Later stages are
    ignored: `steps`, `swaps` and both trainings of repair. In a process group rank 0 writes.

    Args:
        model: the dense causal LM, on the device to work on.
        calibration: the text, and where it comes from.
        config: what to remove; its `split` is replaced.
        settings: steps, patience and folder.
        validation: corpus name -> batches of `input_ids` and `labels`, never calibration or test text. Several corpora
            count by the geometric mean of their perplexities.
        protocol: description of how perplexity is measured.

    Raises:
        ValueError: if there is nothing to search or no validation text, if the trials in the folder belong to another
            search, or if no split meets the budget.
    """
    least_squares = replace(config.repair, epochs=0, distill_tokens=0)
    config = replace(config, split=FREE, steps=1, swaps=SwapsConfig(), repair=least_squares)
    if config.kv_rate:
        raise ValueError(
            f"search chooses how much attention is removed, but pruning.kv_rate {config.kv_rate} fixes it: set "
            "pruning.kv_rate to 0"
        )
    if not config.rate:
        raise ValueError("search needs pruning.rate above 0, got 0; try 0.2")
    if not any(validation.values()):
        raise ValueError("search compares splits on validation text, got none: name a corpus in data.evaluation.val")
    check_text(model, calibration.batches, config)
    check_compatibility(model)
    blocks, budget = select_blocks(model, config), read_budget(model, config)
    check_finite_weights(model)
    check_reachable(blocks, budget, config)

    settings_of = {name: value for name, value in asdict(config).items() if name not in ("split", "sensitivity")}
    settings_of["sensitivity"] = asdict(replace(config.sensitivity, path=None))
    origin = {
        "model": calibration.source,
        "weights": hash_model(model),
        "dtype": str(model.dtype),
        "geometry": asdict(read_geometry(model.config)),
        "pruning": settings_of,
        "calibration": {
            "corpora": list(calibration.corpora),
            "batches": [list(batch.shape) for batch in calibration.batches],
            "text": hash_tensors(calibration.batches),
            "accumulate": calibration.accumulation,
            "seed": calibration.seed,
        },
        "validation": {name: hash_tensors(_list_windows(corpus)) for name, corpus in validation.items()},
        "protocol": protocol,
    }
    path = Path(settings.folder) / SEARCH_FILE
    trials = Trials(origin, path, writes=get_rank_and_world_size()[0] == 0)
    if not is_true_anywhere(not path.exists(), next(model.parameters()).device):
        trials.read()
    search_split(SplitTrials(model, blocks, budget, config, calibration, validation), trials, settings)
    return trials


class _Choice(NamedTuple):
    """Scores, budgets and allocation that determine the counts and units of every split."""

    scores: Scores
    budgets: list[BlockBudget]
    allocate: BoundAllocation


class SplitTrials:
    """Measures the perplexity of a dense model pruned by a split; the model is scored once, on the first call.

    Args:
        model: the dense causal LM.
        blocks: blocks that may shrink.
        budget: parameters to remove, without a split.
        config: how to choose the units.
        calibration: text to score on.
        validation: corpus name -> batches to measure perplexity on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        budget: Budget,
        config: PruningConfig,
        calibration: CalibrationSet,
        validation: Mapping[str, Sequence[Mapping[str, Tensor]]],
    ) -> None:
        self.model = model
        self.blocks = blocks
        self.budget = budget
        self.config = config
        self.calibration = calibration
        self.validation = validation
        self._measured: dict[tuple[tuple[BlockKey, int], ...], float] = {}

    def __call__(self, split: str) -> float:
        """Measure the geometric mean of perplexities over the corpora.

        Raises:
            UnreachableError: if the budget cannot be met with this split.
        """
        scores, budgets, allocate = self._choice
        share = parse_split(split)
        spared = find_spared_kind(share)  # importance and frozen layers refer only to kinds that may shrink
        budgets = [block for block in budgets if block.key.kind != spared]
        removed = allocate(budgets, replace(self.budget, attention_share=share))
        counts = tuple((key, count) for key, count in removed.items() if count)
        if counts not in self._measured:  # splits that differ by less than a group often remove the same units
            measure = self._measure_repaired if self.config.repair.method != "none" else self._measure_gated
            perplexity = measure(scores, removed, f"split {split}")
            self._measured[counts] = math.exp(sum(map(math.log, perplexity.values())) / len(perplexity))
        return self._measured[counts]

    def _measure_gated(self, scores: Scores, removed: Removed, name: str) -> dict[str, float]:
        blocks = [block for block in self.blocks if block.key in removed]
        with apply_gates(blocks, make_gates(blocks, scores, removed, next(self.model.parameters()).device)):
            return measure_perplexity(self.model, self.validation, name)

    def _measure_repaired(self, scores: Scores, removed: Removed, name: str) -> dict[str, float]:
        whole = dict.fromkeys((block.key for block in self.blocks), 0)
        plan = make_plan(self.model, self.blocks, scores, whole | dict(removed), self.config)
        cut = copy.deepcopy(self.model)
        apply_plan_with_repair(cut, plan, self.calibration.batches, self.config.repair)
        return measure_perplexity(cut, self.validation, name)

    @cached_property
    def _choice(self) -> _Choice:
        model, config, calibration = self.model, self.config, self.calibration
        try:
            options = measure_options(model, calibration, config, StageCache())
            if config.uses_importance:
                check_reachable(self.blocks, self.budget, config, options)
        except UnreachableError as error:
            raise ValueError(str(error)) from None  # it is unreachable with any split
        scores, outliers = score_blocks(model, calibration, config, StageCache())
        scores, options, _ = measure_curves(
            model, self.blocks, scores, outliers, calibration.batches, config, options, StageCache()
        )
        return _Choice(scores, budget_blocks(self.blocks, scores, config), bind_allocation(config, options))


def _list_windows(corpus: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """List tokens and labels of every window, independent of the batch size."""
    pairs = (pair for batch in corpus for pair in zip(batch["input_ids"], batch["labels"], strict=True))
    return [window for pair in pairs for window in pair]


def _try_positions(attempt: Callable[[float], Trial], positions: Iterable[float], patience: int) -> list[Trial]:
    """Try splits in order until perplexity has risen `patience` times in a row; unreachable ones do not count."""
    trials: list[Trial] = []
    previous: float | None = None
    rises = 0
    for position in positions:
        trial = attempt(position)
        trials.append(trial)
        if trial.perplexity is None:
            continue
        if previous is not None and trial.perplexity != previous:
            rises = rises + 1 if trial.perplexity > previous else 0
        if rises == patience:
            break
        previous = trial.perplexity
    return trials
