"""Several processes training one network: ``torchrun --nproc-per-node N -m model.train ...``."""

import atexit
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed.nn  # see leave()
from torch import Tensor, nn

from .environment import choose_device
from .errors import UserError, tell

CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """This process: its number, among how many, and where it computes."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def is_main(self) -> bool:
        """The one process that writes and prints."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, which must all call it."""
        if self.size == 1:
            return values
        summed = values.clone()
        dist.all_reduce(summed)
        return summed

    def largest(self, value: int) -> int:
        """The largest of the processes' values; they must all call it."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def parallel(self, model: nn.Module) -> nn.Module:
        """A module whose gradients are averaged over the processes."""
        if self.size == 1:
            return model
        ids = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What each process does by itself, and goes on from only if all of them could.

        Alone, a UserError passes. Of several processes the first that has one tells it, then all
        leave with exit code 2; not before, as torchrun ends the others once one has left.
        """
        mine = None
        try:
            yield
        except UserError as error:
            if self.size == 1:
                raise
            mine = error
        place = 0 if mine is None else self.size - self.rank
        first = self.largest(place)
        if first > 0:
            if mine is not None and place == first:
                tell(mine)
            self.meet()
            raise SystemExit(2)

    def meet(self) -> None:
        """Waits until the others have said all they have to say."""
        if self.size > 1:
            dist.barrier()


ALONE = World()


def leave() -> None:
    """The end of working together, when nothing of a run is left but garbage.

    Threads of gloo let go of a collective's tensors some time after it; were Python over by then,
    they would abort the process. They end with the process group, which ends once nothing refers to
    it: no network made parallel, and no default of a function of ``torch.distributed.nn``, which
    has none only if that was loaded before.
    """
    gc.collect()
    dist.destroy_process_group()


def join(device_name: str | None) -> World:
    """Join the processes torchrun started, if it did, each on a GPU of its own or on the CPU.

    UserError for one GPU by its number, which several processes can't have, and for one too few.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    device = choose_device(device_name)
    if size == 1:
        return World(device=device)
    if device.type == "cuda" and device.index is not None:
        raise UserError(
            f"--device {device_name} can't be given to {size} processes: each takes a GPU of its "
            "own, of those that CUDA_VISIBLE_DEVICES names"
        )
    if device.type == "cuda":  # needs a GPU
        device = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(leave)
    return World(dist.get_rank(), size, device)
