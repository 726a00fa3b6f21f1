"""From a checkpoint to files in other formats, each reopened and compared before it gets its name."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deploy.checking import (
    Agreement,
    Difference,
    agreement,
    detection_difference,
    difference,
    input_batch,
    refuse_if_far,
    refuse_if_other,
)
from deploy.contract import Runtime
from deploy.formats import Format
from deploy.metadata import Metadata, describe
from deploy.run_onnx import with_advice
from deploy.runtime import open_runtime
from deploy.to_onnx import check_opset, export_onnx
from deploy.to_torch import export_aoti, export_torchscript
from deploy.to_wts import compare_wts, export_wts
from deploy.wrap import ExportModel, has_dcn
from models.ensemble import Ensemble
from models.head import side_multiple
from models.loading import load_model
from models.ops.deform_conv import obstacle_to
from models.surgery import fuse
from models.yolo import DetectionModel
from utils.console import LOGGER
from utils.errors import ConfigError, ExportError, ResourceError, UserError, explain_memory_error, explain_os_error

PICTURES_COMPARED = 32
"""Of those that a file in eight bits was calibrated on."""
LEAST_COMPARED = 0.25
"""Confidence of the objects by which it is compared, detect.py's threshold."""

WIDE = ("openvino", "ncnn")
"""Formats whose converters make float16 themselves, from a float32 model."""


@dataclass(frozen=True)
class ExportOptions:
    """What the flags of export.py ask for. ``imgsz`` (height, width); ``dcn``: a form of DCN layers, empty for the one
    that suits each format; ``nms``: suppression inside, with ``conf``, ``iou`` and ``max_det``; ``folder``: where files
    go, None for beside the weights; ``meta``: whether a .wts says what it is; ``calibration``: pictures, uint8
    (H, W, 3) RGB, one at least, whose ranges make a file in eight bits; None for one in floats."""

    imgsz: tuple[int, int] = (640, 640)
    batch: int = 1
    dynamic: bool = False
    half: bool = False
    opset: int | None = None
    dcn: str = ""
    nms: bool = False
    conf: float = 0.25
    iou: float = 0.45
    max_det: int = 100
    folder: Path | None = None
    device: torch.device = torch.device("cpu")
    meta: bool = True
    calibration: Sequence[np.ndarray] | None = None

    @property
    def int8(self) -> bool:
        """Whether files are to be in eight bits."""
        return self.calibration is not None


@dataclass(frozen=True)
class Job:
    """One model and all that the writers need. ``plain`` has its norms, on the CPU; ``image``, uint8 (H, W, 3) RGB, is
    what files are compared on."""

    weights: Path
    options: ExportOptions
    plain: DetectionModel
    image: np.ndarray | None = None

    @cached_property
    def model(self) -> DetectionModel:
        """The model with its norms folded, on the device of the options."""
        return fuse(copy.deepcopy(self.plain)).to(self.options.device)


def prepare(
    weights: str | Path, options: ExportOptions, image: np.ndarray | None = None, cfg: str | None = None
) -> Job:
    """Load the model. ``image``: see :class:`Job`; .wts needs none. ``cfg``: the model YAML of a file without one.

    Raises ConfigError for a size that is no multiple of the stride or an opset that cannot be; CheckpointError.
    """
    plain = load_model(weights, "cpu", fuse=False, cfg=cfg)
    assert not isinstance(plain, Ensemble)
    multiple = side_multiple(plain.stride)
    if any(side % multiple for side in options.imgsz):
        raise ConfigError(f"--imgsz {options.imgsz[0]} {options.imgsz[1]}: not multiples of the stride {multiple}")
    if options.dcn != "fused":  # which no ONNX file can hold
        check_opset(options.opset, form_of(plain, options.dcn, "onnx"))
    return Job(Path(weights), options, plain, image)


def check_options(job: Job, kind: Format) -> None:
    """Raise ConfigError for options that a format cannot take, before anything is written."""
    options = job.options
    form_of(job.plain, options.dcn, kind.name, options.device)
    if options.int8 and kind.name != "onnx":
        raise ConfigError(f"--int8: goes into ONNX files only; leave out --include {kind.name}")
    if options.int8 and options.half:
        raise ConfigError("--int8 and --half: choose one")
    if kind.name == "ncnn" and (options.dynamic or options.batch != 1):
        raise ConfigError("--include ncnn: runs one image of one size; leave out --dynamic and --batch-size")


def export(job: Job, kind: Format, target: Path | None = None) -> Path:
    """Write one format, reopen it, compare it with the model on the picture, give it its name; returns that
    (``target``, or what :meth:`Format.file_for` says).

    An older file of that name is replaced only then. Raises ExportError for a model that the format cannot hold and for
    a file that computes something else; ResourceError where the folder cannot be written to.
    """
    check_options(job, kind)
    ending = "_int8" if job.options.int8 else ""
    target = target or kind.file_for(job.weights.with_stem(job.weights.stem + ending), job.options.folder)
    if target.exists() and target.samefile(job.weights):
        raise ConfigError(
            f"--include {kind.name}: would replace {job.weights} itself; give another folder with --output"
        )
    start = time.perf_counter()
    folder = _temporary_folder(target.parent)
    try:
        made = folder / target.name
        told = _write(job, kind, made)
        seconds, size = time.perf_counter() - start, _size(made)
        compared = told or _check(job, kind, made)
        _rename(made, target, folder)
    except ExportError as error:
        raise ExportError(f"{target}: {error}") from error
    except UserError:
        raise
    except OSError as error:
        raise ResourceError(explain_os_error(error) or f"{target}: cannot be written ({error.strerror})") from error
    except Exception as error:  # a converter's own, of any kind
        reason = (
            explain_memory_error(error) or f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        )
        raise ExportError(f"{target}: {kind.name} cannot hold this model ({with_advice(reason[:300])})") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    LOGGER.info(f"{kind.name}: {target} ({size / 1e6:.1f} MB, {seconds:.1f} s), {compared}")
    return target


def _write(job: Job, kind: Format, path: Path) -> str:
    """Write the file; returns what its writer found when it compared, empty for files that :func:`_check` reopens."""
    meta = metadata(job, kind.name)
    if kind.name == "wts":
        export_wts(job.plain, path, meta if job.options.meta else None)
        return ""
    if kind.name == "engine":
        return _write_engine(job, path)
    on_gpu = kind.name == "aoti" and job.options.device.type == "cuda"
    layout = torch.channels_last if on_gpu else torch.contiguous_format  # as the convolutions there want their weights
    model = ExportModel(job.model, meta.dcn, meta.half and kind.name not in WIDE, layout).to(job.options.device)
    dtype = torch.float16 if meta.half and kind.name not in WIDE else torch.float32
    # two images for a free batch: a dimension of one would be taken for a constant
    count = 2 if meta.dynamic and kind.name != "ncnn" else meta.batch
    example = input_batch(job.image, meta.imgsz, count, job.options.device).to(dtype)
    _writer(job, kind.name)(model, example, path, meta)
    return ""


def _check(job: Job, kind: Format, path: Path) -> str:
    """Reopen and compare; returns what was found, for the log."""
    if kind.name == "wts":
        compare_wts(job.plain, path)
        return "read back, every value the same"
    runtime = open_runtime(path, job.options.device)
    if job.options.int8:
        return compare_int8(job, runtime).text()
    return "; ".join(each.text() for each in compare(job, runtime))


def _write_engine(job: Job, path: Path) -> str:
    """Layer by layer, as python -m deploy.tensorrt -s; compared where the GPU is one that the engine is for."""
    from deploy.tensorrt.build import BuildOptions, engine_of
    from deploy.tensorrt.trt_backend import EngineOptions

    options = job.options
    if options.dynamic or options.dcn not in ("", "gridsample"):
        flag = "--dynamic" if options.dynamic else f"--dcn {options.dcn}"
        raise ConfigError(
            f"{flag}: not for an engine: it takes one size, 1 to --batch-size images, DCN layers as GridSample"
        )
    batches = EngineOptions(options.batch, options.batch)
    asked = BuildOptions(options.imgsz, options.half, engine=batches, image=job.image)
    content, told = engine_of(job.model, asked)
    path.write_bytes(content)
    return told


def metadata(job: Job, name: str) -> Metadata:
    """What the file of a format will say of itself."""
    options = job.options
    form = form_of(job.plain, options.dcn, name, options.device)
    about = {name: getattr(options, name) for name in ("batch", "dynamic", "half", "int8")}
    meta = describe(job.plain, options.imgsz, dcn=form, **about)
    return replace(meta, nms=options.max_det) if name == "onnx" and options.nms else meta


def form_of(model: DetectionModel, asked: str, name: str, device: torch.device = torch.device("cpu")) -> str:
    """The form of DCN layers in a format: the one asked for, else its own; empty for a model without any, and in .wts.

    AOTInductor compiles grid_sample, or on a GPU the kernel of training, but calls deform_conv2d, for which C++ would
    need torchvision's library. Raises ConfigError for ``fused`` where it cannot be.
    """
    if name == "wts" or not has_dcn(model):
        return ""
    obstacle = obstacle_to("triton", device, torch.float32, explicit=False) if name == "aoti" else "it is for aoti only"
    if asked == "fused" and obstacle:
        raise ConfigError(f"--dcn fused: not in {name} here: {obstacle}")
    return asked or ("deformconv" if name != "aoti" else "gridsample" if obstacle else "fused")


def _writer(job: Job, name: str) -> Callable[[ExportModel, Tensor, Path, Metadata], None]:
    options = job.options
    if name == "onnx":
        suppress = {"conf": options.conf, "iou": options.iou, "max_det": options.max_det} if options.nms else None
        opset = check_opset(options.opset, form_of(job.plain, options.dcn, name))
        calibration = calibration_batches(options, options.calibration) if options.int8 else None
        return partial(export_onnx, opset=opset, suppress=suppress, calibration=calibration)
    if name == "openvino":
        from deploy.to_openvino import export_openvino

        return export_openvino
    if name == "ncnn":
        from deploy.to_ncnn import export_ncnn

        return export_ncnn
    return {"torchscript": export_torchscript, "aoti": export_aoti}[name]


def compare(job: Job, runtime: Runtime) -> list[Difference]:
    """The file beside the model on the picture, in the size it was made for; a file for any size also in another and
    with another number of images. Raises ExportError where they differ by more than rounding."""
    meta, options = runtime.meta, job.options
    cases = [(meta.imgsz, options.batch)]
    if meta.dynamic:
        cases.append((_other_size(meta), options.batch + 2))
    found = []
    for size, count in cases:
        expected, given = _both(job, runtime, input_batch(job.image, size, count, options.device))
        if meta.nms:
            far = detection_difference(expected, given, options.conf, options.iou, meta.nms)
        else:
            far = difference(expected, given)
        refuse_if_far(far, meta.half)
        found.append(far)
    return found


def _other_size(meta: Metadata) -> tuple[int, int]:
    """Half as large, and turned."""
    height, width = (max(side // 2 // meta.stride, 1) * meta.stride for side in (meta.imgsz[1], meta.imgsz[0]))
    return height, width


def _both(job: Job, runtime: Runtime, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the model gives for a batch, and what the file gives."""
    with torch.no_grad():
        return job.model(images)[0], runtime(images)[0]


def calibration_batches(options: ExportOptions, pictures: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Pictures as inputs of the file, float32 (batch, 3, H, W); the last one again where a batch is not full."""
    for first in range(0, len(pictures), options.batch):
        some = list(pictures[first : first + options.batch])
        some += some[-1:] * (options.batch - len(some))
        yield torch.cat([input_batch(each, options.imgsz, 1, torch.device("cpu")) for each in some]).numpy()


def compare_int8(job: Job, runtime: Runtime) -> Agreement:
    """A file in eight bits beside the model on some of the calibration pictures; one for any size is run in another as
    well. Raises ExportError where it finds something else."""
    seen, options, meta = Agreement(), job.options, runtime.meta
    pictures = options.calibration[:PICTURES_COMPARED]
    conf = max(options.conf, LEAST_COMPARED) if meta.nms else LEAST_COMPARED  # below, both find noise
    for number, batch in enumerate(calibration_batches(options, pictures)):
        count = min(options.batch, len(pictures) - number * options.batch)
        expected, given = _both(job, runtime, torch.from_numpy(batch).to(options.device))
        seen += agreement(expected[:count], given[:count], conf, options.iou, meta.nms)
    if meta.dynamic:
        images = input_batch(job.image, _other_size(meta), options.batch + 2, options.device)
        expected, given = _both(job, runtime, images)
        if not meta.nms and expected.shape != given.shape:
            raise ExportError(f"gives {tuple(given.shape)} in another size, the model {tuple(expected.shape)}")
    refuse_if_other(seen)
    return seen


def _temporary_folder(parent: Path) -> Path:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".export-", dir=parent))
    except OSError as error:
        raise ResourceError(f"{parent}: cannot write there ({error.strerror}); use --output FOLDER") from None


def _rename(made: Path, target: Path, spare: Path) -> None:
    """Give the file or folder its name; an older folder is moved into ``spare``, which goes."""
    if target.is_dir() and not target.is_symlink():
        os.replace(target, spare / "older")
    os.replace(made, target)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
