"""The Python way in: ``model = load("best.pt"); results = model("photo.jpg")``. detect.py runs the same class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.head import side_multiple
from models.loading import load_model
from models.results import Results
from models.surgery import in_dtype
from models.tta import augmented_forward
from utils.augmentations import Letterbox, letterbox, letterbox_fit
from utils.boxes import scale_to_original
from utils.config import check_thresholds
from utils.cuda_graphs import CudaGraphs
from utils.device import half_dtype, select_device, to_network_input
from utils.errors import ConfigError, SourceError, did_you_mean
from utils.images import read_image
from utils.nms import non_max_suppression
from utils.stages import STAGES, StageTimes

ImageLike = Any  # str | Path | PIL.Image.Image | np.ndarray (H, W, 3) RGB uint8
SETTINGS = ("conf", "iou", "agnostic", "multi_label", "classes", "max_det", "amp", "augment")


class Detector:
    """A model with its pre- and post-processing.

    Settings are plain attributes: ``conf`` and ``iou`` thresholds, ``agnostic`` NMS, ``multi_label``, ``classes`` (only
    these numbers), ``max_det`` an image, ``amp`` autocast, ``augment`` flips and scales at test time. ``names`` maps
    class numbers to names, ``stride`` is what the sides of its input are multiples of, in pixels, ``imgsz`` the only
    (height, width) that an exported file takes, or None.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, half: bool = False, cuda_graphs: bool = False, **settings: Any
    ) -> None:
        """``half`` runs in float16 on CUDA, in bfloat16 on a CPU that has it (:func:`utils.device.half_dtype`).
        ``cuda_graphs``: on CUDA, input shapes that come again are replayed as graphs (:mod:`utils.cuda_graphs`),
        where the model's hooks do not run. Raises ConfigError for an unknown setting or one out of range."""
        exported = next(model.parameters(), None) is None
        self.device, self.dtype = device, half_dtype(half, device, exported) or torch.float32
        self.model = in_dtype(model, self.dtype).to(device).eval()
        self._graphs = CudaGraphs(self.model) if cuda_graphs and device.type == "cuda" else None
        self.names: dict[int, str] = dict(model.names)
        self.stride = side_multiple(model.stride)
        self.imgsz: tuple[int, int] | None = getattr(model, "imgsz", None)  # of exported files that take one size
        self.conf, self.iou, self.max_det = 0.25, 0.45, 1000
        self.agnostic = self.multi_label = self.amp = self.augment = False
        self.classes: Sequence[int] | None = None
        for key, value in settings.items():
            if key not in SETTINGS:
                known = f"{did_you_mean(key, SETTINGS)} (there are: {', '.join(SETTINGS)})"
                raise ConfigError(f"{key}: no such setting{known}")
            setattr(self, key, value)
        self.check()

    def check(self) -> None:
        """Raise ConfigError, naming the flag, when a threshold or a class number is out of range, or the model takes no
        other sizes for ``augment``."""
        check_thresholds(self.conf, self.iou, self.max_det)
        if self.augment and self.imgsz is not None:
            raise ConfigError("--augment: looks at several sizes, and this file takes one; export it with --dynamic")
        if isinstance(self.classes, int):
            self.classes = [self.classes]
        for number in self.classes or ():
            if number not in self.names:
                raise ConfigError(f"--classes {number}: this model has classes 0 to {max(self.names)}")

    @torch.no_grad()
    def __call__(self, images: ImageLike | Sequence[ImageLike] | Tensor, size: int | tuple[int, int] = 640) -> Any:
        """Detect in one image or a list: paths, PIL images, numpy arrays uint8 (H, W, 3) RGB or (H, W) grey.

        ``size``: pixels of the longer side of the network input, or (height, width); rounded up to the stride.
        Returns :class:`models.results.Results`. A tensor (B, 3, H, W) in 0..1, H and W multiples of the stride, is
        run as it is and gives the decoded predictions (B, N, 5+nc). Raises SourceError for what cannot be read.
        """
        if isinstance(images, Tensor):
            if images.dim() != 4 or images.shape[1] != 3:
                raise SourceError(f"tensor: expected (batch, 3, height, width), got {tuple(images.shape)}")
            return self.forward(images.to(self.device, self.dtype))
        many = images if isinstance(images, (list, tuple)) else [images]
        if not many:
            raise SourceError("no image given: the list is empty")
        arrays, files = zip(*(as_image(image, number) for number, image in enumerate(many)))
        boxes, times, shape = self.detect(arrays, self.round_size(size))
        return Results(list(arrays), boxes, list(files), self.names, times, shape)

    def round_size(self, size: int | Sequence[int]) -> tuple[int, int]:
        """(height, width) of the network input: one number or two, rounded up to multiples of the stride; for an
        exported file of one size that one.

        Raises ConfigError for sizes below 1 or more than two numbers.
        """
        sides = list(size) if isinstance(size, (list, tuple)) else [size]
        if not all(isinstance(side, (int, np.integer)) for side in sides):
            raise ConfigError(f"--imgsz {size!r}: expected whole numbers, in pixels")
        if len(sides) not in (1, 2) or any(side < 1 for side in sides):
            raise ConfigError(f"--imgsz {' '.join(map(str, sides))}: expected one size or height and width, in pixels")
        if self.imgsz is not None:
            return self.imgsz
        rounded = [-(-side // self.stride) * self.stride for side in sides]
        return rounded[0], rounded[-1]

    @torch.no_grad()
    def detect(
        self, images: Sequence[np.ndarray], imgsz: tuple[int, int]
    ) -> tuple[list[Tensor], tuple[float, float, float], tuple[int, ...]]:
        """Detect in uint8 (H, W, 3) RGB images of any size.

        Returns a list of (n, 6) float32 on the CPU: x1, y1, x2, y2 in pixels of each image, confidence, class, by
        falling confidence; milliseconds an image for pre-processing, inference and NMS; the network input's shape.
        """
        self.check()
        times = StageTimes(self.device)
        pre_process, inference, nms = STAGES
        with times.stage(pre_process):
            batch, letterboxes = self.prepare(images, imgsz)
        with times.stage(inference):
            decoded = self.forward(batch)
        with times.stage(nms):
            found = non_max_suppression(
                decoded,
                self.conf,
                self.iou,
                classes=self.classes,
                agnostic=self.agnostic,
                multi_label=self.multi_label,
                max_det=self.max_det,
            )
            boxes = [to_original(rows, tuple(batch.shape[2:]), box) for rows, box in zip(found, letterboxes)]
        milliseconds = times.per_image(len(images))
        return boxes, tuple(milliseconds[stage] for stage in STAGES), tuple(batch.shape)

    def prepare(self, images: Sequence[np.ndarray], imgsz: tuple[int, int]) -> tuple[Tensor, list[Letterbox]]:
        """Letterbox to the smallest common rectangle of stride multiples, or to the one size that the model takes;
        (B, 3, H, W) in 0..1 on the device."""
        if self.imgsz is not None:
            boxed = [letterbox(image, self.imgsz, auto=False, stride=self.stride) for image in images]
        elif len({image.shape for image in images}) == 1:
            boxed = [letterbox(image, imgsz, auto=True, stride=self.stride) for image in images]
        else:
            shape = self._common_shape(images, imgsz)
            boxed = [letterbox(image, shape, auto=False, stride=self.stride) for image in images]
        batch = torch.from_numpy(np.stack([image for image, _ in boxed])).permute(0, 3, 1, 2)
        return to_network_input(batch, self.device, self.dtype), [box for _, box in boxed]

    def _common_shape(self, images: Sequence[np.ndarray], imgsz: tuple[int, int]) -> tuple[int, int]:
        sizes = [letterbox_fit(image.shape[:2], imgsz).size for image in images]
        return self.round_size((max(height for _, height in sizes), max(width for width, _ in sizes)))

    @torch.no_grad()  # not inference_mode: its tensors refuse in-place changes by the user later on
    def forward(self, batch: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..1 -> decoded predictions (B, N, 5+nc), float32."""
        with torch.autocast(self.device.type, enabled=self.amp):
            output = augmented_forward(self.model, batch) if self.augment else (self._graphs or self.model)(batch)
        decoded = output[0] if isinstance(output, (tuple, list)) else output
        return decoded.float() if self._graphs is None else decoded.float().clone()  # the next replay writes there

    def warmup(self, imgsz: tuple[int, int]) -> None:
        """One forward of an empty image on a GPU, so that the first picture is not timed with the start-up."""
        if self.device.type == "cuda":
            self.forward(torch.zeros(1, 3, *imgsz, device=self.device, dtype=self.dtype))


def load(weights: str | Path | Sequence[str | Path], device: str = "", half: bool = False, **settings: Any) -> Detector:
    """Open a checkpoint (or several, as an ensemble) for detection.

    ``device`` as in ``--device``; ``settings`` are the attributes of :class:`Detector`, e.g. ``conf=0.4``, and its
    ``cuda_graphs``.
    Raises CheckpointError for a file that is missing or no checkpoint, ConfigError for a wrong setting.
    """
    chosen = select_device(device)
    return Detector(load_model(weights, chosen, fuse=True), chosen, half, **settings)


def as_image(image: ImageLike, number: int = 0) -> tuple[np.ndarray, str]:
    """Any accepted kind of image as (uint8 (H, W, 3) RGB contiguous, a file name to save it under).

    Raises SourceError for URLs and for arrays of another shape or dtype, DataError for a file that is no picture.
    """
    from PIL import Image, ImageOps

    if isinstance(image, (str, Path)):
        if "://" in str(image):
            raise SourceError(f"{image}: nothing is downloaded; fetch the picture first and give its path")
        if not Path(image).is_file():
            raise SourceError(f"{image}: no such picture")
        return read_image(image), Path(image).name
    if isinstance(image, Image.Image):
        if not all(image.size):
            raise SourceError(f"image {number}: is empty ({image.width}x{image.height} pixels)")
        name = Path(getattr(image, "filename", "") or f"image{number}.jpg").name
        return np.array(ImageOps.exif_transpose(image).convert("RGB")), name
    if not isinstance(image, np.ndarray):
        raise SourceError(f"image {number}: expected a path, a PIL image or a numpy array, got {type(image).__name__}")
    pixels = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4))
    if not pixels or image.dtype != np.uint8 or image.size == 0:
        raise SourceError(
            f"image {number}: expected uint8 (height, width, 3) RGB, got {image.dtype} {tuple(image.shape)}; "
            "a float (batch, 3, height, width) goes in as a torch tensor"
        )
    if image.ndim == 2 or image.shape[2] == 1:
        image = np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    return np.ascontiguousarray(image[:, :, :3]), f"image{number}.jpg"


def to_original(rows: Tensor, input_hw: tuple[int, int], box: Letterbox) -> Tensor:
    """(n, 6) detections in network pixels -> the same in pixels of the original image, clipped to it, on the CPU."""
    scaled = scale_to_original(rows[:, :4], input_hw, box.original, gain=box.ratio[0], pad=box.pad)
    return torch.cat((scaled, rows[:, 4:]), 1).cpu()
