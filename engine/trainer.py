"""A whole training, top to bottom. What each step does is in the file it is imported from."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from engine.diagnosis import TrainingDiverged
from engine.epoch import EpochResult, Learner, MultiScale, PartialEpoch, log_header, train_one_epoch
from engine.eval_outputs import BatchPictures, save_curves
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
from engine.resume import torchrun_job
from engine.state import MOST_ROLLBACKS, Progress, describe_run, keep_newest, restore, roll_back, save_best, save_last
from models.loading import load_model
from models.summary import summarize
from models.surgery import set_dcn_backend
from models.yolo import DetectionModel
from utils.config import DataConfig, Hyp, TrainConfig
from utils.console import LOGGER, plural, setup_console
from utils.curves import plot_labels, plot_results
from utils.dataloaders import DetectionLoader
from utils.dcn_watch import DcnWatch
from utils.device import describe_device, seed_everything, select_device
from utils.dist import World, broadcast, close_distributed, init_distributed
from utils.early_stopping import EarlyStopping
from utils.ema import unwrap
from utils.errors import ConfigError
from utils.files import atomic_write, dump_yaml, new_run_dir, remove_leftovers
from utils.loggers import COLUMNS, RunLogger, read_results
from utils.metrics import TABLE_HEADER, Metrics
from utils.plots import plot_batch
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
    _check_together(cfg, hyp, world)
    _announce(cfg, hyp, device, notes)
    seed_everything(cfg.seed + 1 + world.rank, cfg.deterministic)
    if cfg.label_smoothing:
        hyp = replace(hyp, label_smoothing=cfg.label_smoothing)

    model = build_model(cfg, hyp, data, device)
    frame = with_auto_batch(frame_for(cfg, model, world), model, cfg, device)
    cfg = replace(cfg, batch_size=frame.batch)  # what --batch-size -1 found: a resumed run must not measure again
    train_set, val_set = build_datasets(cfg, hyp, data, frame, world)
    frame = within_data(frame, len(train_set), world)
    loader, val_loader = build_loaders(cfg, train_set, val_set, frame, world)
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

    run_dir = Path(broadcast(str(_open_run_dir(cfg, hyp, world)), world))
    run = Run(cfg, hyp, data, run_dir, learner, loader, val_loader, progress, world)
    multi_scale = MultiScale(frame.imgsz, frame.stride, cfg.seed) if cfg.multi_scale else None
    LOGGER.info(
        f"Image sizes {frame.imgsz} train, {frame.imgsz} val\nUsing {loader.num_workers} dataloader workers\n"
        f"Logging results to {run_dir}\nStarting training for {cfg.epochs} epochs..."
    )
    try:
        fit(run, multi_scale)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(run)) from None
    close_distributed(world)
    return run_dir


@dataclass
class Run:
    """A training under way: its settings, its folder and its parts."""

    cfg: TrainConfig
    hyp: Hyp
    data: DataConfig
    dir: Path
    learner: Learner
    loader: DetectionLoader
    val_loader: DetectionLoader
    progress: Progress
    world: World
    validations: int = 0
    saved_partly: bool = False  # last.pt holds steps of an unfinished epoch
    unsaved_best: dict | None = None  # with --nosave: the best averaged weights so far

    @property
    def model(self) -> DetectionModel:
        """The model being trained, without wrappers."""
        return unwrap(self.learner.model)

    @property
    def best(self) -> Path:
        return self.dir / "weights" / "best.pt"

    @property
    def last(self) -> Path:
        return self.dir / "weights" / "last.pt"


def fit(run: Run, multi_scale: MultiScale | None = None) -> None:
    """All epochs: learn, validate, log, save; stop early when it no longer pays; then validate best.pt in full."""
    cfg, world, progress = run.cfg, run.world, run.progress
    logger = RunLogger(run.dir, progress.start_epoch) if world.main else None
    if world.main and not cfg.noplots:
        _first_pictures(run, logger)
    if cfg.on_nan == "rollback" and not cfg.resume:  # a state to go back to before the first epoch is over
        save_last(run.last, run.learner, describe_run(run.model, cfg, run.hyp), progress, -1, {})
    start, first = time.perf_counter(), progress.start_epoch
    with termination_noted(enabled=world.size == 1) as termination:  # ranks would not stop at the same step
        last = _all_epochs(run, logger, multi_scale, termination)
    hours = (time.perf_counter() - start) / 3600
    LOGGER.info(f"\n{last - first + 1} epochs completed in {hours:.3f} hours.")
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
            epoch = _roll_back(run, error)
            continue
        stop, metrics = False, None
        if run.world.main:
            final = epoch + 1 == cfg.epochs
            if final or not cfg.noval or progress.stopper.possible_stop:
                metrics = _validate_or_save(run, epoch, result, termination)
                progress.class_maps = metrics.maps(run.model.nc).tolist()
                stop = progress.stopper.update(epoch, metrics.fitness)
            _log_epoch(run, logger, watch, epoch, result, metrics)
            _save(run, epoch, metrics, last_epoch=final or stop)
        if termination.is_set() and not (stop or epoch + 1 == cfg.epochs):
            _save_and_end(run, epoch, None, termination)
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
    with watch.sampling():
        result = train_one_epoch(run.learner, run.loader, epoch, run.cfg.epochs, multi_scale, done, termination.is_set)
    if result.unfinished:
        _save_and_end(run, epoch - 1, result.done, termination)
    return result


def _validate_or_save(run: Run, epoch: int, result: EpochResult, termination: NotedTermination) -> Metrics:
    """The metrics of a trained epoch. A SIGTERM ends validation at once, and the training that came before is saved."""
    try:
        termination.at_once = True
        if termination.is_set():
            raise KeyboardInterrupt
        return validate(run)
    except KeyboardInterrupt:
        termination.at_once = False
        if not termination.is_set():
            raise
        _save_and_end(run, epoch - 1, result.done, termination)
    finally:
        termination.at_once = False


def _save_and_end(run: Run, epoch: int, partial: PartialEpoch | None, termination: NotedTermination) -> NoReturn:
    """Write last.pt (when it does not hold this already) and end as the signal asks."""
    if partial or run.cfg.nosave:
        meta = describe_run(run.model, run.cfg, run.hyp)
        if run.unsaved_best:
            save_best(run.best, **run.unsaved_best)
        save_last(run.last, run.learner, meta, run.progress, epoch, {}, partial)
        run.saved_partly = True
    termination.end()


def _roll_back(run: Run, error: TrainingDiverged) -> int:
    """Put the run back to its last.pt with a lower learning rate; the epoch to go on with. Raises ``error``, with what
    to do, when --on-nan says stop or MOST_ROLLBACKS have not helped."""
    progress = run.progress
    if run.cfg.on_nan != "rollback":
        raise TrainingDiverged(
            f"{error}; the checkpoints of earlier epochs are whole: go on with --resume {run.last} --on-nan rollback, "
            f"or start from it with a lower lr0 in --hyp, or with --amp off"
        )
    if progress.rollbacks >= MOST_ROLLBACKS:
        raise TrainingDiverged(f"{error}; {progress.rollbacks} rollbacks with ever lower learning rates did not help")
    roll_back(run.last, run.learner, progress)
    LOGGER.warning(
        f"{error}. Rollback {progress.rollbacks} of {MOST_ROLLBACKS}: back to the start of epoch "
        f"{progress.start_epoch}, learning rates x {run.learner.schedule.scale:g}"
    )
    return progress.start_epoch


def validate(run: Run) -> Metrics:
    """Metrics and losses of the averaged weights on the validation split."""
    metrics = _evaluate(run, run.learner.ema.model, criterion=run.learner.criterion)
    LOGGER.info(metrics.table(run.data.names, verbose=False))
    return metrics


def _evaluate(run: Run, model: nn.Module, **options: Any) -> Metrics:
    """``model`` on the validation split with the run's settings; ``options`` as engine.evaluator.evaluate's."""
    run.val_loader.set_epoch(run.validations)  # only to keep its stream going: each holds the same images
    run.validations += 1
    return evaluate(
        model,
        run.val_loader,
        device=run.learner.device,
        names=run.data.names,
        single_cls=run.cfg.single_cls,
        amp_dtype=run.learner.amp_dtype,
        **options,
    )


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
    if progress.start_epoch >= cfg.epochs:
        raise ConfigError(
            f"--resume {cfg.resume}: its {progress.start_epoch} epochs are finished; "
            f"give --epochs N with more to go on, or start anew with --weights {cfg.resume}"
        )
    step = f", after {plural(progress.partial.batches, 'batch', 'batches')}" if progress.partial else ""
    LOGGER.info(f"Resuming {cfg.resume} at epoch {progress.start_epoch} of {cfg.epochs}{step}")


def _how_to_go_on(run: Run) -> str:
    if run.cfg.nosave and not run.last.is_file():
        return (
            f"with --nosave checkpoints are written at the end only, so the epochs of this start are not in {run.dir}"
        )
    if not run.last.is_file():
        return f"no epoch was completed; start again with: python train.py --resume {run.dir}"
    what = "all steps done" if run.saved_partly else "all completed epochs"
    return f"{what} are saved; go on with: python train.py --resume {run.last}"


def _open_run_dir(cfg: TrainConfig, hyp: Hyp, world: World) -> Path | None:
    """The run's folder with opt.yaml and hyp.yaml, which together repeat the run; None on the other ranks."""
    if not world.main:
        return None
    if cfg.resume:
        run_dir = Path(cfg.resume).resolve().parent.parent
    else:
        run_dir = new_run_dir(cfg.project, cfg.name, cfg.exist_ok)
    (run_dir / "weights").mkdir(exist_ok=True)
    if cfg.resume or cfg.exist_ok:
        remove_leftovers(run_dir, run_dir / "weights")
    job = {"torchrun": torchrun_job()} if world.size > 1 else {}
    atomic_write(run_dir / "opt.yaml", dump_yaml({**cfg.to_dict(), "resume": "", "save_dir": str(run_dir), **job}))
    atomic_write(run_dir / "hyp.yaml", dump_yaml(hyp.to_dict()))
    return run_dir


def _first_pictures(run: Run, logger: RunLogger) -> None:
    """labels.jpg and, for a new run, the first three training batches."""
    dataset = run.loader.dataset
    plot_labels(dataset.labels, run.data.names, run.dir / "labels.jpg")
    if run.progress.start_epoch:
        return
    run.loader.set_epoch(0)
    for index, batch in zip(range(3), run.loader):
        picture = plot_batch(
            batch.images, batch.targets, batch.paths, run.data.names, run.dir / f"train_batch{index}.jpg"
        )
        if picture is not None:
            logger.image(f"train_batch{index}", picture)


def _log_epoch(
    run: Run, logger: RunLogger, watch: DcnWatch, epoch: int, result: EpochResult, metrics: Metrics | None
) -> None:
    numbers = metrics.row() if metrics else [0.0] * 7
    rates = [result.lr[role] for role in ("bias", "weight", "norm")]
    row = dict(zip(COLUMNS, [*result.losses.tolist(), *numbers, *rates]))
    summary = watch.summary()
    extra = {f"dcn/{layer}/{name}": value for layer, values in summary.items() for name, value in values.items()}
    logger.epoch(epoch, row, {**extra, "speed/train_images_per_second": result.images_per_second})
    for line in watch.warnings(summary, run.cfg.dcn_offset_lr):
        LOGGER.warning(line)


def _save(run: Run, epoch: int, metrics: Metrics | None, last_epoch: bool) -> None:
    """Write last.pt, and best.pt when this epoch is the best so far; with --nosave only after the last epoch."""
    cfg, progress = run.cfg, run.progress
    meta = describe_run(run.model, cfg, run.hyp)
    scores = {"mAP50": metrics.map50, "mAP50-95": metrics.map, "fitness": metrics.fitness} if metrics else {}
    if metrics is not None and metrics.fitness >= progress.best_fitness:
        progress.best_fitness = metrics.fitness
        state = {k: v.clone() for k, v in run.learner.ema.model.state_dict().items()}
        run.unsaved_best = {"state": state, "meta": meta, "epoch": epoch, "metrics": scores}
    if cfg.nosave and not last_epoch:
        return
    if run.unsaved_best:
        save_best(run.best, **run.unsaved_best)
        run.unsaved_best = None
    if cfg.save_period > 0 and epoch % cfg.save_period == 0:
        save_best(run.last.with_name(f"epoch{epoch}.pt"), run.learner.ema.model.state_dict(), meta, epoch, scores)
        keep_newest(run.last.parent, cfg.keep)
    save_last(run.last, run.learner, meta, progress, epoch, scores)  # last: after a kill before it all is made again


def _finish(run: Run, logger: RunLogger) -> None:
    """Validate best.pt as val.py would, draw the last pictures, say where everything is."""
    if run.best.is_file():
        LOGGER.info(f"\nValidating {run.best}...\n{TABLE_HEADER}")
        observers = [] if run.cfg.noplots else [BatchPictures(run.dir, run.data.names)]
        model = load_model(run.best, run.learner.device)
        set_dcn_backend(model, run.cfg.dcn_backend)
        metrics = _evaluate(run, model, observers=observers, show_progress=False)
        LOGGER.info(metrics.table(run.data.names))
        if not run.cfg.noplots:
            save_curves(metrics, run.data.names, run.dir)
    if not run.cfg.noplots:
        plot_results(read_results(run.dir / "results.csv"), run.dir / "results.png")
    logger.close()
    LOGGER.info(f"Results saved to {run.dir}")
