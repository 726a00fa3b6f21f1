"""The command line's common parts: a parser whose errors are one clear line, flags that several scripts share.

Imports nothing heavy: ``--help`` and a wrong flag are answered before torch is loaded.
"""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from utils.config import DCN_BACKENDS, check_thresholds
from utils.errors import CheckpointError, ConfigError, did_you_mean
from utils.files import EXPORTED_MODELS, ROOT

# Flags of YOLOv5 that are absent on purpose: the answer to who types them.
ABSENT = {
    "--evolve": "hyper-parameter evolution is not offered; give hyp files with --hyp",
    "--evolve_population": "hyper-parameter evolution is not offered; give hyp files with --hyp",
    "--resume_evolve": "hyper-parameter evolution is not offered; give hyp files with --hyp",
    "--bucket": "nothing is uploaded from here; copy runs/ with a tool of your own",
    "--entity": "no hosted logger is built in; results.csv and TensorBoard are always written",
    "--upload_dataset": "nothing is uploaded from here",
    "--bbox_interval": "no hosted logger is built in; results.csv and TensorBoard are always written",
    "--artifact_alias": "no hosted logger is built in; results.csv and TensorBoard are always written",
    "--keras": "TensorFlow's formats are not offered (see export.py --list)",
    "--optimize": "no such form of TorchScript is offered",
    "--inplace": "the exported arithmetic needs no such switch",
    "--topk-all": "--max-det says how many boxes of a class --nms keeps",
    "--topk-per-class": "--max-det says how many boxes of a class --nms keeps",
    "--dnn": "OpenCV's DNN runtime is not offered; ONNX files run in ONNX Runtime",
}


LARGEST_SIDE = 16384
"""OpenCV's warps end at twice that; a picture of this side is 3 GB to a network."""


class Parser(argparse.ArgumentParser):
    """ArgumentParser that answers a wrong flag with one line, the nearest flag and exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError (run_cli prints it) instead of a page of usage."""
        raise ConfigError(self._explain(message))

    def _explain(self, message: str) -> str:
        unknown = re.search(r"unrecognized arguments: (.*)", message)
        if not unknown:
            return f"{message.replace('argument ', '', 1)} (see {self.prog} --help)"
        words = unknown.group(1).split()
        flag = next((w for w in words if w.startswith("-")), words[0])
        name = flag.split("=")[0]
        if name in ABSENT:
            return f"{name}: {ABSENT[name]}"
        known = [s for a in self._actions for s in a.option_strings if s.startswith("--")]
        return f"{name}: no such flag{did_you_mean(name, known)} (see {self.prog} --help)"

    def given(self, argv: Sequence[str]) -> set[str]:
        """Names (underscored) of the flags that ``argv`` really holds, as opposed to defaults."""
        bare = Parser(prog=self.prog, add_help=False, argument_default=argparse.SUPPRESS, parents=[])
        for action in self._actions:
            if not isinstance(action, argparse._HelpAction):
                bare._add_action(_without_default(action))
        return set(vars(bare.parse_args(argv)))


def _without_default(action: argparse.Action) -> argparse.Action:
    twin = copy.copy(action)
    twin.default = argparse.SUPPRESS
    return twin


def add_run_flags(parser: argparse.ArgumentParser, project: str) -> None:
    """--project --name --exist-ok --device --debug, the same in every script."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--project", default=project, metavar="DIR", help="results go to PROJECT/NAME (default: %(default)s)"
    )
    group.add_argument("--name", default="exp", help="folder name; exp2, exp3, ... when taken (default: %(default)s)")
    group.add_argument("--exist-ok", action="store_true", help="write into PROJECT/NAME even when it exists")
    group.add_argument(
        "--device", default="", help="cpu, mps, 0, 0,1 under torchrun; default: the first GPU, else the CPU"
    )
    group.add_argument("--debug", action="store_true", help="show a traceback instead of a one-line error")


def image_size_flag(parser: Any, default: int = 640, nargs: str | None = None) -> None:
    """--imgsz with its two other names; pixels of the longer side."""
    parser.add_argument(
        "--imgsz", "--img", "--img-size", type=_side, default=default if nargs is None else [default], nargs=nargs,
        metavar="PIXELS", help=f"network input size, a multiple of 32 (default: {default})",
    )  # fmt: skip


def _side(text: str) -> int:
    try:
        pixels = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}") from None
    if pixels > LARGEST_SIDE:
        raise argparse.ArgumentTypeError(f"{text}: at most {LARGEST_SIDE} pixels")
    return pixels


def add_dcn_backend_flag(group: Any) -> None:
    """--dcn-backend, the same in every script."""
    kernels = "kernels of DCN layers; auto: the first that can run here"
    group.add_argument("--dcn-backend", choices=DCN_BACKENDS, default="auto", help=f"{kernels} (default: %(default)s)")


def add_cuda_graphs_flag(group: Any, what: str, auto: str) -> None:
    """--cuda-graphs auto|on|off; ``what`` is replayed, with auto ``auto``."""
    text = f"replay {what} as CUDA graphs, faster where launching is what takes time; auto: {auto}"
    group.add_argument("--cuda-graphs", choices=["auto", "on", "off"], default="auto", help=text)


def add_detection_flags(group: Any, conf: float, iou: float, max_det: int, graphs: str = "on a GPU") -> None:
    """--conf-thres --iou-thres --max-det --augment --half --cuda-graphs of val.py and detect.py, own defaults.

    What the flags may be is checked by :func:`utils.config.check_thresholds`.
    """
    group.add_argument(
        "--conf-thres", type=float, default=conf, metavar="P", help="lowest confidence kept (default: %(default)s)"
    )
    most = "NMS removes boxes that overlap a better one by more (default: %(default)s)"
    group.add_argument("--iou-thres", type=float, default=iou, metavar="IOU", help=most)
    group.add_argument(
        "--max-det", type=int, default=max_det, metavar="N", help="most detections an image (default: %(default)s)"
    )
    augment = "look at flipped and scaled copies as well: slower, finds a little more"
    group.add_argument("--augment", action="store_true", help=augment)
    group.add_argument("--half", action="store_true", help="float16 on a GPU, bfloat16 on a CPU that has it")
    add_cuda_graphs_flag(group, "the model of a checkpoint", graphs)


def add_weights_flag(group: Any) -> None:
    """--weights and --cfg of val.py and detect.py: one file or several."""
    weights = "checkpoint, or what export.py made of one; several .pt make an ensemble (default: yolov5s.pt)"
    group.add_argument("--weights", nargs="+", default=["yolov5s.pt"], metavar="PT", help=weights)
    group.add_argument("--cfg", default="", metavar="YAML", help="model YAML, for weights that are tensors only (.wts)")


def add_label_file_flags(group: Any) -> None:
    """--save-txt --save-conf of val.py and detect.py."""
    text = "labels/NAME.txt: class cx cy w h, in parts of the image size"
    group.add_argument("--save-txt", action="store_true", help=text)
    group.add_argument("--save-conf", action="store_true", help="confidence as a last column of --save-txt")


def check_detection_flags(args: argparse.Namespace) -> None:
    """What val.py and detect.py check alike. Raises ConfigError for a threshold out of range or --save-conf without
    --save-txt, CheckpointError for weights that are not there."""
    check_thresholds(args.conf_thres, args.iou_thres, args.max_det)
    if args.save_conf and not args.save_txt:
        raise ConfigError("--save-conf: a column of the label files; add --save-txt")
    for weights in args.weights:
        check_weights(weights)


def check_weights(weights: str) -> None:
    """Raise CheckpointError, saying how to get some, when the file does not exist. Nothing is downloaded."""
    path = Path(weights)
    if path.is_file() and path.suffix != ".pt" and path.parent.name.endswith(EXPORTED_MODELS):
        raise CheckpointError(f"--weights {weights}: is a part of an exported model; give its folder, {path.parent}")
    if path.is_file() or (path.is_dir() and path.name.endswith(EXPORTED_MODELS)):
        return
    if path.is_dir() and weights:
        raise CheckpointError(f"--weights {weights}: is a folder; give the file in it, e.g. weights/best.pt")
    trained = sorted((ROOT / "runs" / "train").glob("*/weights/best.pt"), key=lambda p: p.stat().st_mtime)
    if trained:
        how = f"the newest trained here is {trained[-1]}"
    else:
        how = "train some with train.py, or run `make demo`, which leaves runs/train/*/weights/best.pt"
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise CheckpointError(f"--weights {weights}: no such file{did_you_mean(path.name, siblings)}; {how}")


def keywords_to_argv(parser: argparse.ArgumentParser, kwargs: dict[str, Any]) -> list[str]:
    """The command line for ``run(**kwargs)``: names in underscore form, True for a switch, a list for several values.

    Raises ConfigError for a name that is no flag.
    """
    flags = {a.dest: a for a in parser._actions if a.option_strings}
    for action in list(flags.values()):
        for option in action.option_strings:
            flags.setdefault(option.lstrip("-").replace("-", "_"), action)
    argv: list[str] = []
    for name, value in kwargs.items():
        if name not in flags:
            raise ConfigError(f"{name}: no such argument{did_you_mean(name, flags)}")
        action = flags[name]
        option = max(action.option_strings, key=len)
        if action.nargs == 0:
            argv += [option] if value else []
        elif value is None or value is False:
            continue
        elif value is True and action.nargs == "?":
            argv.append(option)
        elif isinstance(value, (list, tuple)):
            argv += [option, *map(str, value)]
        else:
            argv.append(f"{option}={value}")
    return argv
