"""Show the model's continuations of a few prompts, dense and during training, in TensorBoard and on the run's page."""

from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from gqaprune.callbacks.lookup import get_tensorboards
from gqaprune.callbacks.order import Phase
from gqaprune.callbacks.parts import GivenText, get_parts
from gqaprune.callbacks.run_state import get_run
from gqaprune.common.console import console, keep_going
from gqaprune.datamodules import TextDataModule
from gqaprune.evaluation.generation import continue_greedily, split_continuation
from gqaprune.models.wrapping import is_sharded
from gqaprune.module import CausalLMModule
from gqaprune.placement.layer_store import find_store
from gqaprune.reporting.page import Sample

DENSE = -1
"""The step under which texts of the dense model are kept, before all others."""


class SampleGenerations(Callback):
    """Logs greedy continuations of `data.prompts` as text: before the first step, and at each validation.

    If this run prunes the model, the dense model's continuations are shown beside them. Rank 0 writes them alone; if a
    strategy shards the model, one rank cannot run it, so a console line says that nothing is logged. A prompt that
    cannot be continued is skipped with a warning: it never ends a run.

    Args:
        prompts: number of `data.prompts` to continue, from the first on; 0 logs none.
        max_new_tokens: largest number of tokens to add to each prompt, at least 1.

    Attributes:
        written: prompt number -> the prompt, and step -> text; the dense model's text has the step `DENSE`.

    Raises:
        ValueError: if a number is out of its bounds.
    """

    phase: ClassVar = Phase.WORK

    def __init__(self, prompts: int = 3, max_new_tokens: int = 30) -> None:
        if prompts < 0 or max_new_tokens < 1:
            raise ValueError(
                "samples needs prompts >= 0 and max_new_tokens >= 1, got "
                f"{prompts} and {max_new_tokens}; set samples.prompts to 0 to log none"
            )
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.written: dict[int, tuple[str, dict[int, str]]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the prompts; forget the texts of an earlier run."""
        # Prompts with the dense text alone belong to this run, whose pruning may have come first.
        self.written = {number: entry for number, entry in self.written.items() if list(entry[1]) == [DENSE]}
        data = trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit" and self.prompts and trainer.limit_train_batches != 0 and isinstance(data, TextDataModule):
            data.encode_prompts()

    def on_before_pruning(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the dense model's continuations, which are shown beside all later ones."""
        module, _ = get_parts(trainer, pl_module)
        if trainer.limit_train_batches != 0 and find_store(module.model).is_in_memory:
            self._write(trainer, pl_module, DENSE)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log continuations before the first step of recovery, or print why none are logged."""
        module, data = get_parts(trainer, pl_module)
        if self.prompts and trainer.is_global_zero and isinstance(data, GivenText):
            console.print("SampleGenerations is off: it needs the prompts of a TextDataModule")
        if self.prompts and trainer.is_global_zero and is_sharded(module.model):
            name = type(trainer.strategy).__name__
            console.print(f"SampleGenerations is off: {name} shards the model, so one rank cannot run it alone")
        self._log(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log continuations at this step."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._log(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the texts written so far, for a run that resumes."""
        return {"written": {number: (prompt, dict(texts)) for number, (prompt, texts) in self.written.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the texts that `state_dict` returned."""
        self.written = {number: (prompt, dict(texts)) for number, (prompt, texts) in state_dict["written"].items()}

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        written = self._write(trainer, pl_module, trainer.global_step)
        get_run(trainer).samples = [Sample(*sample) for sample in self.written.values()]
        for number in written:
            prompt, texts = self.written[number]
            shown = [texts[step] for step in (DENSE, trainer.global_step) if step in texts]
            with keep_going(f"sample {number}"):
                for logger in get_tensorboards(trainer):
                    logger.experiment.add_text(f"samples/{number}", _format(prompt, *shown), trainer.global_step)

    def _write(self, trainer: Trainer, pl_module: LightningModule, step: int) -> list[int]:
        """Continue the prompts with the current model; return the numbers of those that succeeded."""
        module, data = get_parts(trainer, pl_module)
        if not self.prompts or not trainer.is_global_zero or is_sharded(module.model):
            return []
        done, was_training = [], module.model.training
        module.model.eval()
        try:
            for number, (prompt, batch) in enumerate(data.encode_prompts()[: self.prompts], 1):
                with keep_going(f"sample {number}"):
                    answer = self._continue(trainer, module, data, batch["input_ids"])
                    self.written.setdefault(number, (prompt.text, {}))[1][step] = answer
                    done.append(number)
        finally:
            module.model.train(was_training)
        return done

    def _continue(self, trainer: Trainer, module: CausalLMModule, data: TextDataModule, ids_1T: Tensor) -> str:
        with trainer.precision_plugin.forward_context():
            output = continue_greedily(module.model, ids_1T.to(module.model.device), self.max_new_tokens)
        tokens, _ = split_continuation(module.model, output, ids_1T.shape[1])
        return str(data.tokenizer.decode(tokens, skip_special_tokens=True))


def _format(prompt: str, *answers: str) -> str:
    """Format the prompt and its continuations as code blocks, so that Markdown shows them unchanged."""
    parts = ("\n".join(f"    {line}" for line in text.splitlines() or [""]) for text in (prompt, *answers))
    return "\n\n→\n\n".join(parts)
