"""The evaluations and sample texts that a run makes every few steps."""

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerFast

from minigpt.config.arguments import RunArguments
from minigpt.data.chat_template import sample_prompts
from minigpt.data.datamodule import loader
from minigpt.data.samplers import EvaluationBatchSampler
from minigpt.data.samples import Samples
from minigpt.evaluation.hellaswag import evaluate, summarize
from minigpt.evaluation.hellaswag_items import check_encodable, load_rows
from minigpt.evaluation.loss import summed_loss
from minigpt.evaluation.metrics import validation_metrics
from minigpt.generation.sampling import sample_text
from minigpt.modeling.loss import IGNORE_INDEX
from minigpt.training.accelerator import uncompiled
from minigpt.training.state import TrainingState
from minigpt.utils.errors import UserError, first_line


class ValidationLoss:
    """Full validation loss, every `eval_steps` steps. Raises UserError for text without any target."""

    def __init__(self, samples: Samples, batch_size: int, eval_steps: int) -> None:
        self.samples, self.batch_size, self.eval_steps = samples, batch_size, eval_steps
        if not any(bool((samples[sample]["shift_labels"] != IGNORE_INDEX).any()) for sample in samples.full_pass()):
            raise UserError("no token of the validation text is in the loss; give other validation text")

    def due(self, state: TrainingState) -> bool:
        return state.is_due(self.eval_steps)

    def run(self, model: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """`val/loss`, `val/perplexity` and, if the size of the text is known, `val/bits_per_byte`."""
        rank, processes = accelerator.process_index, accelerator.num_processes
        batches = EvaluationBatchSampler(self.samples.full_pass(), self.batch_size, rank, processes)
        loss_nats, targets = summed_loss(model, loader(self.samples, batches), accelerator, batches.counted)
        return validation_metrics(loss_nats, targets, self.samples.text_bytes)


class HellaSwagEvaluation:
    """HellaSwag during training, every `hellaswag_steps` steps.

    Raises UserError for a file that is not HellaSwag, and for text that the tokenizer cannot encode.
    """

    def __init__(self, args: RunArguments, tokenizer: PreTrainedTokenizerFast, batch_size: int) -> None:
        self.hellaswag_steps = args.hellaswag_steps or 0
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.rows = load_rows(args.hellaswag_file, args.hellaswag_limit)
        check_encodable(self.rows, tokenizer, args.hellaswag_file)

    def due(self, state: TrainingState) -> bool:
        return state.is_due(self.hellaswag_steps)

    def run(self, model: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """The three accuracies, `hellaswag/...`."""
        with uncompiled(model, accelerator) as plain_model:
            return summarize(evaluate(plain_model, self.tokenizer, self.rows, self.batch_size, accelerator))


def default_prompt(tokenizer: PreTrainedTokenizerFast, documents: int | None) -> str:
    """The start of a text, ""; a new line if there is only one text, whose start a model does not learn."""
    if documents != 1 or tokenizer.chat_template:
        return ""
    try:
        return "\n" if tokenizer("\n")["input_ids"] else ""
    except Exception:  # the tokenizers library raises a bare Exception for a character without an id
        return ""


class SampleTexts:
    """A continuation of every sample prompt, or the answer to it, every `sample_steps` steps."""

    def __init__(
        self, args: RunArguments, seed: int, tokenizer: PreTrainedTokenizerFast, documents: int | None = None
    ) -> None:
        """`documents` are those of the training text, None if unknown."""
        self.args, self.seed, self.tokenizer = args, seed, tokenizer
        self.prompts = args.sample_prompts or [default_prompt(tokenizer, documents)]

    def due(self, state: TrainingState) -> bool:
        return state.is_due(self.args.sample_steps)

    def run(self, model: nn.Module, accelerator: Accelerator) -> dict[str, str]:
        """Prompt → text; with a chat template, question → answer. Every rank must call this, for sharded weights.

        Text that cannot be sampled, as from weights that are not finite, does not end the training: the reason takes
        its place.
        """
        written = sample_prompts(self.tokenizer, self.prompts)
        try:
            with uncompiled(model, accelerator) as plain_model:
                texts = sample_text(
                    plain_model,
                    self.tokenizer,
                    written.values(),
                    max_new_tokens=self.args.sample_max_new_tokens,
                    temperature=0.8,
                    top_k=50,
                    seed=self.seed,
                )
        except RuntimeError as error:
            texts = [f"(no sample: {first_line(error)})"] * len(written)
        if self.tokenizer.chat_template:
            texts = [text.removeprefix(prompt) for prompt, text in zip(written.values(), texts, strict=True)]
        return dict(zip(written, texts, strict=True))
