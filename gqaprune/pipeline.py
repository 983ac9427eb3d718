"""START HERE: prune a dense model, without Lightning. The code follows the order of the method."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.common.console import console
from gqaprune.common.distributed import check_same_on_all_ranks, get_rank_and_world_size
from gqaprune.common.renamed import ARGUMENTS, name_successors
from gqaprune.common.stage_cache import StageCache, StageResult
from gqaprune.data.calibration import CalibrationSet
from gqaprune.data.call_checks import check_evaluation, check_model, list_corpora
from gqaprune.evaluation.perplexity import Evaluation, measure_perplexity
from gqaprune.models.architecture import describe_experts, get_layers
from gqaprune.models.fingerprint import find_fingerprint
from gqaprune.models.saving import check_saves
from gqaprune.placement.layer_store import find_store
from gqaprune.placement.model_hash import hash_model, hash_tensors
from gqaprune.plan import BlockKey, PruningPlan
from gqaprune.planning.allocation import AllocationOptions, Removed
from gqaprune.planning.allocation.steps import Spending
from gqaprune.planning.choice import CutChooser
from gqaprune.planning.config import PruningConfig
from gqaprune.planning.costs.base import Text
from gqaprune.planning.counts import measure_options
from gqaprune.planning.preflight import check_config, check_goes_by_layer, check_reachable, check_repair, check_text
from gqaprune.planning.rounding import describe_rounding
from gqaprune.planning.selection import keep_everything, read_budget, select_blocks
from gqaprune.planning.stages import (
    CUT,
    DENSE,
    DENSE_PREDICTIONS,
    DISTILLATION,
    IMPORTANCE,
    PRUNED,
    StageCounter,
    Work,
    list_stages,
)
from gqaprune.planning.target import resolve_target
from gqaprune.reporting.report import LayerDamage, Outlier, Report, describe_model
from gqaprune.scoring.criteria.base import Scores
from gqaprune.scoring.repaired_damage import choose_judged
from gqaprune.scoring.scores import check_finite_weights
from gqaprune.scoring.sensitivity import Importance
from gqaprune.surgery.compatibility import check_compatibility
from gqaprune.surgery.distillation import (
    DensePredictions,
    Distillation,
    can_distill,
    distill,
    record_predictions,
    split_windows,
)
from gqaprune.surgery.layer_damage import LayerDamageMeter
from gqaprune.surgery.products import settle_products
from gqaprune.surgery.repair import BlockRepair, apply_plan_with_repair, choose_held_out

_HELD_OUT = "held-out calibration text"


@name_successors("prune", ARGUMENTS)
def prune(
    model: PreTrainedModel,
    calibration: CalibrationSet | Sequence[Tensor],
    config: PruningConfig,
    *,
    evaluation: Evaluation | None = None,
    stages: StageCache | None = None,
) -> tuple[PruningPlan, Report]:
    """Prune a dense model in place: score, allocate, plan, cut and repair, in one step or several, and measure it.

    Args:
        model: the dense causal LM, on the device to work on.
        calibration: the calibration text, or only its batches of token ids, each `[batch, tokens]`.
        config: what to remove and how to choose it.
        evaluation: corpus name -> batches of `input_ids` and `labels` to measure perplexity on. It must not be
            calibration text.
        stages: where finished stages are kept, so that an interrupted call can be resumed.

    Returns:
        The plan from the dense to the pruned model, and a report on both.

    Raises:
        ValueError: if the model, the batches or the budget are not suitable; the model is then unchanged. Or if scores
            in a later step, activations in repair or the pruned perplexity are not finite, or if ranks end with
            different plans or weights.
    """
    with torch.inference_mode(False), torch.enable_grad():  # scores need gradients, whatever the caller has set
        pruner = Pruner(model, CalibrationSet.wrap(calibration), config, evaluation=evaluation, stages=stages)
        pruner.counter = StageCounter(list_stages(pruner.config, Work(Text(0, 1)))[:-1])  # the caller saves
        check_saves(model)  # refuse a model that cannot be saved before the work begins
        pruner.measure("dense")
        pruner.spend()
    return pruner.plan, pruner.report


class Pruner:
    """Prunes a dense model in place, at once or a share of the budget at a time. It may be trained in between.

    Args:
        model: the dense causal LM, on the device to work on.
        calibration: the calibration text.
        config: what to remove and how to choose it.
        evaluation: corpus name -> batches of `input_ids` and `labels` to measure perplexity on.
        held_out: batches of the same kind, from calibration corpora but not calibrated on, measured at each stage.
        stages: where finished stages are kept, so that an interrupted run can be resumed.
        counter: announces stages.

    Attributes:
        plan: plan from the dense model to the model in its current state.
        report: measurements of each stage, and results of the last repair.
        share: share of the budget that is spent.
        spending: units that each block has lost.
        scores: scores of the units that the last cut chose among, without outliers; empty before the first cut.

    Raises:
        ValueError: if the model, the batches or the budget are not suitable.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        calibration: CalibrationSet,
        config: PruningConfig,
        *,
        evaluation: Evaluation | None = None,
        held_out: Sequence[Mapping[str, Tensor]] = (),
        stages: StageCache | None = None,
        counter: StageCounter | None = None,
    ) -> None:
        check_model(model)
        check_config(config)
        config = resolve_target(model, config)
        check_goes_by_layer(config, find_store(model).placement)
        check_compatibility(model)
        self.dense_blocks, self.budget = select_blocks(model, config), read_budget(model, config)
        check_finite_weights(model)  # after selecting blocks, which refuses quantised weights
        self.model, self.calibration, self.config = model, calibration, config
        self.evaluation = list_corpora(evaluation or {})
        self.held_out = {_HELD_OUT: held_out} if held_out else {}
        self.stages, self.counter = stages or StageCache(), counter or StageCounter()
        for name, batches in {**self.evaluation, **self.held_out}.items():
            check_evaluation(model, batches, name)
        removed = None
        if config.removes_something:
            removed = check_reachable(self.dense_blocks, self.budget, config)
            check_text(model, calibration.batches, config)
            check_repair(model.config, self.dense_blocks, config)
            self.config = replace(config, repair=settle_products(config.repair, model.device, self.stages))
        source = calibration.source
        self.plan = replace(keep_everything(model), model=source, fingerprint=find_fingerprint(source))
        self.report = Report(source, asdict(self.config), note=describe_experts(model))
        if removed is not None:
            self._note_rounding(removed)
        self.share = 0.0
        self.spending: Spending | None = None
        self.scores: Scores = {}
        self._dense_predictions: DensePredictions | None = None
        self._options: AllocationOptions | None = None

    @property
    def importance(self) -> Importance:
        """Importance of the dense model's blocks; empty if the allocation does not depend on it."""
        return dict((self._options and self._options.importance) or {})

    def measure(self, stage: str) -> None:
        """Measure the model in its current state, and add the stage to the report."""
        self.counter.begin(PRUNED if self.share else DENSE)
        texts = {**self.evaluation, **self.held_out}
        measured = self._stages_of_model().recall(
            f"perplexity, {stage}",
            {"test text": {name: _hash_batches(batches) for name, batches in texts.items()}},
            lambda: StageResult(measure_perplexity(self.model, texts, stage)),
        )
        perplexity = dict(measured.facts)
        held_out = perplexity.pop(_HELD_OUT, None)
        self.report.stages.append(describe_model(stage, self.model, perplexity, held_out=held_out))

    def spend(self, share: float = 1.0, stage: str = "pruned") -> None:
        """Score, allocate, cut and repair until a share of the budget is spent, in the config's steps, and measure.

        Args:
            share: share of the whole budget, larger than what is spent already and at most 1.
            stage: name of the result in the report.

        Raises:
            ValueError: if the budget cannot be met; the model is then unchanged. Or if scores, activations or the
                perplexity are not finite, or ranks end with different plans or weights.
        """
        assert self.share < share <= 1, f"share must be above {self.share}, which is spent already, got {share}"
        config, steps, start = self.config, self.config.steps, self.share
        self.share = share
        if not config.removes_something:
            self.report.stages.append(replace(self.report.stages[-1], name=stage))
            return
        if start == 0:
            self._record_predictions()
        for step in range(1, steps + 1):
            self.report.repairs = self._cut(start + (share - start) * step / steps if step < steps else share)
        if self._dense_predictions is not None:
            self.report.distillation = self._distill(self._dense_predictions)
        if get_rank_and_world_size()[1] > 1:
            check_same_on_all_ranks("the pruned weights", hash_model(self.model), self.model.device)
        self.plan = replace(
            self.plan,
            criterion=config.criterion,
            allocation=config.allocation,
            rate=share * config.rate,
            rate_base=config.rate_base,
            kv_rate=share * config.kv_rate,
            seed=self.calibration.seed,
            corpora=self.calibration.corpora,
        )
        self.measure(stage)

    def resume(self, model: PreTrainedModel, plan: PruningPlan, share: float, spending: Spending) -> None:
        """Resume with a model that was cut before, and free the dense model.

        Args:
            model: the model, cut and possibly trained since.
            plan: plan from the dense model to this model.
            share: share of the budget that was spent.
            spending: units that each block had lost.

        Raises:
            ValueError: if the plan was made for another model.
        """
        plan.check_fits(self.plan.geometry)
        self._measure_options()
        self._record_predictions()
        self.model.to("meta")
        self.model, self.plan, self.share, self.spending = model, plan, share, spending

    def _measure_options(self) -> AllocationOptions:
        """Measure what the allocation depends on besides scores, once, on the dense model."""
        if self._options is None:
            self.counter.begin(IMPORTANCE)
            options = measure_options(
                self.model,
                self.calibration,
                self.config,
                self._stages_of_model(self.calibration.batches) if self.config.uses_importance else StageCache(),
            )
            if self.config.uses_importance:
                check_reachable(self.dense_blocks, self.budget, self.config, options)
            self._options = options
        return self._options

    def _note_rounding(self, removed: Removed) -> None:
        """Print and report how rounding to whole units changes the budget."""
        rounding = describe_rounding(self.dense_blocks, self.budget, removed, self.config)
        if rounding and rounding != self.report.rounding and get_rank_and_world_size()[0] == 0:
            console.print(rounding)
        self.report.rounding = rounding

    def _cut(self, share: float) -> list[BlockRepair]:
        """Choose units, cut and repair until `share` of the budget is spent."""
        options = self._measure_options()
        stages = self._stages_of_model(self.calibration.batches, "" if share == 1 else f"{share:.4g} of the budget,")
        chooser = CutChooser(self.dense_blocks, self.budget, self.calibration, self.config, self.counter)
        choice = chooser.choose(self.model, share, self.spending, options, stages)
        if self.spending is None:  # in later cuts, unit indexes are not those of the dense model
            self.report.outliers = [
                Outlier(key, unit, ratio) for key, units in choice.outliers.items() for unit, ratio in units
            ]
        self.spending, self.scores = choice.spending, choice.scores
        if share == 1:
            self._note_rounding(choice.spending.so_far)
        self.plan = self.plan.then(choice.plan)
        self.counter.begin(CUT)
        batches = self.calibration.batches
        damage = self._watch_damage() if choice.damages else None
        repairs = apply_plan_with_repair(self.model, choice.plan, batches, self.config.repair, stages, damage)
        measured = {} if damage is None or not repairs else damage.measure()
        self.report.damages = [
            LayerDamage(
                layer,
                choice.damages.get(BlockKey(layer, "attention"), 0.0),
                choice.damages.get(BlockKey(layer, "mlp"), 0.0),
                measured.get(layer),
            )
            for layer in sorted({key.layer for key in choice.damages})
        ]
        return repairs

    def _watch_damage(self) -> LayerDamageMeter:
        """Make a meter of each layer's damage, on the same held-out text that damage was predicted on."""
        batches, (rank, world_size) = self.calibration.batches, get_rank_and_world_size()
        judged = choose_judged(batches, choose_held_out(len(batches), self.config.repair.holdout))
        return LayerDamageMeter(self.model, judged[rank::world_size])

    def _record_predictions(self) -> None:
        """Record the dense model's predictions if distillation needs them."""
        if not can_distill(self.model, self.config.repair):
            return
        self.counter.begin(DENSE_PREDICTIONS)
        batches = self.calibration.batches
        repair = self.config.repair
        trained, judged = split_windows(batches, choose_held_out(len(batches), repair.holdout), repair.distill_tokens)
        self._dense_predictions = record_predictions(self.model, trained, judged, self._stages_of_model(batches))

    def _distill(self, dense: DensePredictions) -> Distillation:
        """Distil the dense model's predictions into the decoder."""
        self.counter.begin(DISTILLATION)
        layers, repair = get_layers(self.model), self.config.repair

        def train() -> StageResult:
            distillation = distill(self.model, dense, repair, self.calibration.seed)
            return StageResult(asdict(distillation), layers.state_dict())

        stages = self._stages_of_model(self.calibration.batches)
        stage = stages.recall("distillation", {"repair": asdict(repair)}, train)
        layers.load_state_dict(dict(stage.tensors))
        return Distillation(**stage.facts)

    def _stages_of_model(self, batches: Sequence[Tensor] = (), part: str = "") -> StageCache:
        """Open the stages that depend on the model in its current state and on calibration batches."""
        if not self.stages.are_kept:
            return self.stages
        inputs = {
            "model": hash_model(self.model),
            "calibration text": hash_tensors(batches),
            "attention kernel": self.model.config._attn_implementation,
            "device": self.model.device.type,
        }
        return self.stages.of(part, inputs)


def _hash_batches(batches: Sequence[Mapping[str, Tensor]]) -> str:
    return hash_tensors([tensor for batch in batches for tensor in batch.values()])
