"""A whole training, top to bottom. What each step does is in the file it is imported from."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.compiling import check_compiler
from engine.diagnosis import TrainingDiverged
from engine.epoch import EpochResult, MultiScale, PartialEpoch, log_header, train_one_epoch
from engine.eval_outputs import BatchPictures, FirstBatches, save_curves
from engine.evaluator import evaluate
from engine.parts import (
    build_datasets,
    build_learner,
    build_loaders,
    build_model,
    draw_weights,
    fit_anchors,
    frame_for,
    share_anchors,
    with_auto_batch,
    within_data,
)
from engine.run import (
    Run,
    go_back,
    how_to_go_on,
    is_finished,
    mark_finished,
    open_run_dir,
    save_and_end,
    save_epoch,
    save_steps,
)
from engine.state import Progress, describe_run, restore, save_last
from models.loading import load_model
from models.summary import summarize
from models.surgery import fuse, set_dcn_backend
from utils.config import DataConfig, Hyp, TrainConfig
from utils.console import LOGGER, plural, setup_console
from utils.cuda_graphs import CudaGraphs
from utils.dcn_watch import DcnWatch
from utils.device import describe_device, few_threads, seed_everything, select_device
from utils.dist import World, broadcast, close_distributed, gather, init_distributed, meet, share_weights
from utils.early_stopping import EarlyStopping
from utils.errors import ConfigError
from utils.helpers import Helpers
from utils.loggers import COLUMNS, RunLogger, read_results
from utils.metrics import TABLE_HEADER, Metrics
from utils.peer_watch import PeerWatch
from utils.signals import NotedTermination, termination_noted


def train(cfg: TrainConfig, hyp: Hyp, data: DataConfig, notes: Sequence[str] = ()) -> Path:
    """Train by these settings and return the run's folder. ``notes``: lines to print first.

    Everything that can be wrong with the input is found before the folder is made. Raises UserError for what the
    user can mend, KeyboardInterrupt on Ctrl-C (the checkpoints of completed epochs are whole).
    """
    world = init_distributed(cuda=torch.cuda.is_available() and cfg.device != "cpu")
    setup_console(world.main)
    device = select_device(cfg.device, world.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # pinning and NCCL's barriers take the current one: not a GPU nobody asked for
    with few_threads(device), PeerWatch(world, cfg.ddp_timeout) as watch:
        run_dir = _train(cfg, hyp, data, notes, device, world, watch)
        meet(world)
    close_distributed(world)
    return run_dir


def _train(
    cfg: TrainConfig,
    hyp: Hyp,
    data: DataConfig,
    notes: Sequence[str],
    device: torch.device,
    world: World,
    watch: PeerWatch,
) -> Path:
    """:func:`train` in one of the processes of ``world``."""
    _check_together(cfg, hyp, world)
    if cfg.compile:
        check_compiler(device)
    _announce(cfg, hyp, device, notes)
    seed_everything(cfg.seed + 1 + world.rank, cfg.deterministic)
    if cfg.label_smoothing:
        hyp = replace(hyp, label_smoothing=cfg.label_smoothing)

    model = build_model(cfg, hyp, data, device)
    frame = with_auto_batch(frame_for(cfg, model, world), model, cfg, device)
    cfg = replace(cfg, batch_size=frame.batch)  # what --batch-size -1 found: a resumed run must not measure again
    train_set, val_set = build_datasets(cfg, hyp, data, frame, world)
    frame = within_data(frame, len(train_set), world)
    train_set.set_batch_size(frame.rank_batch)
    with ExitStack() as held:
        loader, val_loader = build_loaders(cfg, train_set, val_set, frame, world, device)
        held.callback(val_loader.close)
        held.callback(loader.close)
        if not (cfg.resume or cfg.image_weights):  # which begin elsewhere in the data
            loader.begin()  # its processes start beside what follows
        if not (cfg.noautoanchor or cfg.resume):
            if world.main:
                fit_anchors(model, train_set, hyp, frame, cfg)
            share_anchors(model, world)
        LOGGER.info(summarize(model, frame.imgsz).totals())
        learner = build_learner(model, cfg, hyp, frame, len(loader), device, world)
        progress = Progress(EarlyStopping(cfg.patience))
        if cfg.resume:
            restore(cfg.resume, learner, progress)
            _check_unfinished(cfg, progress)
        _check_same_start(progress, world)

        run_dir = Path(broadcast(str(open_run_dir(cfg, hyp, world, held)), world))
        run = Run(cfg, hyp, data, run_dir, learner, loader, val_loader, progress, world, watch)
        multi_scale = MultiScale(frame.imgsz, frame.stride, cfg.seed) if cfg.multi_scale else None
        LOGGER.info(
            f"Image sizes {frame.imgsz} train, {frame.imgsz} val\nUsing {loader.num_workers} dataloader workers\n"
            f"Logging results to {run_dir}\nStarting training for {cfg.epochs} epochs..."
        )
        try:
            fit(run, multi_scale)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(how_to_go_on(run)) from None
    return run_dir


def fit(run: Run, multi_scale: MultiScale | None = None) -> None:
    """All epochs: learn, validate, log, save; stop early when it no longer pays; then validate best.pt in full."""
    cfg, world, progress = run.cfg, run.world, run.progress
    logger = RunLogger(run.dir, progress.start_epoch) if world.main else None
    with Helpers() if world.main and not cfg.noplots else nullcontext() as helpers:
        try:
            pictures = _first_pictures(run, logger, helpers) if helpers else None
            if cfg.on_nan == "rollback" and not cfg.resume:  # a state to go back to before the first epoch is over
                save_last(run.last, run.learner, describe_run(run.model, cfg, run.hyp), progress, -1, {})
            meet(world)  # from here on nobody waits for anything but steps
            start, first = time.perf_counter(), progress.start_epoch
            with termination_noted(enabled=world.size == 1) as termination:  # ranks would not stop at the same step
                last = _all_epochs(run, logger, multi_scale, termination)
            hours = (time.perf_counter() - start) / 3600
            LOGGER.info(f"\n{last - first + 1} epochs completed in {hours:.3f} hours.")
            if helpers:
                helpers.draw("plot_results", read_results(run.dir / "results.csv"), run.dir / "results.png")
        finally:
            run.background.wait()
        last_pictures = _final_validation(run, helpers)
    # not before the diagrams: these then are there even where a picture cannot be written
    for drawn in (pictures, last_pictures) if helpers else ():
        if drawn:
            drawn.close()
    if world.main:
        _finish(run, logger)


def _all_epochs(
    run: Run, logger: RunLogger | None, multi_scale: MultiScale | None, termination: NotedTermination
) -> int:
    """Epoch after epoch; returns the last one's number. Goes back when the loss is not finite and --on-nan says so."""
    cfg, progress = run.cfg, run.progress
    watch = DcnWatch(run.model)
    epoch = progress.start_epoch
    while epoch < cfg.epochs:
        done, progress.partial = progress.partial, None
        try:
            result = _learn(run, epoch, multi_scale, watch, done, termination)
        except TrainingDiverged as error:
            epoch = go_back(run, error)
            continue
        run.watch.begin()
        stop, metrics, final = False, None, epoch + 1 == cfg.epochs
        if broadcast(final or not cfg.noval or progress.stopper.possible_stop, run.world):  # rank 0 knows
            metrics = _validate_or_save(run, epoch, result, termination)
        if run.world.main:
            if metrics is not None:
                progress.class_maps = metrics.maps(run.model.nc).tolist()
                stop = progress.stopper.update(epoch, metrics.fitness)
            with run.watch.undisturbed():
                _log_epoch(run, logger, watch, epoch, result, metrics)
                save_epoch(run, epoch, metrics, last_epoch=final or stop)
        if termination.is_set():
            save_and_end(run, epoch, None, termination)
        if broadcast(stop, run.world):
            LOGGER.info(progress.stopper.message())
            break
        epoch += 1
    return min(epoch, cfg.epochs - 1)


def _learn(
    run: Run,
    epoch: int,
    multi_scale: MultiScale | None,
    watch: DcnWatch,
    done: PartialEpoch | None,
    termination: NotedTermination,
) -> EpochResult:
    """One epoch, or what ``done`` left of it; after a SIGTERM saves what was done and raises KeyboardInterrupt."""
    if run.cfg.image_weights:
        run.loader.set_weights(draw_weights(run.loader.dataset, run.progress.class_maps, run.model.nc))
    run.loader.set_epoch(epoch, done.batches if done else 0)
    log_header()
    result = train_one_epoch(
        run.learner, run.watch.batches(run.loader), epoch, run.cfg.epochs, multi_scale, done, termination.is_set, watch
    )
    if result.unfinished:
        save_and_end(run, epoch - 1, result.done, termination)
    return result


def _validate_or_save(run: Run, epoch: int, result: EpochResult, termination: NotedTermination) -> Metrics | None:
    """The metrics of a trained epoch. Whatever ends validation (a signal, at once; memory, a damaged image), the
    training that came before is saved first."""
    try:
        termination.at_once = True
        if termination.is_set():
            termination.end()
        return validate(run)
    except (Exception, KeyboardInterrupt):
        termination.at_once = False
        if run.world.size == 1:
            save_steps(run, epoch - 1, result.done)
        raise
    finally:
        termination.at_once = False


def validate(run: Run) -> Metrics | None:
    """Metrics and losses of the averaged weights on the validation split, in rank 0; each rank does its share."""
    share_weights(run.learner.ema.model, run.world)
    model = run.learner.ema.model
    if run.learner.graphs and run.averaged is None:  # its weights change in place, which graphs follow
        run.averaged = CudaGraphs(model)
    metrics = _evaluate(run, run.averaged or model, criterion=run.learner.criterion)
    if metrics is not None:
        LOGGER.info(metrics.table(run.data.names, verbose=False))
    return metrics


def _evaluate(run: Run, model: nn.Module, **options: Any) -> Metrics | None:
    """``model`` on the validation split with the run's settings; ``options`` as engine.evaluator.evaluate's."""
    run.val_loader.set_epoch(run.validations)  # only to keep its stream going: each holds the same images
    run.validations += 1
    metrics = evaluate(
        model,
        run.watch.batches(run.val_loader),
        device=run.learner.device,
        names=run.data.names,
        single_cls=run.cfg.single_cls,
        amp_dtype=run.learner.amp_dtype,
        world=run.world,
        **options,
    )
    run.watch.begin()
    return metrics


def _check_together(cfg: TrainConfig, hyp: Hyp, world: World) -> None:
    if cfg.noautoanchor and hyp.anchors and not cfg.resume:
        raise ConfigError(f"--noautoanchor: the hyper-parameter anchors: {hyp.anchors:g} asks AutoAnchor to find them")
    if world.size > 1 and cfg.image_weights:
        raise ConfigError("--image-weights works in one process: ranks would draw different images")
    if world.size > 1 and cfg.on_nan == "rollback":
        raise ConfigError("--on-nan rollback works in one process: ranks would not go back at the same step")
    if cfg.noval and cfg.patience < cfg.epochs and cfg.patience:
        LOGGER.warning(f"--noval: --patience {cfg.patience} has nothing to watch; training runs to the end")


def _announce(cfg: TrainConfig, hyp: Hyp, device: torch.device, notes: Sequence[str]) -> None:
    LOGGER.info("train: " + ", ".join(f"{k}={v}" for k, v in asdict(cfg).items()))
    LOGGER.info(f"torch {torch.__version__}, {describe_device(device)}")
    LOGGER.info("hyperparameters: " + ", ".join(f"{k}={v:g}" for k, v in hyp.to_dict().items()))
    for note in notes:
        LOGGER.warning(note)


def _check_unfinished(cfg: TrainConfig, progress: Progress) -> None:
    early = progress.stopper.has_ended(progress.start_epoch)
    if (early or progress.start_epoch >= cfg.epochs) and is_finished(cfg.resume):
        more = "a larger --patience (0: no end)" if early else "--epochs N with more"
        raise ConfigError(
            f"--resume {cfg.resume}: its training of {plural(progress.start_epoch, 'epoch')} is finished; "
            f"give {more} to go on, or start anew with --weights {cfg.resume}"
        )
    step = f", after {plural(progress.partial.batches, 'batch', 'batches')}" if progress.partial else ""
    LOGGER.info(f"Resuming {cfg.resume} at epoch {progress.start_epoch} of {cfg.epochs}{step}")


def _check_same_start(progress: Progress, world: World) -> None:
    """Ranks that resume where others begin would train another model."""
    starts = gather(progress.start_epoch, world)
    if len(set(starts)) > 1:
        other = next(rank for rank, start in enumerate(starts) if start != starts[0])
        raise ConfigError(
            f"rank 0 begins at epoch {starts[0]} and rank {other} at {starts[other]}: their machines do not see the "
            f"same run folder; put --project on a file system that all of them share"
        )


def _first_pictures(run: Run, logger: RunLogger, helpers: Helpers) -> FirstBatches | None:
    """labels.jpg and, for a new run, the first three training batches as they come by."""
    helpers.draw("plot_labels", run.loader.dataset.labels, run.data.names, run.dir / "labels.jpg")
    if run.progress.start_epoch or run.progress.partial:
        return None
    run.loader.on_batch = FirstBatches(run.dir, run.data.names, logger)
    return run.loader.on_batch


def _log_epoch(
    run: Run, logger: RunLogger, watch: DcnWatch, epoch: int, result: EpochResult, metrics: Metrics | None
) -> None:
    numbers = metrics.row() if metrics else [0.0] * 7
    rates = [result.lr[role] for role in ("bias", "weight", "norm")]
    row = dict(zip(COLUMNS, [*result.losses.tolist(), *numbers, *rates]))
    logger.epoch(epoch, row, {"speed/train_images_per_second": result.images_per_second})
    summary = watch.summary()
    logger.layers(epoch, summary, watch.lengths())
    for line in watch.warnings(summary, run.cfg.dcn_offset_lr):
        LOGGER.warning(line)


def _final_validation(run: Run, helpers: Helpers | None) -> BatchPictures | None:
    """Validate best.pt as val.py would, on all ranks, and have its curves drawn; and its pictures, to be closed."""
    if not broadcast(run.best.is_file(), run.world):
        return None
    LOGGER.info(f"\nValidating {run.best}...\n{TABLE_HEADER}")
    pictures = BatchPictures(run.dir, run.data.names) if helpers else None
    metrics = _evaluate(run, _best_model(run), observers=[pictures] if pictures else [], show_progress=False)
    if metrics is not None:
        LOGGER.info(metrics.table(run.data.names))
        if helpers:
            save_curves(metrics, run.data.names, run.dir, helpers.draw)
    return pictures


def _finish(run: Run, logger: RunLogger) -> None:
    """All is written: say so to --resume and to the user."""
    logger.close()
    mark_finished(run)
    LOGGER.info(f"Results saved to {run.dir}")


def _best_model(run: Run) -> nn.Module:
    """best.pt ready for inference in every rank. Rank 0 reads it: the others may be on machines that do not see it."""
    if run.world.size == 1:
        model = load_model(run.best, run.learner.device)
    else:
        model = load_model(run.best, run.learner.device, fuse=False) if run.world.main else run.learner.ema.model
        share_weights(model, run.world)
        model = fuse(model).to(memory_format=torch.channels_last)
    set_dcn_backend(model, run.cfg.dcn_backend)
    return model
