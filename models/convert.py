"""Turn a checkpoint of YOLOv5, or a bare state dict, into one of this program. Nothing in the file is run.

    python -m models.convert yolov5s.pt -o ours.pt
    python -m models.convert weights.pth --cfg yolov5s.yaml -o ours.pt      # tensors only: say what model they are of

The result holds the averaged weights in the precision of the file and what rebuilds the model; no optimizer state, no
paths of the machine it was trained on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from models.loading import described_by, fill_described, is_wts, read_any_weights
from models.upstream import Upstream
from utils.checkpoint import Checkpoint, save_checkpoint
from utils.cli import Parser
from utils.console import LOGGER, plural, setup_console
from utils.errors import CheckpointError, run_cli
from utils.safe_names import printable


def convert(source: str | Path, output: str | Path, cfg: str | Path | None = None) -> str:
    """Read ``source``, rebuild its model and write ``output``; returns lines that say what was found.

    ``cfg``: the model YAML of a file without description. Raises CheckpointError for a file that cannot be read, does
    not fill its model, or is one of this program already; ConfigError for a faulty YAML; OSError when writing fails.
    """
    source, output = Path(source), Path(output)
    if output.exists() and output.samefile(source):
        raise CheckpointError(f"--output {output}: is the file to convert; give another name")
    checkpoint = read_any_weights(source)
    if not isinstance(checkpoint, Upstream) and checkpoint.meta and not is_wts(source):
        raise CheckpointError(f"{source}: is a checkpoint of this program already")
    if cfg:
        checkpoint = described_by(cfg, checkpoint)
    model = fill_described(checkpoint)
    state = {name: checkpoint.model[name].view_as(value) for name, value in model.state_dict().items()}
    meta = {**checkpoint.meta, "yaml": model.yaml, "nc": model.nc, "names": dict(model.names)}
    save_checkpoint(output, state, meta)
    return f"{_found(checkpoint, model)}\nSaved to {output} ({output.stat().st_size / 1e6:.1f} MB)"


def _found(checkpoint: Checkpoint, model) -> str:
    """One line: what kind of file it was, its size, classes, epoch, and what is not taken over."""
    floating = {str(t.dtype).removeprefix("torch.") for t in checkpoint.model.values() if t.is_floating_point()}
    epoch = checkpoint.meta.get("epoch")
    parts = [
        checkpoint.meta.get("source", "a state dict"),
        f"{sum(p.numel() for p in model.parameters()):,} parameters in {'/'.join(sorted(floating))}",
        f"{plural(model.nc, 'class', 'classes')} ({printable(', '.join(list(model.names.values())[:5]))}"
        f"{', ...' if model.nc > 5 else ''})",
        f"strides {'/'.join(f'{stride:g}' for stride in model.stride.tolist())}",
        "epoch not recorded (a finished run's file)" if epoch is None else f"epoch {epoch}",
    ]
    left_out = checkpoint.left_out if isinstance(checkpoint, Upstream) else []
    extra = len(checkpoint.model) - len(model.state_dict())
    left_out = [*left_out, *([f"{extra} other tensors"] if extra else [])]
    return f"{checkpoint.path}: {', '.join(parts)}; left out: {', '.join(left_out) or 'nothing'}"


def main(argv: Sequence[str]) -> None:
    """Convert what the flags say."""
    parser = Parser(
        prog="python -m models.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="the .pt to read")
    parser.add_argument("-o", "--output", required=True, help="the .pt to write")
    parser.add_argument("--cfg", help="model YAML, for a file that holds tensors only")
    parser.add_argument("--debug", action="store_true", help="keep tracebacks")
    args = parser.parse_args(argv)
    setup_console()
    LOGGER.info(convert(args.source, args.output, args.cfg))


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
