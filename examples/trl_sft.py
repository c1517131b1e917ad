"""Fine-tune a model on conversations with TRL's SFTTrainer. Only what the assistant says is in the loss.

    pip install trl peft
    python examples/trl_sft.py --model_name_or_path runs/quickstart_chat --train_file chats.jsonl --output_dir runs/sft
    minigpt chat --model runs/sft

Each line of the file has a conversation:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

The options are those of trl.SFTConfig (--learning_rate, --packing ...) and trl.ModelConfig (--use_peft, --lora_r ...).
The output folder is a complete model with its tokenizer; with --use_peft, an adapter.
The model runs its own code (trust_remote_code): name only models that you trust.
"""

from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config


@dataclass
class ConversationsConfig:
    train_file: str = field(metadata={"help": "JSONL file; each line has the field messages"})


def main() -> None:
    """Train with the options of the command line and save the model."""
    parser = TrlParser((ConversationsConfig, SFTConfig, ModelConfig), usage="%(prog)s [options]; --help lists them")
    # the chat templates of MiniGPT mark the assistant's words with {% generation %}, which assistant_only_loss needs
    parser.set_defaults(assistant_only_loss=True, bf16=torch.accelerator.is_available())
    parser.set_defaults(lora_target_modules=["all-linear"])  # PEFT has no default layers for MiniGPT
    data_config, training_config, model_config = parser.parse_args_and_config()
    name = model_config.model_name_or_path
    if name is None:
        parser.error("the following arguments are required: --model_name_or_path")
    try:
        conversations = load_dataset("json", data_files=data_config.train_file, split="train")
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=model_config.dtype, trust_remote_code=True)
    except (OSError, DatasetGenerationError) as error:
        parser.error(f"{name}, {data_config.train_file}: {str(error.__cause__ or error).splitlines()[0]}")
    if not tokenizer.chat_template and training_config.chat_template_path is None:
        parser.error(f"the tokenizer of {name} has no chat template; name a model that chats, or --chat_template_path")
    # TRL's default of 1,024 tokens is more than the position table of a small model has
    training_config.max_length = min(training_config.max_length, model.config.max_position_embeddings)

    peft_config = get_peft_config(model_config)
    trainer = SFTTrainer(
        model, training_config, train_dataset=conversations, processing_class=tokenizer, peft_config=peft_config
    )
    trainer.train(resume_from_checkpoint=training_config.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
