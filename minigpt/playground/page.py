"""The playground: a page with a model's text, next tokens and attention."""

import html
from collections.abc import Iterator
from queue import Empty, Queue
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from minigpt.generation.inspection import attention_weights, next_token_probabilities, token_label
from minigpt.generation.sampling import (
    Sampling,
    complete,
    context_length,
    decode,
    end_of_text_ids,
    final_text,
    first_stop,
    prompt_ids,
)
from minigpt.playground.views import attention_figure, bars_html
from minigpt.utils.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BARS = 10
SHOWN_TOKENS = 24  # more labels would be too small to read
CSS = """
.gradio-container {max-width: 1180px !important; margin: 0 auto !important}
#problem {color: #b00020; font-weight: 600; padding: 0}
.dark #problem {color: #ff9b9b}
#text textarea, #prompt textarea {font-family: var(--font-mono); line-height: 1.5}
#bars {padding: .6em .2em}
"""


class Player:
    """One model for all visitors. Generation and views run one at a time: they set the random state and the kernel."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.lock = Lock()
        self.running: dict[str | None, _Stream] = {}  # by the session of the visitor

    def generate(
        self, visitor: str | None, prompt: str, sampling: Sampling, seed: int
    ) -> Iterator[tuple[str, list[int]]]:
        """Yields the text so far and its token ids; ends early after `stop`. Raises UserError on bad input."""
        ids = prompt_ids(self.model, self.tokenizer, prompt)
        stream = self.running[visitor] = _Stream()
        worker = Thread(target=self._work, args=(ids, sampling, seed, stream), daemon=True)
        worker.start()
        try:
            new_ids: list[int] = []
            while stream.read_into(new_ids):
                text = decode(self.tokenizer, new_ids, skip_special_tokens=True)
                yield prompt + final_text(text, sampling.stop), ids + new_ids
            worker.join()
            if stream.error is not None:
                raise stream.error
            if stream.text is None:  # stopped by the visitor
                text = decode(self.tokenizer, new_ids, skip_special_tokens=True)
                stream.text = text[: first_stop(text, sampling.stop)]
            ended = new_ids[-1:] and new_ids[-1] in end_of_text_ids(self.model, self.tokenizer)
            yield prompt + stream.text, ids + (new_ids[:-1] if ended else new_ids)  # the views follow the shown text
        finally:
            stream.stopped = True  # also if the visitor has left
            self.running.pop(visitor, None)

    def _work(self, ids: list[int], sampling: Sampling, seed: int, stream: "_Stream") -> None:
        try:
            with self.lock:
                (completion,) = complete(self.model, self.tokenizer, ids, sampling, seed, stream)
            stream.text = completion.continuation
        except _Stopped:
            pass
        except Exception as error:  # raised again in the thread of the visitor
            stream.error = error
        finally:
            stream.tokens.put(None)

    def stop(self, visitor: str | None) -> None:
        """End the visitor's generation after its current token."""
        if visitor in self.running:
            self.running[visitor].stopped = True

    def bars(self, ids: list[int]) -> str:
        """The most likely next tokens as HTML."""
        with self.lock:
            best = next_token_probabilities(self.model, ids, BARS)
        return bars_html([(token_label(self.tokenizer, token), probability) for token, probability in best])

    def attention(self, ids: list[int], layer: int, head: int) -> "Figure":
        """The attention of one head as a figure; `layer` and `head` count from 1, as on the page."""
        with self.lock:
            weights = attention_weights(self.model, ids, layer - 1, head - 1)
        tokens = len(weights)
        labels = [token_label(self.tokenizer, token) for token in ids[-tokens:][-SHOWN_TOKENS:]]
        part = f"last {len(labels)} of {tokens} tokens" if tokens > len(labels) else f"{tokens} tokens"
        title = f"layer {layer}, head {head}: {part}"
        return attention_figure(weights[-SHOWN_TOKENS:, -SHOWN_TOKENS:].numpy(), labels, title)


class _Stopped(Exception):
    """Raised inside `generate` to end it."""


class _Stream(BaseStreamer):
    """A streamer for `generate` that passes tokens to another thread, and ends the generation once it is stopped."""

    def __init__(self) -> None:
        self.tokens: Queue[list[int] | None] = Queue()
        self.stopped = False
        self.text: str | None = None  # the whole continuation, at the end
        self.error: Exception | None = None
        self._expects_prompt = True

    def put(self, value: Tensor) -> None:
        """Take the next tokens; `generate` passes the prompt first."""
        if self.stopped:
            raise _Stopped
        if not self._expects_prompt:
            self.tokens.put(value.flatten().tolist())
        self._expects_prompt = False

    def end(self) -> None:
        """The end of one call of `generate`; after a refill of the context, the next call passes a prompt again."""
        self._expects_prompt = True

    def read_into(self, ids: list[int]) -> bool:
        """Wait for tokens and append all that have arrived. False if there will be no more."""
        tokens = self.tokens.get()
        while tokens is not None:
            ids += tokens
            try:
                tokens = self.tokens.get_nowait()
            except Empty:
                return True
        return False


def build_page(player: Player, name: str, prompts: list[str]) -> Any:
    """The page as `gradio.Blocks`, not served yet. `prompts` are examples; the first one is filled in."""
    import gradio as gr

    config = player.model.config
    limit = context_length(player.model)
    context = "context without a limit" if limit is None else f"context of {limit:,} tokens"
    about = f"{player.model.num_parameters():,} parameters, {context}, {config.num_hidden_layers} layers"
    with gr.Blocks(title=f"{name} · MiniGPT playground", analytics_enabled=False) as page:
        ids = gr.State([])
        gr.Markdown(f"## {html.escape(name)}\n{about}")
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
                controls = [
                    gr.Slider(1, 1000, 100, step=1, label="Max new tokens"),
                    gr.Slider(0, 2, 0.8, step=0.05, label="Temperature", info="0: always the most likely token"),
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
        _connect(page, player, prompt, controls, (layer, head), (start, stop), (text, ids, problem), (bars, picture))
    return page


def _connect(
    page: Any, player: Player, prompt: Any, controls: Any, layer_and_head: Any, buttons: Any, results: Any, views: Any
) -> None:
    """Connect the events of the page: typing updates the views, a button generates, then the views show the text."""
    import gradio as gr

    text, ids, problem = results
    start, stop = buttons

    def update_views(ids: list[int], layer: int, head: int) -> tuple[Any, ...]:
        return (player.bars(ids), player.attention(ids, layer, head)) if ids else (gr.skip(), gr.skip())

    def update_prompt(prompt: str, layer: int, head: int, request: gr.Request) -> tuple[Any, ...]:
        if request.session_hash in player.running:  # the views will show its text
            return (gr.skip(),) * 4
        try:
            ids = prompt_ids(player.model, player.tokenizer, prompt)
            return ids, "", *update_views(ids, layer, head)
        except UserError as error:
            return gr.skip(), html.escape(str(error)), gr.skip(), gr.skip()

    def generate(
        prompt: str, max_new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        try:
            sampling = Sampling(int(max_new_tokens), temperature, int(top_k), top_p)
            for text, ids in player.generate(request.session_hash, prompt, sampling, int(seed)):
                yield text, ids, ""
        except UserError as error:
            yield gr.skip(), gr.skip(), html.escape(str(error))

    def end(request: gr.Request) -> None:
        player.stop(request.session_hash)

    view_event = {
        "fn": update_views,
        "inputs": [ids, *layer_and_head],
        "outputs": list(views),
        "show_progress": "hidden",
    }
    for slider in layer_and_head:
        slider.change(**view_event, trigger_mode="always_last")
    prompt_event = {
        "fn": update_prompt,
        "inputs": [prompt, *layer_and_head],
        "outputs": [ids, problem, *views],
        "show_progress": "hidden",
    }
    page.load(**prompt_event)
    prompt.change(**prompt_event, trigger_mode="always_last")
    start.click(generate, [prompt, *controls], [text, ids, problem], show_progress="minimal").then(**view_event)
    stop.click(end, queue=False)
