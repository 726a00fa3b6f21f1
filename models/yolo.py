"""DetectionModel: a YOLOv5 network from a YAML file.

python -m models.yolo --cfg yolov5s.yaml --profile      # table of layers, totals, milliseconds per layer
python -m models.yolo --cfg yolov5s.yaml --dcn c3:8     # with convolutions made deformable (models/deform.py)
python -m models.yolo --cfg runs/train/exp/weights/best.pt
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from models.deform import make_deformable, parse_requests
from models.head import Detect
from models.map_size import largest_map
from models.parser import Layer, parse_model
from models.spec import read_spec
from models.upstream import read_weights
from utils.errors import CheckpointError, ConfigError, run_cli

STRIDE_PROBE = 256
"""Pixels. Side of the image whose maps tell the strides; the largest stride that a model can have."""
MAX_MAP = 2**27
"""Values of one map of that image, half a gigabyte; the largest of YOLOv5's models has 2 million."""


class DetectionModel(nn.Module):
    """Layers from a description (YAML file, its name below models/, or a dict), with Detect as the last.

    ``nc`` and ``anchors`` (per level, or lists of pixels) replace those of the description.

    Attributes: ``model`` the nn.Sequential (state-dict keys are ``model.<layer>.<attribute>...``), ``save`` the layers
    whose outputs are kept, ``layers`` what the table knows of each, ``yaml`` a plain dict that rebuilds this model,
    ``yaml_file``, ``nc``, ``names`` {class: text}.
    """

    def __init__(
        self,
        spec: str | Path | dict,
        ch: int | None = None,
        nc: int | None = None,
        anchors: float | list | None = None,
        check: Callable[[int], None] = lambda values: None,
        empty: bool = False,
    ) -> None:
        """``check`` and ``empty`` as in :func:`models.parser.parse_model`."""
        super().__init__()
        read = read_spec(spec, ch, nc, anchors)
        self.yaml_file, self.nc = read.name, read.nc
        self.yaml = {key: value for key, value in read.yaml.items() if key != "dcn"}  # it will name what was made
        self.model, self.layers = parse_model(read, check, empty)
        self.names = {number: str(number) for number in range(read.nc)}
        self.save = sorted(i for layer in self.layers for i in layer.kept)
        strides = self._measure_strides(read.ch)
        self.detect.set_anchors(self.layers[-1].args[1], strides)
        self.detect.initialize_biases(strides)
        if read.dcn:
            make_deformable(self, [part for item in read.dcn for part in parse_requests(str(item))], read.dcn_where)

    @property
    def detect(self) -> Detect:
        """The last layer. Its ``anchors`` (nl, A, 2) are in grid units."""
        return self.model[-1]

    @property
    def stride(self) -> Tensor:
        """(nl,) float32: pixels per cell of each level."""
        return self.detect.stride

    def forward(self, images: Tensor) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """images (B, ch, H, W) float in 0..1, sides multiples of the largest stride.

        Training: list over levels of logits (B, A, H/s, W/s, 5 + nc). Eval: (decoded (B, N, 5 + nc), that list), see
        :meth:`models.head.Detect.decode`.
        """
        x, kept = images, {}
        for module, layer in zip(self.model, self.layers):
            x = module(_gather(layer, x, kept))
            if layer.index in self.save:
                kept[layer.index] = x
        return x

    @torch.no_grad()
    def _measure_strides(self, ch: int) -> list[float]:
        """Pixels per cell of the maps that Detect receives. A batch of no images runs through the layers, which follows
        shapes and computes nothing; on torch's meta device the first pass would import torch's compiler."""
        if ch * STRIDE_PROBE**2 > MAX_MAP:
            raise ConfigError(f"{self.layers[0].where}: {ch} input channels (ch) are too many")
        x, kept = torch.zeros(0, ch, STRIDE_PROBE, STRIDE_PROBE), {}
        if x.is_meta:  # which refuses to enlarge an empty batch, and computes nothing either
            x = x.new_zeros(1, *x.shape[1:])
        self.model.eval()  # BatchNorm statistics stay at their start
        for module, layer in zip(self.model[:-1], self.layers):
            x = _probe(module, layer, _gather(layer, x, kept))
            kept[layer.index] = x
        self.model.train()
        return [STRIDE_PROBE / kept[i].shape[-2] for i in self.layers[-1].inputs]


def _gather(layer: Layer, previous: Tensor, kept: dict[int, Tensor]) -> Tensor | list[Tensor]:
    """What a layer reads: one map, or a list for a 'from' that is a list."""
    maps = [previous if i == layer.index - 1 else kept[i] for i in layer.inputs]
    return maps if isinstance(layer.source, list) else maps[0]


def _probe(module: nn.Module, layer: Layer, x: Tensor | list[Tensor]) -> Tensor:
    try:
        values = largest_map(module, x if isinstance(x, list) else [x])
        if values > MAX_MAP:
            place = f"{layer.where}: layer {layer.index}"
            raise ConfigError(f"{place} makes a map of {values:,} values of a {STRIDE_PROBE}-pixel image")
        return module(x)
    except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError) as error:  # shapes that do not fit
        shapes = [tuple(t.shape) for t in (x if isinstance(x, list) else [x])]
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{layer.where}: layer {layer.index} does not fit its input {', '.join(map(str, shapes))} "
            f"(for a {STRIDE_PROBE}-pixel image): {reason}"
        ) from error


def main(argv: Sequence[str]) -> None:
    """Print the table of a model's layers and its totals."""
    from models.summary import summarize
    from utils.device import select_device

    parser = argparse.ArgumentParser(prog="python -m models.yolo", description="Build a model and show its layers.")
    parser.add_argument("--cfg", default="yolov5s.yaml", help="model YAML, or a checkpoint (default: yolov5s.yaml)")
    parser.add_argument(
        "--dcn", default="", metavar="LAYERS", help="make these convolutions deformable, as in train.py"
    )
    parser.add_argument(
        "--imgsz", "--img", "--img-size", type=int, default=640, help="image side, pixels (default 640)"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="images per timed pass with --profile (default 1)")
    parser.add_argument("--device", default="", help="cpu, mps or a CUDA number; default: first GPU, else CPU")
    parser.add_argument("--profile", action="store_true", help="time every layer")
    parser.add_argument("--debug", action="store_true", help="keep tracebacks")
    args = parser.parse_args(argv)
    for flag in ("imgsz", "batch_size"):
        if getattr(args, flag) < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected a number from 1 up")
    model = DetectionModel(_description(args.cfg))
    if args.dcn:
        make_deformable(model, parse_requests(args.dcn))
    model = model.to(select_device(args.device))
    print(summarize(model, args.imgsz, profile=args.profile, batch_size=args.batch_size).text())


def _description(cfg: str) -> str | dict:
    """``cfg`` itself, or what a checkpoint says of its model."""
    if not cfg.endswith(".pt"):
        return cfg
    description = read_weights(cfg).meta.get("yaml")
    if not isinstance(description, dict):
        raise CheckpointError(f"{cfg}: holds weights without a model description")
    return description


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
