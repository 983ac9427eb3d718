"""The whole path from a dense model to a pruned one, without Lightning. Reads top to bottom like the method itself."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.config import PruningConfig
from gqaprune.counts import (
    bind_allocation,
    check_reachable,
    check_text,
    measure_curves,
    measure_options,
    refine_counts,
)
from gqaprune.importance import check_finite_weights, score_units
from gqaprune.perplexity import measure_perplexity
from gqaprune.plan import PruningPlan
from gqaprune.reconstruction import apply_plan_with_repair
from gqaprune.report import Report, describe_model
from gqaprune.selection import budget_blocks, keep_everything, make_plan, read_budget, select_blocks
from gqaprune.steps import spend_share
from gqaprune.surgery import apply_plan


def prune(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    config: PruningConfig,
    *,
    accumulate: int = 1,
    evaluation: Mapping[str, Sequence[Mapping[str, Tensor]]] | None = None,
    source: str = "",
    seed: int = 0,
    corpora: Sequence[str] = (),
) -> tuple[PruningPlan, Report]:
    """Prune a dense model in place, in one step or several: score, allocate, plan, cut, repair; measure it.

    Args:
        model: the dense causal LM, on the device to work on.
        batches: calibration token ids, each `[batch, tokens]`; in a process group the same list on every rank.
        config: what to remove.
        accumulate: micro-batches per accumulation window of the criterion.
        evaluation: corpus name -> batches of `input_ids` and `labels` to measure perplexity on, never calibration text.
        source: name of the model, for the plan.
        seed: seed that chose the calibration windows; of `random` scores and of swaps, too.
        corpora: names of the calibration corpora, for the plan.

    Returns:
        The plan from the dense to the pruned model, and the report of both.

    Raises:
        ValueError: if the model, the batches or the budget do not allow it, the model being untouched then; or if the
            scores after an earlier step, the activations under repair or the pruned perplexity are not finite.
    """
    check_finite_weights(model)
    dense_blocks, budget = select_blocks(model, config), read_budget(model, config)
    if config.removes_something:
        check_reachable(dense_blocks, budget, config)
        check_text(batches, config)
    report = Report(source, asdict(config))
    perplexity = measure_perplexity(model, evaluation or {}, "dense")
    report.stages.append(describe_model("dense", model, perplexity))

    plan = replace(keep_everything(model), model=source)
    if config.removes_something:
        options = measure_options(
            model, dense_blocks, budget, batches, config, source=source, seed=seed, corpora=corpora
        )
        spending = None
        for step in range(1, config.steps + 1):
            blocks = select_blocks(model, config)
            scores = score_units(model, blocks, batches, config.criterion, accumulate, config.scoring_options(seed))
            options = measure_curves(model, dense_blocks, scores, batches, config, options)
            allocate, budgets = bind_allocation(config, options), budget_blocks(dense_blocks, scores, config)
            spending = spend_share(budgets, budget, allocate, step / config.steps, spending)
            removed = refine_counts(
                model, dense_blocks, scores, batches, config, options, budget, spending.so_far, seed
            )
            step_plan = make_plan(model, dense_blocks, scores, removed, config)
            if (repair := config.repair_options()) is None:
                apply_plan(model, step_plan)
            else:
                report.repairs = apply_plan_with_repair(model, step_plan, batches, repair)
            plan = plan.then(step_plan)
        plan = replace(
            plan,
            criterion=config.criterion,
            allocation=config.allocation,
            rate=config.rate,
            rate_base=config.rate_base,
            kv_rate=config.kv_rate,
            seed=seed,
            corpora=tuple(corpora),
        )
        perplexity = measure_perplexity(model, evaluation or {}, "pruned")

    report.stages.append(describe_model("pruned", model, perplexity))
    return plan, report
