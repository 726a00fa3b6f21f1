"""Weights as text: mutated .wts files, alone and as the weights of a model."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

import torch

from scripts.fuzz.rounds import Counts, mutate, run_round
from utils.wts import META, read_wts, write_wts

WORDS = [b" ", b"\n", b"  ", b"0", b"-1", b"99999999999", b"9" * 300, b"3f800000", b" 3f800000", b"g", b"\0", b"\x0b"]
WORDS += [
    b"\xff",
    b"1\n",
    b"a 1  3f800000\n",
    b"a 0 \n",
    META.encode(),
    b"\x1b[2J",
    b"\xc2\x85",
    b"x" * 300,
    b"7fc00000",
]


def run(inputs: int, seed: int) -> Counts:
    """Read ``inputs`` mutated files."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.wts"
        corpus = _corpus(path)

        def attempt(data: bytes) -> None:
            path.write_bytes(data)
            tensors, meta = read_wts(path)
            assert isinstance(meta, dict) and META not in tensors
            assert all(value.dtype == torch.float32 and value.dim() == 1 for value in tensors.values())
            assert sum(value.numel() for value in tensors.values()) * 9 <= len(data)

        return run_round(lambda rng: _make(rng, corpus), attempt, inputs, seed)


def _corpus(path: Path) -> list[bytes]:
    files = []
    for tensors, meta in (
        ({"model.0.conv.weight": torch.randn(3, 2)}, None),
        ({"a": torch.tensor([float("nan"), float("inf"), -0.0]), "b": torch.empty(0)}, {"names": ["a"], "nc": 1}),
        ({}, {"yaml": {"nc": 1, "backbone": []}}),
    ):
        write_wts(path, tensors, meta)
        files.append(path.read_bytes())
    return files


def _make(rng: random.Random, corpus: list[bytes]) -> bytes:
    if rng.random() < 0.2:  # another JSON text
        words = ['{"nc": 1e999}', "[" * 5000, "null", '{"a": NaN}', '"\\ud800"', "{}", json.dumps({"x": "y" * 50})]
        text = mutate(rng, [word.encode() for word in words], WORDS)
        values = "".join(f" {torch.tensor(float(byte)).view(torch.int32).item():08x}" for byte in text)
        return f"1\n{META} {len(text)} {values}\n".encode()
    return mutate(rng, corpus, WORDS)
