"""Train a LoRA adapter with PEFT, in a plain loop with Accelerate, and load it again.

    pip install peft
    python examples/peft_lora.py runs/quickstart my_text.txt runs/lora

The last eight blocks of the text are held out. Their loss is printed before, after, and when loaded from runs/lora.
The model runs its own code (trust_remote_code): name only models that you trust.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Train an adapter for one epoch, save it, and load it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "train_file", "output_dir"):
        parser.add_argument(name)
    args = parser.parse_args()
    # the adapter records where its base model is, so a folder gets its full path
    base = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
    try:
        text = Path(args.train_file).read_text(encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)
    except OSError as error:
        parser.error(f"model={base}, train_file={args.train_file}: {str(error).splitlines()[0]}")
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    *blocks, _ = ids.split(model.config.max_position_embeddings)  # the last one may be shorter
    if len(blocks) <= 8:
        parser.error(f"train_file={args.train_file} has only {len(ids)} tokens; give more text")

    accelerator = Accelerator()
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
    model, optimizer, batches = accelerator.prepare(model, optimizer, DataLoader(blocks[:-8], 8, shuffle=True))
    held_out = torch.stack(blocks[-8:]).to(accelerator.device)
    accelerator.print(f"before the training: {model.eval()(held_out, labels=held_out).loss:.4f} nats per token")
    model.train()
    for batch in batches:
        accelerator.backward(model(batch, labels=batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.print(f"after the training: {model.eval()(held_out, labels=held_out).loss:.4f} nats per token")
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
        loaded = AutoPeftModelForCausalLM.from_pretrained(args.output_dir, trust_remote_code=True).to(held_out.device)
        print(f"loaded from {args.output_dir}: {loaded(held_out, labels=held_out).loss:.4f} nats per token")


if __name__ == "__main__":
    main()
