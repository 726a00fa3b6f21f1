"""The article's program: weights as text to a TensorRT engine, layer by layer, and the engine on a folder of pictures.

    python -m deploy.tensorrt -s model.wts model.engine s_dcn             # n s m l x, with 6, _dcn, _dcn4, _dcn_best
    python -m deploy.tensorrt -s model.wts model.engine c_dcn 0.33 0.5    # depth and width of your own
    python -m deploy.tensorrt -s model.wts model.engine                   # a .wts of gen_wts.py says what it is
    python -m deploy.tensorrt -s model.wts model.onnx s_dcn               # the same network, to run anywhere
    python -m deploy.tensorrt -s model.wts model.engine s_dcn --plugin libdcnv2.so   # of deploy.tensorrt.plugin
    python -m deploy.tensorrt -d model.engine folder                      # then as detect.py, with its flags

Exit status: 0 done, 2 wrong input; -d as detect.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from utils.cli import Parser, check_weights, image_size_flag
from utils.errors import ConfigError, run_cli
from utils.files import ROOT


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="python -m deploy.tensorrt", description="Weights to a TensorRT engine, and the engine run.")
    what = parser.add_mutually_exclusive_group(required=True)
    serialise = "WTS ENGINE [SIZE [DEPTH WIDTH]]: build; a name that ends in .onnx gives the same network as ONNX"
    what.add_argument("-s", nargs="+", metavar="WORD", help=serialise)
    what.add_argument("-d", nargs=2, metavar=("ENGINE", "FOLDER"), help="detect; other flags are those of detect.py")

    built = parser.add_argument_group("with -s")
    image_size_flag(built, nargs="+")
    built.add_argument("--half", action="store_true", help="compute in float16; DCN still samples in float32")
    batch = "images at once that the engine is tuned for (default: 1)"
    built.add_argument("--batch-size", type=int, default=1, metavar="N", help=batch)
    most = "the most it takes at once (default: 8, or --batch-size)"
    built.add_argument("--max-batch", type=int, default=0, metavar="N", help=most)
    arch = "compute capabilities, like 86 89, of a tensorrt_rtx engine (default: all)"
    built.add_argument("--arch", type=int, nargs="+", default=[], metavar="N", help=arch)
    module = "(default: the first that is installed)"
    built.add_argument("--builder", choices=["tensorrt", "tensorrt_rtx"], default="", help=module)
    library = "library of our plugin, which computes DCN layers in an engine (default: GridSample)"
    built.add_argument("--plugin", default="", metavar="SO", help=library)
    form = "of DCN layers in an .onnx (default: gridsample, as in the engine)"
    built.add_argument("--dcn", choices=["deformconv", "gridsample", "plugin"], default="gridsample", help=form)
    image = "picture to compare on (default: one of data/images)"
    built.add_argument("--image", default=str(ROOT / "data" / "images" / "jockey.jpg"), metavar="FILE", help=image)
    parser.add_argument("--debug", action="store_true", help="show a traceback instead of a one-line error")
    return parser


def main(argv: Sequence[str]) -> int:
    """Build or detect; returns the exit status. Raises UserError for wrong input."""
    parser = build_parser()
    args, others = parser.parse_known_args(argv)
    if args.d:
        return _detect(list(argv))
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if not 2 <= len(args.s) <= 5:
        raise ConfigError("-s: expected WTS ENGINE [SIZE [DEPTH WIDTH]], e.g. -s model.wts model.engine s_dcn")
    most = args.max_batch or max(8, args.batch_size)
    if not 1 <= args.batch_size <= most:
        raise ConfigError(f"--batch-size {args.batch_size}: expected 1 to --max-batch, {most}")
    if len(args.imgsz) > 2:
        raise ConfigError(f"--imgsz {' '.join(map(str, args.imgsz))}: expected one size or height and width, in pixels")
    weights, target, *words = args.s
    check_weights(weights)

    from deploy.tensorrt.build import BuildOptions, build
    from deploy.tensorrt.trt_backend import EngineOptions
    from utils.console import setup_console
    from utils.images import read_image

    setup_console()
    engine = EngineOptions(args.batch_size, most, tuple(dict.fromkeys(args.arch)))
    size = (args.imgsz[0], args.imgsz[-1])
    image = read_image(args.image)
    options = BuildOptions(size, args.half, args.builder, engine, args.dcn, args.plugin, image)
    build(weights, target, words, options)
    return 0


def _detect(argv: list[str]) -> int:
    """``-d ENGINE FOLDER`` in the words of detect.py."""
    import detect

    place = argv.index("-d")
    engine, folder = argv[place + 1 : place + 3]
    return detect.main([*argv[:place], "--weights", engine, "--source", folder, *argv[place + 3 :]])


if __name__ == "__main__":
    sys.exit(run_cli(main))
