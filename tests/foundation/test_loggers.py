"""What TensorBoard is given: numbers by epoch, and pictures as the files hold them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.loggers import COLUMNS, RunLogger, read_results
from utils.plots import write_image


def test_scalars_and_pictures_arrive(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    write_image(tmp_path / "batch.jpg", picture)
    logger = RunLogger(tmp_path)
    logger.image("batch", tmp_path / "batch.jpg", picture.shape[:2])
    logger.epoch(3, dict.fromkeys(COLUMNS, 0.5), {"speed": 7.0})
    logger.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    (shown,) = events.Images("batch")
    assert shown.encoded_image_string == (tmp_path / "batch.jpg").read_bytes()
    assert (shown.width, shown.height) == (30, 20)
    assert [(event.step, event.value) for event in events.Scalars("speed")] == [(3, 7.0)]
    assert read_results(tmp_path / "results.csv")[COLUMNS[0]] == [0.5]
