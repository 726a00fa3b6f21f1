"""Files of torch.save as data: equal to what torch reads, and nothing gained by lying in them."""

from __future__ import annotations

import io
import os
import struct
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from scripts.fuzz.fuzz_checkpoint import old_tar, zipped
from utils.errors import CheckpointError
from utils.pickle_records import Record
from utils.torch_file import read_torch_file

FORMS = {"zip": True, "old": False}


def content() -> dict:
    base = torch.arange(24, dtype=torch.float32)
    state = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()
    dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8)
    return {
        "state": OrderedDict(state),
        "views": [base.view(4, 6), base.view(4, 6).t(), base[5:9], base.view(2, 3, 4)[:, 1]],
        "expanded": torch.ones(1).expand(2, 3),
        "empty": [torch.empty(0), torch.empty(0, 3), torch.empty(2, 0)],
        "scalar": torch.tensor(2.5),
        "dtypes": [torch.arange(5).to(dtype) for dtype in (*dtypes, torch.uint8, torch.bool)],
        "parameter": nn.Parameter(torch.ones(2)),
        "plain": {"epoch": 3, "names": ["a", "b"], "size": torch.Size([1, 2]), "device": torch.device("cpu")},
    }


@pytest.mark.parametrize("form", FORMS)
def test_tensors_are_those_that_torch_reads(form: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(content(), path, _use_new_zipfile_serialization=FORMS[form])
    ours, theirs = read_torch_file(path), torch.load(path, weights_only=True)
    for group in ("views", "empty", "dtypes"):
        for a, b in zip(ours[group], theirs[group], strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b) and a.stride() == b.stride()
    assert {k: v.tolist() for k, v in ours["state"].items()} == {k: v.tolist() for k, v in theirs["state"].items()}
    assert torch.equal(ours["expanded"], theirs["expanded"]) and ours["scalar"] == 2.5
    assert type(ours["parameter"]) is torch.Tensor and ours["parameter"].tolist() == [1, 1]
    assert ours["plain"] == {"epoch": 3, "names": ["a", "b"], "size": (1, 2), "device": "cpu"}
    assert ours["views"][0].untyped_storage().data_ptr() == ours["views"][1].untyped_storage().data_ptr()


@pytest.mark.parametrize("form", FORMS)
def test_whole_modules_become_records(form: str, tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 3), tmp_path / "a.pt", _use_new_zipfile_serialization=FORMS[form])
    found = read_torch_file(tmp_path / "a.pt")
    assert isinstance(found, Record) and found.name == "torch.nn.modules.linear.Linear"
    assert found.state["_parameters"]["weight"].shape == (3, 2)


def test_the_tar_of_the_first_versions(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(old_tar())
    assert read_torch_file(tmp_path / "a.pt")["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


def refusal(path: Path, data: bytes | None = None) -> str:
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_torch_file(path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


# One tensor of four float32 in a storage called 0; what is between the braces is replaced.
STORAGE = b"(X\x07\x00\x00\x00storagec{kind}\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu{count}tQ"
TENSOR = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"{view}\x89ccollections\nOrderedDict\n)RtR."


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def view(offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    return number(offset) + b"".join(b"(" + b"".join(map(number, values)) + b"t" for values in (size, stride))


def one_tensor(kind=b"torch\nFloatStorage", count=4, place=(0, (2, 2), (2, 1)), data=struct.pack("<4f", 1, 2, 3, 4)):
    pickled = TENSOR.replace(b"{kind}", kind).replace(b"{count}", number(count)).replace(b"{view}", view(*place))
    return zipped({"a/data.pkl": pickled, "a/data/0": data})


def test_the_example_by_hand_is_sound(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(one_tensor())
    assert read_torch_file(tmp_path / "a.pt").tolist() == [[1, 2], [3, 4]]


LIES = {
    "4 GB storage": ({"count": 2**30}, "claims 4,294,967,296 bytes, the archive has 16"),
    "storage of 2^62": ({"count": 2**62}, "claims"),
    "negative storage": ({"count": -1}, "description of a storage"),
    "short storage": ({"count": 2}, "claims 8 bytes, the archive has 16"),
    "tensor beyond its storage": ({"place": (1, (2, 2), (2, 1))}, "reaches beyond its storage of 4"),
    "huge tensor": ({"place": (0, (2**31, 2**31), (1, 1))}, "reaches beyond"),
    "tensor without end": ({"place": (0, (2**40,), (0,))}, "far larger than the file"),
    "negative offset": ({"place": (-1, (2, 2), (2, 1))}, "description of a tensor"),
    "negative stride": ({"place": (3, (2, 2), (-2, -1))}, "description of a tensor"),
    "many dimensions": ({"place": (0, (1,) * 40, (1,) * 40)}, "description of a tensor"),
    "sizes and strides of different length": ({"place": (0, (2, 2), (1,))}, "description of a tensor"),
    "a class in place of a storage": ({"kind": b"posix\nsystem"}, "a storage of an unknown kind (posix.system)"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_about_tensors_are_refused_without_allocating(lie: str, tmp_path: Path) -> None:
    changes, words = LIES[lie]
    tracemalloc.start()
    text = refusal(tmp_path / "a.pt", one_tensor(**changes))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert words in text and peak < 2_000_000


def test_a_call_in_a_persistent_id_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    command = f"touch {mark}".encode()
    call = b"cposix\nsystem\nX" + struct.pack("<I", len(command)) + command + b"\x85R"
    for pickled in (
        b"\x80\x02(X\x07\x00\x00\x00storage" + call + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ.",
        b"\x80\x02" + call + b"Q.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + call + b"K\x00)))tR.",
    ):
        assert "calls posix.system" in refusal(tmp_path / "a.pt", zipped({"a/data.pkl": pickled, "a/data/0": b"1234"}))
    assert not mark.exists()


OUTSIDE = ["torch\nload", "torch.hub\nload", "torch.jit._pickle\nbuild_intlist", "torch._utils\n_rebuild_sparse_tensor"]
OUTSIDE += ["torch.serialization\nload", "torch._utils\n_rebuild_qtensor", "torch.utils.data.dataset\nDataset"]
OUTSIDE += ["torch.storage\n_load_from_bytes", "numpy\nload", "numpy.f2py\ncompile", "torch\nFloatStorage"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_functions_of_torch_and_numpy_are_no_exception(name: str, tmp_path: Path) -> None:
    pickled = b"\x80\x02c" + name.encode() + b"\nX\x01\x00\x00\x00a\x85R."
    expected = f"calls {name.replace(chr(10), '.')}, which is not allowed"
    assert expected in refusal(tmp_path / "a.pt", zipped({"a/data.pkl": pickled}))
    typed = b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(c" + name.encode() + b"\nctorch\nTensor\n)}tR."
    assert "which is not allowed" in refusal(tmp_path / "a.pt", zipped({"a/data.pkl": typed}))


NAMES = ["../../etc/passwd", "a/../../x", "/etc/passwd", "a/data/..\\..\\x", "..", "\\\\host\\x"]


@pytest.mark.parametrize("name", NAMES)
def test_paths_out_of_the_archive_are_refused_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "in" / "here"
    folder.mkdir(parents=True)
    data = zipped({"a/data.pkl": b"K\x01.", name: b"x"})
    assert "which points out of it" in refusal(folder / "a.pt", data)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [folder / "a.pt"]


def archive(*entries: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as out:
        for name, data in entries:
            out.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_odd_archives(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    bomb = archive(("a/data.pkl", b"\0" * 50_000_000), compression=zipfile.ZIP_DEFLATED)
    assert "a compressed or encrypted archive" in refusal(path, bomb)
    assert "two entries named a/data.pkl" in refusal(path, archive(("a/data.pkl", b"N."), ("a/data.pkl", b"N.")))
    assert "an archive of something else" in refusal(path, archive(("a/data.pkl", b"N."), ("b/data.pkl", b"N.")))
    assert "TorchScript program" in refusal(path, archive(("a/data.pkl", b"N."), ("a/constants.pkl", b"N.")))
    assert "big-endian" in refusal(path, archive(("a/data.pkl", b"N."), ("a/byteorder", b"big")))
    missing = (
        TENSOR.replace(b"{kind}", b"torch\nFloatStorage").replace(b"{count}", b"K\x04").replace(b"{view}", b"K\0))")
    )
    assert "storage 0 is missing" in refusal(path, archive(("a/data.pkl", missing)))


def test_overlapping_entries_are_refused(tmp_path: Path) -> None:
    """Many names for the same bytes: an archive that claims to hold more than it is long."""
    data = bytearray(archive(("a/data.pkl", b"N."), ("a/data/0", b"x" * 2000), ("a/data/1", b"y")))
    second = data.find(b"PK\1\2", data.find(b"PK\1\2", data.find(b"PK\1\2") + 4) + 4)
    data[second + 20 : second + 28] = struct.pack("<II", 2000, 2000)
    assert "that claims to hold" in refusal(tmp_path / "a.pt", bytes(data))


def test_claims_in_the_headers_of_the_archive(tmp_path: Path) -> None:
    """Every length, offset and count of the zip set to 4 GB: one line, little time and memory."""
    whole = one_tensor()
    tracemalloc.start()
    start = time.process_time()
    for place in range(len(whole) - 4):
        data = whole[:place] + b"\xff\xff\xff\xff" + whole[place + 4 :]
        (tmp_path / "a.pt").write_bytes(data)
        try:
            read_torch_file(tmp_path / "a.pt")
        except CheckpointError as error:
            assert "\n" not in str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000 and time.process_time() - start < 10


def test_a_table_of_contents_without_end(tmp_path: Path) -> None:
    """Each of its entries would become an object of ten times its size."""
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as out:
        for number in range(300):
            out.writestr("n" * 60_000 + str(number), b"")
    assert "a table of contents of 18," in refusal(tmp_path / "a.pt")


def test_storages_of_the_old_form_are_compared_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.arange(300.0)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    count = struct.pack("<H", 300)
    at = whole.index(b"M" + count)  # the number of elements in the persistent id
    claim = whole[:at] + b"J" + struct.pack("<i", 2**31 - 1) + whole[at + 3 :]
    assert "claim more than the" in refusal(path, claim)
    for length in (20, 200, len(whole) // 2, len(whole) - 1):
        refusal(path, whole[:length])
    at = whole.index(struct.pack("<q", 300))
    assert "damaged" in refusal(path, whole[:at] + struct.pack("<q", 299) + whole[at + 8 :])


def test_a_pickle_has_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.pickle_reader.MAX_PICKLE", 1000)
    monkeypatch.setattr("utils.torch_file.MAX_PICKLE", 1000)
    for new_form in FORMS.values():
        torch.save(["x" * 2000], tmp_path / "a.pt", _use_new_zipfile_serialization=new_form)
        assert "its pickle is larger than" in refusal(tmp_path / "a.pt")


def test_booleans_are_zero_or_one(tmp_path: Path) -> None:
    data = one_tensor(kind=b"torch\nBoolStorage", data=bytes([0, 1, 7, 255]))
    (tmp_path / "a.pt").write_bytes(data)
    assert read_torch_file(tmp_path / "a.pt").view(torch.uint8).tolist() == [[0, 1], [1, 1]]


def test_things_that_are_no_files(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.pt") == "no such file"
    assert refusal(tmp_path).startswith("cannot be read")
    os.mkfifo(tmp_path / "pipe.pt")
    assert refusal(tmp_path / "pipe.pt") == "cannot be read (not a file)"
    assert refusal(Path("/dev/zero")) == "cannot be read (not a file)"
