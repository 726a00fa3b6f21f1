"""The table of formats: what export.py writes and detect.py and val.py run. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from utils.errors import ConfigError, MissingPackage, did_you_mean, is_installed


@dataclass(frozen=True)
class Format:
    """``name`` as in --include; ``suffix`` of the file, or of the folder where it begins with '_'; ``packages``: pairs
    of module (``a|b``: one of them will do) and what pip calls it; ``purpose`` in words; ``planned``: not offered yet;
    ``runs``: whether detect.py and val.py run it as it is."""

    name: str
    suffix: str
    packages: tuple[tuple[str, str], ...]
    purpose: str
    planned: bool = False
    runs: bool = True

    def missing(self) -> str:
        """What pip would have to install, or an empty text."""
        return " ".join(pip for modules, pip in self.packages if not any(map(is_installed, modules.split("|"))))

    def availability(self) -> str:
        """``yes``, or why not."""
        if self.planned:
            return "no: not offered yet"
        return f"no: pip install {self.missing()}" if self.missing() else "yes"

    def file_for(self, weights: str | Path, folder: str | Path | None = None) -> Path:
        """Where the export of a weights file goes: beside it, or into ``folder``."""
        weights = Path(weights)
        return Path(folder or weights.parent) / f"{weights.stem}{self.suffix}"


FORMATS = (
    Format("wts", ".wts", (), "tensors as text, for tensorrtx and other C++ programs", runs=False),
    Format(
        "onnx",
        ".onnx",
        (("onnx", "onnx"), ("onnxscript", "onnxscript"), ("onnxruntime", "onnxruntime")),
        "ONNX Runtime, TensorRT from 10.1",
    ),
    Format("torchscript", ".torchscript", (), "C++ and Python with torch and torchvision"),
    Format("aoti", ".pt2", (), "compiled ahead of time, C++ and Python with torch alone"),
    Format("openvino", "_openvino_model", (("openvino", "openvino"),), "Intel CPUs and GPUs"),
    Format("ncnn", "_ncnn_model", (("ncnn", "ncnn"), ("pnnx", "pnnx")), "phones and small boards; batch 1"),
    Format("engine", ".engine", (("tensorrt|tensorrt_rtx", "tensorrt-rtx-cu13"),), "TensorRT on NVIDIA GPUs"),
)
BY_NAME = {each.name: each for each in FORMATS}


def chosen(names: list[str]) -> list[Format]:
    """The formats of --include, each once. Raises ConfigError for an unknown name or one that is not offered yet,
    MissingPackage where a package is lacking."""
    for name in names:
        if name not in BY_NAME:
            raise ConfigError(f"--include {name}: no such format{did_you_mean(name, BY_NAME)} (see export.py --list)")
        if BY_NAME[name].planned:
            raise ConfigError(f"--include {name}: not offered yet (see export.py --list)")
        if BY_NAME[name].missing():
            raise MissingPackage(f"--include {name}", BY_NAME[name].missing())
    return [BY_NAME[name] for name in dict.fromkeys(names)]


def format_of(weights: str | Path) -> Format | None:
    """The exported format that a --weights file or folder has, by its name; None for .pt, .wts and all others."""
    name = Path(weights).name
    return next((each for each in FORMATS if each.runs and name.endswith(each.suffix)), None)


def table() -> str:
    """What ``export.py --list`` prints."""
    rows = [("--include", "file", "available", "for")]
    rows += [(f.name, f"best{f.suffix}", f.availability(), f.purpose) for f in FORMATS]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[3]]) for row in rows)
