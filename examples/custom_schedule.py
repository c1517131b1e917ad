"""Train with a learning-rate schedule of your own: here, the inverse square root of "Attention Is All You Need".

    python examples/custom_schedule.py quickstart --warmup_steps 40 --output_dir runs/inverse_sqrt
    accelerate launch --config_file accelerate_configs/cpu_ddp.yaml examples/custom_schedule.py quickstart

The options are those of train_accelerate.py. The schedule is a function of the state of the run alone, so a resumed
run has the same rates. `arguments.yaml` does not know it: resume with this script too. The rates that were used are in
`metrics.jsonl`, as train/lr.
"""

from minigpt.training.run_length import RunLength
from minigpt.training.state import TrainingState
from train_accelerate import main


class InverseSquareRoot(RunLength):
    """Linear warm-up to the peak over `warmup_steps`, then a decay with the square root of the step."""

    def learning_rate(self, state: TrainingState) -> float:
        """The rate of AdamW in the next step; Muon's keeps its ratio to it."""
        progress = (state.step + 1) / max(1, self.schedule.warmup_steps)
        return self.schedule.learning_rate * min(progress, progress**-0.5)


if __name__ == "__main__":
    main(InverseSquareRoot)
