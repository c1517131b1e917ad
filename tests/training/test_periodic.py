"""Laws of what a run does between its steps."""

import torch
from accelerate import Accelerator

from minigpt.config.arguments import RunArguments
from minigpt.training.periodic import SampleTexts
from support.tiny import byte_tokenizer, tiny_model


def test_weights_that_are_not_finite_give_a_note_instead_of_a_sample() -> None:
    args = RunArguments(sample_prompts=["a", "b"], sample_max_new_tokens=4, report_to=["none"])
    samples = SampleTexts(args, 1, byte_tokenizer(eos_token="<|endoftext|>"), max_steps=1)
    model, accelerator = tiny_model(), Accelerator(cpu=True)
    sound = samples.run(model, accelerator)
    assert all(text.startswith(prompt) for prompt, text in sound.items())
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    notes = samples.run(model, accelerator)
    assert notes.keys() == sound.keys()
    assert all(note.startswith("(no sample: probability tensor contains") for note in notes.values())
