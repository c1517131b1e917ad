"""Laws of Muon's orthogonalization: what it does to a matrix, and that processes which share it find the same."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from minigpt.optim.muon import orthogonalize, orthogonalize_copies, orthogonalize_rows

PROCESSES = 3


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 8, 32), (2, 32, 8), (1, 1, 5)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape), steps=10))
    assert values.min() > 0.6
    assert values.max() < 1.25
    assert torch.equal(orthogonalize(torch.zeros(shape)), torch.zeros(shape))


def test_wide_and_square_matrices_get_the_same_polynomial() -> None:
    torch.manual_seed(0)
    square = torch.randn(3, 16, 16)
    wide = torch.cat([square, torch.zeros(3, 16, 8)], dim=2)
    torch.testing.assert_close(orthogonalize(wide)[:, :, :16], orthogonalize(square), atol=2e-4, rtol=0)


def share_the_work(rank: int, rendezvous: str) -> None:
    """One of three processes, which neither matrices nor rows divide evenly among."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    for shape in [(4, 7, 5), (3, 6, 6), (1, 4, 9), (2, 2, 3)]:
        matrices = torch.randn(shape)
        alone = orthogonalize(matrices)
        torch.testing.assert_close(orthogonalize_copies(matrices), alone, rtol=0, atol=1e-5)
        rows = shape[1]
        sizes = [len(part) for part in torch.arange(rows).chunk(PROCESSES)]  # the last processes may have none
        sizes += [0] * (PROCESSES - len(sizes))
        found = orthogonalize_rows(matrices.split(sizes, dim=1)[rank], rows, dist.group.WORLD)
        torch.testing.assert_close(found, alone.split(sizes, dim=1)[rank], rtol=0, atol=1e-5)
    dist.destroy_process_group()


def test_processes_that_share_the_work_find_what_one_finds(tmp_path) -> None:
    torch.multiprocessing.spawn(share_the_work, (str(tmp_path / "rendezvous"),), nprocs=PROCESSES)
