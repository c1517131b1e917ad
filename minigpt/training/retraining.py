"""Train stretches of a run again: the process that `minigpt audit` starts.

    python -m minigpt.training.retraining REQUEST.json

The request has for each stretch the options, the checkpoint that it begins at (None: the beginning of the run), its
last step, and a folder for its checkpoint. Without a step to make, the validation loss is measured instead. What comes
out is written to the file `answer` of the request.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from minigpt.config.parser import parse_arguments
from minigpt.training.run_dir import OutputDir
from minigpt.utils.errors import one_line_errors


def retrain(options: list[str], start: str | None, end: int, folder: str) -> dict[str, Any]:
    """Train from the checkpoint `start` to the step `end`. Returns the metrics of each step, and the counters.

    Nothing is logged, evaluated or published on the way; after the last step a checkpoint is written into `folder`.
    """
    trainer: Any = importlib.import_module("train_accelerate")
    resume = ["--resume_from_checkpoint", start] if start is not None else []
    args = parse_arguments([*options, "--output_dir", folder, *resume])
    with OutputDir(args) as output_dir:
        run = trainer.set_up(args, output_dir)
        run.model.train()
        if run.state.step == end:
            return {"val/loss": run.validation.run(run.model, run.accelerator)["val/loss"]}
        steps = {}
        while run.state.step < end:
            learning_rate = run.length.learning_rate(run.state)
            loss, grad_norm = trainer.take_step(run, learning_rate)
            run.skipped_steps.settle(run.state, run.model)
            mean_loss = float(run.accelerator.reduce(loss, "mean"))
            steps[run.state.step] = {
                "train/loss": mean_loss, "train/lr": learning_rate, "train/grad_norm": float(grad_norm)
            }  # fmt: skip
        run.checkpoints.save(run.state, run.model, run.optimizer, run.accelerator, stopping=True)
        return {"steps": steps}


def main() -> None:
    """Train the stretches of a request, in the order it has them."""
    with one_line_errors("retraining"):
        request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
        answers = [retrain(**stretch) for stretch in request["stretches"]]
    Path(request["answer"]).write_text(json.dumps(answers), encoding="utf-8")  # every rank has the same


if __name__ == "__main__":
    main()
