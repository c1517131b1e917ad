"""Train a LoRA adapter with PEFT, in a plain loop with Accelerate, and load it again.

    pip install peft
    python examples/peft_lora.py --model runs/quickstart --train_file my_text.txt --output_dir runs/lora

The end of the text is held out. Its loss is printed without the adapter, with it, and after loading it again.
`minigpt generate --model runs/lora` and the other commands take the output folder as well.
The model runs its own code (trust_remote_code): name only models that you trust.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def mean_loss(model: torch.nn.Module, blocks: torch.Tensor) -> float:
    """Nats per token of the blocks [N, T]."""
    model.eval()
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in blocks.split(8)]
    return sum(losses) / len(blocks)


def main() -> None:
    """Train an adapter, save it, and load it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--train_file", "--output_dir"):
        parser.add_argument(name, required=True)
    parser.add_argument("--num_train_epochs", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    args = parser.parse_args()
    # the adapter records where its base model is, so a folder gets its full path
    base = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
    try:
        text = Path(args.train_file).read_text(encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)
    except OSError as error:
        parser.error(str(error).splitlines()[0])
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))

    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    context = model.config.max_position_embeddings
    blocks = ids[: len(ids) // context * context].view(-1, context)
    if len(blocks) < 10:
        parser.error(f"train_file={args.train_file} has {len(ids)} tokens; give at least {10 * context}")
    held_out = len(blocks) // 10
    held_out, batches = blocks[-held_out:], DataLoader(blocks[:-held_out], batch_size=8, shuffle=True)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=args.learning_rate)

    accelerator = Accelerator()
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    held_out = held_out.to(accelerator.device)
    accelerator.print(f"held-out loss without the adapter: {mean_loss(model, held_out):.4f}")  # a new one adds zero
    for _ in range(args.num_train_epochs):
        model.train()
        for batch in batches:
            accelerator.backward(model(input_ids=batch, labels=batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.print(f"held-out loss with the adapter: {mean_loss(model, held_out):.4f}")
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
        loaded = AutoPeftModelForCausalLM.from_pretrained(args.output_dir, trust_remote_code=True)
        print(f"held-out loss when loaded again: {mean_loss(loaded.to(accelerator.device), held_out):.4f}")


if __name__ == "__main__":
    main()
