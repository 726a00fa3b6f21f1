"""What TensorBoard is given: numbers by epoch, and pictures as the files hold them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
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


def test_offsets_of_layers(tmp_path: Path) -> None:
    """A row an epoch and a layer; a run taken up again drops those that it makes anew; one that begins, all."""
    numbers = {"mean_offset": 2.0, "max_offset": 9.0, "outside": 0.25, "outside_at_rest": 0.05, "mean_mask": 0.5}
    summary = {"1.conv": {**numbers, "height": 40.0, "width": 50.0}}
    lengths = {"1.conv": torch.arange(101.0)}
    logger = RunLogger(tmp_path)
    assert not (tmp_path / "offsets.csv").exists()
    for epoch in range(3):
        logger.layers(epoch, summary, lengths)
    logger.close()
    header, *rows = (tmp_path / "offsets.csv").read_text().splitlines()
    assert header == "epoch,layer,mean_offset,median_offset,p95_offset,max_offset,outside,outside_at_rest,mean_mask"
    assert rows == [f"{epoch},1.conv,2,50,95,9,0.25,0.05,0.5" for epoch in range(3)]
    events = EventAccumulator(str(tmp_path), {"histograms": 0}).Reload()
    assert [event.step for event in events.Histograms("dcn/1.conv/offsets")] == [0, 1, 2]
    assert events.Scalars("dcn/1.conv/outside")[0].value == 0.25

    resumed = RunLogger(tmp_path, first_epoch=2)
    assert (tmp_path / "offsets.csv").read_text().splitlines() == [header, *rows[:2]]
    resumed.layers(2, {}, {})
    resumed.layers(2, summary, {"1.conv": torch.full((5,), float("nan"))})
    assert (tmp_path / "offsets.csv").read_text().splitlines()[3] == "2,1.conv,2,0,0,9,0.25,0.05,0.5"
    resumed.close()
    RunLogger(tmp_path).close()
    assert not (tmp_path / "offsets.csv").exists()
