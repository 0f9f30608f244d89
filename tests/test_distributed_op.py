"""DDP and FSDP2 around capsule layers: two processes step as one does on the joint batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from capsule_kernels import CapsuleConv2d, CapsuleLinear

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed")


class Flattened(nn.Module):
    """Capsules [B, C, K, H, W] of a grid as [B, C H W, K]."""

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        return grid.movedim(2, -1).flatten(1, 3)


def network() -> nn.Module:
    """Two types of capsules on a grid 4 x 3, convolved with overlapping windows, then routed."""
    torch.manual_seed(0)
    return nn.Sequential(
        CapsuleConv2d(2, 4, 3, 4, 2, bias=True, learn_logits=True), Flattened(),
        CapsuleLinear(18, 4, 4, 5, bias=True, learn_logits=True), CapsuleLinear(4, 5, 3, 2),
    )  # fmt: skip


def step(model: nn.Module, u: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(u).square().sum(-1).mean().backward()
        optimizer.step()


def work(rank: int, rendezvous: str, device: str, processes: int) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=processes,
    )
    joint = torch.randn(8, 2, 4, 4, 3, generator=torch.Generator().manual_seed(1)).to(device)
    alone = network().to(device)
    step(alone, joint)
    own = joint.chunk(processes)[rank]

    replicated = DistributedDataParallel(network().to(device))
    step(replicated, own)
    for (name, p), q in zip(alone.named_parameters(), replicated.parameters(), strict=True):
        torch.testing.assert_close(q, p, msg=lambda m, name=name: f"DDP, {name}: {m}")

    mesh = dist.init_device_mesh(device, (processes,))
    sharded = network().to(device)
    for layer in sharded:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert sharded[2].weight.to_local().shape[0] == 18 // processes
    step(sharded, own)
    for (name, p), q in zip(alone.named_parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(
            q.full_tensor(), p, msg=lambda m, name=name: f"FSDP2, {name}: {m}"
        )
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_step_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path / "rendezvous"), "cpu", 2), nprocs=2)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
def test_nccl(tmp_path: Path) -> None:
    """A process for each of two GPUs; where there is one, its own reductions at least."""
    processes = min(2, torch.cuda.device_count())
    arguments = (str(tmp_path / "rendezvous"), "cuda", processes)
    torch.multiprocessing.spawn(work, arguments, nprocs=processes)
