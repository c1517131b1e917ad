"""The playground: a page with a model's text, next tokens and attention, and a chat if it was trained for one."""

import html
from collections.abc import Iterator
from typing import Any

import gradio as gr

from minigpt.generation.sampling import Sampling, context_length, prompt_ids
from minigpt.playground.chat_tab import CHAT_CSS, ChatTab
from minigpt.playground.copies import CopyMarker
from minigpt.playground.copy_marks import CopyMarks
from minigpt.playground.player import Player
from minigpt.playground.views import BARS_CSS, problem_line, sampling_sliders
from minigpt.utils.errors import UserError

CSS = f"""
.gradio-container {{width: 100%; max-width: 1180px !important; margin: 0 auto !important}}
.problem {{color: #b00020; font-weight: 600; padding: 0}}
.dark .problem {{color: #ff9b9b}}
#text textarea, #prompt textarea {{font-family: var(--font-mono); line-height: 1.5}}
#bars {{padding: .6em .2em}}
{BARS_CSS}{CHAT_CSS}"""


def build_page(player: Player, name: str, prompts: list[str], marker: CopyMarker | str | None = None) -> Any:
    """The page as `gradio.Blocks`, not served yet. `prompts` are examples; the first one is filled in.

    With a `marker`, a visitor can see what is copied from the training text; a text says why they cannot.
    """
    config = player.model.config
    limit = context_length(player.model)
    context = "context without a limit" if limit is None else f"context of {limit:,} tokens"
    about = f"{player.model.num_parameters():,} parameters, {context}, {config.num_hidden_layers} layers"
    with gr.Blocks(title=f"{name} · MiniGPT playground", analytics_enabled=False) as page:
        gr.Markdown(f"## {html.escape(name)}\n{about}")
        if player.tokenizer.chat_template:
            with gr.Tab("Chat"):
                ChatTab(player, [prompt for prompt in prompts if prompt.strip()])
            with gr.Tab("Text"):
                _text_tab(page, player, prompts, marker)
        else:
            _text_tab(page, player, prompts, marker)
    return page


def _text_tab(page: Any, player: Player, prompts: list[str], marker: CopyMarker | str | None) -> None:
    """A text box for a prompt, the text that continues it, and views of the last tokens."""
    config = player.model.config
    ids = gr.State([])
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
            problem = problem_line("problem")
            text = gr.Textbox(label="Text", lines=7, max_lines=12, buttons=["copy"], elem_id="text")
            marks = CopyMarks(text, marker)
            if len(prompts) > 1:
                gr.Examples([[example] for example in prompts], [prompt], label="Examples")
        with gr.Column(scale=2):
            controls = sampling_sliders()
    with gr.Row():
        with gr.Column():
            bars = gr.HTML(elem_id="bars")
        with gr.Column():
            with gr.Row():
                layer = gr.Slider(1, config.num_hidden_layers, 1, step=1, label="Layer")
                head = gr.Slider(1, config.num_attention_heads, 1, step=1, label="Head")
            picture = gr.Plot(format="png", show_label=False, elem_id="attention")
    _connect(
        page, player, prompt, controls, (layer, head), (start, stop), (text, ids, problem), (bars, picture), marks
    )


def _connect(
    page: Any,
    player: Player,
    prompt: Any,
    controls: Any,
    layer_and_head: Any,
    buttons: Any,
    results: Any,
    views: Any,
    marks: CopyMarks,
) -> None:
    """Connect the events of the page: typing updates the views, a button generates, then the views show the text."""
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
            show_marks = marks.of_new_text(request)
            for text, ids in player.generate(request.session_hash, prompt, sampling, int(seed)):
                yield text, ids, "", *show_marks(ids)
        except UserError as error:
            yield gr.skip(), gr.skip(), html.escape(str(error)), *[gr.skip()] * len(marks.outputs)

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
    start.click(generate, [prompt, *controls], [text, ids, problem, *marks.outputs], show_progress="minimal").then(
        **view_event
    )
    stop.click(end, queue=False)
