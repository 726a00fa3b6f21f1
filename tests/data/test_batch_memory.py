"""Memory that batches share with those before them: never while anybody may still look at it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from utils.batch_memory import BLOCKS, BatchMemory
from utils.dataloaders import Batch, create_dataloader
from utils.dataset import DetectionDataset

ROWS = "0 .5 .5 .4 .4\n1 .3 .3 .2 .2\n"


@pytest.fixture
def images(make_set: Callable) -> object:
    return make_set({f"im{i:02d}": ROWS for i in range(26)})


def dataset(images: object) -> DetectionDataset:
    return DetectionDataset(images, 64, augment=True, nc=2, show=False)


def test_blocks_are_used_again_when_given_back() -> None:
    memory = BatchMemory(2)
    taken = [memory.take((2, 4, 4, 3), 1, 0) for _ in range(BLOCKS + 1)]
    tickets = [ticket for _, ticket in taken]
    assert [t.block for t in tickets[:-1]] == list(range(BLOCKS)) and tickets[-1] is None
    assert len({pixels.data_ptr() for pixels, _ in taken}) == BLOCKS + 1
    memory.give_back(tickets[1])
    memory.give_back(None)
    pixels, ticket = memory.take((1, 4, 4, 3), 1, 0)  # the last batch of an epoch is smaller
    assert ticket.block == 1 and pixels.shape == (1, 4, 4, 3)
    assert pixels.data_ptr() == taken[1][0].data_ptr()
    assert memory.take((2, 4, 4, 3), 1, 0)[1] is None
    assert memory.take((2, 4, 4, 3), 1, 1)[1] is not None  # a new stream: nobody waits for the old one's batches


def same(batch: Batch, other: Batch) -> bool:
    return torch.equal(batch.images, other.images) and torch.equal(batch.targets, other.targets)


@pytest.mark.parametrize("later", [False, True])
def test_held_batches_stay_as_they_are(images: object, later: bool) -> None:
    """All batches of many epochs are kept, streams are left in the middle, and each is what one process makes."""
    options = {"shuffle": True, "finish_on": torch.device("cpu") if later else None}
    alone = create_dataloader(dataset(images), 4, workers=0, **options)
    loader = create_dataloader(dataset(images), 4, workers=2, **options)
    assert loader.dataset.memory is not None and alone.dataset.memory is None
    held: list[tuple[Batch, Batch]] = []
    for epoch, left_after in ((0, 2), (0, 7), (1, 7), (2, 3), (3, 1), (3, 7), (4, 7), (5, 7), (6, 7)):
        for each in (loader, alone):
            each.set_epoch(epoch)
        held += [pair for pair, _ in zip(zip(loader, alone), range(left_after))]
    assert len(held) == 48
    assert all(same(*pair) for pair in held)
    assert all(batch.ticket is None and batch.finishes is None for batch, _ in held)


def test_blocks_come_back(images: object) -> None:
    data = dataset(images)
    loader = create_dataloader(data, 4, workers=2)
    for epoch in range(6):
        loader.set_epoch(epoch)
        assert sum(len(b.paths) for b in loader) == 26
        # what is loaded ahead of the next epoch is still out: two batches of each process
        assert data.memory.free.sum() >= data.memory.free.numel() - 4


def test_a_process_that_cannot_read_gives_its_block_back(make_set: Callable) -> None:
    folder = make_set({name: ROWS for name in "ab"})
    data = dataset(folder)
    data.memory = BatchMemory(1)
    pixels, ticket = data.memory.take((1, 64, 64, 3), 0, 0)
    assert data.memory.free.sum() == BLOCKS - 1 and np.prod(pixels.shape) == 64 * 64 * 3
    data._give_back(ticket)
    assert data.memory.free.sum() == BLOCKS
