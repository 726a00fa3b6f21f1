"""Write a checkpoint's weights as text, for tensorrtx and other C++ programs.

    python gen_wts.py -w best.pt -o best.wts

The same as export.py --include wts, with the flags that tensorrtx's guides name. Read back here with
--weights best.wts (and --cfg X.yaml for files of other writers).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from deploy.formats import BY_NAME
from utils.cli import Parser, check_weights
from utils.errors import ConfigError, run_cli


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="gen_wts.py", description="Write a checkpoint's weights as text (.wts).")
    parser.add_argument("-w", "--weights", default="yolov5s.pt", metavar="PT", help="checkpoint (default: yolov5s.pt)")
    parser.add_argument("-o", "--output", default="", metavar="WTS", help="file or folder (default: beside PT)")
    plain = "nothing but tensors: no class names and sizes, which take one line that C++ readers pass over"
    parser.add_argument("--plain", action="store_true", help=plain)
    parser.add_argument("--cfg", default="", metavar="YAML", help="model YAML, for a bare state dict")
    parser.add_argument("--debug", action="store_true", help="show a traceback instead of a one-line error")
    return parser


def main(argv: Sequence[str]) -> int:
    """Write the file. Returns 0; raises UserError for wrong input."""
    args = build_parser().parse_args(argv)
    check_weights(args.weights)
    own = Path(args.weights).with_suffix(".wts")
    output = Path(args.output or own)
    if output.is_dir():
        output /= own.name
    if output.suffix != ".wts":
        raise ConfigError(f"--output {output}: expected a name that ends in .wts")

    from deploy.exporter import ExportOptions, export, prepare
    from utils.console import setup_console

    setup_console()
    job = prepare(args.weights, ExportOptions(meta=not args.plain), cfg=args.cfg or None)
    export(job, BY_NAME["wts"], output)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
