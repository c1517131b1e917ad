"""What happens every so many steps: evaluations and sample texts."""

from typing import Any

from accelerate import Accelerator
from torch import nn

from minigpt.config.arguments import Arguments, RunArguments
from minigpt.data.datamodule import DataModule, loader
from minigpt.data.samplers import EvaluationBatches
from minigpt.data.samples import Samples
from minigpt.evaluation.hellaswag import evaluate, summarize
from minigpt.evaluation.hellaswag_items import load_rows
from minigpt.evaluation.loss import summed_loss
from minigpt.evaluation.metrics import validation_metrics
from minigpt.generation.sampling import sample_text
from minigpt.training.state import TrainingState, is_due


class Evaluation:
    """Full validation loss, every `eval_steps` steps."""

    def __init__(self, samples: Samples, batch_size: int, eval_steps: int, max_steps: int) -> None:
        self.samples, self.batch_size, self.eval_steps, self.max_steps = samples, batch_size, eval_steps, max_steps

    def due(self, state: TrainingState) -> bool:
        return is_due(state.step, self.eval_steps, self.max_steps)

    def run(self, model: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """`val/loss`, `val/perplexity` and, where the size of the text is known, `val/bits_per_byte`."""
        rank, processes = accelerator.process_index, accelerator.num_processes
        batches = EvaluationBatches(self.samples.every(), self.batch_size, rank, processes)
        loss_nats, targets = summed_loss(model, loader(self.samples, batches), accelerator, batches.counted)
        return validation_metrics(loss_nats, targets, self.samples.text_bytes)


class HellaSwagEvaluation:
    """HellaSwag during training, every `hellaswag_steps` steps. Raises UserError for a file that is not HellaSwag."""

    def __init__(self, args: RunArguments, tokenizer: Any, batch_size: int, max_steps: int) -> None:
        self.every, self.tokenizer, self.batch_size, self.max_steps = (
            args.hellaswag_steps, tokenizer, batch_size, max_steps,
        )  # fmt: skip
        self.rows = load_rows(args.hellaswag_file, args.hellaswag_limit)

    def due(self, state: TrainingState) -> bool:
        return is_due(state.step, self.every or 0, self.max_steps)

    def run(self, model: Any, accelerator: Any) -> dict[str, float]:
        """The three accuracies, `hellaswag/…`."""
        bare = accelerator.unwrap_model(model, keep_fp32_wrapper=True, keep_torch_compile=False)
        return summarize(evaluate(bare, self.tokenizer, self.rows, self.batch_size, accelerator))


def build_evaluations(
    args: Arguments, data_module: DataModule, tokenizer: Any, max_steps: int
) -> list[Evaluation | HellaSwagEvaluation]:
    """What is measured while the model trains. Raises UserError when the items of HellaSwag cannot be read."""
    evaluations: list[Evaluation | HellaSwagEvaluation] = []
    if data_module.validation:
        evaluations.append(Evaluation(data_module.validation, args.eval_batch_size, args.eval_steps, max_steps))
    if args.hellaswag_steps is not None:
        evaluations.append(HellaSwagEvaluation(args, tokenizer, args.eval_batch_size, max_steps))
    return evaluations


class SampleTexts:
    """A continuation of every sample prompt, every `sample_steps` steps."""

    def __init__(self, args: RunArguments, seed: int, tokenizer: Any, max_steps: int) -> None:
        self.args, self.seed, self.tokenizer, self.max_steps = args, seed, tokenizer, max_steps

    def due(self, state: TrainingState) -> bool:
        return is_due(state.step, self.args.sample_steps, self.max_steps)

    def run(self, model: nn.Module, accelerator: Accelerator) -> dict[str, str]:
        """Prompt → text. All processes take part, since sharded weights need it."""
        prompts = self.args.sample_prompts
        texts = sample_text(
            accelerator.unwrap_model(model, keep_fp32_wrapper=True, keep_torch_compile=False),
            self.tokenizer,
            prompts,
            max_new_tokens=self.args.sample_max_new_tokens,
            temperature=0.8,
            top_k=50,
            seed=self.seed,
        )
        return dict(zip(prompts, texts, strict=True))
