"""Batches, order and processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing

import numpy as np
import pytest
import torch

from utils.dataloaders import EpochSampler, collate_quad, create_dataloader, earlier
from utils.dataset import DetectionDataset, Draw, Sample
from utils.errors import DataError, ResourceError
from utils.files import ROOT

ROWS = "0 .5 .5 .4 .4\n1 .3 .3 .2 .2\n"


@pytest.fixture
def data(make_set: Callable) -> DetectionDataset:
    return DetectionDataset(make_set({f"im{i}": ROWS for i in range(7)}), 64, augment=True, nc=2, show=False)


def test_batches_have_the_agreed_form(data: DetectionDataset) -> None:
    batches = list(create_dataloader(data, 4, workers=0))
    assert [len(b.paths) for b in batches] == [4, 3]
    first = batches[0]
    assert first.images.shape == (4, 3, 64, 64) and first.images.dtype == torch.uint8
    assert first.images.is_contiguous(memory_format=torch.channels_last)
    assert first.targets.dtype == torch.float32 and first.targets.shape[1] == 6
    assert first.letterboxes == [None] * 4
    sample = data[Draw(0, 2)]
    np.testing.assert_array_equal(first.images[2].permute(1, 2, 0).numpy(), sample.image)
    np.testing.assert_array_equal(first.targets[first.targets[:, 0] == 2, 1:].numpy(), sample.labels)
    assert first.to("cpu").images.data_ptr() == first.images.data_ptr()


def test_batches_do_not_depend_on_the_number_of_processes(data: DetectionDataset) -> None:
    runs = []
    for workers in (0, 2):
        loader = create_dataloader(data, 4, shuffle=True, workers=workers, seed=1)
        run = []
        for epoch in (0, 1, 4):
            loader.set_epoch(epoch)
            run += [(b.paths, b.images.clone(), b.targets.clone()) for b in loader]
        runs.append(run)
    for (paths, images, targets), (paths2, images2, targets2) in zip(*runs):
        assert paths == paths2
        assert torch.equal(images, images2) and torch.equal(targets, targets2)
    assert runs[0][0][0] != runs[0][2][0]  # another order in the next epoch


def test_loading_leaves_the_global_generator_alone(data: DetectionDataset) -> None:
    before = torch.get_rng_state()
    list(create_dataloader(data, 4, shuffle=True, workers=0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("length", "size"), [(10, 3), (2, 4), (9, 1), (8, 2)])
def test_ranks_share_every_image(length: int, size: int) -> None:
    even = [EpochSampler(length, shuffle=True, seed=5, rank=r, size=size) for r in range(size)]
    assert len({len(s) for s in even}) == 1 and all(len(s) == len(list(s.draws(0))) for s in even)
    assert {d.index for s in even for d in s.draws(0)} == set(range(length))
    exact = [EpochSampler(length, shuffle=False, rank=r, size=size, even=False) for r in range(size)]
    assert sorted(d.index for s in exact for d in s.draws(0)) == list(range(length))


@pytest.mark.parametrize(
    ("length", "size", "even"), [(10, 3, True), (2, 5, True), (2, 5, False), (0, 2, True), (9, 3, False)]
)
def test_single_images_are_shared_as_blocks_of_one_would_be(length: int, size: int, even: bool) -> None:
    order = np.random.default_rng(0).permutation(length)
    whole = -(-length // size) * size
    for rank in range(size):
        sampler = EpochSampler(length, shuffle=True, rank=rank, size=size, even=even)
        expected = [order[i % length] for i in range(rank, whole if even else length, size)]
        assert sampler._share(order).tolist() == expected


def test_earlier_counts() -> None:
    assert earlier(np.array([5, 2, 5, 5, 2, 9])).tolist() == [0, 0, 1, 2, 1, 0]
    assert earlier(np.zeros(0, np.int64)).tolist() == []


def test_rectangular_batches_stay_whole_on_every_rank() -> None:
    for even in (True, False):
        for rank in range(2):
            sampler = EpochSampler(10, shuffle=False, rank=rank, size=2, block=4, even=even)
            indices = [d.index for d in sampler.draws(0)]
            assert len(indices) == len(sampler)
            for start in range(0, len(indices), 4):
                assert len({i // 4 for i in indices[start : start + 4]}) == 1


def test_epochs_come_out_of_one_stream(data: DetectionDataset) -> None:
    """In sequence, after a jump, after an iteration left early and after new weights: always the epoch asked for."""

    def epoch(loader, number: int) -> list[list[int]]:
        loader.set_epoch(number)
        return [batch.images.flatten()[:64].tolist() for batch in loader]

    plain = create_dataloader(data, 2, shuffle=True, workers=0)
    expected = {number: epoch(plain, number) for number in range(5)}
    loader = create_dataloader(data, 2, shuffle=True, workers=2)
    assert [epoch(loader, n) for n in (0, 1)] == [expected[n] for n in (0, 1)]
    assert epoch(loader, 4) == expected[4]
    loader.set_epoch(0)
    next(iter(loader))
    assert [epoch(loader, n) for n in (0, 1)] == [expected[n] for n in (0, 1)]
    loader.set_weights(np.eye(len(data))[0])
    loader.set_epoch(2)
    assert {path for batch in loader for path in batch.paths} == {data.path(0)}


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_begun_beforehand_is_the_epoch_asked_for(data: DetectionDataset, workers: int) -> None:
    """Its processes load before anybody iterates; another epoch than the one begun with begins anew."""

    def paths(loader, number: int) -> list[list[str]]:
        loader.set_epoch(number)
        return [list(batch.paths) for batch in loader]

    plain = create_dataloader(data, 2, shuffle=True, workers=0)
    expected = [paths(plain, number) for number in range(3)]
    loader = create_dataloader(data, 2, shuffle=True, workers=workers)
    loader.begin()
    assert len(multiprocessing.active_children()) >= workers
    loader.begin()
    assert [paths(loader, number) for number in (0, 1)] == expected[:2]
    other = create_dataloader(data, 2, shuffle=True, workers=workers)
    other.begin()
    assert paths(other, 2) == expected[2]
    create_dataloader(data, 2, workers=workers).begin()  # never iterated: ends with the loader


@pytest.mark.parametrize("patient", [False, True])
def test_only_a_training_has_its_processes_stay_after_a_sigterm(data: DetectionDataset, patient: bool) -> None:
    """An evaluation that failed waited half a minute for them."""
    before = set(multiprocessing.active_children())
    loader = create_dataloader(data, 2, workers=1 + patient, patient=patient)
    next(iter(loader))  # they are at work
    process = (set(multiprocessing.active_children()) - before).pop()
    torchs = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # raises for processes that end
    process.terminate()
    process.join(0.5 if patient else 10)
    stays = process.is_alive()
    process.kill()
    loader._stream._shutdown_workers()
    signal.signal(signal.SIGCHLD, torchs)
    assert stays == patient


@pytest.mark.parametrize("begun", [True, False])
def test_a_closed_loader_leaves_no_processes_and_can_be_used_again(data: DetectionDataset, begun: bool) -> None:
    """Also when it is closed by an exception that has the loader in its traceback."""
    before, loader = set(multiprocessing.active_children()), create_dataloader(data, 2, workers=2)
    with pytest.raises(ZeroDivisionError), closing(loader):
        if begun:
            loader.begin()
        for _ in loader:
            assert set(multiprocessing.active_children()) > before
            raise ZeroDivisionError
    assert not set(multiprocessing.active_children()) - before
    expected = [batch.paths for batch in create_dataloader(data, 2, workers=0)]
    with closing(loader):
        assert [batch.paths for batch in loader] == expected
    with closing(create_dataloader(data, 2, workers=0)) as plain:
        next(iter(plain))


LEAVES = """
import time
from multiprocessing import connection, resource_sharer
from utils.dataloaders import _start_worker
_start_worker(False, 0)
address, _ = resource_sharer._resource_sharer.register(lambda *_: None, lambda: None)
connection.SocketClient(address).close()
time.sleep(0.5)
"""


def test_a_program_that_ends_while_it_takes_a_batch_leaves_no_traceback() -> None:
    done = subprocess.run([sys.executable, "-c", LEAVES], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_a_process_that_may_have_no_children_loads_by_itself(data: DetectionDataset, monkeypatch) -> None:
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    assert create_dataloader(data, 2, workers=2).num_workers == 0


def test_image_weights_draw_the_wanted_images() -> None:
    sampler = EpochSampler(4, shuffle=True, seed=0)
    sampler.weights = np.array([0, 1, 3, 0])
    draws = [d for epoch in range(200) for d in sampler.draws(epoch)]
    counts = np.bincount([d.index for d in draws], minlength=4)
    assert counts[0] == counts[3] == 0 and 2.4 < counts[2] / counts[1] < 3.7
    assert len(set(draws)) == len(draws)  # repeated images are augmented anew


def test_rectangular_sets_load_in_their_own_order(make_set: Callable) -> None:
    images = make_set({"a": ROWS, "b": ROWS}, size=(30, 60))
    make_set({"c": ROWS}, size=(60, 30))
    data = DetectionDataset(images, 64, rect=True, batch_size=2, pad=0.5, nc=2, show=False)
    batches = list(create_dataloader(data, 8, shuffle=True, workers=0))
    assert [tuple(b.images.shape) for b in batches] == [(2, 3, 64, 96), (1, 3, 96, 64)]
    assert all(box.original in ((30, 60), (60, 30)) for b in batches for box in b.letterboxes)


def quad_samples() -> list[Sample]:
    labels = np.float32([[1, 0.5, 0.25, 0.2, 0.1]])
    return [Sample(np.full((8, 8, 3), k, np.uint8), labels, f"{k}", None, Draw(0, 0)) for k in range(4)]


def test_quads_enlarge_or_tile() -> None:
    seen = set()
    for index in range(12):
        samples = quad_samples()
        samples[0].draw = Draw(0, index)
        batch = collate_quad(samples)
        assert batch.images.shape == (1, 3, 16, 16)
        if len(batch.targets) == 1:
            seen.add("enlarged")
            assert batch.targets[0, 1:].tolist() == samples[0].labels[0].tolist()
        else:
            seen.add("tiled")
            corners = batch.images[0, 0][::15, ::15].flatten().tolist()
            assert corners == [0, 2, 1, 3]  # down the left column, then down the right
            expected = [(0.25, 0.125), (0.25, 0.625), (0.75, 0.125), (0.75, 0.625)]
            np.testing.assert_allclose(batch.targets[:, 2:4], expected)
            np.testing.assert_allclose(batch.targets[:, 4:], [[0.1, 0.05]] * 4)
    assert seen == {"enlarged", "tiled"}


def test_quad_loader_counts_in_fours(data: DetectionDataset) -> None:
    batches = list(create_dataloader(data, 4, workers=0, quad=True))
    assert [tuple(b.images.shape) for b in batches] == [(1, 3, 128, 128)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_lost_during_the_run_is_one_line(data: DetectionDataset, workers: int) -> None:
    for index in range(len(data)):
        os.remove(data.path(index))
    with pytest.raises(DataError, match=r"^[^\n]*im\d.png: no such file$"):
        list(create_dataloader(data, 4, workers=workers))


class Suicidal(DetectionDataset):
    def load_image(self, index: int) -> np.ndarray:
        os._exit(9)


def test_a_process_that_dies_is_one_line(data: DetectionDataset) -> None:
    data.__class__ = Suicidal
    with pytest.raises(ResourceError, match="data loading process died.*--workers 0"):
        list(create_dataloader(data, 4, workers=1))
