"""Build the TensorRT plugin: one shared library with its kernels inside, for machines with and without a GPU.

    python -m deploy.tensorrt.plugin -o libdcnv2.so                                  # takes any layer
    python -m deploy.tensorrt.plugin -o libdcnv2.so --weights best.pt                # faster for the layers of a model
    python -m deploy.tensorrt.plugin -o libdcnv2.so --weights best.pt --arch 86 --types fp16
    python -m deploy.tensorrt.plugin -o libdcnv2.so --tensorrt /opt/TensorRT/include # against TensorRT's own headers
    python -m deploy.tensorrt.plugin --kernels folder ...                            # only what CMakeLists.txt asks for

Exit status: 0 done, 2 wrong input.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.cli import Parser, check_weights
from utils.errors import ConfigError, MissingPackage, is_installed, run_cli

TYPES = ("fp32", "fp16", "bf16")


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="python -m deploy.tensorrt.plugin", description="Build the DCNv2 plugin for TensorRT.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("-o", "--output", default="libdcnv2.so", metavar="SO", help="library (default: libdcnv2.so)")
    what.add_argument("--kernels", default="", metavar="DIR", help="write only the kernels, for CMake")
    weights = "checkpoints or model YAMLs whose DCN layers get kernels of their own"
    parser.add_argument("--weights", nargs="+", default=[], metavar="FILE", help=weights)
    arch = "compute capabilities (default: 75 80 86 89 90 120)"
    parser.add_argument("--arch", type=int, nargs="+", default=[], metavar="N", help=arch)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES), help="(default: all)")
    headers = "folder of TensorRT's headers, and of CUDA's if not /usr/local/cuda (default: declarations of our own)"
    parser.add_argument("--tensorrt", nargs="+", default=[], metavar="DIR", help=headers)
    parser.add_argument(
        "--compiler", default=os.environ.get("CXX", "c++"), metavar="C++", help="(default: $CXX or c++)"
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback instead of a one-line error")
    return parser


def main(argv: Sequence[str]) -> int:
    """Build it. Returns 0; raises UserError for wrong input."""
    args = build_parser().parse_args(argv)
    if not is_installed("triton"):
        raise MissingPackage("the plugin's kernels", "triton")
    if Path(args.output).suffix != ".so":
        raise ConfigError(f"--output {args.output}: expected a name that ends in .so")
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # read when Triton compiles; source positions are half of the code

    from deploy.tensorrt.plugin.build import PluginOptions, build_library, layers_of, write_kernels
    from deploy.tensorrt.plugin.compile import ARCHITECTURES
    from utils.console import LOGGER, setup_console

    setup_console()
    layers = dict.fromkeys(layer for name in args.weights for layer in layers_of(_model(name)))
    architectures = tuple(sorted(set(args.arch or ARCHITECTURES)))
    options = PluginOptions(
        tuple(layers), tuple(dict.fromkeys(args.types)), architectures, tuple(args.tensorrt), args.compiler
    )
    told = f"{len(layers)} layers of their own, {', '.join(options.types)}, for {' '.join(map(str, architectures))}"
    if args.kernels:
        folder = Path(args.kernels)
        folder.mkdir(parents=True, exist_ok=True)
        LOGGER.info(f"{folder}: {write_kernels(folder, options, _show)} kernels, {told}")
    else:
        count = build_library(args.output, options, _show)
        LOGGER.info(f"{args.output}: {Path(args.output).stat().st_size / 1e6:.1f} MB, {count} kernels, {told}")
    return 0


def _model(name: str):
    from models.loading import build_or_load
    from models.yolo import DetectionModel

    if name.endswith((".yaml", ".yml")):
        return DetectionModel(name)
    check_weights(name)
    return build_or_load(None, name, None)[0]


def _show(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:30}", end="\r", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_cli(main))
