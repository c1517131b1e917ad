"""Train a MiniGPT with the Trainer of transformers, on a text file.

    python examples/transformers_trainer.py --model_name_or_path runs/quickstart --train_file my_text.txt \\
        --output_dir runs/trainer --num_train_epochs 1 --learning_rate 1e-3

The other options are those of transformers.TrainingArguments. The end of the text is held out; its loss is printed
before and after the training. The output folder is a complete model with its tokenizer.
The model runs its own code (trust_remote_code): name only models that you trust.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments
from transformers.data import default_data_collator


@dataclass
class TextConfig:
    model_name_or_path: str = field(metadata={"help": "Folder of a run, or a name on the Hub"})
    train_file: str = field(metadata={"help": "UTF-8 text; its last tenth is held out"})


def main() -> None:
    """Train with the options of the command line and save the model."""
    parser = HfArgumentParser((TextConfig, TrainingArguments), usage="%(prog)s [options]; --help lists them")
    text_config, training_args = parser.parse_args_into_dataclasses()
    name = text_config.model_name_or_path
    try:
        text = Path(text_config.train_file).read_text(encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    except OSError as error:
        parser.error(f"model={name}, train_file={text_config.train_file}: {str(error).splitlines()[0]}")

    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    *blocks, _ = ids.split(model.config.max_position_embeddings)  # the last one may be shorter
    if len(blocks) < 2:
        parser.error(f"train_file={text_config.train_file} has only {len(ids)} tokens; give more text")
    samples = [{"input_ids": block, "labels": block} for block in blocks]  # the model itself shifts the labels
    held_out = max(1, len(samples) // 10)
    trainer = Trainer(
        model,
        training_args,
        data_collator=default_data_collator,
        train_dataset=samples[:-held_out],
        eval_dataset=samples[-held_out:],
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    after = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        print(f"held-out loss: {before:.4f} nats per token before the training, {after:.4f} after it")


if __name__ == "__main__":
    main()
