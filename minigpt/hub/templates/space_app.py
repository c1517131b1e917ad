"""What runs in the Space of a model? This file, as app.py: type a text, and the model goes on."""

from collections.abc import Iterator
from threading import Thread

import gradio as gr
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

MODEL, REVISION, PROMPT = "USER/NAME", None, "The"

tokenizer = AutoTokenizer.from_pretrained(MODEL, revision=REVISION, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(MODEL, revision=REVISION, trust_remote_code=True).eval()
LIMIT = model.config.max_position_embeddings


def generate(
    prompt: str, max_new_tokens: float, temperature: float, top_k: float, top_p: float, seed: float
) -> Iterator[str]:
    """Yields the text so far; the prompt "" is the start of a text. Raises gradio.Error for what the page must say."""
    try:
        inputs = tokenizer(prompt or tokenizer.bos_token or tokenizer.eos_token or "\n", return_tensors="pt")
    except Exception as error:  # a bare Exception from Rust, for a vocabulary without an unknown token
        raise gr.Error("The prompt has characters that the tokenizer does not know.") from error
    room = LIMIT - inputs["input_ids"].shape[1]
    if room < 1:
        raise gr.Error(f"The prompt has {LIMIT - room} tokens and must have fewer than {LIMIT}; give a shorter one.")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=120)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": int(top_k), "top_p": top_p}
    options = {
        "max_new_tokens": min(int(max_new_tokens), room),
        "streamer": streamer,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id or 0,
        **(sampling if temperature > 0 else {"do_sample": False}),
    }
    torch.manual_seed(int(seed))
    worker = Thread(target=model.generate, kwargs={**inputs, **options}, daemon=True)
    worker.start()
    text = prompt
    yield text
    for piece in streamer:
        text += piece
        yield text
    worker.join()  # the last piece is here a little before it ends


demo = gr.Interface(
    generate,
    inputs=[
        gr.Textbox(PROMPT, label="Prompt (empty: the start of a text)", lines=3),
        gr.Slider(1, LIMIT - 1, min(100, LIMIT // 2), step=1, label="Max new tokens"),
        gr.Slider(0, 2, 0.8, step=0.05, label="Temperature", info="0: always the likeliest token"),
        gr.Slider(0, 200, 50, step=1, label="Top k (tokens)", info="0: all"),
        gr.Slider(0.05, 1, 1, step=0.05, label="Top p (share of the probability)"),
        gr.Slider(0, 9999, 0, step=1, label="Seed"),
    ],
    outputs=gr.Textbox(label="Text", lines=12),
    title=MODEL.split("/")[-1],
    description=f"A base model: it continues text and follows no instructions. [Its card](https://huggingface.co/{MODEL})",
    flagging_mode="never",
)

if __name__ == "__main__":
    demo.launch()
