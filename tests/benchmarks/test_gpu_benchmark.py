"""`minigpt bench gpu`: a step that fails does not stop the others, and everything runs at a tiny size on a CPU."""

import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train_accelerate
from minigpt.benchmarks.gpu import (
    DRY_RUN,
    STATUS,
    STEPS,
    Figure,
    Step,
    failures,
    markdown,
    read_figures,
    run_all,
    run_step,
    summary,
)
from minigpt.benchmarks.gpu_worker import TASKS, Recorder, kernel_group, synchronizations, write_text_shards
from minigpt.commands import bench_gpu
from minigpt.data.tokenizer import load_tokenizer
from minigpt.utils.errors import UserError
from support.runs import ROOT
from support.tables import unpadded

# Python without some packages: their absence, not an error inside them
WITHOUT_PACKAGES = """
import importlib.machinery
find_spec = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None:
        None if name.split(".")[0] in ("datasets", "evaluate") else find_spec(name, path, target)
)
"""


def test_a_step_that_fails_or_hangs_is_reported_and_the_next_one_runs(tmp_path: Path) -> None:
    steps = [
        Step("unknown task", "nowhere"),
        Step("too slow", "machine", limit_s=0.01),
        Step("for a GPU", "machine", needs="CUDA"),
        Step("unknown option", "train", {"no_such_option": 1}),
    ]
    settings = replace(DRY_RUN, figures=str(tmp_path / "figures.jsonl"))
    figures = run_all(steps, settings, tmp_path)
    assert [(figure.step, figure.value) for figure in figures] == [
        ("unknown task", "failed"),
        ("too slow", "timed out"),
        ("for a GPU", "skipped"),
        ("unknown option", "failed"),
    ]
    assert "KeyError: 'nowhere'" in figures[0].note
    assert figures[2].note == "needs CUDA"
    assert "no_such_option" in figures[3].note
    assert [figure.step for figure in failures(figures)] == ["unknown task", "too slow", "unknown option"]
    assert summary(figures).startswith("4 steps: 2 failed, 1 timed out, 1 skipped.")


def test_no_step_starts_after_the_time_is_used_up(tmp_path: Path) -> None:
    settings = replace(DRY_RUN, figures=str(tmp_path / "figures.jsonl"))
    (status,) = run_step(Step("late", "machine"), settings, tmp_path, deadline=time.monotonic() + 1)
    assert (status.value, status.figure) == ("skipped", STATUS)
    assert not (tmp_path / "late").exists()


def test_a_report_is_read_as_it_was_written_and_a_failed_check_is_a_failure(tmp_path: Path) -> None:
    report = tmp_path / "figures.jsonl"
    written = [
        Figure("a", "step", 12.345678, "ms", "1 to 2"),
        Figure("a", "equal", "failed"),
        Figure("a", STATUS, "done"),
    ]
    for figure in written:
        figure.append_to(report)
    assert read_figures(report) == written
    assert failures(written) == [written[1]]
    table = unpadded(markdown(written))
    assert "| a | step | 12.346 | ms | 1 to 2 |" in table
    assert "done" not in table


def test_every_step_has_a_name_of_its_own_and_a_task() -> None:
    assert len({step.name for step in STEPS}) == len(STEPS)
    assert {step.task for step in STEPS} == set(TASKS)


def test_generated_documents_end_with_the_end_of_text_of_their_tokenizer(tmp_path: Path) -> None:
    write_text_shards(tmp_path / "data")
    tokenizer = load_tokenizer(tmp_path / "data")
    for name, documents in (("train", 900), ("val", 100)):
        ids = np.fromfile(tmp_path / "data" / f"{name}.bin", dtype=np.uint16)
        assert np.count_nonzero(ids == tokenizer.eos_token_id) == documents
        assert ids[-1] == tokenizer.eos_token_id
        assert ids.max() < len(tokenizer)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NTN", "matmul"),
        ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x32", "matmul"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", "matmul"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<64>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_64x64x64", "attention"),
        ("fmha_cutlassB_bf16_aligned_64x64_k64_dropout_sm80", "attention"),
        ("triton_red_fused__to_copy_logsumexp_0", "loss"),
        ("void (anonymous namespace)::softmax_warp_forward<float>", "loss"),
        (
            "void at::native::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, FusedAdamMathFunctor>",
            "optimizer",
        ),
        ("void at::native::multi_tensor_apply_kernel<TensorListMetadata<1>, LpNormFunctor<float>>", "optimizer"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", "casts and copies"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel_cuda>",
            "casts and copies",
        ),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>", "activation"),
        ("void at::native::vectorized_layer_norm_kernel<float, float, false>", "norm"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "other"),
    ],
)
def test_cuda_kernels_belong_to_their_part_of_a_step(name: str, group: str) -> None:
    assert kernel_group(name) == group


def test_synchronizations_are_counted_per_step_without_the_logged_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_here: object
) -> None:
    mode = "default"

    def set_mode(value: str) -> None:
        nonlocal mode
        mode = value

    def step_that_waits_twice(run: Any, learning_rate: float) -> Any:
        if mode == "warn":
            for text in ("called a synchronizing CUDA operation", "called a synchronizing CUDA operation", "other"):
                warnings.warn(text, stacklevel=1)
        return take_step(run, learning_rate)

    take_step = train_accelerate.take_step
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    monkeypatch.setattr(train_accelerate, "take_step", step_that_waits_twice)
    settings = replace(DRY_RUN, figures=str(tmp_path / "figures.jsonl"), folder=str(tmp_path))
    synchronizations(Recorder("synchronizations", settings), "--optimizer adamw")
    per_step, none = read_figures(tmp_path / "figures.jsonl")
    assert (per_step.value, none.value, mode) == (2.0, "failed", "default")
    assert per_step.note.endswith(" 20")  # ten steps, all at one place


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nanogpt", "."], "nanogpt=.: no model.py there"),
        (["--only", "nowhere"], "only=nowhere: no such step; choose from machine"),
        (["--output", "missing/report"], "its folder does not exist"),
    ],
)
def test_impossible_options_are_refused(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        bench_gpu.parse(options)


@pytest.mark.slow
def test_dry_run_makes_every_step_that_needs_no_gpu_without_datasets_and_evaluate(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_PACKAGES, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    words = [sys.executable, "-m", "minigpt", "bench", "gpu", "--dry_run", "--output", str(tmp_path / "report")]
    process = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": path})
    assert process.returncode == 0, process.stdout + process.stderr
    figures = read_figures(tmp_path / "report.jsonl")
    statuses = {figure.step: figure.value for figure in figures if figure.figure == STATUS}
    assert statuses == {step.name: "skipped" if step.needs else "done" for step in STEPS}
    for step in STEPS:
        assert step.needs or any(figure.step == step.name and figure.figure != STATUS for figure in figures)
    assert (
        unpadded(process.stdout)
        .strip()
        .endswith(unpadded((tmp_path / "report.md").read_text(encoding="utf-8")).strip())
    )
    assert json.loads((tmp_path / "report.jsonl").read_text(encoding="utf-8").splitlines()[0])["step"] == "machine"
