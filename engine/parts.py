"""The parts of a training, each built from named settings: data sets, model, loaders, learner."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from inspect import signature

import numpy as np
import torch
from torch import nn

from engine.compiling import CompiledStep
from engine.epoch import Learner
from models.deform import FORMS, make_deformable, parse_requests
from models.head import side_multiple
from models.loading import build_or_load
from models.surgery import freeze, use_dcn_backend
from models.yolo import DetectionModel
from utils.autoanchor import check_anchors
from utils.autobatch import auto_batch
from utils.config import DataConfig, Hyp, TrainConfig
from utils.console import LOGGER, plural
from utils.dataloaders import DetectionLoader, create_dataloader
from utils.dataset import DetectionDataset, class_weights, image_weights
from utils.device import amp_dtype, graphs_allowed
from utils.dist import World, broadcast, main_first, share_weights
from utils.ema import ModelEMA
from utils.errors import ConfigError
from utils.loss import DetectionLoss
from utils.optim import build_optimizer, describe, scaled_weight_decay
from utils.schedule import Schedule
from utils.shared_gradients import SharedGradients

MOST_BOXES = 200_000
"""Boxes that anchors are measured on: a recall near 0.98 is then known to 0.0003."""

LAST_OF_OFFSETS = ("conv_offset_mask.weight", "conv_offset_mask.pointwise.weight")
"""Weights that are zero where a DCN has not learned to sample anywhere yet."""


@dataclass(frozen=True)
class Frame:
    """Sizes that everything shares: network input and what its sides are multiples of (pixels), images per step of all
    ranks and of each."""

    imgsz: int
    stride: int
    batch: int
    rank_batch: int


def build_model(cfg: TrainConfig, hyp: Hyp, data: DataConfig, device: torch.device) -> DetectionModel:
    """The model on the device, with the data's names; says what came from the weights and what is frozen."""
    weights = cfg.resume or cfg.weights
    description = None if cfg.resume else cfg.cfg
    model, report = build_or_load(description, weights, data.nc, None if cfg.resume else hyp.anchors, data.names)
    LOGGER.info(report.text())
    if cfg.dcn and not cfg.resume:  # a resumed run's checkpoint describes its model with them
        _make_deformable(model, cfg)
    if model.yaml.get("dcn_options") and not model.yaml.get("dcn"):
        raise ConfigError(
            f"--cfg {cfg.cfg or weights}: dcn_options: no layer is made deformable, so they would change nothing; list "
            f"layers in dcn: or --dcn, or give the options as arguments of the model's DCN rows"
        )
    frozen = freeze(model, cfg.freeze_layers)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"--freeze {cfg.freeze[0]}: freezes all {len(model.model)} layers, nothing is left to train")
    if frozen:
        LOGGER.info(f"freezing {len(frozen)} parameters of layers {', '.join(map(str, cfg.freeze_layers))}")
        for name in frozen:
            if name.endswith(LAST_OF_OFFSETS) and not model.get_parameter(name).any():
                path = name.removeprefix("model.").split(".conv_offset_mask")[0]
                LOGGER.warning(f"--freeze: the offsets of {path} are zero and stay so: a plain convolution would do")
    model = model.to(device)
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)  # cuDNN's fast order
    use_dcn_backend(model, cfg.dcn_backend, device, amp_dtype(cfg.amp, device) or torch.float32)
    return model


def _make_deformable(model: DetectionModel, cfg: TrainConfig) -> None:
    """--dcn on the model with its weights; layers that --freeze stops are refused, their offsets would never move."""
    requests = parse_requests(cfg.dcn)
    if not requests:
        raise ConfigError(f"--dcn {cfg.dcn!r}: names no layer; give {FORMS}")
    paths = make_deformable(model, requests)
    frozen = [path for path in paths if int(path.split(".")[0]) in cfg.freeze_layers]
    if frozen:
        raise ConfigError(
            f"--dcn {cfg.dcn}: layer {frozen[0].split('.')[0]} is frozen by --freeze, so its offsets would stay zero; "
            f"leave it out of one of them"
        )
    LOGGER.info(
        f"--dcn {cfg.dcn}: {plural(len(paths), 'convolution')} made deformable, same output: {', '.join(paths)}"
    )


def frame_for(cfg: TrainConfig, model: DetectionModel, world: World) -> Frame:
    """Round the image size up to the stride, as users expect, and share the batch out over the ranks."""
    stride = side_multiple(model.stride)
    imgsz = max(math.ceil(cfg.imgsz / stride) * stride, 2 * stride)
    if imgsz != cfg.imgsz:
        LOGGER.warning(f"--imgsz {cfg.imgsz} must be a multiple of {stride} and at least {2 * stride}, using {imgsz}")
    if cfg.batch_size == -1:
        if world.size > 1:
            raise ConfigError("--batch-size -1 works on one GPU; with torchrun give the total batch")
        return Frame(imgsz, stride, -1, -1)
    if cfg.batch_size % world.size:
        raise ConfigError(f"--batch-size {cfg.batch_size} must be a multiple of the {world.size} processes")
    return Frame(imgsz, stride, cfg.batch_size, cfg.batch_size // world.size)


def with_auto_batch(frame: Frame, model: DetectionModel, cfg: TrainConfig, device: torch.device) -> Frame:
    """Find the largest batch for ``--batch-size -1``; weights, statistics and gradients are as before afterwards."""
    if frame.batch != -1:
        return frame
    dtype = amp_dtype(cfg.amp, device)
    before = {k: v.clone() for k, v in model.state_dict().items()} if device.type == "cuda" else {}

    def step(batch: int) -> None:
        images = torch.rand(batch, 3, frame.imgsz, frame.imgsz, device=device)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            sum(level.float().mean() for level in model.train()(images)).backward()
        model.zero_grad(set_to_none=True)

    choice = auto_batch(step, device)
    if before:
        model.load_state_dict(before)
    LOGGER.info(choice.text)
    return replace(frame, batch=choice.batch, rank_batch=choice.batch)


def within_data(frame: Frame, images: int, world: World) -> Frame:
    """The frame with a batch that the data can fill: a larger one would only scale the weight decay up."""
    most = max(images // world.size, 1) * world.size
    if frame.batch <= most:
        return frame
    LOGGER.warning(f"--batch-size {frame.batch}: there are {images} training images, using {most}")
    return replace(frame, batch=most, rank_batch=most // world.size)


def build_datasets(
    cfg: TrainConfig, hyp: Hyp, data: DataConfig, frame: Frame, world: World
) -> tuple[DetectionDataset, DetectionDataset]:
    """Scan the training and validation images. Rank 0 goes first, the others find its caches."""
    shared = dict(single_cls=cfg.single_cls, nc=data.nc, names=data.names, strict=cfg.strict_data, seed=cfg.seed)
    shared["tolerant"] = not cfg.strict_data
    with main_first(world):
        train = DetectionDataset(
            data.train,
            frame.imgsz,
            hyp=hyp,
            augment=True,
            rect=cfg.rect,
            batch_size=frame.rank_batch,
            stride=frame.stride,
            prefix="train",
            close_mosaic_epoch=cfg.epochs - cfg.close_mosaic if cfg.close_mosaic else None,
            show=world.main,
            **shared,
        )
        val = DetectionDataset(
            data.val,
            frame.imgsz,
            rect=True,
            batch_size=frame.rank_batch * 2,  # nothing is kept for a backward pass
            stride=frame.stride,
            pad=0.5,
            prefix="val",
            show=world.main,
            **shared,
        )
    train.keep_images("" if cfg.cache == "val" else cfg.cache, world)
    val.keep_images("ram" if cfg.cache == "val" else cfg.cache, world)
    return train, val


def build_loaders(
    cfg: TrainConfig,
    train: DetectionDataset,
    val: DetectionDataset,
    frame: Frame,
    world: World,
    device: torch.device = torch.device("cpu"),
) -> tuple[DetectionLoader, DetectionLoader]:
    """The training loader of this rank, which leaves the last of the augmentation to ``device`` when --augment-device
    says so, and the validation loader with this rank's share of the batches."""
    shared = dict(workers=cfg.workers, seed=cfg.seed)
    loader = create_dataloader(
        train,
        frame.rank_batch,
        shuffle=not cfg.rect,
        world=world,
        quad=cfg.quad,
        finish_on=device if augments_on_device(cfg, device) else None,
        **shared,
    )
    if cfg.quad and (len(loader) == 0 or min(frame.rank_batch, len(train)) < 4):
        raise ConfigError(
            f"--quad makes one image of four: it needs at least 4 images a batch (there are {frame.rank_batch}) and in "
            f"the training set ({len(train)}), for each process"
        )
    loader.batch_sampler.epochs = cfg.epochs
    return loader, create_dataloader(val, val.batch_size, world=world, **shared)


def augments_on_device(cfg: TrainConfig, device: torch.device) -> bool:
    """Whether the training device recolours and mirrors. ConfigError for --augment-device gpu on a CPU."""
    if cfg.augment_device == "gpu" and device.type == "cpu":
        raise ConfigError("--augment-device gpu: training runs on the CPU; leave it out")
    return cfg.augment_device == "gpu"


def fit_anchors(model: DetectionModel, train: DetectionDataset, hyp: Hyp, frame: Frame, cfg: TrainConfig) -> None:
    """Replace the model's anchors when they fit the labels badly (unless --noautoanchor), in place."""
    rng = np.random.default_rng(cfg.seed)
    sizes = train.box_sizes(MOST_BOXES, rng)
    strides = model.stride.cpu().numpy()
    anchors = model.detect.anchors.cpu().numpy() * strides[:, None, None]
    report = check_anchors(sizes, anchors, strides, hyp.anchor_t, frame.imgsz, rng)
    LOGGER.info(report.text)
    if report.changed:
        model.detect.set_anchors(report.anchors, strides)
        model.yaml["anchors"] = report.anchors.reshape(len(strides), -1).round(2).tolist()


def share_anchors(model: DetectionModel, world: World) -> None:
    """Rank 0's anchors in every rank."""
    model.detect.anchors.copy_(broadcast(model.detect.anchors.cpu(), world))


def build_learner(
    model: DetectionModel, cfg: TrainConfig, hyp: Hyp, frame: Frame, batches: int, device: torch.device, world: World
) -> Learner:
    """Loss, optimizer, schedule, scaler, EMA and, over several processes, what averages their gradients: DDP around
    ``model``, or SharedGradients beside it where steps are CUDA graphs, into which DDP cannot put its messages."""
    dtype = amp_dtype(cfg.amp, device)
    gains = hyp.scaled(model.detect.nl, model.nc, frame.imgsz)
    criterion = DetectionLoss(model.detect.anchors, model.stride, model.nc, gains).to(device)
    decay = scaled_weight_decay(hyp.weight_decay, frame.batch, hyp.nominal_batch)
    optimizer = build_optimizer(model, cfg.optimizer, hyp.lr0, hyp.momentum, decay, cfg.dcn_offset_lr)
    LOGGER.info(f"optimizer: {describe(optimizer)}")
    share_weights(model, world)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = hyp.bn_momentum
    ema, graphs = ModelEMA(model, hyp.ema_decay, hyp.ema_tau), uses_graphs(cfg, device, world)
    if cfg.sync_bn and world.size > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    compiled = CompiledStep(model, criterion) if cfg.compile else None
    trained = compiled.model if compiled else model
    learner = Learner(
        model=trained if graphs else over_ranks(trained, device, world),
        criterion=criterion,
        optimizer=optimizer,
        schedule=Schedule(hyp, cfg.epochs, batches, frame.batch, cfg.cos_lr),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        ema=ema,
        device=device,
        world=world,
        amp_dtype=dtype,
        clip_grad=cfg.clip_grad,
        loss_gain=4.0 if cfg.quad else 1.0,
        shared=SharedGradients(model) if graphs and world.size > 1 else None,
        compiled=compiled,
    )
    if graphs:
        learner.use_graphs()
    return learner


# the name since torch 2.12, and the one before
_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in signature(nn.parallel.DistributedDataParallel).parameters
)


def over_ranks(model: nn.Module, device: torch.device, world: World) -> nn.Module:
    """``model`` in DDP; itself when there is one process.

    Buffers are not sent: training reads none of them, and rank 0's are those that are validated and saved.
    """
    if world.size == 1:
        return model
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        static_graph=True,
        gradient_as_bucket_view=True,
        **{_BUFFERS: False},
    )


def uses_graphs(cfg: TrainConfig, device: torch.device, world: World) -> bool:
    """Whether steps become CUDA graphs: by default wherever they can be. ConfigError where they were asked for and
    cannot be."""
    obstacle = "--sync-bn sends messages in the middle of a step" if cfg.sync_bn and world.size > 1 else ""
    return graphs_allowed(cfg.cuda_graphs, device, obstacle)


def draw_weights(train: DetectionDataset, class_maps: list[float], nc: int) -> np.ndarray:
    """(n,) weight of each image for ``--image-weights``: more where its classes are rare or still badly found."""
    maps = np.asarray(class_maps or [0.0] * nc)
    weights = class_weights(train.labels[:, 0], nc) * nc * (1 - maps) ** 2 / nc
    return image_weights(train.labels[:, 0], train.offsets, weights)
