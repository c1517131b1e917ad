"""Teach a model to prefer one answer over another: direct preference optimization (DPO) with TRL.

    pip install trl peft
    python examples/dpo.py --model_name_or_path runs/chat --train_file pairs.jsonl --output_dir runs/dpo

Each line of the file has a prompt, a chosen and a rejected answer; all are lists of messages, or all are strings:

    {"prompt": [{"role": "user", "content": "..."}],
     "chosen": [{"role": "assistant", "content": "..."}], "rejected": [{"role": "assistant", "content": "..."}]}

The options are those of trl.DPOConfig (--beta, --learning_rate ...) and trl.ModelConfig (--use_peft, --lora_r ...).
The output folder is a complete model with its tokenizer; with --use_peft, its subfolder `adapter` has the adapter.
The model runs its own code (trust_remote_code): name only models that you trust.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, ModelConfig, TrlParser, get_peft_config

FIELDS = ("prompt", "chosen", "rejected")


@dataclass
class PairsConfig:
    train_file: str = field(metadata={"help": "JSONL file with the fields prompt, chosen and rejected"})
    eval_file: str | None = field(default=None, metadata={"help": "the same for --eval_strategy steps or epoch"})


def load_pairs(file: str) -> Dataset:
    if not Path(file).is_file() or not Path(file).stat().st_size:
        sys.exit(f"{file}: there is no such file, or it is empty")
    try:
        pairs = load_dataset("json", data_files=file, split="train")
    except DatasetGenerationError as error:
        sys.exit(f"{file}: not a JSONL file with the same fields in every line: {error.__cause__ or error}")
    for name in FIELDS:
        values = pairs[name][:] if name in pairs.column_names else [None]
        if None in values:
            sys.exit(f"{file}:{values.index(None) + 1}: no field {name!r}; every line needs {', '.join(FIELDS)}")
    return pairs


def main() -> None:
    """Train with the options of the command line and save the model."""
    parser = TrlParser((PairsConfig, DPOConfig, ModelConfig), usage="%(prog)s [options]; --help lists them")
    # TRL loads the reference model by itself; PEFT has no default layers for MiniGPT
    parser.set_defaults(trust_remote_code=True, lora_target_modules=["all-linear"])
    data_config, training_config, model_config = parser.parse_args_and_config()
    if model_config.model_name_or_path is None:
        parser.error("the following arguments are required: --model_name_or_path")
    train_pairs = load_pairs(data_config.train_file)
    eval_pairs = load_pairs(data_config.eval_file) if data_config.eval_file else None

    name, revision = model_config.model_name_or_path, model_config.model_revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype=model_config.dtype,
            attn_implementation=model_config.attn_implementation,
            trust_remote_code=True,
        )
    except OSError as error:
        sys.exit(f"model_name_or_path={name}: {str(error).splitlines()[0]}")
    if not isinstance(train_pairs[0]["prompt"], str) and not tokenizer.chat_template:
        sys.exit(f"{data_config.train_file} has messages, but the tokenizer of {name} has no chat template")
    # TRL's default of 1,024 tokens is more than the position table of a small model has
    training_config.max_length = min(training_config.max_length, model.config.max_position_embeddings)

    trainer = DPOTrainer(
        model,
        args=training_config,
        train_dataset=train_pairs,
        eval_dataset=eval_pairs,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_config),
    )
    trainer.train(resume_from_checkpoint=training_config.resume_from_checkpoint)
    output_dir = Path(training_config.output_dir)
    if model_config.use_peft:
        trainer.save_model(str(output_dir / "adapter"))
        trainer.model = trainer.model.merge_and_unload()
    trainer.save_model(str(output_dir))


if __name__ == "__main__":
    main()
