"""Who is to blame when a training of several ranks cannot go on; threads that share a store stand for the ranks."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

import utils.peer_watch as peer_watch
from utils.dist import World
from utils.errors import ResourceError
from utils.peer_watch import UNJUDGED_BEATS, PeerWatch, Seen, Sign, verdict


def seen(*ranks: tuple[str, tuple[int, int], float, float]) -> dict[int, Seen]:
    """(state, moved, seconds of silence, seconds of standing still) of each rank, at second 100."""
    return {
        number: Seen(Sign(1, moved, state, "disk full"), 100 - silent, 100 - still)
        for number, (state, moved, silent, still) in enumerate(ranks)
    }


@pytest.mark.parametrize(
    ("ranks", "blame"),
    [
        ([("judged", (2, 5), 1, 60), ("judged", (2, 6), 1, 60)], "rank 0 (is in a step) has stood still for 60 s"),
        ([("judged", (2, 5), 1, 60), ("judged", (2, 4), 1, 60)], "rank 1 (waits for its loader) has stood still"),
        ([("judged", (3, 0), 1, 60), ("judged", (2, 9), 1, 60)], "rank 1 (is in a step)"),  # rank 0 is through
        ([("judged", (2, 5), 1, 60), ("judged", (2, 5), 1, 60)], "no rank has moved for 60 s, all in the same step"),
        ([("judged", (2, 5), 1, 60), ("judged", (2, 6), 1, 40)], ""),  # rank 1 has only just come to wait
        ([("working", (2, 5), 1, 900), ("judged", (2, 6), 1, 900)], ""),  # scanning, saving, drawing
        ([("judged", (2, 5), 1, 2), ("working", (2, 6), 50, 50)], "rank 1 has given no sign of life for 50 s"),
        ([("judged", (2, 5), 1, 2), ("done", (2, 6), 50, 50)], ""),
        (
            [("judged", (2, 5), 1, 2), ("follows", (2, 5), 5, 5), ("ended", (2, 6), 5, 5)],
            "rank 2 has ended (disk full)",
        ),
    ],
)
def test_verdict(ranks: list, blame: str) -> None:
    line = verdict(seen(*ranks), 0, 100, 45)
    assert line.startswith(blame) and bool(line) == bool(blame)


def test_a_last_word_counts_more_than_that_the_process_has_ended() -> None:
    ranks = seen(("judged", (2, 5), 1, 2), ("judged", (2, 5), 1, 2))
    ranks[1].gone = True
    assert verdict(ranks, 0, 100, 45).startswith("rank 1 has ended without a word (killed, or its machine is gone)")
    ranks[1].sign = Sign(2, (2, 5), "ended", "disk full")
    assert verdict(ranks, 0, 100, 45).startswith("rank 1 has ended (disk full)")
    ranks[1].sign = Sign(2, (2, 5), "done")
    assert verdict(ranks, 0, 100, 45) == ""


def test_the_rank_that_was_killed_is_named_before_those_that_torchrun_then_ended() -> None:
    ranks = seen(("judged", (2, 5), 1, 2), ("ended", (2, 5), 1, 2), ("judged", (2, 5), 4, 4))
    ranks[2].gone = True
    assert verdict(ranks, 0, 100, 45).startswith("rank 2 has ended without a word")


class Ranks:
    """Two watches in threads: ``run(body0, body1)`` gives what each said when it gave up, or raised."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, patience: float) -> None:
        self.patience = patience
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5))
        barrier = threading.Barrier(2)
        monkeypatch.setattr(peer_watch, "broadcast", lambda value, world: "one start")
        monkeypatch.setattr(peer_watch, "gather", lambda value, world: barrier.wait(5))
        monkeypatch.setattr(peer_watch, "GRACE", 0.2)
        monkeypatch.setenv("WORLD_SIZE", "2")

    def run(self, *bodies) -> list[str]:
        said = ["", ""]

        def rank(number: int) -> None:
            given_up = threading.Event()

            def end(blame: str) -> None:
                said[number] = blame
                given_up.set()

            store = dist.TCPStore("127.0.0.1", self.store.port, is_master=False, timeout=timedelta(seconds=5))
            watch = PeerWatch(World(number, number, 2), self.patience, store, end)
            watch.every = 0.05
            try:
                with watch:
                    bodies[number](watch, given_up)
            except Exception as error:
                said[number] = said[number] or f"{type(error).__name__}: {error}"

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        return said


def waits(watch: PeerWatch, given_up: threading.Event) -> None:
    assert given_up.wait(10)


def test_an_error_of_one_rank_ends_the_other_with_its_reason(monkeypatch) -> None:
    def fails(watch: PeerWatch, given_up: threading.Event) -> None:
        raise ResourceError("the disk is full")

    said = Ranks(monkeypatch, 30).run(waits, fails)
    assert said[0].startswith("rank 1 has ended (the disk is full)") and said[1] == "ResourceError: the disk is full"


def test_a_broken_connection_gets_the_name_of_the_rank(monkeypatch) -> None:
    def fails(watch: PeerWatch, given_up: threading.Event) -> None:
        raise MemoryError

    def notices(watch: PeerWatch, given_up: threading.Event) -> None:
        raise RuntimeError("[/pytorch/gloo/pair.cc:561] Connection closed by peer [127.0.0.1]:1")

    said = Ranks(monkeypatch, 30).run(notices, fails)
    assert said[0].startswith("ResourceError: rank 1 has ended (memory ran out")


def test_the_rank_that_stands_still_is_named_by_both(monkeypatch) -> None:
    def trains(stalls: bool):
        def body(watch: PeerWatch, given_up: threading.Event) -> None:
            for _ in watch.batches(range(UNJUDGED_BEATS)):
                pass
            watch.begin()
            for index in watch.batches(range(9)):
                if index == 3 and stalls:
                    assert given_up.wait(10)
                if index == 4:  # the first step that cannot end without the other
                    assert given_up.wait(10)
                if given_up.is_set():
                    return

        return body

    said = Ranks(monkeypatch, 1).run(trains(False), trains(True))
    assert all(line.startswith("rank 1 (is in a step) has stood still for 1 s") for line in said)


def test_files_are_written_to_the_end(monkeypatch) -> None:
    written = []

    def saves(watch: PeerWatch, given_up: threading.Event) -> None:
        with watch.undisturbed():
            time.sleep(0.7)
            assert not given_up.is_set()
            written.append(True)
        assert given_up.wait(10)

    def fails(watch: PeerWatch, given_up: threading.Event) -> None:
        raise ResourceError("gone")

    assert Ranks(monkeypatch, 30).run(saves, fails)[0].startswith("rank 1 has ended") and written


def test_ranks_that_come_to_the_end_leave_in_peace(monkeypatch) -> None:
    def done(watch: PeerWatch, given_up: threading.Event) -> None:
        time.sleep(0.2)

    assert Ranks(monkeypatch, 1).run(done, done) == ["", ""]


def test_one_process_and_no_patience_watch_nothing() -> None:
    loader = [1, 2]
    for world, patience in ((World(), 45), (World(0, 0, 2), 0)):
        with PeerWatch(world, patience) as watch:
            assert watch.batches(loader) is loader
            watch.begin()
