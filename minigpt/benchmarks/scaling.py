"""The study behind `--train_minutes`: small models over shape, vocabulary, length and learning rate, on real texts."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from minigpt.experiments.runs import PlannedRun, Result
from minigpt.planning.scaling_law import FEWEST_RUNS, Fit, ModelSize, Observation, fit, fit_texts
from minigpt.utils.files import write_atomically
from minigpt.utils.formatting import markdown_table
from minigpt.utils.run_files import DATA_FILE

PROGRAM = "minigpt bench scaling"
RUNS_FILE = "scaling.jsonl"

# (hidden_size, num_hidden_layers, steps) of the runs for the law: on the first text, the second, and each other one
FIRST_TEXT = (
    *((64, 2, steps) for steps in (150, 600, 1500)),
    *((128, 4, steps) for steps in (100, 250, 600, 1500)),
    *((192, 4, steps) for steps in (250, 600)),
    (256, 6, 250),
)
SECOND_TEXT = ((64, 2, 600), (128, 4, 150), (128, 4, 600), (192, 4, 400))
OTHER_TEXTS = ((64, 2, 600), (128, 4, 250))
VOCABULARY, OTHER_VOCABULARIES = 4096, (1024, 2048, 8192, 16384)
# of the last text, which should be small: (hidden_size, num_hidden_layers, steps, dropout, weight_decay)
REPETITION = (
    *((128, 4, 1500, dropout, 0.0) for dropout in (0.0, 0.1, 0.2)),
    (128, 4, 1500, 0.0, 0.1),
    (64, 2, 1500, 0.0, 0.0),
    (192, 4, 600, 0.0, 0.0),
)
RATE_SHAPES = ((128, 4), (256, 4), (512, 4), (128, 2), (128, 8))  # (hidden_size, num_hidden_layers)
RATES = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08)  # of Muon or of AdamW, while the other has 0.02
BASE = {
    "tokenizer": "bpe", "block_size": 128, "per_device_train_batch_size": 16, "optimizer": "muon",
    "learning_rate": 0.02, "muon_learning_rate": 0.02, "muon_momentum": 0.9, "muon_ns_steps": 3,
    "lr_scheduler_type": "linear", "warmup_steps": 10, "per_device_eval_batch_size": 64, "eval_steps": 0,
    "save_steps": 0, "logging_steps": 1000, "sample_max_new_tokens": 1, "report_to": "none",
    "validation_split_percentage": 5,
}  # fmt: skip


@dataclass(frozen=True)
class StudyRun:
    """One run: which question it belongs to, its text, and what differs from `BASE`."""

    question: str  # law, vocabulary, repetition, muon_rate or adamw_rate
    text: str
    vocabulary: int
    hidden_size: int
    layers: int
    steps: int
    muon_rate: float = 0.02
    adamw_rate: float = 0.02
    batch: int = 16
    dropout: float = 0.0
    weight_decay: float = 0.0

    @property
    def name(self) -> str:
        return (
            f"{self.text}-v{self.vocabulary}-w{self.hidden_size}-l{self.layers}-s{self.steps}-b{self.batch}"
            f"-m{self.muon_rate:g}-a{self.adamw_rate:g}-d{self.dropout:g}"
            f"-wd{self.weight_decay:g}"
        )

    def words(self, source: Sequence[str]) -> list[str]:
        """The command line of the run."""
        options = BASE | {
            "tokenizer_vocab_size": self.vocabulary,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden_size // 32,
            "max_steps": self.steps,
            "muon_learning_rate": self.muon_rate,
            "learning_rate": self.adamw_rate,
            "per_device_train_batch_size": self.batch,
            "dropout": self.dropout,
            "weight_decay": self.weight_decay,
        }
        return [*source, *(f"--{name}={value}" for name, value in options.items())]


def study_runs(texts: Sequence[str]) -> Iterator[StudyRun]:
    """All runs. The first text gets every shape and the learning rates, the last one is repeated with dropout."""
    shapes = chain([FIRST_TEXT, SECOND_TEXT], repeat(OTHER_TEXTS))
    for text, runs in zip(texts, shapes, strict=False):
        for hidden_size, layers, steps in runs:
            yield StudyRun("law", text, VOCABULARY, hidden_size, layers, steps)
    for text in texts[:2]:
        for vocabulary in OTHER_VOCABULARIES:
            yield StudyRun("vocabulary", text, vocabulary, 128, 4, 250)
    for hidden_size, layers, steps, dropout, decay in REPETITION:
        yield StudyRun(
            "repetition", texts[-1], VOCABULARY, hidden_size, layers, steps, dropout=dropout, weight_decay=decay
        )
    for hidden_size, layers in RATE_SHAPES:
        for rate in RATES:
            yield StudyRun("muon_rate", texts[0], VOCABULARY, hidden_size, layers, 120, muon_rate=rate, batch=8)
        for rate in RATES:
            yield StudyRun("adamw_rate", texts[0], VOCABULARY, hidden_size, layers, 120, adamw_rate=rate, batch=8)


def run_study(
    texts: dict[str, list[str]],
    output_dir: Path,
    questions: Sequence[str],
    parallel: int = 1,
    report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Train all runs that are not finished yet. Returns a row for each; the same go to scaling.jsonl.

    texts: name → the words that give its source, such as ["--train_file", "kjv.txt"].
    """

    def train(study_run: StudyRun) -> Result:
        plan = PlannedRun(study_run.words(texts[study_run.text]), output_dir / study_run.name)
        environment = {"OMP_NUM_THREADS": "1"} if parallel > 1 else {}
        result = plan.train(plan.arguments(PROGRAM), environment=environment)
        report(f"{study_run.name}: {result.bits_per_byte:.4f} bits per byte after {result.elapsed_s:.0f} s")
        return result

    def row(study_run: StudyRun, result: Result) -> dict[str, Any]:
        measured = {"bits_per_byte": result.bits_per_byte, "elapsed_s": result.elapsed_s}
        return asdict(study_run) | run_facts(study_run, result.run_dir) | measured

    chosen = list(dict.fromkeys(run for run in study_runs(list(texts)) if run.question in questions))
    by_name = {run.name: run for run in chosen}  # the same run may belong to two questions
    with ThreadPoolExecutor(parallel) as pool:
        results = dict(zip(by_name, pool.map(train, by_name.values()), strict=True))
    rows = [row(run, results[run.name]) for run in chosen]
    write_atomically(output_dir / RUNS_FILE, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def fitted_law(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The law fitted to the runs with the usual rates and without dropout, its errors, and those on unseen runs."""
    runs = [
        Observation(
            row["text"],
            row["vocabulary"],
            ModelSize(row["layer_parameters"], row["parameters"] - row["layer_parameters"]),
            row["text_bytes"],
            row["epochs"],
            row["bits_per_byte"],
        )
        for row in rows
        if row["question"] in ("law", "vocabulary", "repetition") and not row["dropout"] and not row["weight_decay"]
    ]
    if len(runs) < FEWEST_RUNS:
        return [f"{len(runs)} runs are too few for the law; give more texts"]
    found = fit(runs)
    lines = [f"{found.law}"]
    lines.append(f"slopes: {', '.join(f'{name} {text.slope:.2f}' for name, text in found.texts.items())}")
    lines.append(f"error on these {len(runs)} runs: {_errors(found, runs)}")
    longest = max(run.text_bytes for run in runs)
    shorter = [run for run in runs if run.text_bytes < longest]
    rest = [run for run in runs if run.text_bytes == longest]
    lines.append(f"on the longest, fitted to the others: {_errors(fit(shorter), rest)}")
    for text in found.texts:
        others, own = [run for run in runs if run.text != text], [run for run in runs if run.text == text]
        if len(others) >= FEWEST_RUNS and len(own) > 1:
            lines.append(
                f"on {text}, with the constants of the other texts: {_errors(fit_texts(own, fit(others).law), own)}"
            )
    return lines


def rate_tables(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table for each question about rates: the loss by shape and rate, and the best rate of each shape."""
    tables = []
    for question, name in (("muon_rate", "Muon's rate"), ("adamw_rate", "AdamW's rate")):
        losses: dict[tuple[int, int], dict[float, float]] = defaultdict(dict)  # width, layers → rate → loss
        for row in rows:
            if row["question"] == question:
                losses[row["hidden_size"], row["layers"]][row[question]] = row["bits_per_byte"]
        if losses:
            rates = sorted(set(chain(*losses.values())))
            head = (f"width x layers, {name}", *(f"{rate:g}" for rate in rates), "best")
            cells = [
                (f"{width} x {layers}", *(f"{of_rate[rate]:.3f}" for rate in rates), f"{best_rate(of_rate):.3g}")
                for (width, layers), of_rate in sorted(losses.items())
            ]
            tables.append(markdown_table(head, cells, numeric=True))
    return tables


def best_rate(losses: dict[float, float]) -> float:
    """The rate with the lowest loss, by a parabola over the logarithm through the lowest point and its neighbours.

    losses: rate → loss, with rates a constant factor apart. If the lowest is the first or last, it is the best.
    """
    rates = sorted(losses)
    lowest = min(range(len(rates)), key=lambda place: losses[rates[place]])
    if lowest in (0, len(rates) - 1):
        return rates[lowest]
    below, here, above = (losses[rates[place]] for place in (lowest - 1, lowest, lowest + 1))
    shift = (below - above) / (2 * (below - 2 * here + above))  # in steps of the grid, at most half of one
    return rates[lowest] * (rates[lowest + 1] / rates[lowest]) ** shift


def _errors(found: Fit, runs: Sequence[Observation]) -> str:
    errors = [found.predict(run) / run.loss - 1 for run in runs]
    mean_square = sum(error**2 for error in errors) / len(errors)
    return f"{mean_square**0.5:.1%} (root mean square), largest {max(errors, key=abs):+.1%}"


def run_facts(study_run: StudyRun, run_dir: Path) -> dict[str, float]:
    """Parameters of the layers, parameters in all, and bytes of text that the run has read."""
    data = json.loads((run_dir / DATA_FILE).read_text(encoding="utf-8"))
    train = data["splits"]["train"]
    tokens = study_run.steps * study_run.batch * 128
    size = ModelSize.of(study_run.hidden_size, study_run.layers, study_run.vocabulary)
    return {
        "layer_parameters": size.layers,
        "parameters": size.layers + size.embeddings,
        "tokens": tokens,
        "text_bytes": tokens * train["text_bytes"] / train["tokens"],
        "epochs": tokens / train["tokens"],
    }
