"""HTML and figures that the playground shows."""

import html
from typing import Any

from minigpt.training.plot import COLOURS

# for a page of Gradio, whose colours and fonts it takes over
BARS_CSS = f"""
.bars {{display: grid; grid-template-columns: max-content 1fr max-content; gap: .75em .7em; align-items: center}}
.bars .token {{font-family: var(--font-mono); text-align: right; max-width: 11em; overflow: hidden;
              text-overflow: ellipsis; white-space: nowrap}}
.bars .bar {{background: {COLOURS[0]}; height: 1.15em; border-radius: 2px; min-width: 1px}}
.bars .share {{font-variant-numeric: tabular-nums; text-align: right}}
.caption {{opacity: .75; font-size: .85em; margin-bottom: 1em}}
"""


def bars_html(shares: list[tuple[str, float]]) -> str:
    """Horizontal bars, one a (label, probability), with the probability in per cent behind each."""
    longest = max(share for _, share in shares)
    rows = "".join(
        f'<span class="token" title="{html.escape(label)}">{html.escape(label)}</span>'
        f'<span class="bar" style="width: {100 * share / longest:.1f}%"></span>'
        f'<span class="share">{100 * share:.1f} %</span>'
        for label, share in shares
    )
    total = 100 * sum(share for _, share in shares)
    caption = f"probability in %, before temperature, top k and top p; together {total:.0f} %"
    return (
        f'<b>The likeliest next tokens</b><div class="caption">{caption}</div>'
        f'<div class="bars" role="img" aria-label="{caption}">{rows}</div>'
    )


def attention_figure(weights: Any, labels: list[str], title: str) -> Any:
    """A matplotlib figure of attention weights [T, T]: rows look, columns are looked at; the future is left white."""
    import numpy as np
    from matplotlib.figure import Figure  # not pyplot: pages are drawn in several threads

    figure = Figure(figsize=(6, 5.2), layout="constrained", dpi=120)
    axes = figure.subplots()
    future = np.triu(np.ones_like(weights, dtype=bool), k=1)
    picture = axes.imshow(np.ma.array(weights, mask=future), cmap="viridis_r", vmin=0, interpolation="nearest")
    shown = [label if len(label) <= 10 else f"{label[:9]}…" for label in labels]
    size = 9 if len(shown) <= 16 else 8
    # tokens may hold $ and glyphs of any script: no mathematics, and no warning for a glyph that is missing
    axes.set_xticks(range(len(shown)), shown, rotation=90, fontsize=size, family="monospace", parse_math=False)
    axes.set_yticks(range(len(shown)), shown, fontsize=size, family="monospace", parse_math=False)
    axes.set_xlabel("token that is looked at")
    axes.set_ylabel("token that looks")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.colorbar(picture, ax=axes, label="attention weight (share of 1)", shrink=0.85)
    return figure
