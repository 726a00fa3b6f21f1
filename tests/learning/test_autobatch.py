"""Choosing a batch size from a memory meter that obeys, lies or runs out."""

from __future__ import annotations

import pytest
import torch

from utils.autobatch import auto_batch, largest_batch
from utils.errors import ResourceError

GIB = 2**30


def linear(per_image: float, fixed: float, limit: int | None = None):
    """A meter of a step that needs ``fixed + per_image * batch`` GiB and fails from ``limit`` images on."""

    def measure(batch: int) -> int:
        if limit is not None and batch >= limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return int((fixed + per_image * batch) * GIB)

    return measure


def test_fills_the_share_asked_for() -> None:
    choice = largest_batch(linear(0.5, 2), 80 * GIB)
    assert choice.batch == (80 * 0.8 - 2) / 0.5
    assert choice.text == "AutoBatch: batch size 124 for 64.00 of 80.00 GiB (80%)"
    assert largest_batch(linear(0.5, 2), 80 * GIB, fraction=0.4).batch == 60


@pytest.mark.parametrize(("limit", "batch"), [(2, 1), (8, 4), (16, 8)])
def test_stays_below_what_failed(limit: int, batch: int) -> None:
    assert largest_batch(linear(0.1, 0, limit), 80 * GIB).batch == batch


def test_a_fit_below_the_failed_size_is_kept() -> None:
    assert largest_batch(linear(1.0, 0, 16), 15 * GIB).batch == 12


def test_nothing_fits() -> None:
    with pytest.raises(ResourceError, match="not even a batch of 1 fits into 1.0 GiB"):
        largest_batch(linear(1, 0, limit=1), GIB)


@pytest.mark.parametrize("measure", [lambda batch: 5, lambda batch: GIB // batch])
def test_senseless_measurements_give_the_default(measure) -> None:
    choice = largest_batch(measure, 8 * GIB, default=16)
    assert choice.batch == 16
    assert "make no sense" in choice.text


def test_stays_within_what_is_useful() -> None:
    assert largest_batch(linear(0.001, 0), 80 * GIB).batch == 1024
    assert largest_batch(linear(0.9, 0, limit=4), GIB).batch == 1  # it ran, though it takes more than the share


def test_other_errors_are_not_taken_for_memory() -> None:
    def measure(batch: int) -> int:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        largest_batch(measure, GIB)


def test_the_cpu_has_a_default() -> None:
    choice = auto_batch(lambda batch: pytest.fail("must not run"), torch.device("cpu"))
    assert choice.batch == 16
    assert "CPU" in choice.text


@pytest.mark.gpu
def test_the_chosen_batch_runs() -> None:
    device = torch.device("cuda")
    weight = torch.zeros(2**20, device=device, requires_grad=True)

    def step(batch: int) -> None:
        (weight * torch.ones(batch * 64, 1, device=device)).square().sum().backward()

    choice = auto_batch(step, device, fraction=0.5)
    assert choice.batch > 16
    step(choice.batch)
