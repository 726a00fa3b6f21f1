"""Several processes: read torchrun's variables once, in main, and carry the result as a value."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from utils.errors import ConfigError

TIMEOUT = timedelta(hours=3)
"""How long a rank waits for another (rank 0 may be scanning a large data set); those that hang are found sooner, by
utils/peer_watch.py."""


@dataclass(frozen=True)
class World:
    """Who this process is among its peers. A run without torchrun is World(0, 0, 1)."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    on_machine: int = 0
    """Processes on this machine; 0: all are."""

    @property
    def sharers(self) -> int:
        """How many processes share this machine's cores."""
        return self.on_machine or self.size

    @property
    def main(self) -> bool:
        """True in the one process that logs, validates and saves."""
        return self.rank == 0


def init_distributed(cuda: bool) -> World:
    """Join the process group when torchrun started us (RANK, LOCAL_RANK, WORLD_SIZE); nccl on CUDA, else gloo.

    Raises ConfigError when torchrun started more processes than there are GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    local_rank, on_machine = (int(os.environ.get(f"LOCAL_{name}", "0")) for name in ("RANK", "WORLD_SIZE"))
    world = World(int(os.environ["RANK"]), local_rank, size, on_machine)
    if cuda:
        if torch.cuda.device_count() <= world.local_rank:
            raise ConfigError(
                f"torchrun --nproc_per_node asks for process {world.local_rank} but there are "
                f"{torch.cuda.device_count()} CUDA devices"
            )
        torch.cuda.set_device(world.local_rank)
    if not dist.is_initialized():  # the caller's group serves as well
        store = _store_of_this_start(world)
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=TIMEOUT)
    return world


def _store_of_this_start(world: World, store: dist.Store | None = None) -> dist.Store:
    """Where ranks find each other's addresses, without those that an earlier start has left.

    torchrun keeps one store for all its restarts, and a process that reads the address of one that is dead cannot
    connect, or waits without end. So rank 0 makes up a name under which this start keeps its keys. The others ask for
    it under names of their own, which nobody has used before; rank 0 answers whoever asks until each has thanked.
    """
    if store is None:
        store = next(dist.rendezvous("env://", rank=world.rank, world_size=world.size, timeout=TIMEOUT))[0]
    if not world.main:
        asking = uuid.uuid4().hex
        store.set(f"asks/{world.rank}", asking)
        name = store.get(f"answer/{asking}").decode()
        store.set(f"thanks/{asking}/{name}", "")
        return dist.PrefixStore(name, store)
    name, waiting = uuid.uuid4().hex, set(range(1, world.size))
    while waiting:
        for rank in sorted(waiting):
            asking = store.get(f"asks/{rank}").decode()  # perhaps of an earlier start: then nobody thanks
            store.set(f"answer/{asking}", name)
            if store.check([f"thanks/{asking}/{name}"]):
                waiting.discard(rank)
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


def meet(world: World) -> None:
    """Wait until all ranks are here."""
    if world.size > 1 and dist.is_initialized():
        nccl = dist.get_backend() == "nccl"
        dist.barrier(device_ids=[torch.cuda.current_device()] if nccl else None)  # else torch guesses, and says so


def close_distributed(world: World) -> None:
    """Leave the process group together: a rank that leaves early can abort its peers."""
    meet(world)
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def main_first(world: World) -> Iterator[None]:
    """Rank 0 runs the block, then the others: they find the caches it wrote."""
    if not world.main:
        meet(world)
    yield
    if world.main:
        meet(world)


def broadcast(value: Any, world: World) -> Any:
    """Rank 0's value in every rank (a small picklable object)."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_to_main(value: Any, world: World) -> list[Any]:
    """Every rank's value (a picklable object), in the order of ranks, in rank 0; an empty list in the others."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size if world.main else []
    dist.gather_object(value, values or None, dst=0)
    return values


@torch.no_grad()
def share_weights(model: nn.Module, world: World) -> None:
    """Rank 0's parameters and buffers in the ``model`` of every rank; their state dicts have the same entries."""
    by_type: dict[torch.dtype, list[torch.Tensor]] = {}
    for value in model.state_dict().values() if world.size > 1 else ():
        by_type.setdefault(value.dtype, []).append(value)
    for values in by_type.values():  # together: a message for each would take longer than what is in it
        flat = torch.cat([value.reshape(-1) for value in values])
        dist.broadcast(flat, src=0)
        for value, part in zip(values, flat.split([value.numel() for value in values]), strict=True):
            value.copy_(part.view(value.shape))


def gather(value: Any, world: World) -> list[Any]:
    """Every rank's value (a small picklable object), in the order of ranks, in every rank."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values
