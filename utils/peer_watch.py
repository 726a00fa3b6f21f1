"""Ranks that watch each other: whoever ends, stops or stands still is named, and nobody waits for it for ever.

gloo says that a connection was closed, not whose; NCCL between the GPUs of a machine says nothing at all; and how long
a rank may take cannot be told by a process group's time-out, because rank 0 scans data sets and writes checkpoints
while the others wait. So each rank tells two things about itself, once a second, in the store that torchrun (or rank
0) keeps: that its process lives, and how far its main thread has come. The second is judged in loops over batches only.
That a silent process of the same machine has ended is looked up, which takes seconds where silence alone takes longer.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist

from utils.dist import World, broadcast, gather
from utils.errors import ResourceError, UserError, explain_lost_peer, explain_lost_worker, explain_memory_error
from utils.process_name import has_ended, process_name
from utils.safe_names import printable

GO_ON = "the checkpoints of completed epochs are whole: go on with --resume"
UNJUDGED_BEATS = 8
"""The first batches compile and load kernels, which may take a minute on one rank and not on another."""
GRACE = 3.0
"""Seconds that a main thread has to end by itself, with a better message, before its watch ends it."""


@dataclass(frozen=True)
class Sign:
    """What a rank last said. ``moved``: (phase, beats), the same course in every rank; ``state``: working, judged (in a
    loop over batches), done, ended (``text`` says why), or follows (ended because of another). ``process``: see
    :func:`utils.process_name.process_name`."""

    pulse: int = 0
    moved: tuple[int, int] = (0, 0)
    state: str = "working"
    text: str = ""
    process: str = ""

    @property
    def present(self) -> bool:
        """It should go on giving signs."""
        return self.state in ("working", "judged")

    def dumps(self) -> str:
        return json.dumps([self.pulse, self.moved, self.state, self.text, self.process])

    @classmethod
    def loads(cls, text: str | bytes) -> Sign:
        pulse, moved, state, reason, process = json.loads(text)
        return cls(pulse, tuple(moved), state, reason, process)


@dataclass
class Seen:
    """A rank as another sees it: its last sign, and since when (seconds, own clock) its parts are what they are.
    ``gone``: its process had ended, and it had been silent for a while, before that sign was read, which is therefore
    its last word."""

    sign: Sign
    pulse_since: float
    moved_since: float
    gone: bool = False

    def update(self, sign: Sign, now: float) -> None:
        """Take note of what was read at ``now``, after :attr:`gone` was found out."""
        if sign.pulse != self.sign.pulse:
            self.pulse_since = now
        if (sign.moved, sign.state) != (self.sign.moved, self.sign.state):
            self.moved_since = now
        self.sign = sign


def verdict(seen: Mapping[int, Seen], me: int, now: float, patience: float) -> str:
    """Who is to blame that this training cannot go on, in a line; '' while there is no reason to think so."""
    for rank, peer in seen.items():
        if peer.gone and peer.sign.present:
            return _without_a_word(rank)
    for rank, peer in seen.items():
        if peer.sign.state == "ended":
            return f"rank {rank} has ended ({peer.sign.text}), and the others cannot go on without it; {GO_ON}"
    for rank, peer in seen.items():
        silent = now - peer.pulse_since
        if rank != me and peer.sign.present and silent > patience:
            return (
                f"rank {rank} has given no sign of life for {silent:.0f} s: its process or its machine has stopped, "
                f"is gone or cut off; {GO_ON}"
            )
    if any(peer.sign.state != "judged" for peer in seen.values()):
        return ""
    still = min(now - peer.moved_since for peer in seen.values())
    if still <= patience:
        return ""
    last = min(peer.sign.moved for peer in seen.values())
    behind = [rank for rank, peer in seen.items() if peer.sign.moved == last]
    if len(behind) == len(seen):
        return f"no rank has moved for {still:.0f} s, all in the same step: a GPU or the network hangs; {GO_ON}"
    doing = "waits for its loader" if last[1] % 2 == 0 else "is in a step"
    names = f"rank {behind[0]}" if len(behind) == 1 else f"ranks {', '.join(map(str, behind))}"
    return f"{names} ({doing}) has stood still for {still:.0f} s, and the others wait for it; {GO_ON}"


class PeerWatch:
    """Around a training: ``with PeerWatch(world, patience) as watch``; all ranks enter it together.

    patience: seconds of silence, or of standing still in a loop over :meth:`batches`, after which a rank is given up;
    0 watches nothing, as does a world of one. A rank that gives another up says why in one line and ends with status 2,
    from a thread if its main thread is waiting. An exception that leaves the block is told to the others; one that says
    no more than that a connection broke is replaced by one that names the rank. ``store`` and ``end``: for tests.
    """

    def __init__(
        self, world: World, patience: float, store: Any = None, end: Callable[[str], None] | None = None
    ) -> None:
        self.world, self.patience = world, patience
        self.every = max(1.0, world.size / 32)  # seconds between signs: each rank reads those of all
        self._store, self._end = store, end or _end_process
        self._process = process_name()
        self._phase = self._beats = self._all_beats = self._pulse = 0
        self._state, self._text, self._in_loop = "working", "", False
        self._seen: dict[int, Seen] = {}
        self._leaving = threading.Event()
        self._hold = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def _silence(self) -> float:
        """Seconds without a sign that cannot be chance."""
        return 3 * self.every

    @property
    def watching(self) -> bool:
        return self.world.size > 1 and self.patience > 0

    def __enter__(self) -> PeerWatch:
        if not self.watching:
            return self
        self._store = self._store or _second_connection(max(20.0, self.patience))
        self._key = f"peers/{broadcast(uuid.uuid4().hex, self.world)}"  # an earlier start may have left its signs
        self._tell()
        gather(None, self.world)  # from here on everyone's sign can be read without waiting
        now = time.monotonic()
        self._seen = {rank: Seen(Sign(), now, now) for rank in range(self.world.size)}
        self._thread = threading.Thread(target=self._watch, name="peer watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.watching:
            return
        self._leaving.set()
        self._thread.join(5)  # it may be waiting for the store
        lost = explain_lost_peer(error) if isinstance(error, Exception) else None
        try:
            if lost:
                self._state = "follows"
                named = self._who_is_gone()
                if named:
                    raise ResourceError(named) from error
            else:
                self._state, self._text = ("ended", _in_words(error)) if error else ("done", "")
                self._tell()
        except _STORE_ERRORS:
            if lost:
                raise ResourceError(_store_is_gone()) from error

    def begin(self, judged: bool = False) -> None:
        """The next part of the training, in all ranks. ``judged``: none may stand still in it."""
        self._phase, self._beats, self._in_loop = self._phase + 1, 0, judged

    def beat(self) -> None:
        """This rank has come a little further: it has a batch, or is done with one."""
        self._beats += 1
        self._all_beats += 1

    def batches(self, loader: Any) -> Any:
        """``loader``, with a part of the training that is judged around its batches; iterable and with a length."""
        return _Watched(loader, self) if self.watching else loader

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """The block is not ended by this watch, whatever the others do: files are being written."""
        with self._hold:
            yield

    def _tell(self) -> None:
        self._pulse += 1
        judged = self._state == "working" and self._in_loop and self._all_beats >= UNJUDGED_BEATS
        state = "judged" if judged else self._state
        sign = Sign(self._pulse, (self._phase, self._beats), state, self._text, self._process)
        self._store.set(f"{self._key}/{self.world.rank}", sign.dumps())

    def _look(self) -> None:
        keys = [f"{self._key}/{rank}" for rank in range(self.world.size)]
        now = time.monotonic()
        for peer in self._seen.values():  # a machine that was copied while it ran may have its name, but gives signs
            peer.gone = now - peer.pulse_since > self._silence and has_ended(peer.sign.process)
        for rank, text in enumerate(self._store.multi_get(keys)):
            self._seen[rank].update(Sign.loads(text), now)

    def _watch(self) -> None:
        """The thread: tells, looks, and ends the process when it must."""
        blame = ""
        while not blame and not self._leaving.wait(self.every):
            try:
                self._tell()
                self._look()
                blame = verdict(self._seen, self.world.rank, time.monotonic(), self.patience)
            except _STORE_ERRORS:
                blame = _store_is_gone()
        if blame and not self._leaving.wait(GRACE):
            with self._hold:
                if not self._leaving.is_set():
                    self._pass_on(blame)
                    self._end(blame)

    def _pass_on(self, blame: str) -> None:
        """Tell the others why this rank ends; if it is the one to blame, they are to name it."""
        self._state = "ended" if blame.startswith(f"rank {self.world.rank} ") else "follows"
        self._text = blame.split("; ")[0]
        with suppress(*_STORE_ERRORS):
            self._tell()

    def _who_is_gone(self) -> str:
        """After a lost connection: the rank that ended, with its reason if it left one, or that fell silent; '' if all
        others are there."""
        deadline = time.monotonic() + self._silence + 2
        while time.monotonic() < deadline:
            self._tell()  # others may be looking for the same
            self._look()
            blame = verdict(self._seen, self.world.rank, time.monotonic(), self.patience)
            if blame:
                return blame
            for rank, peer in self._seen.items():
                silent = time.monotonic() - peer.pulse_since > self._silence
                if rank != self.world.rank and peer.sign.present and silent:
                    return _without_a_word(rank)
            time.sleep(0.2)
        told = [peer.sign.text for peer in self._seen.values() if peer.sign.state == "follows" and peer.sign.text]
        return f"{told[0]}; {GO_ON}" if told else ""


class _Watched:
    """See PeerWatch.batches. A rank that is through with its share goes over to the next part and waits there, still
    judged, so that it is ahead of one that hangs."""

    def __init__(self, loader: Any, watch: PeerWatch) -> None:
        self._loader: Iterable | Sized = loader
        self._watch = watch

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        self._watch.begin(judged=True)
        for batch in self._loader:
            self._watch.beat()
            yield batch
            self._watch.beat()
        self._watch.begin(judged=True)


_STORE_ERRORS = (dist.DistError, RuntimeError, ConnectionError)


def _second_connection(timeout: float) -> dist.Store:
    """To the store of the process group; its own connection may be taken by a main thread that waits in it."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout))


def _without_a_word(rank: int) -> str:
    return f"rank {rank} has ended without a word (killed, or its machine is gone); {GO_ON}"


def _store_is_gone() -> str:
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return f"rank 0, or its machine, is gone ({where}, where ranks find each other, does not answer); {GO_ON}"


def _in_words(error: BaseException) -> str:
    """Why a rank ends, short enough for the others' line."""
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted or terminated"
    line = None
    if isinstance(error, Exception) and not isinstance(error, UserError):
        line = explain_memory_error(error) or explain_lost_worker(error)
    text = line or (str(error).strip().splitlines() or [""])[0] or type(error).__name__
    return printable(text[:300])


def _end_process(blame: str) -> None:
    """One line, and out, whatever the main thread waits for."""
    sys.stdout.flush()
    print(f"rank {os.environ.get('RANK', '?')}: error: {blame}", file=sys.stderr, flush=True)
    os._exit(ResourceError.exit_code)
