"""Checkpoints: round trips, whole or absent, and one line for every file that is none of ours."""

from __future__ import annotations

import errno
import io
import os
import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from utils.checkpoint import FORMAT, read_checkpoint, rng_state, save_checkpoint, set_rng_state, strip_checkpoint
from utils.errors import CheckpointError
from utils.optim import build_optimizer

UPSTREAM = Path(__file__).parents[1] / "reference" / "upstream_format_stripped.pt"
META = {"nc": 2, "names": {0: "cat", 1: "dog"}, "yaml": {"backbone": [[-1, 1, "Conv", [8, 3]]]}, "epoch": 4}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "last.pt", network().state_dict(), META, {"epoch": 4})
    return tmp_path / "last.pt"


def test_round_trip_of_everything_a_run_keeps(tmp_path: Path) -> None:
    model = network()
    optimizer = build_optimizer(model, "AdamW", 0.01, 0.9, 0.0005)
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    train = {"optimizer": optimizer.state_dict(), "rng": rng_state(), "best": np.float64(0.5), "n": np.int64(3)}
    save_checkpoint(tmp_path / "a.pt", model.state_dict(), {**META, "torch": torch.__version__}, train)
    read = read_checkpoint(tmp_path / "a.pt")
    assert {k: v.tolist() for k, v in read.model.items()} == {k: v.tolist() for k, v in model.state_dict().items()}
    assert read.meta == {**META, "torch": str(torch.__version__)}
    assert (read.train["best"], read.train["n"]) == (0.5, 3)
    optimizer.load_state_dict(read.train["optimizer"])
    set_rng_state(read.train["rng"])
    raw = torch.load(tmp_path / "a.pt", weights_only=True)  # what any reader sees
    assert list(raw) == ["format", "model", "meta", "train"]
    assert raw["format"] == FORMAT


def test_random_generators_continue_where_they_were(tmp_path: Path) -> None:
    def draw() -> list:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(2).tolist()]

    draw()
    save_checkpoint(tmp_path / "a.pt", {}, {}, {"rng": rng_state()})
    expected = draw()
    draw()
    set_rng_state(read_checkpoint(tmp_path / "a.pt").train["rng"])
    assert draw() == expected


def test_tensors_bring_only_their_own_memory_and_no_graph(tmp_path: Path) -> None:
    big = torch.zeros(1_000_000, requires_grad=True)
    save_checkpoint(tmp_path / "a.pt", {"part": big[:10], "parameter": nn.Parameter(torch.ones(2))}, {})
    assert (tmp_path / "a.pt").stat().st_size < 10_000
    read = read_checkpoint(tmp_path / "a.pt").model
    assert type(read["parameter"]) is torch.Tensor and not read["part"].requires_grad


@pytest.mark.parametrize(
    ("meta", "where"),
    [({"opt": {"project": Path("runs")}}, "meta.opt.project: PosixPath"), ({"a": [1, {2}]}, r"meta.a\[1\]: set")],
)
def test_other_objects_are_the_programmers_mistake(tmp_path: Path, meta: dict, where: str) -> None:
    with pytest.raises(TypeError, match=f"checkpoint entry {where}"):
        save_checkpoint(tmp_path / "a.pt", {}, meta)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file_and_names_it(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()
    original = os.fdopen

    class Full(io.BufferedWriter):
        left = 2000

        def write(self, data: bytes) -> int:
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    monkeypatch.setattr("utils.files.os.fdopen", lambda fd, mode: Full(original(fd, mode, buffering=0)))
    with pytest.raises(OSError) as caught:
        save_checkpoint(saved, {"w": torch.zeros(5000)}, META)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["last.pt"]


def test_stripping(saved: Path) -> None:
    state = {**network().state_dict(), "large": torch.tensor([1e6, 1.0])}
    save_checkpoint(saved, state, META, {"much": torch.zeros(10_000)})
    before = saved.stat().st_size
    size = strip_checkpoint(saved)
    read = read_checkpoint(saved)
    assert size == saved.stat().st_size < before / 4
    assert read.train is None and read.meta == META
    assert read.model["0.weight"].dtype == torch.float16
    assert read.model["1.num_batches_tracked"].dtype == torch.int64
    assert read.model["large"].tolist() == [1e6, 1.0]  # half precision would make it infinite
    strip_checkpoint(saved, saved.with_name("other.pt"))
    assert read_checkpoint(saved.with_name("other.pt")).train is None


def test_description_is_one_line(saved: Path) -> None:
    text = read_checkpoint(saved).describe()
    assert text == f"{saved}: 2 classes, epoch 4, 128 values in float32, with training state"


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def test_missing_empty_folder_and_other_files(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.pt") == "no such file"
    assert refusal(tmp_path).startswith("cannot be read")
    for name, content, expected in [
        ("empty.pt", b"", "is empty"),
        ("text.pt", b"just text\n" * 50, "not a checkpoint (not a file that torch.save wrote)"),
        ("html.pt", b"<html>404</html>", "not a checkpoint"),
        ("pickle.pt", pickle.dumps({"a": 1}), "not a checkpoint"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert refusal(tmp_path / name).startswith(expected), name
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "an archive of something else" in refusal(tmp_path / "zip.pt")


def test_torch_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for content, expected in [
        (network().state_dict(), "it holds a dict of 0.weight, 0.bias, 1.weight, 1.bias, ..."),
        (torch.zeros(2), "it holds a Tensor"),
        ({"format": 1, "model": {"w": 3}, "meta": {}}, "unexpected types"),
        ({"format": "x", "model": {}, "meta": {}}, "unexpected types"),
        ({"format": 1, "model": {}, "meta": {}, "train": [1]}, "unexpected types"),
        ({"format": 2, "model": {}, "meta": {}}, "written by a newer version of this program (format 2"),
    ]:
        torch.save(content, path)
        assert expected in refusal(path)


def test_ordered_dicts_and_their_attributes_become_plain(tmp_path: Path) -> None:
    state = network().state_dict()
    assert isinstance(state, OrderedDict) and hasattr(state, "_metadata")
    save_checkpoint(tmp_path / "a.pt", state, {})
    assert type(read_checkpoint(tmp_path / "a.pt").model) is dict


def test_upstreams_files_are_named_and_the_way_shown() -> None:
    text = refusal(UPSTREAM)
    assert text.startswith("not a checkpoint of this program (it holds a dict of epoch, best_fitness, model, ema, ...")
    assert (
        "YOLOv5's files go to --weights or through python -m models.convert, here: models.yolo.DetectionModel" in text
    )


class Payload:
    """Pickles as a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_never_runs(tmp_path: Path, zipped: bool) -> None:
    mark = tmp_path / "ran"
    content = {"format": 1, "model": {}, "meta": {"x": Payload(f"touch {mark}")}, "train": None}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert "calls posix.system, which is not allowed" in refusal(tmp_path / "a.pt")
    with pytest.raises(CheckpointError):
        strip_checkpoint(tmp_path / "a.pt")
    assert not mark.exists()


def test_compressed_archives_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\0" * 10_000_000)
    assert "a compressed or encrypted archive" in refusal(tmp_path / "bomb.pt")


def test_cut_short_anywhere(saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    for length in [2, 4, 50, 500, len(whole) // 2, len(whole) - 30, len(whole) - 1]:
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        assert "is damaged or cut short" in refusal(tmp_path / "cut.pt"), length


def test_every_flipped_bit_is_noticed_or_harmless(saved: Path, tmp_path: Path) -> None:
    whole, expected = saved.read_bytes(), read_checkpoint(saved)
    rng, path, noticed = random.Random(0), tmp_path / "flipped.pt", 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            read = read_checkpoint(path)
        except CheckpointError:
            noticed += 1
        else:
            assert read.meta == expected.meta
            assert all(torch.equal(read.model[key], value) for key, value in expected.model.items())
    assert noticed > 100


def test_only_damage_becomes_a_line(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running out of memory, for one, stays what it is."""

    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError

    monkeypatch.setattr("utils.torch_file.read_pickle", fail)
    with pytest.raises(MemoryError):
        read_checkpoint(saved)
