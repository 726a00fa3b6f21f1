"""YAML files: mutated data sets, models, hyper-parameters; what can be read goes on to the checks of each kind."""

from __future__ import annotations

import random
from pathlib import Path

from models.spec import read_spec
from scripts.fuzz.rounds import Counts, mutate, run_round
from utils.config import Hyp, read_names
from utils.files import ROOT, parse_yaml

FILES = ("data/bccd.yaml", "data/coco.yaml", "models/yolov5n.yaml", "data/hyps/hyp.scratch-low.yaml")
CORPUS = [(ROOT / name).read_bytes()[:3000] for name in FILES if (ROOT / name).is_file()]
CORPUS += [b"names: [a, b]\nnc: 2\ntrain: x\nval: y\n", b"lr0: 0.01\nlrf: 1e-2\nanchors: 3\n", b"a: {b: [1, {c: d}]}\n"]
WORDS = [
    b"&a ",
    b"*a",
    b"!!python/object/apply:os.system ['true']",
    b"!!binary ",
    b"!!timestamp ",
    b"!!int ",
    b"!!float ",
]
WORDS += [
    b"!!bool ",
    b"!!set ",
    b"!!omap ",
    b"!!pairs ",
    b"!!null ",
    b"!!seq ",
    b"!!map ",
    b"!!str ",
    b"<<: ",
    b"? ",
    b": ",
    b"- ",
]
WORDS += [
    b"---\n",
    b"...\n",
    b"%YAML 9.9\n",
    b"|\n ",
    b">\n ",
    b"'",
    b'"',
    b"\\x00",
    b"\\ud800",
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b"\n",
]
WORDS += [
    b"2001-99-99",
    b"1:59:59",
    b"0x" + b"f" * 80,
    b".inf",
    b"-.inf",
    b".nan",
    b"1e999",
    b"~",
    b"yes",
    b"\xff",
    b"\0",
    b"\t",
]
WORDS += [b"[" * 60, b"9" * 5000, b"=", b"names: ", b"backbone: ", b"anchors: ", b"1" * 50, b"-1", b"0"]


def run(inputs: int, seed: int) -> Counts:
    """Read ``inputs`` mutated YAML files."""
    return run_round(lambda rng: _make(rng), _attempt, inputs, seed)


def _make(rng: random.Random) -> bytes:
    return bytes([rng.randrange(3)]) + mutate(rng, CORPUS, WORDS)


def _attempt(data: bytes) -> None:
    content = parse_yaml(data[1:].decode("utf-8", errors="replace"), Path("a.yaml"))
    if data[0] == 0:
        Hyp.from_dict(content)
    elif data[0] == 1:
        read_spec(content)
    elif "names" in content:
        read_names(content)
