"""Parts of the playground's page: sliders, HTML and figures."""

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure  # not pyplot: pages are drawn in several threads

from minigpt.evaluation.memorization import COPY_LENGTHS, Copy, times
from minigpt.training.plot import COLORS

# for a page of Gradio, with its colors and fonts
BARS_CSS = f"""
.bars {{display: grid; grid-template-columns: max-content 1fr max-content; gap: .75em .7em; align-items: center}}
.bars .token {{font-family: var(--font-mono); text-align: right; max-width: 11em; overflow: hidden;
              text-overflow: ellipsis; white-space: nowrap}}
.bars .bar {{background: {COLORS[0]}; height: 1.15em; border-radius: 2px; min-width: 1px}}
.bars .share {{font-variant-numeric: tabular-nums; text-align: right}}
#marked .title {{color: var(--block-title-text-color); margin-bottom: var(--spacing-lg)}}
.marked {{font-family: var(--font-mono); line-height: 1.5; white-space: pre-wrap; overflow-wrap: anywhere;
         min-height: 10em; padding: .7em; border: 1px solid
         var(--border-color-primary); border-radius: 4px}}
.marked mark, .copies b {{background: #ffe08a; color: #1f2937; border-radius: 3px; padding: .1em 0}}
.marked mark:nth-of-type(even), .copies li:nth-of-type(even) b {{background: #b9e3c6}}
.marked mark::after {{content: attr(data-number); font-size: .7em; vertical-align: super; padding: 0 .2em}}
.copies {{list-style: none; padding: 0; margin: .6em 0 0; font-size: .9em}}
.copies li {{margin: .3em 0; overflow-wrap: anywhere}}
.copies b {{padding: 0 .4em; margin-right: .3em}}
.caption {{opacity: .75; font-size: .85em; margin-bottom: 1em}}
"""


def bars_html(probabilities: Sequence[tuple[str, float]]) -> str:
    """Horizontal bars, one per (label, probability), with the probability in percent after each."""
    largest = max(probability for _, probability in probabilities)
    rows = "".join(
        f'<span class="token" title="{html.escape(label)}">{html.escape(label)}</span>'
        f'<span class="bar" style="width: {100 * probability / largest:.1f}%"></span>'
        f'<span class="share">{100 * probability:.1f} %</span>'
        for label, probability in probabilities
    )
    total = 100 * sum(probability for _, probability in probabilities)
    caption = f"probability in %, before temperature, top k and top p; together {total:.0f} %"
    return (
        f'<b>The most likely next tokens</b><div class="caption">{caption}</div>'
        f'<div class="bars" role="img" aria-label="{caption}">{rows}</div>'
    )


def marked_html(text: str, copies: Sequence[tuple[tuple[int, int], Copy]]) -> str:
    """A text with its copies marked, each given with the bounds of its characters, and a numbered list of sources.

    Where copies overlap, the mark of the first one ends where the second one begins.
    """
    parts, lines, done = [], [], 0
    starts = [bounds[0] for bounds, _ in copies]
    for number, ((start, end), copy) in enumerate(copies, start=1):
        origin = (
            f"{copy.tokens} tokens, {times(copy.occurrences)} in the training text, from document {copy.document:,}: "
            f"“{' '.join(copy.source.split())} …”"
        )
        end = min([end, *starts[number : number + 1]])
        parts.append(html.escape(text[done:start]))
        parts.append(
            f'<mark data-number="{number}" title="{html.escape(origin)}">{html.escape(text[start:end])}</mark>'
        )
        lines.append(f"<li><b>{number}</b>{html.escape(origin)}</li>")
        done = end
    parts.append(html.escape(text[done:]))
    if not copies and text:
        lines.append(f"<li>no copy of {COPY_LENGTHS[0]} or more tokens</li>")
    marked = f'<div class="marked">{"".join(parts)}</div>'
    return f'<div class="title">Text</div>{marked}<ul class="copies">{"".join(lines)}</ul>'


def attention_figure(weights: np.ndarray, labels: Sequence[str], title: str) -> Figure:
    """A figure of attention weights [T, T]: each row attends to the columns; future tokens stay white."""
    figure = Figure(figsize=(6, 5.2), layout="constrained", dpi=120)
    axes = figure.subplots()
    future = np.triu(np.ones_like(weights, dtype=bool), k=1)
    picture = axes.imshow(np.ma.array(weights, mask=future), cmap="viridis_r", vmin=0, interpolation="nearest")
    shown = [label if len(label) <= 10 else f"{label[:9]}…" for label in labels]
    size = 9 if len(shown) <= 16 else 8
    # a $ in a token must not start a formula
    axes.set_xticks(range(len(shown)), shown, rotation=90, fontsize=size, family="monospace", parse_math=False)
    axes.set_yticks(range(len(shown)), shown, fontsize=size, family="monospace", parse_math=False)
    axes.set_xlabel("token attended to")
    axes.set_ylabel("token that attends")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.colorbar(picture, ax=axes, label="attention weight (share of 1)", shrink=0.85)
    return figure


def sampling_sliders() -> list[Any]:
    """Sliders of Gradio for how the next token is chosen: max new tokens, temperature, top k, top p and seed."""
    import gradio as gr

    return [
        gr.Slider(1, 1000, 100, step=1, label="Max new tokens"),
        gr.Slider(0, 2, 0.8, step=0.05, label="Temperature", info="0: always the most likely token"),
        gr.Slider(0, 200, 50, step=1, label="Top k (tokens)", info="0: all"),
        gr.Slider(0.05, 1, 1, step=0.05, label="Top p (share of the probability)"),
        gr.Slider(0, 9999, 0, step=1, label="Seed"),
    ]


def problem_line(elem_id: str, visible: bool = True) -> Any:
    """The place on the page for an error message."""
    import gradio as gr

    return gr.HTML(visible=visible, elem_id=elem_id, elem_classes="problem")
