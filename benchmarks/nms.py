"""NMS at evaluation's thresholds: ours, block by block, against one call of torchvision with all candidates, and all
images at once, which is our way on a GPU, against image by image.

    python -m benchmarks.nms [--device cuda] [--images 8]

Predictions are made up: objects with a cloud of overlapping boxes each and a tail of low scores, about as many
candidates above 0.001 as a trained yolov5n has on BCCD (6000 an image). The boxes kept are compared, not only the
times. CPU: processor time of one thread, the smallest of several passes; CUDA: wall time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.report import cpu_name, heading, table
from utils import nms
from utils.batched_nms import recorded_step
from utils.cuda_graphs import CudaGraphs

MAX_DET = 300


def made_up_predictions(images: int, objects: int, around: int, nc: int, device: str) -> Tensor:
    """(B, objects x around, 5+nc) decoded predictions in a frame of 640 pixels."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(images, objects, *shape, generator=generator)

    boxes = torch.cat((random(1, 2) * 640, 20 + 80 * random(1, 2)), -1)
    boxes = boxes + 0.15 * boxes[..., 2:].repeat(1, 1, 1, 2) * torch.randn(
        images, objects, around, 4, generator=generator
    )
    scores = random(around, 1) ** 6
    classes = 0.9 * torch.nn.functional.one_hot((random(around) * nc).long(), nc) + 0.01
    return torch.cat((boxes, scores, classes), -1).flatten(1, 2).to(device)


def shortest(call: Callable[[], list[Tensor]], device: str, repeats: int) -> float:
    """Smallest milliseconds of several passes."""
    clock = time.perf_counter if device.startswith("cuda") else time.process_time
    times = []
    for _ in range(repeats + 1):
        start = clock()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(clock() - start)
    return 1000 * min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--objects", type=int, default=100, help="in each image, 80 boxes around each")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(heading(cpu_name() if args.device == "cpu" else torch.cuda.get_device_name()))
    pred = made_up_predictions(args.images, objects=args.objects, around=80, nc=3, device=args.device)

    def suppress(
        block: int, at_once: bool, conf: float, iou: float, multi: bool, graph: bool = False
    ) -> Callable[[], list[Tensor]]:
        recorded = recorded_step(iou, MAX_DET, CudaGraphs) if graph else None

        def call() -> list[Tensor]:
            nms.BLOCK, nms._goes_at_once = block, lambda device: at_once
            return nms.non_max_suppression(pred, conf, iou, multi_label=multi, max_det=MAX_DET, recorded=recorded)

        return call

    rows, block = [], nms.BLOCK
    for name, settings in {"val (0.001, 0.6)": (0.001, 0.6, True), "detect (0.25, 0.45)": (0.25, 0.45, False)}.items():
        calls = [suppress(block, True, *settings), suppress(block, False, *settings)]
        calls.append(suppress(nms.MAX_CANDIDATES, False, *settings))
        if args.device.startswith("cuda"):
            calls.append(suppress(block, True, *settings, graph=True))
        results = [call() for call in calls]
        same = all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
        rows.append([name, *(shortest(call, args.device, args.repeats) / args.images for call in calls)])
        rows[-1].append("yes" if same else "NO")
    header = ["thresholds", "at once, ms/image", "image by image, ms/image", "one call, ms/image"]
    header += ["in a graph, ms/image"] * args.device.startswith("cuda") + ["same boxes"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
