"""Laws of Muon: parity with torch's, what orthogonalization does to a matrix, and work shared between processes."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from minigpt.optim import muon
from minigpt.optim.muon import Muon, orthogonalize, orthogonalize_copies, orthogonalize_rows

PROCESSES = 3

# torch.optim.Muon runs Newton-Schulz in bfloat16, whose products are rounded to 8 significant bits; on a CPU ours runs
# in float32. Five steps in bfloat16 are off by about 1 % of the update. A wrong option changes far more, see below.
TOLERANCE = 0.02


@pytest.fixture
def torchs_coefficients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The polynomial of torch.optim.Muon, the same in all steps."""
    monkeypatch.setattr(muon, "NEWTON_SCHULZ_COEFFICIENTS", [(3.4445, -4.7750, 2.0315)])
    monkeypatch.setattr(muon, "SAFETY_FACTOR", 1.0)


def relative_difference_to_torchs_muon(**torch_options: object) -> float:
    """How far apart five steps move the same matrices with the same gradients, as a share of the distance moved."""
    shapes = [(24, 24), (24, 24), (24, 96), (96, 24), (96, 24), (96, 24), (1, 24)]
    torch.manual_seed(0)
    start = [0.1 * torch.randn(shape) for shape in shapes]
    ours, theirs = ([nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    options = {"momentum": 0.9, "weight_decay": 1.0}
    our_optimizer = Muon([{"params": ours, "muon": True}], lr=0.02, **options)
    their_optimizer = torch.optim.Muon(theirs, lr=0.02, **(options | torch_options))
    for step in range(5):
        for our_matrix, their_matrix in zip(ours, theirs, strict=True):
            our_matrix.grad = torch.randn_like(our_matrix)
            their_matrix.grad = our_matrix.grad.clone()
        for optimizer in (our_optimizer, their_optimizer):
            optimizer.param_groups[0]["lr"] = 0.02 / (step + 1)
            optimizer.step()
    differences = [
        ((our_matrix - their_matrix).norm() / (our_matrix - start_matrix).norm()).item()
        for our_matrix, their_matrix, start_matrix in zip(ours, theirs, start, strict=True)
    ]
    return max(differences)


@pytest.mark.usefixtures("torchs_coefficients")
def test_muon_equals_torchs_muon_with_the_original_learning_rate_adjustment() -> None:
    assert relative_difference_to_torchs_muon(nesterov=True, adjust_lr_fn="original") < TOLERANCE


@pytest.mark.usefixtures("torchs_coefficients")
@pytest.mark.parametrize(
    "option",
    [
        {"momentum": 0.8},
        {"nesterov": False},
        {"adjust_lr_fn": "match_rms_adamw"},
        {"weight_decay": 0.0},
        {"ns_steps": 4},
    ],
    ids=lambda option: next(iter(option)),
)
def test_the_comparison_with_torchs_muon_notices_every_option(option: dict[str, object]) -> None:
    assert relative_difference_to_torchs_muon(**option) > 2 * TOLERANCE


@pytest.mark.parametrize(("steps", "lowest", "highest"), [(3, 0.18, 1.87), (4, 0.43, 1.57), (5, 0.87, 1.13)])
def test_singular_values_end_in_the_documented_range(steps: int, lowest: float, highest: float) -> None:
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(2, 64, 64)).Q for _ in range(2))
    values = torch.logspace(-2.5, 0, 64)
    values[1:] *= 0.1  # so that the norm, which the matrix is divided by, is about that of the largest value
    kept = int((values / values.norm() >= 0.003).sum())
    result = torch.linalg.svdvals(orthogonalize(left @ torch.diag(values) @ right.mT, steps))  # in descending order
    assert result.max() < highest
    assert result[:, kept - 1].min() > lowest


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 8, 32), (2, 32, 8), (1, 1, 5)])
def test_eight_steps_give_the_orthogonal_factor_of_the_polar_decomposition(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    torch.testing.assert_close(orthogonalize(matrices, steps=8), left @ right, atol=1e-4, rtol=0)
    assert torch.equal(orthogonalize(torch.zeros(shape)), torch.zeros(shape))


def test_blocks_of_rows_are_orthogonalized_separately() -> None:
    torch.manual_seed(0)
    heads = torch.randn(2, 4, 8, 32)  # of two matrices with four heads
    together = orthogonalize(heads.flatten(1, 2), row_blocks=4)
    for matrix, result in zip(heads, together.unflatten(1, (4, 8)), strict=True):
        torch.testing.assert_close(result, orthogonalize(matrix), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 8, 32), (2, 32, 8)])
def test_orthogonalization_keeps_singular_vectors_and_ignores_scale(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    in_singular_basis = left.mT @ orthogonalize(1000 * matrices) @ right.mT
    off_diagonal = in_singular_basis - torch.diag_embed(in_singular_basis.diagonal(dim1=-2, dim2=-1))
    # float32 products of matrices with values near 1
    torch.testing.assert_close(off_diagonal, torch.zeros_like(off_diagonal), atol=1e-4, rtol=0)
    torch.testing.assert_close(orthogonalize(1000 * matrices), orthogonalize(matrices), atol=1e-4, rtol=0)


def test_wide_and_square_matrices_get_the_same_polynomial() -> None:
    torch.manual_seed(0)
    square = torch.randn(3, 16, 16)
    wide = torch.cat([square, torch.zeros(3, 16, 8)], dim=2)
    # the products of float32 are taken in another order
    torch.testing.assert_close(orthogonalize(wide)[:, :, :16], orthogonalize(square), atol=2e-4, rtol=0)


def share_the_work(rank: int, rendezvous: str) -> None:
    """One of three processes; neither the matrices nor their rows divide evenly between them."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    orthogonalized = partial(orthogonalize, steps=4)
    for shape in [(4, 7, 5), (3, 6, 6), (1, 4, 9), (2, 2, 3)]:
        matrices = torch.randn(shape)
        expected = orthogonalized(matrices)
        torch.testing.assert_close(orthogonalize_copies(matrices, orthogonalized), expected, rtol=0, atol=1e-5)
        row_counts = [len(part) for part in torch.arange(shape[1]).chunk(PROCESSES)]
        row_counts += [0] * (PROCESSES - len(row_counts))  # the last processes may have no rows

        def shard(whole: Tensor, row_counts: list[int] = row_counts) -> Tensor:
            return whole.split(row_counts, dim=1)[rank]

        result = orthogonalize_rows(shard(matrices), shape[1], dist.group.WORLD, orthogonalized)
        torch.testing.assert_close(result, shard(expected), rtol=0, atol=1e-5)
    dist.destroy_process_group()


def test_processes_that_share_the_work_get_the_result_of_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(share_the_work, (str(tmp_path / "rendezvous"),), nprocs=PROCESSES)
