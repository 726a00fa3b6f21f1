"""Work in the background: in order, of data as it was, and errors that come out."""

from __future__ import annotations

import threading

import pytest
import torch

from utils import background as module
from utils.background import Background, fetch, held


def test_arguments_are_held() -> None:
    weights, seen, go = torch.zeros(2), [], threading.Event()
    background = Background()
    background(lambda: go.wait(5))
    background(lambda state: seen.append(state), {"w": [weights, (weights, 1)], "name": "x"})
    weights.fill_(7)
    go.set()
    background.wait()
    [state] = seen
    assert state["w"][0].tolist() == state["w"][1][0].tolist() == [0, 0] and state["w"][1][1] == 1


def test_only_so_many_wait() -> None:
    background, done = Background(most=2), []
    for number in range(20):
        background(done.append, number)
        assert len(background._pending) <= 2
    background.wait()
    assert done == list(range(20))


def test_named_and_other_values_stay_what_they_are() -> None:
    class Named(dict):
        pass

    assert held((1, None, "a", [2.5])) == (1, None, "a", [2.5])
    assert held(Named(a=1)) == {"a": 1}


def mixed(device: str) -> list[torch.Tensor]:
    """Tensors of several types, shapes and orders in memory."""
    numbers = torch.arange(24.0, device=device)
    images = numbers.view(1, 2, 3, 4).to(memory_format=torch.channels_last)
    parameter = torch.nn.Parameter(numbers[:4].view(2, 2))
    return [numbers, images, parameter, numbers.half()[3], numbers[::5], numbers.long(), numbers[:0], numbers.half()]


@pytest.mark.parametrize("most", [1, 10, 1 << 26])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_fetched_is_the_same(device: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", most)
    given = mixed(device)
    for copy, tensor in zip(fetch(given), given, strict=True):
        assert copy.dtype == tensor.dtype and torch.equal(copy, tensor.detach().cpu()) and not copy.requires_grad


def test_without_memory_to_join_them_in_they_are_fetched_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: list) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    given = mixed("cpu")
    monkeypatch.setattr(torch, "cat", full)
    copies = fetch(given)
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, given, strict=True))
    given[0].fill_(7)
    assert not torch.equal(copies[0], given[0])


@pytest.mark.gpu
def test_tensors_of_a_gpu_are_held() -> None:
    cuda, cpu = mixed("cuda"), mixed("cpu")
    kept = held({"a": cuda, "b": (cpu[0], {"c": cuda[0]}), "n": 1})
    for tensor in (cuda[0], cpu[0]):
        tensor.fill_(7)
    for copy, tensor in zip(kept["a"], mixed("cpu"), strict=True):
        assert copy.device.type == "cpu" and torch.equal(copy, tensor)
    assert torch.equal(kept["b"][0], torch.arange(24.0)) and torch.equal(kept["b"][1]["c"], torch.arange(24.0))


def test_an_error_comes_out_once_and_ends_what_was_to_follow() -> None:
    background, done = Background(), []

    def fail() -> None:
        raise OSError(28, "full", "last.pt")

    for work in (lambda: done.append(1), fail, lambda: done.append(2)):
        background(work)
    with pytest.raises(OSError, match="full"):
        background.wait()
    background.wait()
    background(done.append, 3)
    background.wait()
    assert done == [1, 3]
