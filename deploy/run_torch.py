"""Files that torch itself runs: TorchScript, and packages of AOTInductor."""

from __future__ import annotations

import json
import warnings
import zipfile
from pathlib import Path

import torch
import torchvision  # noqa: F401 - registers deform_conv2d, which traces with DCN layers call
from torch import Tensor
from torch._C._aoti import AOTIModelPackageLoader

from deploy.contract import Runtime
from deploy.cxx import has_own_cxx_library
from deploy.metadata import parse
from deploy.to_torch import ENTRIES
from utils.errors import ConfigError, ExportError

MODEL = "model"
"""What a package calls the one model that is in it."""


class TorchScriptRuntime(Runtime):
    """A trace, on any device of torch."""

    def __init__(self, path: Path, device: torch.device) -> None:
        extra = {ENTRIES: ""}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch prefers its own .pt2
                module = torch.jit.load(str(path), map_location=device, _extra_files=extra)
        except (RuntimeError, ValueError) as error:
            raise ExportError(f"{path}: not a TorchScript file ({str(error).splitlines()[0][:200]})") from error
        super().__init__(parse(_entries(extra[ENTRIES]), str(path)), path)
        # not as a submodule: .half() and .float() of a model must not reach the weights of a file
        self._trace, self._device = module.forward, device

    def run(self, images: Tensor) -> Tensor:
        return self._trace(images.to(self._device))


class AotiRuntime(Runtime):
    """Compiled for one kind of device, and run on that."""

    def __init__(self, path: Path, device: torch.device) -> None:
        try:
            _check_device(path, device)
            _check_library(path)
            # not by aoti_load_package: it compiles test programs first, to say what this processor knows (20 seconds)
            index = -1 if device.index is None else device.index
            package = AOTIModelPackageLoader(str(path), MODEL, False, 1, index)
        except (RuntimeError, ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
            raise ExportError(f"{path}: not a package of export.py ({str(error).splitlines()[0][:200]})") from error
        super().__init__(parse(package.get_metadata(), str(path)), path)
        self._package, self._device = package, device

    def run(self, images: Tensor) -> Tensor:
        (output,) = self._package.run([images.to(self._device).contiguous()])
        return output


def read_metadata(path: Path) -> dict[str, str]:
    """What a package says of itself, ours and torch's; it is not opened for that. Raises RuntimeError and the like for
    a file that is none."""
    return AOTIModelPackageLoader.load_metadata_from_package(str(path), MODEL)


def _check_device(path: Path, device: torch.device) -> None:
    """Raise ConfigError or ExportError for a package that was compiled for something else; it would end the process."""
    told = read_metadata(path)
    kind = told.get("AOTI_DEVICE_KEY", "cpu")
    if kind != device.type:
        raise ConfigError(f"{path}: compiled for {kind}, and --device is {device.type}; export it again with --device")
    if kind != "cuda":
        return
    torch.zeros(1, device=device)  # starts CUDA, which a package takes for granted
    made, here = told.get("AOTI_COMPUTE_CAPABILITY", ""), "{}{}".format(*torch.cuda.get_device_capability(device))
    if made.isdigit() and made != here:
        raise ExportError(f"{path}: compiled for compute capability {made}, this GPU has {here}; export it again here")


def _check_library(path: Path) -> None:
    """Raise ExportError for a package whose constructor would end the process: see deploy/cxx.py."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if not name.endswith(".so"):
                continue
            with archive.open(name) as library:
                if has_own_cxx_library(library):
                    raise ExportError(
                        f"{path}: has a C++ library of its own, which crashes where it is opened; export it again"
                    )


def _entries(text: str | bytes) -> dict:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
