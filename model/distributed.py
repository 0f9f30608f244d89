"""Several processes training one network: ``torchrun --nproc-per-node N -m model.train ...``."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
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
        """Waits for the others, before the end.

        A thread of gloo's lets go of the tensors of a collective some time after it; were Python
        over by then, it would abort the process. Behind a barrier, which has none, it has done so.
        """
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """The end of working together."""
        if self.size > 1:
            dist.destroy_process_group()


ALONE = World()


def join(device_name: str | None) -> World:
    """Join the processes torchrun started, if it did, each on a GPU of its own or on the CPU."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    device = choose_device(device_name)
    if size == 1:
        return World(device=device)
    if device.type == "cuda":  # needs a GPU
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(dist.get_rank(), size, device)
