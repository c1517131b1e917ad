"""The summary of a run that is printed before its first step."""

from accelerate import Accelerator

from configuration_minigpt import MiniGPTConfig
from minigpt.config.arguments import Arguments
from minigpt.data.datamodule import DataModule, samples_per_step
from minigpt.data.packing import PackedDocuments
from minigpt.data.shards import TokenShards

PRECISION_NAMES = {"no": "float32", "bf16": "bfloat16 (mixed)", "fp16": "float16 (mixed)"}


def describe(
    args: Arguments,
    accelerator: Accelerator,
    config: MiniGPTConfig,
    parameters: int,
    trained: int,
    shards: TokenShards,
    data_module: DataModule,
    max_steps: int,
) -> str:
    """Model, data, step, length and device of a run, one line each. `trained` of the `parameters` are not frozen."""
    processes, per_step = accelerator.num_processes, samples_per_step(args, accelerator.num_processes)
    steps_per_epoch = data_module.order.samples_per_epoch / per_step
    validation = f"{len(shards.validation):,} validation tokens" if shards.validation else "no validation split"
    places = "tokens" if data_module.train.targets_per_sample else "token positions"
    precision = PRECISION_NAMES.get(accelerator.mixed_precision, accelerator.mixed_precision)
    compiled = "" if accelerator.state.dynamo_plugin.backend == "NO" else ", compiled"
    base = parameters - trained if args.use_peft else parameters
    length = f"{max_steps:,} steps = {max_steps / steps_per_epoch:.2f} epochs of {steps_per_epoch:,.1f} steps"
    if args.train_minutes:
        minutes = f"{args.train_minutes:g} minute{'' if args.train_minutes == 1 else 's'}"
        length = f"{minutes} of training; an epoch has {steps_per_epoch:,.1f} steps"
    lines = {
        "model": f"{base / 1e6:.2f}M parameters: {config.num_hidden_layers} layers, {config.hidden_size} wide, "
        f"{config.num_attention_heads} heads, vocabulary of {config.vocab_size:,}",
        **({"adapter": _adapter(args, parameters, trained)} if args.use_peft else {}),
        "data": f"{len(shards.train):,} training tokens in {data_module.order.samples_per_epoch:,} samples, "
        f"{validation}",
        **({"packing": str(data_module.train)} if isinstance(data_module.train, PackedDocuments) else {}),
        "step": f"{per_step * args.block_size:,} {places} = {args.per_device_train_batch_size} samples x "
        f"{args.gradient_accumulation_steps} micro-batches x {processes} processes x {args.block_size} tokens",
        "length": length,
        "device": f"{processes} x {accelerator.device.type}, {precision}{compiled}",
        "output": str(args.run_dir),
    }
    return "\n".join(f"  {name:<7} {text}" for name, text in lines.items())


def _adapter(args: Arguments, parameters: int, trained: int) -> str:
    modules = "all linear layers" if args.lora_target_modules is None else ", ".join(args.lora_target_modules)
    return f"LoRA of rank {args.lora_r} on {modules}: {trained:,} parameters are trained, {trained / parameters:.2%}"
