"""What does the model write so far? Continuations of the same prompts, from the same seed, as a run goes on."""

from typing import Any

from accelerate import Accelerator
from torch import nn

from minigpt.arguments import RunArguments
from minigpt.sampling import sample_text
from minigpt.state import TrainingState, is_due


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
