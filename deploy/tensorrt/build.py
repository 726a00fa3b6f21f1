"""From weights to a file: a TensorRT engine, or the same network as ONNX, which can be run and compared anywhere."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from deploy.checking import difference, input_batch, refuse_if_far
from deploy.contract import Runtime
from deploy.metadata import Metadata, describe
from deploy.tensorrt.engine_file import Maker, pack_engine
from deploy.tensorrt.network import describe_network
from deploy.tensorrt.onnx_backend import OnnxNetwork
from deploy.tensorrt.plugin_backend import PluginNetwork
from deploy.tensorrt.sizes import check_fit, layers_of
from deploy.tensorrt.trt_backend import EngineOptions, TensorRtNetwork, load_tensorrt
from deploy.wrap import has_dcn
from models.head import side_multiple
from models.loading import described_by, fill_described, read_any_weights
from models.surgery import fuse
from models.yolo import DetectionModel
from utils.console import LOGGER
from utils.errors import CheckpointError, ConfigError, ResourceError
from utils.files import atomic_open


@dataclass(frozen=True)
class BuildOptions:
    """``imgsz`` (height, width), the only size taken; ``half``: compute in float16; ``module``: of TensorRT, empty for
    the one that is there; ``dcn``: form of DCN layers in ONNX; ``plugin``: library that computes them in an engine,
    empty to put them together from GridSample; ``image`` uint8 (H, W, 3) RGB to compare on."""

    imgsz: tuple[int, int] = (640, 640)
    half: bool = False
    module: str = ""
    engine: EngineOptions = field(default_factory=EngineOptions)
    dcn: str = "gridsample"
    plugin: str = ""
    image: np.ndarray | None = None


def load_sized(weights: str | Path, words: Sequence[str]) -> DetectionModel:
    """The model of a .wts (or a checkpoint) that has the size ``words``, fused, float32 on the CPU; without words the
    one that the file itself describes.

    Raises ConfigError for words that are no size, CheckpointError for a file that is damaged, or has not just the
    tensors of that size.
    """
    checkpoint, layers = read_any_weights(weights), layers_of(words)
    if layers is None and not isinstance(checkpoint.meta.get("yaml"), dict):
        raise CheckpointError(f"{weights}: does not say what it is; give its size behind the engine's name, like s_dcn")
    check_fit(checkpoint, words)
    return fuse(fill_described(described_by(layers, checkpoint) if layers else checkpoint).eval())


def build(weights: str | Path, target: str | Path, words: Sequence[str], options: BuildOptions) -> Path:
    """Write ``target``, an .engine or an .onnx; an older file is replaced when the new one is whole.

    What can be run here is compared with the model on the picture. Raises ConfigError for a size that is no multiple of
    the stride, another suffix or options that do not go with it, CheckpointError as :func:`load_sized`, ExportError for
    a network that TensorRT does not build or one that computes something else, MissingPackage, ResourceError for a
    folder that takes no file.
    """
    target, start = Path(target), time.perf_counter()
    if target.suffix not in (".engine", ".onnx"):
        raise ConfigError(f"-s: {target}: expected a name that ends in .engine, or .onnx")
    if target.suffix == ".engine" and options.dcn != "gridsample":
        raise ConfigError(
            f"--dcn {options.dcn}: for an .onnx; an engine's DCN layers are GridSample, or --plugin LIBRARY"
        )
    if target.suffix == ".onnx" and options.plugin:
        raise ConfigError(f"--plugin {options.plugin}: for an .engine; an .onnx for the plugin takes --dcn plugin")
    model = load_sized(weights, words)
    if (options.plugin or options.dcn == "plugin") and not has_dcn(model):
        raise ConfigError(f"--plugin: {weights} has no DCN layers")
    multiple = side_multiple(model.stride)
    if any(side < 1 or side % multiple for side in options.imgsz):
        raise ConfigError(f"--imgsz {options.imgsz[0]} {options.imgsz[1]}: not multiples of the stride {multiple}")
    try:
        with atomic_open(target) as file:  # before the work: a folder that cannot be written to is told at once
            content, told = (engine_of if target.suffix == ".engine" else _onnx)(model, options)
            file.write(content)
    except OSError as error:
        raise ResourceError(f"{target}: cannot be written ({error.strerror}); give another folder") from error
    seconds = time.perf_counter() - start
    LOGGER.info(f"{target.suffix[1:]}: {target} ({len(content) / 1e6:.1f} MB, {seconds:.1f} s), {told}")
    return target


def _onnx(model: DetectionModel, options: BuildOptions) -> tuple[bytes, str]:
    from deploy.run_onnx import OnnxRuntime

    net, meta = OnnxNetwork(options.dcn), _meta(model, options, options.dcn)
    describe_network(model, net, options.imgsz, options.half)
    # the input is float32 and is cast inside, so to who runs it the file is not half
    content = net.finish(replace(meta, half=False).entries())
    if options.dcn == "plugin":
        return content, "not run: only TensorRT with our plugin can"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        path.write_bytes(content)
        return content, _compared(model, OnnxRuntime(path, torch.device("cpu")), options)


def engine_of(model: DetectionModel, options: BuildOptions) -> tuple[bytes, str]:
    """The bytes of an .engine of a fused model, and what is to be said of it. Raises as :func:`build`."""
    trt = load_tensorrt(options.module)
    if options.plugin:
        net, form = PluginNetwork(trt, options.engine, options.plugin), "plugin"
    else:
        net, form = TensorRtNetwork(trt, options.engine), "gridsample"
    describe_network(model, net, options.imgsz, options.half)
    meta = replace(_meta(model, options, form), batch=options.engine.most)
    start = time.perf_counter()
    engine = net.finish({})
    seconds = time.perf_counter() - start
    maker = Maker(trt.__name__, trt.__version__, net.targets(), Path(options.plugin).name)
    content = pack_engine(engine, meta, maker)
    told = f"{seconds:.1f} s of it in {maker.text()}, batch 1 to {meta.batch}"
    return content, f"{told}; {_tried(model, content, maker, options)}"


def _tried(model: DetectionModel, content: bytes, maker: Maker, options: BuildOptions) -> str:
    """Run and compare an engine on the GPU that is here, if it is one that the engine is for."""
    if not torch.cuda.is_available():
        return "not run: no GPU here"
    major, minor = torch.cuda.get_device_capability()
    if maker.targets and 10 * major + minor not in maker.targets:
        return f"not run: the GPU here is {major}.{minor}"
    from deploy.tensorrt.run_engine import EngineRuntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.engine"
        path.write_bytes(content)
        return _compared(model, EngineRuntime(path, torch.device("cuda", 0)), options)


def _meta(model: DetectionModel, options: BuildOptions, form: str) -> Metadata:
    return describe(model, options.imgsz, half=options.half, dcn=form if has_dcn(model) else "")


def _compared(model: DetectionModel, runtime: Runtime, options: BuildOptions) -> str:
    """The largest difference to the model for one image and for two. Raises ExportError beyond rounding."""
    image = options.image if options.image is not None else np.full((*options.imgsz, 3), 114, np.uint8)
    images = input_batch(image, options.imgsz, 2, model.stride.device)
    with torch.no_grad():
        expected = model(images)[0]
        found = runtime(images)[0]
        again = runtime(images[:1])[0]
    for rows, given in ((expected, found), (expected[:1], again)):
        refuse_if_far(difference(rows, given), options.half)
    return difference(expected, found).text()
