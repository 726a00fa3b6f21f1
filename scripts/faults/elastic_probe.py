"""Whether this machine lets torchrun start processes again: gloo and nothing of this program.

    torchrun --standalone --nproc_per_node 2 --max-restarts 3 -m scripts.faults.elastic_probe

Rank 1 of the first start is killed at its sixth sum. "done" from both ranks of a later start: it does.
"""

from __future__ import annotations

import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist


def main() -> None:
    first_start = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    dist.init_process_group("gloo", timeout=timedelta(seconds=25))
    total = torch.ones(4)
    for step in range(20):
        dist.all_reduce(total)
        total /= dist.get_world_size()
        if first_start and step == 5 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    print(f"done: rank {dist.get_rank()}, start {os.environ['TORCHELASTIC_RESTART_COUNT']}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
