"""Back end for engines whose DCN layers are our plugin (plugin/).

The network goes as ONNX, with nodes that TensorRT's parser looks up among its plugins: the one way that ``tensorrt``
and ``tensorrt_rtx``, whose network takes no plugins otherwise, have in common.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from deploy.tensorrt.onnx_backend import PLUGIN, OnnxNetwork
from deploy.tensorrt.trt_backend import EngineOptions, TensorRtNetwork
from utils.errors import ConfigError, ExportError, MissingPackage


class PluginNetwork(OnnxNetwork):
    """``library``: the plugin's, as python -m deploy.tensorrt.plugin builds it. Raises ConfigError for one that is not
    there, ExportError where TensorRT does not take it."""

    def __init__(self, trt: ModuleType, options: EngineOptions, library: str | Path) -> None:
        super().__init__("plugin")
        self.engine = TensorRtNetwork(trt, options)
        load_plugin(trt, library)
        if trt.__name__ == "tensorrt_rtx":
            _name_for_the_parser(trt)

    def finish(self, entries: dict[str, str]) -> bytes:
        """The engine."""
        network, log = self.engine.network, self.engine.log
        parser = self.engine.trt.OnnxParser(network, log)
        if not parser.parse(super().finish(entries)):
            reason = parser.get_error(0).desc() if parser.num_errors else log.last
            raise ExportError(f"{self.engine.trt.__name__} does not take this network ({reason})")
        return self.engine.finish(entries)

    def targets(self) -> tuple[int, ...]:
        """As TensorRtNetwork's."""
        return self.engine.targets()


def load_plugin(trt: ModuleType, library: str | Path) -> None:
    """Make the plugin known to TensorRT, once for a process, for engines to be built or opened. Raises ConfigError for
    a file that is not there, ExportError where TensorRT does not take it."""
    registry, path = trt.get_plugin_registry(), Path(library).resolve()
    if _is_known(registry):
        return
    if not path.is_file():
        raise ConfigError(f"{library}: no such library; build it with python -m deploy.tensorrt.plugin -o {path.name}")
    registry.load_library(str(path))
    if not _is_known(registry):
        raise ExportError(f"{library}: {trt.__name__} finds no plugin {PLUGIN} in it")


def _is_known(registry: Any) -> bool:
    return any((each.name, each.plugin_namespace) == (PLUGIN, "") for each in registry.all_creators)


def _name_for_the_parser(trt: ModuleType) -> None:
    """Let its parser open ``libtensorrt_rtx.so``, as it does when it meets a plugin; the package of 1.7 holds that
    library only as .so.1, and the process would end without a word. An empty library of that name, which depends on
    the real one, is enough. Raises MissingPackage without a C compiler."""
    name = "libtensorrt_rtx.so"
    try:
        ctypes.CDLL(name)
        return
    except OSError:
        pass
    import tensorrt_rtx_libs

    real = sorted(Path(tensorrt_rtx_libs.__file__).parent.glob(f"{name}.*"))
    if not real:
        raise ExportError(f"{trt.__name__}: its package holds no {name}")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / name
        command = ["c++", "-shared", "-o", made, f"-Wl,-soname,{name}", "-Wl,--no-as-needed", real[0]]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except FileNotFoundError:
            raise MissingPackage("a plugin in tensorrt_rtx (a C++ compiler)", "g++ or clang, not from pip,") from None
        except subprocess.CalledProcessError as error:
            raise ExportError(f"c++: {error.stderr.decode(errors='replace').splitlines()[0]}") from None
        ctypes.CDLL(str(made))
