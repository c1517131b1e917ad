"""Make the pictures and the numbers of docs/inside.md from the model that the quickstart trained.

    minigpt train quickstart
    python examples/inside.py --output_dir docs

Reads the folder runs/quickstart. First the Python blocks of the page run, in order; the page shows what they print.
Then each function below prints one table of the page or draws one of its pictures, as inside_*.png.

Shapes: B batch, T tokens, C hidden size, V vocabulary. Layers and heads are counted from 0.
"""

import argparse
import builtins
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from configuration_minigpt import MiniGPTConfig
from minigpt.generation.inspection import attention_weights, next_token_probabilities, token_label
from minigpt.modeling.loading import load_model
from minigpt.optim.muon import orthogonalize
from minigpt.training.plot import COLORS, STYLE
from minigpt.utils.errors import UserError, one_line_errors
from minigpt.utils.run_files import OPTIMIZER_FILE, find_checkpoints
from modeling_minigpt import MiniGPTForCausalLM

PAGE = Path(__file__).parents[1] / "docs" / "inside.md"
RUN = Path("runs", "quickstart")
SENTENCE = "Return True if the file (or directory"
LAYER, HEAD = 1, 2  # the head that attends to an opening bracket
MATRIX = "transformer.layers.1.mlp.up_proj.weight"


def run_page() -> None:
    """Run the Python blocks of the page, except those that quote a file, and print their output."""
    names: dict[str, Any] = {}
    for block in snippets(PAGE.read_text(encoding="utf-8")):
        print(f">>> {block.splitlines()[0]} ...")
        exec(block, names)


def snippets(page: str) -> list[str]:
    """The Python blocks of `page` that are no quotations: a quotation follows a line such as "`file.py`:"."""
    blocks = re.findall(r"^(.*)\n\n```python\n((?:.*\n)*?)```", page, re.MULTILINE)
    return [block for line_before, block in blocks if not line_before.endswith("`:")]


@torch.no_grad()
def additions(model: MiniGPTForCausalLM, ids: Tensor) -> list[tuple[str, Tensor]]:
    """Everything that is added to the residual stream, in order, each [B, T, C]; its sum is the stream at the end."""
    added: list[tuple[str, Tensor]] = []

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: added.append((name, output[0] if isinstance(output, tuple) else output))

    modules: list[tuple[str, nn.Module]] = [("embeddings", model.transformer.dropout)]
    for number, layer in enumerate(model.transformer.layers):
        modules += [(f"attention {number}", layer.self_attn), (f"MLP {number}", layer.mlp)]
    handles = [module.register_forward_hook(keep(name)) for name, module in modules]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return added


def streams(added: list[tuple[str, Tensor]]) -> list[Tensor]:
    """The residual stream [B, T, C] after each addition."""
    return list(torch.stack([tensor for _, tensor in added]).cumsum(0))


def closing_probability(model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> float:
    """The probability that the next token begins with a closing bracket."""
    best = next_token_probabilities(model, ids, model.config.vocab_size)
    return sum(probability for token, probability in best if token_label(tokenizer, token).startswith(")"))


@contextmanager
def without_head(model: MiniGPTForCausalLM, layer: int, head: int) -> Iterator[None]:
    """Inside the block, one head contributes nothing."""
    attention = model.transformer.layers[layer].self_attn
    columns = slice(head * attention.head_dim, (head + 1) * attention.head_dim)

    def silence(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        mixed = inputs[0].clone()
        mixed[..., columns] = 0.0
        return (mixed,)

    handle = attention.o_proj.register_forward_pre_hook(silence)
    yield
    handle.remove()


def draw_attention(model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """The weights of one head, and the probability of a closing bracket when one head after the other is silenced."""
    ids = tokenizer(SENTENCE).input_ids
    labels = [token_label(tokenizer, token) for token in ids]
    weights = attention_weights(model, ids, LAYER, HEAD)
    probability = closing_probability(model, tokenizer, ids)
    silenced = torch.zeros(model.config.num_hidden_layers, model.config.num_attention_heads)
    for layer, head in product(*map(range, silenced.shape)):
        with without_head(model, layer, head):
            silenced[layer, head] = closing_probability(model, tokenizer, ids)
    print(f"\nprobability of a closing bracket: {probability:.2f}; without one head (rows: layers, columns: heads)")
    print("\n".join("  ".join(f"{value:.2f}" for value in row) for row in silenced.tolist()))

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4), width_ratios=(1.25, 1), layout="constrained")
    draw_numbers(left, weights.masked_fill(torch.ones_like(weights).triu(1).bool(), torch.nan), 1.0)
    left.set_xticks(range(len(labels)), labels, rotation=45, family="monospace")
    left.set_yticks(range(len(labels)), labels, family="monospace")
    left.set_title(f"Attention weights of layer {LAYER}, head {HEAD}", loc="left")
    left.set_xlabel("token attended to")
    left.set_ylabel("token that attends")
    draw_numbers(right, silenced, probability)
    right.set_title(f"P(closing bracket) without one head\nwith all heads: {probability:.2f}", loc="left")
    right.set_xlabel("head")
    right.set_ylabel("layer")
    right.set_yticks(range(len(silenced)))
    save(figure, file)


def draw_numbers(panel: Any, values: Tensor, largest: float) -> None:
    """A matrix as colors and numbers; NaN stays empty."""
    panel.imshow(values, cmap="Blues", vmin=0, vmax=2 * largest, aspect="auto")  # 2: light enough for dark text
    for row, column in (~values.isnan()).nonzero().tolist():
        panel.text(column, row, f"{values[row, column]:.2f}", ha="center", va="center", fontsize=8)
    panel.grid(False)


def draw_residual_stream(model: MiniGPTForCausalLM, ids: Tensor, file: Path) -> None:
    """How long the vectors are that each part adds, and the residual stream after it: means over all tokens."""
    added = additions(model, ids)
    names = [name for name, _ in added]
    added_norms = [float(tensor.norm(dim=-1).mean()) for _, tensor in added]
    stream_norms = [float(stream.norm(dim=-1).mean()) for stream in streams(added)]
    print("\npart           it adds  stream after it")
    for name, added_norm, stream_norm in zip(names, added_norms, stream_norms, strict=True):
        print(f"{name:<13}{added_norm:>9.1f}{stream_norm:>17.1f}")

    figure, panel = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    colors = [COLORS[1] if name.startswith("MLP") else COLORS[0] for name in names]
    panel.bar(names, added_norms, color=["gray", *colors[1:]], width=0.6)
    panel.plot(names, stream_norms, "o-", color="black", markersize=4, label="residual stream after it")
    panel.set_ylabel("mean norm of the vectors")
    panel.set_title("What each part adds to the residual stream", loc="left")
    panel.tick_params(axis="x", rotation=30)
    panel.legend(frameon=False)
    save(figure, file)


@torch.no_grad()
def print_logit_lens(model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """What the model would predict if it ended after each layer."""
    added = additions(model, tokenizer(SENTENCE, return_tensors="pt").input_ids)
    print("\n| after | most likely next tokens |\n|---|---|")
    for (name, _), stream in zip(added, streams(added), strict=True):
        if name.startswith("attention"):
            continue
        logits = model.lm_head(model.transformer.norm(stream[0, -1]))
        best = logits.softmax(-1).topk(3)
        cells = [
            f"`{token_label(tokenizer, token)}` {share:.2f}"
            for token, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        print(f"| {name.replace('MLP', 'layer')} | {', '.join(cells)} |")


def draw_initialization(config: MiniGPTConfig, ids: Tensor, file: Path) -> None:
    """The size of the residual stream in new models of several depths, with and without the scaled projections."""
    figure, panel = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    print("\nlayers  scaled  not scaled   (root mean square at the end)")
    for depth, color in zip((4, 12, 48), COLORS, strict=False):
        torch.manual_seed(0)
        model = MiniGPTForCausalLM(MiniGPTConfig(**config.to_dict() | {"num_hidden_layers": depth})).eval()
        scaled = root_mean_squares(additions(model, ids))
        for module in model.modules():
            if getattr(module, "feeds_residual", False):
                module.weight.data *= (2 * depth) ** 0.5  # now 0.02, as all other matrices
        unscaled = root_mean_squares(additions(model, ids))
        print(f"{depth:>6}{scaled[-1]:>8.2f}{unscaled[-1]:>12.2f}")
        share_of_depth = torch.linspace(0, 1, len(scaled))
        panel.plot(share_of_depth, scaled, color=color, label=f"{depth} layers, scaled")
        panel.plot(share_of_depth, unscaled, "--", color=color, label=f"{depth} layers, not scaled")
    panel.set_xlabel("share of the layers passed")
    panel.set_ylabel("root mean square\nof the residual stream")
    panel.set_title("New models: the residual stream from layer to layer", loc="left")
    panel.legend(frameon=False)
    save(figure, file)


def root_mean_squares(added: list[tuple[str, Tensor]]) -> list[float]:
    return [float(stream.square().mean().sqrt()) for stream in streams(added)]


def draw_singular_values(momentum: Tensor, file: Path) -> None:
    """The singular values of a momentum matrix divided by its norm, and of the updates that Muon makes of it."""
    figure, panel = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    updates = {"momentum": momentum / momentum.norm()}
    updates |= {f"after {steps} steps": orthogonalize(momentum[None], steps)[0] for steps in (3, 5)}
    print("\n| matrix | largest | median | last but one | last | the ten largest, in % of the sum of squares |")
    print("|---|---:|---:|---:|---:|---:|")
    for (name, matrix), color in zip(updates.items(), COLORS, strict=False):
        values = torch.linalg.svdvals(matrix)
        percent = 100 * values[:10].square().sum() / values.square().sum()
        shown = " | ".join(f"{value:.4f}" for value in values[[0, len(values) // 2, -2, -1]])
        print(f"| {name} | {shown} | {percent:.0f} |")
        panel.plot(range(1, len(values) + 1), values, color=color, label=name)
    panel.set_yscale("log")
    panel.set_xlabel("singular value, the largest first")
    panel.set_title(f"Singular values of {MATRIX.removeprefix('transformer.')}", loc="left")
    panel.legend(frameon=False)
    save(figure, file)


def save(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    print(f"\n{file}")


def built_in_docs(tokenizer: PreTrainedTokenizerBase, rows: int, columns: int) -> Tensor:
    """Token ids [rows, columns] of the docstrings of Python's built-in names, joined."""
    texts = [doc for _, value in sorted(vars(builtins).items()) if (doc := value.__doc__)]
    ids = [token for text in texts for token in [*tokenizer(text, truncation=True).input_ids, tokenizer.eos_token_id]]
    return torch.tensor(ids[: rows * columns]).view(rows, columns)


def main() -> None:
    """Print the numbers of the page and draw its pictures into the folder of the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path(), help="where the pictures go; default: here")
    folder = parser.parse_args().output_dir
    checkpoints = find_checkpoints(RUN)
    moments = load_file(checkpoints[-1] / OPTIMIZER_FILE) if checkpoints else {}
    if f"{MATRIX}.momentum" not in moments:
        raise UserError(f"no checkpoint of Muon in {RUN}; make one with `minigpt train quickstart`")
    model, tokenizer = load_model(RUN, device="cpu"), AutoTokenizer.from_pretrained(RUN)
    folder.mkdir(parents=True, exist_ok=True)
    run_page()
    text = built_in_docs(tokenizer, rows=16, columns=model.config.max_position_embeddings)
    with pyplot.rc_context(STYLE):
        draw_attention(model, tokenizer, folder / "inside_attention.png")
        draw_residual_stream(model, text, folder / "inside_residual_stream.png")
        print_logit_lens(model, tokenizer)
        draw_initialization(model.config, text, folder / "inside_initialization.png")
        draw_singular_values(moments[f"{MATRIX}.momentum"], folder / "inside_muon.png")


if __name__ == "__main__":
    matplotlib.use("agg")
    with one_line_errors("inside.py"):
        main()
