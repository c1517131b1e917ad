"""Laws of what a run does between its steps."""

from collections.abc import Callable, Sequence

import pytest
import torch
from accelerate import Accelerator

from minigpt.config.arguments import RunArguments
from minigpt.data.chat_template import read_chat_template, set_chat_template
from minigpt.data.samples import Batch, Samples
from minigpt.generation.conversation import Conversation
from minigpt.generation.sampling import Sampling
from minigpt.modeling.loss import IGNORE_INDEX
from minigpt.training.periodic import SampleTexts, ValidationLoss, default_prompt
from minigpt.utils.errors import UserError
from support.tiny import byte_tokenizer, letter_tokenizer, tiny_model


def test_weights_that_are_not_finite_give_a_note_instead_of_a_sample() -> None:
    args = RunArguments(sample_prompts=["a", "b"], sample_max_new_tokens=4, report_to=["none"])
    samples = SampleTexts(args, 1, byte_tokenizer(eos_token="<|endoftext|>"))
    model, accelerator = tiny_model(), Accelerator(cpu=True)
    sound = samples.run(model, accelerator)
    assert all(text.startswith(prompt) for prompt, text in sound.items())
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    notes = samples.run(model, accelerator)
    assert notes.keys() == sound.keys()
    assert all(note.startswith("(no sample: probability tensor contains") for note in notes.values())


@pytest.mark.parametrize(("documents", "prompt"), [(1, "\n"), (2, ""), (None, "")])
def test_a_model_of_a_single_text_continues_a_new_line_since_it_knows_no_start(
    documents: int | None, prompt: str
) -> None:
    args = RunArguments(sample_max_new_tokens=4, report_to=["none"])
    samples = SampleTexts(args, 1, byte_tokenizer(eos_token="<|endoftext|>"), documents)
    assert list(samples.run(tiny_model(), Accelerator(cpu=True))) == [prompt]
    assert default_prompt(letter_tokenizer("abc"), documents) == ""


def test_with_a_chat_template_a_sample_is_the_answer_to_its_prompt() -> None:
    tokenizer, model = byte_tokenizer(eos_token="<|endoftext|>"), tiny_model(max_position_embeddings=64)
    set_chat_template(tokenizer, read_chat_template("plain"))
    args = RunArguments(sample_prompts=["", "Hi"], sample_max_new_tokens=8, report_to=["none"])
    answers = SampleTexts(args, 1, tokenizer).run(model, Accelerator(cpu=True))
    assert list(answers) == ["Hi"]
    conversation = Conversation(model, tokenizer)
    conversation.ask("Hi", Sampling(8, temperature=0.8, top_k=50), seed=1)
    assert answers["Hi"].strip() == conversation.messages[-1]["content"]


def test_a_run_in_mixed_precision_writes_samples(
    tiny_run: list[str], train_here: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here([*tiny_run, "--mixed_precision", "bf16", "--sample_prompts", "e"]) == 0
    output = capsys.readouterr().out
    assert "sample from 'e':" in output
    assert "no sample" not in output


class LabeledSamples(Samples):
    """One sample per list of labels."""

    def __init__(self, labels: list[list[int]]) -> None:
        self.labels = labels

    def __getitems__(self, sample_ids: list[int]) -> Batch:
        labels = torch.tensor([self.labels[sample] for sample in sample_ids])
        return {"input_ids": torch.zeros_like(labels), "shift_labels": labels}

    def target_count(self, sample_ids: Sequence[int]) -> int:
        return int((self.__getitems__(list(sample_ids))["shift_labels"] != IGNORE_INDEX).sum())

    def full_pass(self) -> Sequence[int]:
        return range(len(self.labels))


def test_validation_text_without_a_target_is_refused_before_the_first_step() -> None:
    masked = [IGNORE_INDEX, IGNORE_INDEX]
    ValidationLoss(LabeledSamples([masked, [IGNORE_INDEX, 5]]), batch_size=1, eval_steps=1)
    with pytest.raises(UserError, match="no token of the validation text is in the loss"):
        ValidationLoss(LabeledSamples([masked, masked]), batch_size=1, eval_steps=1)
