"""The playground: a page with a model's text, next tokens and attention."""

import html
from collections.abc import Iterator
from queue import Empty, Queue
from threading import Lock, Thread
from typing import Any

from minigpt.generation.inspection import attention_weights, next_token_probabilities, token_label
from minigpt.generation.sampling import Sampling, complete, context_length, end_of_text_ids, prompt_ids
from minigpt.playground.views import attention_figure, bars_html

BARS = 10

SHOWN_TOKENS = 24  # more would not be format_bytes on the axes

CSS = """
.gradio-container {max-width: 1180px !important; margin: 0 auto !important}
#problem {color: #b00020; font-weight: 600; padding: 0}
.dark #problem {color: #ff9b9b}
#text textarea, #prompt textarea {font-family: var(--font-mono); line-height: 1.5}
#bars {padding: .6em .2em}
"""


class Player:
    """One model and its visitors: generation and views, one at a time, since they set the random state and kernel."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.lock = Lock()
        self.running: dict[str | None, _Stream] = {}  # by the visitor's session

    def generate(
        self, visitor: str | None, prompt: str, sampling: Sampling, seed: int
    ) -> Iterator[tuple[str, list[int]]]:
        """The text and its token ids so far, ever longer; ends early after `stop`. Raises UserError on bad input."""
        ids = prompt_ids(self.model, self.tokenizer, prompt)
        stream = self.running[visitor] = _Stream()
        worker = Thread(target=self._work, args=(ids, sampling, seed, stream), daemon=True)
        worker.start()
        try:
            new_ids: list[int] = []
            while stream.read_into(new_ids):
                text = self.tokenizer.decode(new_ids, skip_special_tokens=True)
                if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else half a character
                    yield prompt + text, ids + new_ids
            worker.join()
            if stream.error is not None:
                raise stream.error
            if stream.text is None:  # stopped
                stream.text = self.tokenizer.decode(new_ids, skip_special_tokens=True)
            ended = new_ids[-1:] and new_ids[-1] in end_of_text_ids(self.model, self.tokenizer)
            yield prompt + stream.text, ids + (new_ids[:-1] if ended else new_ids)  # the text as it is shown
        finally:
            stream.stopped = True  # also when the visitor has gone
            self.running.pop(visitor, None)

    def _work(self, ids: list[int], sampling: Sampling, seed: int, stream: "_Stream") -> None:
        try:
            with self.lock:
                (completion,) = complete(self.model, self.tokenizer, ids, sampling, seed, stream)
            stream.text = completion.continuation
        except _Stopped:
            pass
        except Exception as error:  # raised again where the visitor sees it
            stream.error = error
        finally:
            stream.tokens.put(None)

    def stop(self, visitor: str | None) -> None:
        """End the visitor's generation after the token that it is at."""
        if visitor in self.running:
            self.running[visitor].stopped = True

    def bars(self, ids: list[int]) -> str:
        """The likeliest next tokens as HTML."""
        with self.lock:
            best = next_token_probabilities(self.model, ids, BARS)
        return bars_html([(token_label(self.tokenizer, token), probability) for token, probability in best])

    def attention(self, ids: list[int], layer: int, head: int) -> Any:
        """Where one head looks, as a figure; `layer` and `head` count from 1, as people do."""
        with self.lock:
            weights = attention_weights(self.model, ids, layer - 1, head - 1)
        seen = len(weights)
        labels = [token_label(self.tokenizer, token) for token in ids[-seen:][-SHOWN_TOKENS:]]
        part = f"last {len(labels)} of {seen} tokens" if seen > len(labels) else f"{seen} tokens"
        title = f"layer {layer}, head {head}: {part}"
        return attention_figure(weights[-SHOWN_TOKENS:, -SHOWN_TOKENS:].numpy(), labels, title)


class _Stopped(Exception):
    """Thrown through `generate` to end it."""


class _Stream:
    """A streamer for `generate`: hands over tokens from its thread, and ends it when nobody wants more."""

    def __init__(self) -> None:
        self.tokens: Queue[list[int] | None] = Queue()
        self.is_prompt, self.stopped = True, False
        self.text: str | None = None  # the whole continuation, once there
        self.error: Exception | None = None

    def put(self, value: Any) -> None:
        if self.stopped:
            raise _Stopped
        if not self.is_prompt:  # `generate` hands over the prompt first
            self.tokens.put(value.flatten().tolist())
        self.is_prompt = False

    def end(self) -> None:
        self.is_prompt = True  # a refilled context begins with a prompt again

    def read_into(self, ids: list[int]) -> bool:
        """Wait for tokens and append all that are there. False when there will be no more."""
        tokens = self.tokens.get()
        while tokens is not None:
            ids += tokens
            try:
                tokens = self.tokens.get_nowait()
            except Empty:
                return True
        return False


def build_page(player: Player, name: str, prompts: list[str]) -> Any:
    """The page, as `gradio.Blocks` that is not served yet."""
    import gradio as gr

    config = player.model.config
    about = f"{player.model.num_parameters():,} parameters, context of {context_length(player.model):,} tokens"
    with gr.Blocks(title=f"{name} · MiniGPT playground", analytics_enabled=False) as page:
        ids = gr.State([])
        gr.Markdown(f"## {html.escape(name)}\n{about}, {config.num_hidden_layers} layers")
        with gr.Row():
            with gr.Column(scale=3):
                prompt = gr.Textbox(
                    (prompts or [""])[0],
                    label="Prompt (empty: the start of a text)",
                    lines=2,
                    max_lines=8,
                    elem_id="prompt",
                )
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", elem_id="generate")
                    stop = gr.Button("Stop", elem_id="stop")
                problem = gr.HTML(elem_id="problem")
                text = gr.Textbox(label="Text", lines=7, max_lines=12, buttons=["copy"], elem_id="text")
                if len(prompts) > 1:
                    gr.Examples([[example] for example in prompts], [prompt], label="Examples")
            with gr.Column(scale=2):
                knobs = [
                    gr.Slider(1, 1000, 100, step=1, label="Max new tokens"),
                    gr.Slider(0, 2, 0.8, step=0.05, label="Temperature", info="0: always the likeliest token"),
                    gr.Slider(0, 200, 50, step=1, label="Top k (tokens)", info="0: all"),
                    gr.Slider(0.05, 1, 1, step=0.05, label="Top p (share of the probability)"),
                    gr.Slider(0, 9999, 0, step=1, label="Seed"),
                ]
        with gr.Row():
            with gr.Column():
                bars = gr.HTML(elem_id="bars")
            with gr.Column():
                with gr.Row():
                    layer = gr.Slider(1, config.num_hidden_layers, 1, step=1, label="Layer")
                    head = gr.Slider(1, config.num_attention_heads, 1, step=1, label="Head")
                picture = gr.Plot(format="png", show_label=False, elem_id="attention")
        _connect(page, player, prompt, knobs, (layer, head), (start, stop), (text, ids, problem), (bars, picture))
    return page


def _connect(
    page: Any, player: Player, prompt: Any, knobs: Any, where: Any, buttons: Any, said: Any, seen: Any
) -> None:
    """What happens on the page: typing moves the views, a button generates, then the views follow the text."""
    import gradio as gr

    text, ids, problem = said
    start, stop = buttons

    def look(ids: list[int], layer: int, head: int) -> tuple[Any, ...]:
        return (player.bars(ids), player.attention(ids, layer, head)) if ids else (gr.skip(), gr.skip())

    def follow(prompt: str, layer: int, head: int, request: gr.Request) -> tuple[Any, ...]:
        if request.session_hash in player.running:  # the views will follow its text
            return (gr.skip(),) * 4
        try:
            ids = prompt_ids(player.model, player.tokenizer, prompt)
            return ids, "", *look(ids, layer, head)
        except ValueError as error:
            return gr.skip(), html.escape(str(error)), gr.skip(), gr.skip()

    def generate(
        prompt: str, length: int, temperature: float, top_k: int, top_p: float, seed: int, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        try:
            sampling = Sampling(int(length), temperature, int(top_k), top_p)
            for text, ids in player.generate(request.session_hash, prompt, sampling, int(seed)):
                yield text, ids, ""
        except ValueError as error:
            yield gr.skip(), gr.skip(), html.escape(str(error))

    def end(request: gr.Request) -> None:
        player.stop(request.session_hash)

    views = {"fn": look, "inputs": [ids, *where], "outputs": list(seen), "show_progress": "hidden"}
    for moved in where:
        moved.change(**views, trigger_mode="always_last")
    typed = {"fn": follow, "inputs": [prompt, *where], "outputs": [ids, problem, *seen], "show_progress": "hidden"}
    page.load(**typed)
    prompt.change(**typed, trigger_mode="always_last")
    start.click(generate, [prompt, *knobs], [text, ids, problem], show_progress="minimal").then(**views)
    stop.click(end, queue=False)
