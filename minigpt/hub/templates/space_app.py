"""The app of a demo Space (app.py there): a page that continues a text with a model from the Hub."""

from collections.abc import Iterator
from threading import Thread

import gradio as gr
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

MODEL = "USER/NAME"
REVISION = None
PROMPT = "The"

tokenizer = AutoTokenizer.from_pretrained(MODEL, revision=REVISION, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(MODEL, revision=REVISION, trust_remote_code=True).eval()
CONTEXT = model.config.max_position_embeddings  # tokens


def generate(
    prompt: str, max_new_tokens: float, temperature: float, top_k: float, top_p: float, seed: float
) -> Iterator[str]:
    """Yield the prompt and the text generated so far. An empty prompt starts a new text.

    Raises gradio.Error, which the page shows, if the prompt is too long or cannot be encoded.
    """
    try:
        inputs = tokenizer(prompt or tokenizer.bos_token or tokenizer.eos_token or "\n", return_tensors="pt")
    except Exception as error:  # tokenizers raises a bare Exception if the vocabulary has no unknown token
        raise gr.Error("The prompt contains characters that are not in the model's vocabulary.") from error
    prompt_tokens = inputs["input_ids"].shape[1]
    if prompt_tokens >= CONTEXT:
        raise gr.Error(f"The prompt has {prompt_tokens} tokens, but the limit is {CONTEXT - 1}. Shorten it.")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=120)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": int(top_k), "top_p": top_p}
    options = {
        "max_new_tokens": min(int(max_new_tokens), CONTEXT - prompt_tokens),
        "streamer": streamer,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id or 0,
        **(sampling if temperature > 0 else {"do_sample": False}),
    }
    torch.manual_seed(int(seed))
    thread = Thread(target=model.generate, kwargs={**inputs, **options}, daemon=True)
    thread.start()
    text = prompt
    yield text
    for new_text in streamer:
        text += new_text
        yield text
    thread.join()  # the last text arrives shortly before `generate` returns


demo = gr.Interface(
    generate,
    inputs=[
        gr.Textbox(PROMPT, label="Prompt", info="Leave empty to start a new text", lines=3),
        gr.Slider(1, CONTEXT - 1, min(100, CONTEXT // 2), step=1, label="Maximum new tokens"),
        gr.Slider(0, 2, 0.8, step=0.05, label="Temperature", info="0: always the most likely token"),
        gr.Slider(0, 200, 50, step=1, label="Top-k", info="Sample from the k most likely tokens; 0: from all tokens"),
        gr.Slider(
            0.05, 1, 1, step=0.05, label="Top-p", info="Sample from the most likely tokens with this total probability"
        ),
        gr.Slider(0, 9999, 0, step=1, label="Seed", info="The same seed gives the same text"),
    ],
    outputs=gr.Textbox(label="Text", lines=12),
    title=MODEL.split("/")[-1],
    description=(
        "This is a base model: it continues text and does not follow instructions. "
        f"See its [model card](https://huggingface.co/{MODEL})."
    ),
    flagging_mode="never",
)

if __name__ == "__main__":
    demo.launch()
