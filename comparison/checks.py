"""All that can be wrong with a comparison, found before its first training starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import train
from comparison.plan import Plan
from utils.cli import check_weights
from utils.config import DataConfig, Hyp, TrainConfig
from utils.console import LOGGER
from utils.errors import ConfigError, did_you_mean
from utils.files import ROOT, find_file

if TYPE_CHECKING:
    import torch

    from models.loading import LoadReport
    from models.summary import Summary

OURS = ("data", "cfg", "weights", "epochs", "batch_size", "imgsz", "seed", "device", "workers", "project", "name")
OURS += ("exist_ok", "resume", "check_data", "debug", "local_rank")
"""Flags of train.py that compare.py gives itself."""


@dataclass(frozen=True)
class Checked:
    """What the checks found on the way: the data set, train.py's settings of each model, what each consists of, and
    what a reader of the report should know."""

    data: DataConfig
    configs: dict[str, TrainConfig]
    summaries: dict[str, Summary]
    notes: tuple[str, ...] = ()


def resolve_models(names: Sequence[str]) -> tuple[str, ...]:
    """Absolute paths of model YAMLs. Raises ConfigError for one that is not there."""
    found = []
    for name in names:
        path = find_file(name, ("models",))
        if path is None or path.suffix not in (".yaml", ".yml"):
            known = sorted(p.name for p in (ROOT / "models").rglob("*.yaml"))
            what = "no such file" if path is None else "not a model YAML"
            raise ConfigError(f"--cfg {name}: {what}{did_you_mean(name, known)}")
        found.append(str(path.resolve()))
    return tuple(found)


def check_extra(extra: Sequence[str]) -> None:
    """Raise ConfigError for a flag after ``--`` that train.py does not know or that compare.py gives itself."""
    for name in sorted(train.build_parser().given(extra) & set(OURS)):
        where = "--seeds" if name == "seed" else f"compare.py's --{name.replace('_', '-')}"
        fixed = name in ("exist_ok", "resume", "check_data", "debug", "local_rank")
        how = "compare.py takes care of it" if fixed else f"use {where}, before the --"
        raise ConfigError(f"--{name.replace('_', '-')} after --: {how}")


def train_configs(plan: Plan) -> dict[str, TrainConfig]:
    """train.py's settings for the first seed of each model. Raises UserError for flags and files that cannot be."""
    configs = {}
    for model, cfg in zip(plan.models, plan.cfg):
        flags = ["--data", plan.data, "--cfg", cfg, f"--weights={plan.weights}", "--epochs", str(plan.epochs)]
        flags += ["--batch-size", str(plan.batch_size), "--imgsz", str(plan.imgsz), *plan.extra]
        args = vars(train.build_parser().parse_args(flags))
        settings = {key: value for key, value in args.items() if key not in train.NOT_SETTINGS}
        configs[model] = TrainConfig(**{**settings, "freeze": tuple(settings["freeze"])})
        Hyp.load(configs[model].hyp)
    if plan.weights:
        check_weights(plan.weights)
    return configs


def check_all(plan: Plan, device: torch.device) -> Checked:
    """Build every model and open every image once. Raises UserError for what train.py would refuse on ``device``.

    The label caches that this leaves are those that the trainings, side by side, would otherwise all make.
    """
    configs = train_configs(plan)
    data = DataConfig.load(plan.data, next(iter(configs.values())).single_cls)

    import torch

    from engine.parts import augments_on_device, build_datasets, build_model, frame_for
    from models.loading import build_or_load
    from models.summary import summarize
    from models.surgery import use_dcn_backend
    from utils.dataset import DetectionDataset
    from utils.device import amp_dtype
    from utils.dist import World

    world, summaries, reports, frame = World(), {}, {}, None
    for model, config in configs.items():
        augments_on_device(config, device)
        precision = amp_dtype(config.amp, device) or torch.float32
        hyp, _ = Hyp.load(config.hyp)
        built = build_model(replace(config, dcn_backend="auto"), hyp, data, torch.device("cpu"))
        use_dcn_backend(built, config.dcn_backend, device, precision)
        frame = frame_for(config, built, world)
        summaries[model] = summarize(built, frame.imgsz)
        LOGGER.info(f"{model}: {summaries[model].totals()}")
        if plan.weights:
            reports[model] = build_or_load(config.cfg, config.weights, data.nc, hyp.anchors)[1]
    build_datasets(replace(config, cache=""), hyp, data, frame, world)
    if data.test:
        DetectionDataset(data.test, frame.imgsz, names=data.names, single_cls=config.single_cls, prefix="test")
    notes = unlike_starts(reports)
    if data.missing_test:
        LOGGER.warning(f"compared on val alone: {data.missing_test}")
    for note in notes:
        LOGGER.warning(note)
    return Checked(data, configs, summaries, notes)


def unlike_starts(reports: Mapping[str, LoadReport]) -> tuple[str, ...]:
    """A warning when --weights gives some models more of themselves than others: the one whose own checkpoint it is
    would win for that alone. Anchors, which a --cfg always brings along, are not counted."""
    new = {model: sum("anchor" not in name for name in r.missing) + len(r.mismatched) for model, r in reports.items()}
    if len(set(new.values())) < 2:
        return ()
    counts = ", ".join(f"{model} {count} of {reports[model].total}" for model, count in new.items())
    return (
        f"--weights: the models do not start alike (tensors that begin anew: {counts}): a difference between them may "
        f"come from that",
    )
