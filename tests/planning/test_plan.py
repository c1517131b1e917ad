"""Laws of `minigpt plan`: its figures describe the run that the trainer would start, and bad input is one line."""

import itertools
import json
import random
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from configuration_minigpt import MiniGPTConfig
from minigpt.cli import main
from minigpt.commands import train
from minigpt.config.arguments import Arguments
from minigpt.config.parser import parse_arguments
from minigpt.config.presets import find_profile, presets
from minigpt.data.datamodule import load_data, open_data_module, steps_of_run
from minigpt.modeling.activation_checkpointing import enable_activation_checkpointing
from minigpt.planning import step_time
from minigpt.planning.memory import TrainingSetup, peak_bytes
from minigpt.planning.plan import plan_run, planned_config, planned_steps
from minigpt.training.launch import split_words
from minigpt.training.setup import build_model
from minigpt.utils.errors import UserError
from minigpt.utils.hardware import GPUS
from modeling_minigpt import MiniGPTForCausalLM
from support.runs import ROOT
from support.tiny import byte_tokenizer

TINY_SHAPE = (
    "--tokenizer_vocab_size 300 --hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 --block_size 16"
)
TINY_RUN = "--per_device_train_batch_size 4 --gradient_accumulation_steps 6 --max_steps 12 --use_cpu"
TINY = f"{TINY_SHAPE} {TINY_RUN}".split()
PARALLELISM = {"one": [], "DDP": [], "FSDP2": ["--fsdp"], "HSDP": ["--hsdp"]}

TOKENIZER_IDS = {"bos_token_id", "eos_token_id", "pad_token_id"}  # decide neither memory nor time


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    main(["plan", "quickstart", *TINY, "--json", *words])
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that bad input gives."""
    with pytest.raises(SystemExit) as stop:
        main(["plan", *words])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def decisive(config: MiniGPTConfig) -> dict:
    """The fields of a configuration that decide memory and time."""
    fields = config.__dataclass_fields__.keys() - type(config).__mro__[1].__dataclass_fields__.keys() - TOKENIZER_IDS
    assert {"hidden_size", "vocab_size", "attn_pdrop", "max_position_embeddings"} <= fields
    return {name: getattr(config, name) for name in fields}


@pytest.fixture(scope="module")
def text_with_many_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough different pairs of characters for a BPE vocabulary of a few thousand ids."""
    letters = random.Random(0)
    words = ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=9)) for _ in range(1500)]
    path = tmp_path_factory.mktemp("pairs") / "text.txt"
    path.write_text(" ".join(words * 2), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow GPT-2 with a tokenizer, which takes the place of openai-community/gpt2."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = byte_tokenizer(bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=16, n_layer=2, n_head=2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("preset", sorted(presets()))
@pytest.mark.parametrize("extra", [[], ["--dropout", "0.2", "--pad_vocab_size_to_multiple_of", "64"]])
def test_planned_config_is_that_of_the_model_the_trainer_builds(
    preset: str,
    extra: list[str],
    text_with_many_pairs: Path,
    gpt2_folder: Path,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [preset, "--train_file", str(text_with_many_pairs), "--cache_dir", str(cache_dir)]
    words += ["--preprocessing_num_workers", "1"]
    args = parse_arguments(words)
    if args.model_name_or_path is not None:
        words += ["--model_name_or_path", str(gpt2_folder)]
    if args.chat_template is not None:
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        rows = text_with_many_pairs.with_name("rows.jsonl")
        rows.write_text(f"{json.dumps({'messages': turns})}\n" * 4, encoding="utf-8")
        words += ["--train_file", str(rows)]
    if args.tokenizer not in (None, "bpe", "char"):
        words += ["--tokenizer", str(gpt2_folder)]  # presets with a tokenizer of the Hub set vocab_size themselves
    if args.vocab_size is not None:
        extra = extra[:2]
    args = parse_arguments([*words, *extra])
    _, tokenizer = load_data(args)
    if args.model_name_or_path is None:
        with torch.device("meta"):  # the shape is enough, and 1.5 billion weights are too many for a test
            model = build_model(args, tokenizer, None)
    else:
        model = build_model(args, tokenizer, None)
    planned = planned_config(args)
    assert decisive(planned) == decisive(model.config)
    if extra:
        assert planned.attn_pdrop == 0.2


def test_planned_config_takes_the_vocabulary_of_prepared_shards(text_file: Path, tmp_path: Path) -> None:
    words = ["--train_file", str(text_file), "--tokenizer", "char", "--block_size", "8", "--hidden_size", "12"]
    main(["prepare", *words[:4], "--output_dir", str(tmp_path / "shards")])
    args = Arguments(data=[str(tmp_path / "shards")], block_size=8, hidden_size=12)
    with torch.device("meta"):
        model = build_model(args, load_data(args)[1], None)
    assert planned_config(args).vocab_size == model.config.vocab_size == len(set(text_file.read_text())) + 1


@pytest.mark.parametrize("options", [{}, {"stride": 5}, {"num_train_epochs": 2.5}, {"max_steps": 7}])
@pytest.mark.parametrize("devices", [1, 3])
def test_planned_steps_are_those_of_the_trainer(options: dict, devices: int, tmp_path: Path) -> None:
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    byte_tokenizer(eos_token="<|endoftext|>").save_pretrained(tmp_path)
    folder = str(tmp_path)
    args = Arguments(data=[folder], tokenizer=folder, block_size=16, per_device_train_batch_size=2, **options)
    samples = open_data_module(args, load_data(args)[0], 0).order.samples_per_epoch
    assert planned_steps(args, devices, None) == steps_of_run(args, samples, devices)


def test_planned_tokens_per_step_are_those_that_a_run_logs(
    capsys: pytest.CaptureFixture[str], tiny_run: list[str]
) -> None:
    main(["plan", "quickstart", *tiny_run, "--gradient_accumulation_steps", "3", "--devices", "2", "--no_probe"])
    assert "tokens per step  384 = 4 samples x 3 micro-batches x 2 device(s) x 16 tokens" in capsys.readouterr().out


def test_table_shows_the_figures_of_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    figures = plan(capsys, "--device", "H100", "--memory", "2")
    main(["plan", "quickstart", *TINY, "--device", "H100", "--memory", "2"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    sizes = {" ".join(words[:-1]): words[-1] for words in lines if words}
    for name, gib in (figures["memory_gib"] | {"sum": figures["peak_gib"]}).items():
        assert float(sizes[name]) == pytest.approx(gib, abs=0.000501)  # shown in thousandths
    text = " ".join(itertools.chain.from_iterable(lines))
    assert f"parameters {figures['parameters']:,}" in text
    assert f"steps {figures['steps']:,}" in text
    assert figures["proposal"]["command"] in text


def test_proposed_options_give_a_run_of_the_proposed_size(capsys: pytest.CaptureFixture[str]) -> None:
    for devices in ("1", "4", "16"):
        machine = ["--device", "H100", "--devices", devices]
        before = plan(capsys, *machine, "--memory", "2")
        assert before["candidates"]
        for candidate in before["candidates"]:
            names = ("gradient_checkpointing", "per_device_train_batch_size", "gradient_accumulation_steps")
            options = [word for name in names for word in (f"--{name}", str(candidate[name]))]
            after = plan(capsys, *machine, *options, *PARALLELISM[candidate["parallelism"]])
            assert after["peak_gib"] == candidate["peak_gib"] <= 2
            assert after["step_s"] == candidate["step_s"] >= before["proposal"]["step_s"] / 1.03
            assert after["tokens_per_step"] == before["tokens_per_step"]


@pytest.mark.parametrize(
    ("options", "profile", "processes"),
    [
        ([], "single_gpu", 1),
        (["--devices", "4"], "multi_gpu", 4),
        (["--devices", "4", "--fsdp"], "fsdp2", 4),
        (["--devices", "16", "--network", "8x400"], "multi_node", 16),  # HSDP sends less between two nodes
        (["--devices", "16", "--hsdp"], "hsdp", 16),
    ],
)
def test_proposed_command_gives_the_trainer_the_proposed_options(
    capsys: pytest.CaptureFixture[str], options: list[str], profile: str, processes: int
) -> None:
    gpu = ["--device", "H100", "--link", "PCIe 3", "--network", "1"]  # so slow that DDP is the fastest
    proposal = plan(capsys, *gpu, *options)["proposal"]
    program, verb, *words = shlex.split(proposal["command"])
    assert (program, verb) == ("minigpt", "train")
    launched = vars(train.parse(words))
    launcher_words, trainer_words = split_words(launched["words"])
    launcher = dict(zip(launcher_words[::2], launcher_words[1::2], strict=True))
    assert launched["profile"] == profile
    find_profile(profile)
    assert int(launcher.get("--num_processes", 1)) == processes
    args = parse_arguments(trainer_words)
    assert args.per_device_train_batch_size == proposal["per_device_train_batch_size"]
    assert args.gradient_accumulation_steps == proposal["gradient_accumulation_steps"]
    assert args.gradient_checkpointing == proposal["gradient_checkpointing"]
    assert args.hidden_size == 16  # from the words of the plan


def test_the_largest_preset_for_24_gb_fits_every_gpu_of_that_size() -> None:
    args = parse_arguments(["gpt_1.4b_24gb"])
    for name in (name for name, gpu in GPUS.items() if gpu.memory_gb == 24):
        run = plan_run(args, devices=4, fsdp=True, device=name)
        assert peak_bytes(run.setup) < 0.9 * GPUS[name].memory_bytes
        with pytest.raises(UserError, match="is too little"):
            plan_run(args, devices=1, device=name, memory_gib=24)
    ours, original = vars(args), vars(parse_arguments(["gpt_1.4b"]))
    differences = {name for name, value in ours.items() if value != original[name]}
    assert differences == {"gradient_checkpointing", "output_dir"}  # the same training


def test_a_gpu_may_be_named_as_its_driver_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(capsys, "--device", "NVIDIA H100 80GB HBM3") == plan(capsys, "--device", "H100")


def test_a_plan_for_gpus_without_a_gpu_asks_which(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words in (["--memory", "24"], ["--devices", "4"], ["--devices", "4", "--fsdp"], ["--network", "100"]):
        assert "this machine has no GPU; name the one to plan for with --device" in refused(
            capsys, "quickstart", *words
        )
    message = refused(capsys, "gpt_1.4b", "--memory", "24", "--devices", "4")
    assert "A10G" in message
    assert "RTX 4090" in message
    assert "H100" not in message
    assert plan(capsys, "--devices", "2", "--device", "cpu", "--no_probe")["device"] == "cpu"


@pytest.mark.parametrize(("driver_name", "name"), [("NVIDIA A10G", "A10G"), ("NVIDIA X9000", "NVIDIA X9000")])
def test_gpu_of_this_machine_limits_the_proposal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, driver_name: str, name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: driver_name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(total_memory=22.5 * 2**30))
    main(["plan", "quickstart", *TINY[:-1], "--no_probe", "--json", "--devices", "2", "--memory", "40"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["device"] == name
    assert figures["step_s"] is None  # not measured
    assert figures["limit_gib"] == pytest.approx(0.9 * 22.5)
    assert figures["proposal"]["parallelism"] == "DDP"
    assert (figures["proposal"]["step_s"] is None) == (name not in GPUS)


def test_scaling_efficiency_is_1_for_one_device_and_falls_with_devices(capsys: pytest.CaptureFixture[str]) -> None:
    for options in ([], ["--fsdp"]):
        devices = [n for n in (1, 2, 8, 64, 512) if n > 1 or not options]
        plans = [plan(capsys, "--device", "A10G", "--devices", str(n), *options) for n in devices]
        efficiencies = [figures["scaling_efficiency"] for figures in plans]
        assert efficiencies == sorted(efficiencies, reverse=True)
        assert all(0 < efficiency <= 1 for efficiency in efficiencies)
        if not options:
            assert efficiencies[0] == 1
            times = [figures["step_s"] for figures in plans]  # every device has the same work
            assert times == sorted(times)


def test_preset_without_a_text_can_be_planned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text("hidden_size: 16\nnum_hidden_layers: 1\nnum_attention_heads: 2\nblock_size: 8\n")
    main(["plan", str(preset), "--no_probe", "--json", "--use_cpu"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["steps"] is None
    assert figures["parameters"] > 0


def test_time_of_an_absent_gpu_follows_its_speed() -> None:
    args = parse_arguments(["quickstart", *TINY])

    def step_s(gpu: str, precision: str, efficiency: float) -> float:
        run = plan_run(args.with_values(mixed_precision=precision), device=gpu, efficiency=efficiency)
        assert run.timing is not None
        return run.timing.step_s

    assert step_s("H100", "bf16", 1.0) < step_s("H100", "bf16", 0.4) < step_s("T4", "bf16", 0.4)
    assert step_s("H100", "bf16", 0.4) < step_s("H100", "no", 0.4)


def test_recomputation_takes_time(capsys: pytest.CaptureFixture[str]) -> None:
    times = [
        plan(capsys, "--device", "H100", "--gradient_checkpointing", checkpointing)["step_s"]
        for checkpointing in ("no", "selective", "full")
    ]
    assert times == sorted(times)
    assert times[2] < times[0] * 4 / 3  # less than a second forward pass: the head is not recomputed


def test_time_of_an_absent_gpu_at_its_peak_is_that_of_the_operations_torch_counts() -> None:
    shape = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "tokenizer_vocab_size": 1000}
    args = Arguments(corpus="python-docs", block_size=64, per_device_train_batch_size=2, **shape)
    config = planned_config(args)
    config._attn_implementation = "eager"  # its matrix products are counted one by one
    ids = torch.zeros(2, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        MiniGPTForCausalLM(config)(ids, labels=ids).loss.backward()
    setup = TrainingSetup(config, block_size=64, micro_batch=2, compute_bytes=2, device="cuda")
    time = step_time.estimate_step_time(GPUS["H100"], setup, efficiency=1.0)
    # 1 %: the formula counts a product for every parameter, biases and norms included
    assert time.micro_batch_s * GPUS["H100"].peak_flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_full_checkpointing_recomputes_the_operations_torch_counts() -> None:
    config = MiniGPTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=100, attn_pdrop=0.0)
    config._attn_implementation = "eager"
    setup = TrainingSetup(config, block_size=64, micro_batch=2, gradient_checkpointing="full")
    ids = torch.zeros(2, 64, dtype=torch.long)
    counts = []
    for checkpointing in ("no", "full"):
        model = MiniGPTForCausalLM(config).train()
        enable_activation_checkpointing(model, checkpointing)
        with FlopCounterMode(display=False) as counter:
            model(ids, labels=ids).loss.backward()
        counts.append(counter.get_total_flops())
    # at most: torch stops recomputing a layer at its last saved tensor, before the last product
    assert counts[1] - counts[0] <= 128 * step_time.recomputed_flops_per_token(setup) < 1.5 * (counts[1] - counts[0])


def test_extrapolation_is_exact_for_times_that_are_linear_in_the_layers() -> None:
    def time_of(layers: int) -> step_time.StepTime:
        return step_time.StepTime(micro_batch_s=1.0 + 0.5 * layers, update_s=0.2 + 0.1 * layers)

    for layers in (1, 2, 3, 12, 48):
        predicted = step_time.extrapolate((1, time_of(1)), (3, time_of(3)), layers)
        assert predicted.step_s(4) == pytest.approx(time_of(layers).step_s(4))


@pytest.fixture
def short_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_time, "WARM_UP_S", 0.1)
    monkeypatch.setattr(step_time, "MEASURING_S", 0.3)


@pytest.mark.slow
def test_measured_time_grows_with_the_layers(short_probe: None) -> None:
    args = Arguments(corpus="python-docs", hidden_size=64, num_attention_heads=2, block_size=64)

    def step_s(layers: int) -> float:
        config = planned_config(args.with_values(num_hidden_layers=layers))
        return step_time.measure_step_time(args, config, 4, "no", torch.device("cpu")).step_s(1)

    # 40 layers are extrapolated from 1 and 3; the upper bound leaves a factor of 5 for a busy machine
    assert step_s(2) < step_s(40) < 5 * 40 * step_s(1)


def test_time_of_the_run_is_that_of_its_steps(capsys: pytest.CaptureFixture[str], short_probe: None) -> None:
    figures = plan(capsys)
    assert 0 < figures["step_s"] < 10
    assert figures["run_s"] == pytest.approx(12 * figures["step_s"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory", "-1"], "memory=-1.0 must be a number of GiB above 0"),
        (["--memory", "nan"], "nan is not a finite number"),
        (["--memory", "lots"], "invalid float value: 'lots'"),
        (["--devices", "0"], "devices=0 must be at least 1"),
        (["--efficiency", "1.5"], "efficiency=1.5 must be above 0 and at most 1"),
        (["--fsdp"], "give --devices"),
        (["--devices", "8", "--hsdp", "--device", "H100"], "devices=8 must be two or more times devices_per_node=8"),
        (["--devices", "20", "--hsdp", "--device", "H100"], "devices=20 must be two or more times devices_per_node=8"),
        (["--devices", "16", "--fsdp", "--hsdp"], "give either --fsdp or --hsdp"),
        (["--device", "H1000"], "device=H1000 is not available and not one of"),
        (["--device", "L400"], "device=L400 is not available and not one of"),
        (["--device", "A10G", "--link", "rope"], "link=rope is not one of NVLink 5,"),
        (["--device", "A10G", "--network", "fast"], "network=fast must be the Gbit/s of a node, such as 100 or 8x400"),
        (["--devices_per_node", "0"], "devices_per_node=0 must be at least 1"),
        (["--devices", "2", "--fsdp", "--use_cpu"], "fsdp needs GPUs; name one with --device"),
        (["--hiden_size", "8"], "unknown option --hiden_size; did you mean --hidden_size?"),
        (["--memroy", "8"], "unknown option --memroy; did you mean --memory?"),
        (["--hidden_size", "7", "--num_attention_heads", "2"], "hidden_size=7 is not divisible by"),
        (["--max_position_embeddings", "64"], "try its max_position_embeddings, block_size=64"),
        (["--model_name_or_path", "./nowhere"], "nowhere"),
        (["--memory", "0.001", "--use_cpu"], "even with per_device_train_batch_size=1, gradient_checkpointing="),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert message in refused(capsys, "quickstart", *words)


def test_missing_preset_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.yaml: no such file or preset" in refused(capsys, "nowhere.yaml")
    assert "give a preset" in refused(capsys)


def test_characters_without_a_text_name_the_missing_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--train_file" in refused(capsys, "shakespeare_char_cpu")


def test_a_run_that_needs_more_memory_than_given_is_a_user_error() -> None:
    with pytest.raises(UserError, match="is too little"):
        plan_run(parse_arguments(["quickstart", *TINY]), memory_gib=0.001, probe=False)


def test_help_imports_no_heavy_library() -> None:
    program = (
        "import sys; from minigpt.cli import main\n"
        "try: main(['plan', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.splitlines()[-1] == "[]"


def test_a_plan_for_lora_trains_the_adapter_only_and_needs_less_memory_and_time(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_time, "WARM_UP_S", 0.0)
    monkeypatch.setattr(step_time, "MEASURING_S", 0.0)
    shape = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 64}
    model = MiniGPTForCausalLM(MiniGPTConfig(vocab_size=300, **shape))
    model.save_pretrained(tmp_path / "base")
    preset = tmp_path / "preset.yaml"
    preset.write_text(f"model_name_or_path: {tmp_path / 'base'}\nblock_size: 64\nmax_steps: 3\n")
    lora = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "down_proj"]
    figures = {}
    for name, words in {"full": [], "lora": lora}.items():
        for device in (["--use_cpu"], ["--device", "H100"]):
            main(["plan", str(preset), "--json", *words, *device])
            figures[name, device[0]] = json.loads(capsys.readouterr().out)
    full, adapted = figures["full", "--device"], figures["lora", "--device"]
    assert full["parameters"] == full["trained_parameters"] == model.num_parameters()
    assert adapted["trained_parameters"] == 4 * 4 * (64 + 64 + 256 + 64)
    assert adapted["parameters"] == full["parameters"] + adapted["trained_parameters"]
    assert adapted["peak_gib"] < full["peak_gib"]
    assert 0.6 < adapted["flops_per_token"] / full["flops_per_token"] < 0.9
    assert adapted["step_s"] < full["step_s"]
    assert figures["lora", "--use_cpu"]["time_from"] == "measured on this machine"
    with pytest.raises(SystemExit):
        main(["plan", str(preset), "--use_peft", "--lora_target_modules", "c_attn"])
    assert "lora_target_modules=c_attn: no such linear layer; the model has q_proj" in capsys.readouterr().err
