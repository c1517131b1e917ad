"""The app of a demo Space (app.py there): a page to chat with a model from the Hub."""

from collections.abc import Iterator
from threading import Event, Thread

import gradio as gr
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteriaList, TextIteratorStreamer

MODEL = "USER/NAME"
REVISION = None
PROMPT = "The"

tokenizer = AutoTokenizer.from_pretrained(MODEL, revision=REVISION, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(MODEL, revision=REVISION, trust_remote_code=True).eval()
CONTEXT = model.config.max_position_embeddings  # tokens


def answer(
    question: str, history: list[dict], system_prompt: str, max_new_tokens: float, temperature: float, top_p: float
) -> Iterator[str]:
    """Yield the answer generated so far. `history` has the messages before the question.

    Raises gradio.Error, which the page shows, if the question is too long or cannot be encoded.
    """
    system = [{"role": "system", "content": system_prompt}] if system_prompt.strip() else []
    turns = [{"role": message["role"], "content": message_text(message)} for message in history]
    ids = prompt_ids(system, [*turns, {"role": "user", "content": question}], int(max_new_tokens))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=120)
    stopped = Event()
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": min(int(max_new_tokens), CONTEXT - ids.shape[1]),
        "streamer": streamer,
        "eos_token_id": end_ids(),
        "pad_token_id": tokenizer.eos_token_id or 0,
        "stopping_criteria": StoppingCriteriaList([lambda ids, scores: torch.full((len(ids),), stopped.is_set())]),
        **(sampling if temperature > 0 else {"do_sample": False}),
    }
    Thread(target=model.generate, args=(ids,), kwargs=options, daemon=True).start()
    text = ""
    try:
        for new_text in streamer:
            text += new_text
            yield text
    finally:
        stopped.set()  # also if the visitor has pressed Stop


def prompt_ids(system: list[dict], turns: list[dict], max_new_tokens: int) -> torch.Tensor:
    """Token ids [1, T] of the conversation, which ends with a question.

    They leave room for the answer, but no more than a quarter of the context. The oldest questions are dropped with
    their answers until the rest fits.
    """
    limit = CONTEXT - max(1, min(max_new_tokens, CONTEXT // 4))
    while True:
        try:
            ids = tokenizer.apply_chat_template(
                [*system, *turns], add_generation_prompt=True, return_tensors="pt", return_dict=False
            )
        except Exception as error:  # a chat template may raise anything, the tokenizers library a bare Exception
            raise gr.Error(f"The model cannot read this conversation: {error}") from error
        if ids.shape[1] <= limit:
            return ids
        questions = [position for position, message in enumerate(turns) if message["role"] == "user"]
        if len(questions) == 1:
            raise gr.Error(f"The question has {ids.shape[1]} tokens, but the limit is {limit}. Shorten it.")
        turns = turns[questions[1] :]


def message_text(message: dict) -> str:
    """The text of a message of gr.Chatbot."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def end_ids() -> list[int] | None:
    """The tokens that end an answer: those of the model, and the end-of-text token of the tokenizer."""
    configured = model.generation_config.eos_token_id
    ids = [*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id]
    return [token for token in ids if token is not None] or None


demo = gr.ChatInterface(
    answer,
    chatbot=gr.Chatbot(show_label=False, height=440, placeholder="Ask the model something."),
    textbox=gr.Textbox(
        PROMPT, show_label=False, placeholder="Your message", max_lines=8, submit_btn=True, stop_btn=True
    ),
    additional_inputs=[
        gr.Textbox("", label="System prompt", lines=2),
        gr.Slider(1, CONTEXT // 2, min(256, CONTEXT // 4), step=1, label="Maximum new tokens"),
        gr.Slider(0, 2, 0.7, step=0.05, label="Temperature", info="0: always the most likely token"),
        gr.Slider(
            0.05, 1, 0.95, step=0.05, label="Top-p", info="Sample from the most likely tokens with this probability"
        ),
    ],
    additional_inputs_accordion=gr.Accordion("Settings", open=False),
    title=MODEL.split("/")[-1],
    description=(
        "This model was trained on conversations. Its answers may be wrong. "
        f"See its [model card](https://huggingface.co/{MODEL})."
    ),
    flagging_mode="never",
)

if __name__ == "__main__":
    demo.launch()
