"""Work in the background: in order, of data as it was, and errors that come out."""

from __future__ import annotations

import threading

import pytest
import torch

from utils.background import Background, held


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
