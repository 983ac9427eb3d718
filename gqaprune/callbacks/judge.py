"""Judge the continuations that `predict` wrote, side by side with the dense model's."""

import os
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.callbacks.lookup import get_run_folder
from gqaprune.callbacks.order import Phase
from gqaprune.callbacks.parts import check_own_parts, get_parts
from gqaprune.callbacks.run_state import get_run
from gqaprune.checkpoints.origin import find_dense
from gqaprune.common.console import console, track
from gqaprune.datamodules import TextDataModule
from gqaprune.evaluation.generation import continue_greedily, measure_text_perplexity, split_continuation
from gqaprune.evaluation.judgement import MeasuredText, measure_text
from gqaprune.evaluation.predictions import Predictions, TextPair, render_predictions
from gqaprune.models.sources import load_config
from gqaprune.models.tokenizer import check_tokenizer
from gqaprune.models.wrapping import is_sharded
from gqaprune.module import CausalLMModule

PREDICTIONS_FILE = "predictions.json"


class PredictionJudge(Callback):
    """Prints each prompt with the texts of both models and a verdict; writes `predictions.json` in the run's folder.

    The dense model is `model.recovery.teacher`; else `model.pretrained` if `model.plan` cuts it; else the model that
    the plan beside a pruned checkpoint names. It runs on the pruned model's device, while that one is on the CPU.

    Args:
        releases: free the pruned model instead of moving it to the CPU; for programs that do not need it afterwards.
    """

    phase: ClassVar = Phase.EXPORT

    def __init__(self, releases: bool = False) -> None:
        self.releases = releases
        self.predictions: Predictions | None = None
        self._dense, self._note = "", ""
        self._written: list[Tensor] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the dense model before any work."""
        if stage == "predict":
            check_own_parts(trainer, pl_module, "PredictionJudge")
            self._written = []
            self._dense, self._note = choose_dense(get_parts(trainer, pl_module)[0])

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Tensor, *_: Any, **__: Any
    ) -> None:
        """Keep the model's continuation."""
        self._written.append(outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the continuations, on rank 0 only because every rank wrote the same."""
        if not trainer.is_global_zero:
            return
        module, data = get_parts(trainer, pl_module)
        ids = [batch["input_ids"] for _, batch in data.encode_prompts()]
        sizes = [ids_1T.shape[1] for ids_1T in ids]
        pruned = [split_continuation(module.model, *pair) for pair in zip(self._written, sizes, strict=True)]
        perplexities: list[float | None] = [None] * len(pruned)
        dense_texts: list[MeasuredText | None] = [None] * len(pruned)
        if self._dense:
            if self.releases:
                module.release()
            elif not is_sharded(module.model):
                module.model.to("cpu")
            dense = self._load_dense(module, data).to(trainer.strategy.root_device)
            for index, ids_1T in enumerate(track(ids, "the dense model", "prompts")):
                dense_ids = continue_greedily(dense, ids_1T.to(dense.device), module.max_new_tokens)
                perplexities[index] = _measure(dense, self._written[index].to(dense.device), sizes[index])
                added = split_continuation(dense, dense_ids, sizes[index])
                dense_texts[index] = _describe(data, *added, _measure(dense, dense_ids, sizes[index]))
            if not self.releases and not is_sharded(module.model):
                module.model.to(trainer.strategy.root_device)
        texts = [_describe(data, *added, value) for added, value in zip(pruned, perplexities, strict=True)]
        prompts = [prompt.text for prompt, _ in data.encode_prompts()]
        comparisons = [TextPair(*parts) for parts in zip(prompts, texts, dense_texts, strict=True)]
        self.predictions = get_run(trainer).predictions = Predictions(
            module.source.pretrained, self._dense, self._note, comparisons
        )
        path = get_run_folder(trainer) / PREDICTIONS_FILE
        console.print(render_predictions(self.predictions), soft_wrap=False)
        self.predictions.save(path)
        console.print(f"{'predictions':<14} {os.path.relpath(path)}")

    def _load_dense(self, module: CausalLMModule, data: TextDataModule) -> PreTrainedModel:
        is_teacher = self._dense == module.recovery.teacher
        source = module.source.name_another(
            self._dense,
            module.recovery.teacher_dtype if is_teacher else module.source.dtype,
            # A model that only a plan names must not run code.
            module.source.trust_remote_code and (is_teacher or module.plan is not None),
        )
        dense = source.load().eval()
        check_tokenizer(data.tokenizer, dense)
        return dense


def choose_dense(module: CausalLMModule) -> tuple[str, str]:
    """Return the name of the dense model, or an empty string and a sentence that says why there is none.

    Raises:
        ValueError: if `recovery.teacher` names a model that does not exist.
    """
    if module.recovery.teacher is not None:
        load_config(module.recovery.teacher, module.source.trust_remote_code)
        return module.recovery.teacher, ""
    if module.plan is not None:
        return module.source.pretrained, ""
    alone = "no dense model to compare with, so the verdicts detect repetition but not text that makes no sense"
    way_out = "set --model.recovery.teacher to the dense model"
    try:
        return find_dense(module.source.pretrained), ""
    except ValueError as error:
        return "", f"{alone}: {error}; {way_out}"


def _measure(dense: PreTrainedModel, ids_1T: Tensor, prompt_tokens: int) -> float:
    return measure_text_perplexity(dense, ids_1T, prompt_tokens)


def _describe(data: TextDataModule, tokens: list[int], ended: bool, perplexity: float | None) -> MeasuredText:
    def decode(ids: Any) -> str:
        return str(data.tokenizer.decode(ids, skip_special_tokens=True))

    return measure_text(tokens, decode, ended, perplexity)
