"""Label files: rows of mutated text, and what the parser made of them checked."""

from __future__ import annotations

import random

import numpy as np

from scripts.fuzz.rounds import Counts, mutate, run_round
from utils.errors import DataError
from utils.labels import MAX_FAULTS, LabelFile, decode_labels, format_detections

CORPUS = [
    b"0 0.5 0.5 0.25 0.25\n",
    b"1 0.1 0.2 0.05 0.1\n2 0.9 0.9 0.1 0.1\n2 0.9 0.9 0.1 0.1\n",
    b"3 0.1 0.1 0.9 0.1 0.9 0.9 0.1 0.9\n0 .5 .5 1 1\n",
    b"\xef\xbb\xbf0 0.5 0.5 1.005 -0.003\r\n\r\n4 1e-3 1E-3 2e-3 +2e-3",
    b"5\t0.25\t0.25\t0.5\t0.5\n" * 20,
    b"",
]
WORDS = [b"nan", b"inf", b"-inf", b"1e999", b"-1e999", b"1e308", b"1e-320", b"5e-324", b"1e38", b"3.5e38", b"1e-46"]
WORDS += [b"-0", b"1.01", b"-0.01", b"1.0000001", b"0.99999999999", b"16777217", b"9" * 400, b"0x10", b"1_0", b"1,5"]
WORDS += [
    b" ",
    b"\n",
    b"\r",
    b"\t",
    b"\0",
    b"\x0b",
    b"\x1c",
    b"\xc2\x85",
    b"\xe2\x80\xa8",
    b"\xd9\xa3",
    b"\xff",
    b"\x1b[2J",
]
WORDS += [b"#", b"=", b"0 ", b"0 0.5 0.5 0.1 0.1\n", b"0.5 " * 50, b"0.3 0.3 " * 3]


def run(inputs: int, seed: int) -> Counts:
    """Read ``inputs`` mutated label files."""
    return run_round(_make, _attempt, inputs, seed)


def _make(rng: random.Random) -> bytes:
    return bytes([rng.randrange(2)]) + mutate(rng, CORPUS, WORDS)


def _attempt(data: bytes) -> None:
    nc = 6 if data[0] else None  # the first byte says whether class numbers are bounded
    result = decode_labels(data[1:], "a.txt", nc)
    check_result(result, nc)
    if result.faults:  # as the scan of a data set tells it
        raise DataError(f"a.txt:{result.faults[0][0]}: {result.faults[0][1]}")


def check_result(result: LabelFile, nc: int | None) -> None:
    """Raise AssertionError unless ``result`` is what :class:`LabelFile` promises."""
    boxes = result.boxes
    assert boxes.dtype == np.float32 and boxes.ndim == 2 and boxes.shape[1] == 5, boxes.shape
    assert np.isfinite(boxes).all() and (boxes[:, 0] == boxes[:, 0].round()).all() and (boxes[:, 0] >= 0).all()
    assert nc is None or (boxes[:, 0] < nc).all()
    assert ((boxes[:, 1:] >= 0) & (boxes[:, 1:] <= 1)).all() and (boxes[:, 3:] > 0).all(), boxes
    assert result.rows == len(boxes) + len(result.faults) + result.duplicates
    assert len(result.faults) <= MAX_FAULTS + 1
    if result.segments is not None:
        assert len(result.segments) == len(boxes)
        assert all(((s >= 0) & (s <= 1)).all() and s.dtype == np.float32 for s in result.segments)
    detections = np.concatenate((boxes[:, 1:], np.ones((len(boxes), 1)), boxes[:, :1]), 1)
    assert format_detections(detections, (100, 100)).count("\n") == len(boxes)
