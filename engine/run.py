"""A training under way, what it leaves in its folder, and how it ends early: by a signal, or by a loss gone wrong."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from engine.diagnosis import TrainingDiverged
from engine.epoch import Learner, PartialEpoch
from engine.resume import torchrun_job
from engine.state import MOST_ROLLBACKS, Progress, describe_run, keep_newest, roll_back, save_best, save_last
from models.yolo import DetectionModel
from utils.background import Background
from utils.config import DataConfig, Hyp, TrainConfig
from utils.console import LOGGER
from utils.cuda_graphs import CudaGraphs
from utils.dataloaders import DetectionLoader
from utils.dist import World
from utils.ema import unwrap
from utils.files import atomic_write, dump_yaml, load_yaml, new_run_dir, remove_leftovers
from utils.metrics import Metrics
from utils.peer_watch import PeerWatch
from utils.run_lock import sole_user
from utils.signals import NotedTermination


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
    watch: PeerWatch
    validations: int = 0
    saved_partly: bool = False  # last.pt holds steps of an unfinished epoch
    unsaved_best: dict | None = None  # with --nosave: the best averaged weights so far
    background: Background = field(default_factory=Background)  # writes checkpoints
    averaged: CudaGraphs | None = None  # the averaged model as CUDA graphs, where steps are graphs too

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


def open_run_dir(cfg: TrainConfig, hyp: Hyp, world: World, held: ExitStack) -> Path | None:
    """The run's folder with opt.yaml and hyp.yaml, which together repeat the run; None on the other ranks. It is this
    training's alone until ``held`` is closed; ResourceError when another's."""
    if not world.main:
        return None
    if cfg.resume:
        run_dir = Path(cfg.resume).resolve().parent.parent
    else:
        run_dir = new_run_dir(cfg.project, cfg.name, cfg.exist_ok)
    held.enter_context(sole_user(run_dir))
    (run_dir / "weights").mkdir(exist_ok=True)
    if cfg.resume or cfg.exist_ok:
        remove_leftovers(run_dir, run_dir / "weights")
    job = {"torchrun": torchrun_job()} if world.size > 1 else {}
    atomic_write(run_dir / "hyp.yaml", dump_yaml(hyp.to_dict()))  # first: whoever looks for runs looks for opt.yaml
    atomic_write(run_dir / "opt.yaml", dump_yaml({**cfg.to_dict(), "resume": "", "save_dir": str(run_dir), **job}))
    return run_dir


def mark_finished(run: Run) -> None:
    """Write down that nothing is left to do, so that --resume says so instead of doing the last part again."""
    atomic_write(run.dir / "opt.yaml", dump_yaml({**load_yaml(run.dir / "opt.yaml"), "finished": True}))


def is_finished(last: str | Path) -> bool:
    """Whether the run of this last.pt came to its end, final validation included."""
    return load_yaml(Path(last).resolve().parent.parent / "opt.yaml").get("finished") is True


def save_epoch(run: Run, epoch: int, metrics: Metrics | None, last_epoch: bool) -> None:
    """Write last.pt, and best.pt when this epoch is the best so far, in the background; with --nosave only after the
    last epoch."""
    run.background.wait()
    cfg, progress = run.cfg, run.progress
    meta = describe_run(run.model, cfg, run.hyp)
    scores = {"mAP50": metrics.map50, "mAP50-95": metrics.map, "fitness": metrics.fitness} if metrics else {}
    if metrics is not None and metrics.fitness >= progress.best_fitness:
        progress.best_fitness = metrics.fitness
        state = {k: v.clone() for k, v in run.learner.ema.model.state_dict().items()}
        run.unsaved_best = {"state": state, "meta": meta, "epoch": epoch, "metrics": scores}
    if cfg.nosave and not last_epoch:
        return
    later = run.background
    if run.unsaved_best:
        save_best(run.best, **run.unsaved_best, later=later)
        run.unsaved_best = None
    if cfg.save_period > 0 and epoch % cfg.save_period == 0:
        state = run.learner.ema.model.state_dict()
        save_best(run.last.with_name(f"epoch{epoch}.pt"), state, meta, epoch, scores, later)
        later(keep_newest, run.last.parent, cfg.keep)
    # last: after a kill before it all is made again
    save_last(run.last, run.learner, meta, progress, epoch, scores, later=later)


def save_steps(run: Run, epoch: int, partial: PartialEpoch | None) -> None:
    """last.pt after ``epoch`` and ``partial`` of the next one, unless it holds this already; written on return."""
    run.background.wait()
    if partial or run.cfg.nosave:
        meta = describe_run(run.model, run.cfg, run.hyp)
        if run.unsaved_best:
            save_best(run.best, **run.unsaved_best)
        save_last(run.last, run.learner, meta, run.progress, epoch, {}, partial)
        run.saved_partly = True


def save_and_end(run: Run, epoch: int, partial: PartialEpoch | None, termination: NotedTermination) -> NoReturn:
    """:func:`save_steps`, then end as the signal asks."""
    save_steps(run, epoch, partial)
    termination.end()


def go_back(run: Run, error: TrainingDiverged) -> int:
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
    run.background.wait()
    roll_back(run.last, run.learner, progress)
    LOGGER.warning(
        f"{error}. Rollback {progress.rollbacks} of {MOST_ROLLBACKS}: back to the start of epoch "
        f"{progress.start_epoch}, learning rates x {run.learner.schedule.scale:g}"
    )
    return progress.start_epoch


def how_to_go_on(run: Run) -> str:
    """What an interrupted run tells its user."""
    if run.cfg.nosave and not run.last.is_file():
        return (
            f"with --nosave checkpoints are written at the end only, so the epochs of this start are not in {run.dir}"
        )
    if not run.last.is_file():
        return f"no epoch was completed; start again with: python train.py --resume {run.dir}"
    what = "all steps done" if run.saved_partly else "all completed epochs"
    return f"{what} are saved; go on with: python train.py --resume {run.last}"
