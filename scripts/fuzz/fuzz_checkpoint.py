"""Fuzz target: what opens a .pt, from the container's bytes to the rebuilt model.

Inputs are small files of this program and imitations of YOLOv5's, in zip, old and tar form, whose container, pickle or
storages are damaged, spliced with each other or with hostile pieces; and pickles put together from random instructions.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
import random
import resource
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import torch

from models.loading import fill_described
from models.upstream import from_content
from models.yolo import DetectionModel
from scripts.fuzz.rounds import Counts, mutate, run_round
from scripts.upstream_imitation import checkpoint, imitate, stand_in, write
from utils.errors import CheckpointError
from utils.pickle_records import Refused
from utils.torch_file import read_torch_stream

TINY = {
    "nc": 1,
    "depth_multiple": 1.0,
    "width_multiple": 1.0,
    "anchors": [[10, 13, 16, 30]],
    "backbone": [[-1, 1, "Conv", [8, 3, 8]], [-1, 1, "DCN", [8, 3]]],
    "head": [[[1], 1, "Detect", ["nc", "anchors"]]],
}
MEMORY = 700
"""MB that the reader may take beyond what the process holds at the start, whatever the file."""
NAMES = (b"posix\nsystem", b"builtins\neval", b"builtins\ngetattr", b"torch\nload", b"collections\nOrderedDict")
NAMES += (b"torch._utils\n_rebuild_tensor_v2", b"torch._utils\n_rebuild_parameter", b"numpy\ndtype", b"builtins\nset")
NAMES += (b"pathlib\nPosixPath", b"models.yolo\nDetect", b"torch\nFloatStorage", b"_codecs\nencode", b"torch\nSize")
PIECES = [
    *(b"c" + name + b"\n" for name in NAMES),
    b"cposix\nsystem\n(X\x04\x00\x00\x00truetR",
    b"cbuiltins\neval\n(X\x01\x00\x00\x001tR",
    b"cposix\nsystem\nX\x04\x00\x00\x00true\x85R",
    b"\x8a\x04\xff\xff\xff\x7f",
    b"\x8b\xff\xff\xff\x7f",
    b"X\xff\xff\xff\xff",
    b"\x96\xff\xff\xff\xff\x00\x00\x00\x00",
    b"\x82\x01",
    b"2\x86" * 30,
    b"(" * 50,
    b"]2a",
    b"Q",
]
WORDS = [struct.pack("<I", number) for number in (0, 1, 255, 2**31 - 1, 2**31, 2**32 - 1)] + PIECES
ONE_BYTE = [code for code in vars(pickle).values() if isinstance(code, bytes) and len(code) == 1]
WORDS += ONE_BYTE


ODD_VALUES = [None, True, -1, 0, 10**9, 2**62, 1e308, float("nan"), "", "x" * 300, "nc", b"x", [], {}, (), (1, 2)]
ODD_VALUES += [{"a": 1}, {0: "x"}, [[-1, 1, "Conv", [8, 3]]], [[1, 2], [3]], torch.zeros(2), torch.ones(1, 3), {"x"}]
ODD_VALUES += [torch.tensor(1), torch.zeros(1, 2, 2), stand_in("a.B", {"c": 1}), type("Named", (), {}), ["Conv"]]


@functools.cache
def network() -> DetectionModel:
    """The model of all inputs."""
    torch.manual_seed(0)
    return DetectionModel(TINY).eval()


def own() -> dict:
    """A checkpoint of this program."""
    meta = {"yaml": copy.deepcopy(TINY), "nc": 1, "names": {0: "a"}, "stride": [8.0]}
    return {"format": 1, "model": network().state_dict(), "meta": meta, "train": None}


@functools.cache
def seeds() -> list[bytes]:
    """Whole files: ours, YOLOv5's in both forms, a bare state dict, a tar."""
    theirs = checkpoint(imitate(network(), hooks=False))
    files = [write(io.BytesIO(), own()), write(io.BytesIO(), theirs)]
    files += [write(io.BytesIO(), content, zipped=False) for content in (own(), theirs, network().state_dict())]
    return [file.getvalue() for file in files] + [old_tar()]


def old_tar() -> bytes:
    """{"a": a tensor of 2 x 3} in the form of torch before 0.2."""

    def dump(*values: object) -> bytes:
        return b"".join(pickle.dumps(value, protocol=2) for value in values)

    kind = b"\x80\x02K\x07X\x03\x00\x00\x00cpuctorch\nFloatStorage\n\x87."
    tensor = b"\x80\x02K\x08K\x07ctorch\nFloatTensor\n\x87."
    parts = {
        "sys_info": dump({"little_endian": True}),
        "storages": dump(1) + kind + struct.pack("<q6f", 6, *range(6)) + dump([]),
        "tensors": dump(1) + tensor + struct.pack("<iiqqqqq", 2, 0, 2, 3, 3, 1, 0),
        "pickle": b"\x80\x02}X\x01\x00\x00\x00aX\x01\x00\x00\x008Qs.",
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in parts.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@functools.cache
def archives() -> list[dict[str, bytes]]:
    """The entries of the seeds that are zip archives."""
    found = []
    for data in seeds():
        if data.startswith(b"PK"):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                found.append({name: archive.read(name) for name in archive.namelist()})
    return found


def make(rng: random.Random) -> bytes:
    """One input."""
    kind = rng.random()
    if kind < 0.1:
        return confused(rng)
    if kind < 0.3:
        return damaged(rng, rng.choice(seeds()))
    entries = dict(rng.choice(archives()))
    root = next(name for name in entries if name.endswith("data.pkl"))
    if kind < 0.75:
        entries[root] = damaged(rng, entries[root])
    elif kind < 0.9:
        entries[root] = random_pickle(rng)
    else:
        victim = rng.choice(list(entries))
        entries[rng.choice((victim, f"../{victim}", root))] = damaged(rng, entries.pop(victim))
    return zipped(entries)


def zipped(entries: dict[str, bytes]) -> bytes:
    """A zip archive with right checksums, as torch writes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def damaged(rng: random.Random, data: bytes) -> bytes:
    """``data`` with up to four changes."""
    return mutate(rng, [data], WORDS, most=4)


def confused(rng: random.Random) -> bytes:
    """A sound file with a few values, anywhere in it, replaced by some of another kind."""
    content = checkpoint(imitate(network(), hooks=False)) if rng.random() < 0.8 else own()
    for _ in range(rng.randint(1, 3)):
        at = content
        for _ in range(rng.randint(0, 9)):  # step down, while there is something below
            below = [value for value in entries_of(at).values() if len(entries_of(value))]
            if not below:
                break
            at = rng.choice(below)
        inside = entries_of(at)
        key = rng.choice(list(inside)) if inside else "x"
        value = rng.choice(ODD_VALUES)
        if isinstance(at, list):
            at[key:] = [value, *at[key + 1 :]] if inside else [value]
        elif isinstance(at, dict):
            at[key] = value
        elif hasattr(at, "__dict__"):
            vars(at)[key] = value
    return write(io.BytesIO(), content, zipped=rng.random() < 0.5).getvalue()


def entries_of(value: object) -> dict:
    """What a value holds: entries of a dict or list, attributes of an object."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list):
        return dict(enumerate(value))
    return vars(value) if type(value).__module__ not in ("builtins", "torch", "torch.nn.parameter") else {}


def random_pickle(rng: random.Random) -> bytes:
    """Random instructions with arguments that mostly fit."""
    out = [b"\x80\x02"]
    for _ in range(rng.randint(1, 120)):
        code = rng.choice(ONE_BYTE)
        out.append(rng.choice(PIECES) if rng.random() < 0.15 else code + argument(rng, code))
    return b"".join(out) + b"."


def argument(rng: random.Random, code: bytes) -> bytes:
    """What follows an instruction."""
    if code in (pickle.BINPUT, pickle.BINGET, pickle.BININT1):
        return bytes([rng.randrange(20)])
    if code in (pickle.LONG_BINPUT, pickle.LONG_BINGET, pickle.BININT):
        return struct.pack("<I", rng.choice((rng.randrange(20), 2**31, 2**32 - 1)))
    if code in (pickle.SHORT_BINUNICODE, pickle.SHORT_BINBYTES, pickle.LONG1, pickle.SHORT_BINSTRING):
        return b"\x01" + rng.randbytes(1)
    if code in (pickle.BINUNICODE, pickle.BINBYTES):
        return b"\x07\x00\x00\x00" + rng.choice((b"storage", b"_module", b"latin-1"))
    if code == pickle.GLOBAL:
        return rng.choice(NAMES) + b"\n"
    if code in (pickle.INT, pickle.LONG, pickle.FLOAT, pickle.GET, pickle.PUT):
        return rng.choice((b"1", b"00", b"1e999", b"9" * 400, b"x")) + b"\n"
    return struct.pack(">d", rng.random()) if code == pickle.BINFLOAT else b""


def attempt(data: bytes) -> None:
    """Read ``data`` as a weights file and rebuild its model. Raises CheckpointError when it is refused."""
    try:
        content = read_torch_stream(io.BytesIO(data))
    except Refused as error:
        raise CheckpointError(f"input.pt: {error}") from None
    found = from_content(Path("input.pt"), content)
    if found.meta:
        fill_described(found)


def run(inputs: int, seed: int) -> Counts:
    """Feed the reader with ``inputs`` files."""
    before = peak_memory()
    counts = run_round(make, attempt, inputs, seed)
    grown = peak_memory() - before
    if grown > MEMORY:
        counts.crashes.append(f"memory grew by {grown:,} MB")
    return counts


def peak_memory() -> int:
    """MB that this process has held at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)
