"""A short round of each fuzz target, and that a reader which breaks its promise is noticed."""

from __future__ import annotations

import importlib
import random

import pytest

from scripts.fuzz.__main__ import TARGETS
from scripts.fuzz.rounds import mutate, run_round
from utils.errors import DataError

ROUND = {"labels": 2000, "yaml": 400, "images": 500, "caches": 300, "checkpoint": 200, "wts": 500}


@pytest.mark.filterwarnings("ignore")  # Pillow's, about the damaged pictures
@pytest.mark.parametrize("target", TARGETS)
def test_short_round(target: str) -> None:
    counts = importlib.import_module(f"scripts.fuzz.fuzz_{target}").run(ROUND[target], seed=1)
    assert counts.crashes == [] and counts.inputs == ROUND[target]
    assert counts.accepted > 0 and counts.refused > 0, counts.text()


def test_inputs_are_the_same_for_the_same_seed() -> None:
    def inputs(seed: int) -> list[bytes]:
        return [mutate(random.Random(f"{seed}/{n}"), [b"abc", b"0 1 2\n"], [b"nan"]) for n in range(50)]

    assert inputs(3) == inputs(3) != inputs(4)


def test_crashes_and_messages_of_two_lines_are_counted() -> None:
    def attempt(data: bytes) -> None:
        if data == b"bug":
            raise KeyError("x")
        if data == b"lines":
            raise DataError("one\ntwo")
        if data == b"bad":
            raise DataError("one")

    feed = iter((b"bug", b"lines", b"bad", b"good"))
    counts = run_round(lambda rng: next(feed), attempt, 4, 0)
    assert (counts.accepted, counts.refused, len(counts.crashes)) == (1, 2, 2)
    assert "KeyError" in counts.text() and "more than one line" in counts.text()
