"""The .wts format: the bytes of a naive writer, the names that readers ask for, a C++ reader, the way back."""

from __future__ import annotations

import json
import math
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

import export
import gen_wts
from deploy.to_wts import unknown_to_readers, wts_tensors
from models.deform import make_deformable
from models.loading import load_model
from models.yolo import DetectionModel
from utils.checkpoint import save_checkpoint
from utils.errors import CheckpointError, ExportError, run_cli
from utils.wts import META, read_wts, write_wts

SPECIAL = [0.0, -0.0, 1.0, -2.5, math.inf, -math.inf, 1e-45, -1e-39, 3.4028235e38, 0.1]


def naive(tensors: dict[str, torch.Tensor]) -> bytes:
    """One value at a time, as the format is described."""
    lines = [f"{len(tensors)}\n"]
    for name, tensor in tensors.items():
        values = tensor.reshape(-1).tolist()
        lines.append(f"{name} {len(values)} " + "".join(f" {struct.pack('>f', v).hex()}" for v in values) + "\n")
    return "".join(lines).encode()


def test_the_bytes_are_those_of_a_naive_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.wts.CHUNK", 7)  # so that tensors span several
    tensors = {
        "special": torch.tensor(SPECIAL),
        "matrix": torch.randn(3, 5).t(),  # not contiguous
        "half": torch.randn(4).half(),
        "count": torch.tensor(7),
        "empty": torch.empty(0),
    }
    write_wts(tmp_path / "a.wts", tensors)
    assert (tmp_path / "a.wts").read_bytes() == naive(tensors)


def test_what_is_read_back_is_what_was_written(tmp_path: Path) -> None:
    tensors = {"special": torch.tensor([*SPECIAL, math.nan]), "more": torch.randn(2, 3)}
    write_wts(tmp_path / "a.wts", tensors, {"names": ["a", "ü"], "nc": 2})
    read, meta = read_wts(tmp_path / "a.wts")
    assert meta == {"names": ["a", "ü"], "nc": 2}
    assert {name: value.view(torch.int32).tolist() for name, value in read.items()} == {
        name: value.reshape(-1).view(torch.int32).tolist() for name, value in tensors.items()
    }


def test_a_name_with_white_space_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be the name"):
        write_wts(tmp_path / "a.wts", {"a b": torch.ones(1)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.wts:1: not a .wts file"),
        (b"PK\x03\x04", "a.wts:1: not a .wts file"),
        (b"99999999999\n", "a.wts:1: not a .wts file"),
        (b"2\nx 1  3f800000\n", "a.wts:3: expected 'NAME COUNT VALUES...', the file ends"),
        (b"1\nx 2  3f800000\n", "a.wts:2: cut short: x should have 2 values"),
        (b"1\nx 99999999999  3f800000\n", "a.wts:2: cut short"),
        (b"1\nx 1  3f80000g\n", "a.wts:2: a value of x is not"),
        (b"1\nx 1  3f800000 3f800000\n", "a.wts:2: x has more values"),
        (b"1\nx one  3f800000\n", "a.wts:2: expected 'NAME COUNT"),
        (b"1\nmetadata.json 1  3f800000\n", "metadata.json in it is damaged"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.wts").write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_wts(tmp_path / "a.wts")
    assert message in str(error.value)


def asked_for(n: int, detect: int, levels: int, plain: set[int], stacks: dict[int, int], dcn: set[int]) -> set[str]:
    """The names that tensorrtx looks up. ``n``: SPPF; ``plain``: Conv rows; ``stacks``: C3 row -> repeats."""

    def conv(prefix: str) -> set[str]:
        norms = {f"{prefix}.bn.{part}" for part in ("weight", "bias", "running_mean", "running_var")}
        return {f"{prefix}.conv.weight"} | norms

    names = set().union(*(conv(f"model.{row}") for row in plain), *(conv(f"model.{n}.cv{i}") for i in (1, 2)))
    for row, repeats in stacks.items():
        names |= set().union(*(conv(f"model.{row}.cv{i}") for i in (1, 2, 3)))
        names |= set().union(*(conv(f"model.{row}.m.{r}.cv{i}") for r in range(repeats) for i in (1, 2)))
    for row in dcn:
        names |= {f"model.{row}.{part}" for part in ("weight", "bias")}
        names |= {f"model.{row}.conv_offset_mask.{part}" for part in ("weight", "bias")}
    names |= {f"model.{detect}.m.{level}.{part}" for level in range(levels) for part in ("weight", "bias")}
    return names | {f"model.{detect}.anchor_grid", f"model.{detect}.strides"}


DEPTHS = {"n": 0.33, "s": 0.33, "m": 0.67, "l": 1.0, "x": 1.33}
P5_STACKS = {2: 3, 4: 6, 6: 9, 8: 3, 13: 3, 17: 3, 20: 3, 23: 3}
P6_STACKS = {2: 3, 4: 6, 6: 9, 8: 3, 10: 3, 15: 3, 19: 3, 23: 3, 26: 3, 29: 3, 32: 3}
P5_PLAIN, P6_PLAIN = {0, 1, 3, 5, 7, 10, 14, 18, 21}, {0, 1, 3, 5, 7, 9, 12, 16, 20, 24, 27, 30}


@pytest.mark.parametrize("form", ["yolov5{}.yaml", "yolov5{}6.yaml", "yolov5{}-dcn.yaml"])
@pytest.mark.parametrize("size", DEPTHS)
def test_every_name_that_readers_ask_for_is_there(size: str, form: str) -> None:
    with torch.device("meta"):
        model = _named_only(form.format(size))
    stacks = P6_STACKS if "6" in form else P5_STACKS
    repeats = {row: max(round(count * DEPTHS[size]), 1) for row, count in stacks.items()}
    if "6" in form:
        wanted = asked_for(11, 33, 4, P6_PLAIN, repeats, set())
    else:
        dcn = {1, 3, 5} if "dcn" in form else set()
        wanted = asked_for(9, 24, 3, P5_PLAIN - dcn, repeats, dcn)
    assert wanted <= set(model)


def _named_only(cfg: str) -> dict:
    """The names that would be written, without the memory of yolov5x6."""
    from models.parser import parse_model
    from models.spec import read_spec

    layers, _ = parse_model(read_spec(cfg))
    detect = len(layers) - 1
    state = {f"model.{name}": None for name in layers.state_dict()}
    return {**state, f"model.{detect}.anchor_grid": None, f"model.{detect}.strides": None}


def test_the_two_tensors_of_detect() -> None:
    model = DetectionModel("yolov5n-dcn.yaml", nc=3)
    tensors = wts_tensors(model)
    assert tensors["model.24.strides"].tolist() == [8, 16, 32]
    assert tensors["model.24.anchor_grid"].reshape(-1).tolist() == [
        *(10, 13, 16, 30, 33, 23),
        *(30, 61, 62, 45, 59, 119),
        *(116, 90, 156, 198, 373, 326),
    ]
    assert list(tensors)[:-2] == list(model.state_dict())
    assert unknown_to_readers(model) == []


def test_what_readers_would_compute_wrongly_is_refused(tiny: Path) -> None:
    with pytest.raises(ExportError, match="folded"):
        wts_tensors(load_model(tiny))
    model = load_model(tiny, fuse=False)
    model.model[0].bn.eps = 1e-5
    with pytest.raises(ExportError, match="eps 1e-05"):
        wts_tensors(model)
    assert unknown_to_readers(model) == ["C3DCN"]
    make_deformable(model := DetectionModel("yolov5n.yaml"), ["c3:8"])
    assert unknown_to_readers(model) == ["C3 with DCN inside"]


READER = r"""
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <string>
#include <vector>
int main(int, char** argv) {
    std::ifstream file(argv[1]);
    std::map<std::string, std::vector<uint32_t>> weights;
    int32_t count = 0;
    file >> count;
    if (count <= 0) return 1;
    while (count--) {
        std::string name;
        uint32_t size = 0;
        file >> name >> std::dec >> size;
        std::vector<uint32_t> values(size);
        for (auto& value : values) file >> std::hex >> value;
        if (!file) return 2;
        weights[name] = values;
    }
    std::string rest;
    if (file >> rest) return 3;
    for (const auto& [name, values] : weights) {
        double sum = 0;
        for (uint32_t bits : values) {
            float value;
            std::memcpy(&value, &bits, 4);
            sum += value;
        }
        std::cout.precision(17);
        std::cout << name << ' ' << std::dec << values.size() << ' ' << sum << '\n';
    }
}
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_cpp_program_reads_it_from_a_stream(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "reader.cpp").write_text(READER)
    subprocess.run(["c++", "-std=c++17", "reader.cpp", "-o", "reader"], cwd=tmp_path, check=True)
    assert run_cli(gen_wts.main, ["-w", str(weights), "-o", str(tmp_path / "cells.wts")]) == 0
    done = subprocess.run([tmp_path / "reader", tmp_path / "cells.wts"], capture_output=True, text=True, check=True)
    found = {line.split()[0]: (int(line.split()[1]), float(line.split()[2])) for line in done.stdout.splitlines()}
    expected = wts_tensors(load_model(weights, fuse=False))
    assert set(found) == set(expected) | {META}
    for name, tensor in expected.items():
        assert found[name][0] == tensor.numel()
        assert found[name][1] == pytest.approx(float(tensor.double().sum()), rel=1e-9, abs=1e-9)


def test_gen_wts_and_export_write_the_same(weights: Path, tmp_path: Path) -> None:
    assert run_cli(gen_wts.main, ["-w", str(weights), "-o", str(tmp_path / "a.wts"), "--plain"]) == 0
    assert (tmp_path / "a.wts").read_bytes() == naive(wts_tensors(load_model(weights, fuse=False)))
    assert run_cli(export.main, ["--weights", str(weights), "--include", "wts", "--output", str(tmp_path)]) == 0
    assert run_cli(gen_wts.main, ["-w", str(weights), "-o", str(tmp_path)]) == 0  # a folder, in the same place
    tensors, meta = read_wts(tmp_path / "cells.wts")
    assert meta["names"] == ["RBC", "WBC", "Platelets"] and meta["stride"] == 32
    assert list(tensors) == list(read_wts(tmp_path / "a.wts")[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wts", "cells.wts"]


def test_weights_and_cfg_read_it_back(weights: Path, tmp_path: Path) -> None:
    assert run_cli(gen_wts.main, ["-w", str(weights), "-o", str(tmp_path / "full.wts")]) == 0
    assert run_cli(gen_wts.main, ["-w", str(weights), "-o", str(tmp_path / "plain.wts"), "--plain"]) == 0
    image = torch.rand(1, 3, 64, 64)
    expected = load_model(weights)(image)[0]
    alone = load_model(tmp_path / "full.wts")
    assert alone.names == {0: "RBC", 1: "WBC", 2: "Platelets"}
    assert torch.equal(alone(image)[0], expected)
    assert torch.equal(load_model(tmp_path / "plain.wts", cfg="yolov5n-dcn.yaml")(image)[0], expected)
    with pytest.raises(CheckpointError, match="add --cfg"):
        load_model(tmp_path / "plain.wts")


def test_sizes_and_forms_refuse_each_other(tmp_path: Path) -> None:
    """What tensorrtx cannot tell apart, x from x_dcn, and a wrong size letter."""
    for name in ("yolov5n", "yolov5n-dcn"):
        write_wts(tmp_path / f"{name}.wts", wts_tensors(DetectionModel(f"{name}.yaml")))
    for file, cfg in (("yolov5n", "yolov5n-dcn"), ("yolov5n-dcn", "yolov5n"), ("yolov5n", "yolov5s")):
        with pytest.raises(CheckpointError, match=r"model\.|they do not belong together"):
            load_model(tmp_path / f"{file}.wts", cfg=f"{cfg}.yaml")


def test_upstream_weights_and_converted_wts(tmp_path: Path) -> None:
    """A .wts turned into a checkpoint has the shapes that it itself lacks."""
    from models.convert import convert

    model = DetectionModel("yolov5n.yaml", nc=2)
    save_checkpoint(tmp_path / "a.pt", model.state_dict(), {"yaml": model.yaml, "nc": 2, "names": ["a", "b"]})
    assert run_cli(gen_wts.main, ["-w", str(tmp_path / "a.pt"), "--plain"]) == 0
    convert(tmp_path / "a.wts", tmp_path / "b.pt", "yolov5n.yaml")
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(load_model(tmp_path / "b.pt")(image)[0], load_model(tmp_path / "a.pt")(image)[0])


def test_the_metadata_line_is_json(weights: Path, tmp_path: Path) -> None:
    write_wts(tmp_path / "a.wts", {}, {"nc": 1})
    values = (tmp_path / "a.wts").read_text().split("\n")[1].split()[2:]
    assert json.loads(bytes(int(struct.unpack(">f", bytes.fromhex(v))[0]) for v in values)) == {"nc": 1}
