"""One side of a comparison of two checkouts: loads epochs when told to (see ``benchmarks.dataloader --against``).

    PYTHONPATH=CHECKOUT python benchmarks/loader_turn.py DATA IMGSZ BATCH WORKERS CACHE [later]

Each line of its input loads one epoch of training samples; it answers with images a second, of this process's own time
when there are no loader processes, else of wall time; with ``later`` without what a GPU does. At the end it
tells the mean and the spread of the pixels and the mean difference of neighbours, of the same draws on both sides. Uses
otherwise only what the data path has had from its beginning.
"""

from __future__ import annotations

import sys
import time


def main() -> None:
    import cv2
    import torch

    from utils.config import DataConfig
    from utils.dataloaders import create_dataloader
    from utils.dataset import DetectionDataset

    source, imgsz, batch, workers, cache, *later = sys.argv[1:]
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    config = DataConfig.load(source)
    cache = "" if cache == "none" else cache
    data = DetectionDataset(config.train, int(imgsz), augment=True, names=config.names, cache=cache, show=False)
    options = {"finish_on": torch.device("cpu")} if later else {}
    loader = create_dataloader(data, int(batch), shuffle=True, workers=int(workers), **options)
    if later:
        loader.finish_on = None  # left undone
    clock = time.perf_counter if int(workers) else time.process_time
    for epoch, _ in enumerate(sys.stdin):
        loader.set_epoch(epoch)
        start = clock()
        images = sum(len(b.paths) for b in loader)
        print("rate", images / (clock() - start), flush=True)
    loader.set_epoch(10_000)
    first = torch.cat([b.images for b, _ in zip(loader, range(12))]).float()
    detail = (first.diff(dim=3)).abs().mean()
    print(f"pixels {first.mean():.2f} {first.std():.2f} {detail:.3f}", flush=True)


if __name__ == "__main__":
    main()
