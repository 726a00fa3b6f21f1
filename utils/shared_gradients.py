"""Gradients of several ranks, averaged in one go: as DDP does it bucket by bucket, for steps it cannot look into."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn


class SharedGradients:
    """The gradients of ``model`` in one block of memory for each dtype, zero at first.

    They stay where they are: backward passes and replayed CUDA graphs add to them, :meth:`average` sends the blocks
    as they lie, and clearing them must write zeros rather than drop them. Nothing is sent during a backward pass, so
    that none of it is hidden behind one; and nothing while gradients only add up.
    """

    def __init__(self, model: nn.Module) -> None:
        self.blocks: list[torch.Tensor] = []
        by_type: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in model.parameters():
            if parameter.requires_grad:
                by_type.setdefault(parameter.dtype, []).append(parameter)
        for dtype, parameters in by_type.items():
            block = torch.zeros(sum(p.numel() for p in parameters), dtype=dtype, device=parameters[0].device)
            for parameter, part in zip(parameters, block.split([p.numel() for p in parameters]), strict=True):
                parameter.grad = part.as_strided(parameter.shape, parameter.stride())  # in the parameter's own order
            self.blocks.append(block)

    @torch.no_grad()
    def average(self) -> None:
        """The mean over ranks in every rank."""
        for block in self.blocks:
            dist.all_reduce(block)
            block /= dist.get_world_size()
