"""Diagrams drawn by processes of their own, while the program goes on: matplotlib takes a second to import and a third
of one for each figure.

A painter imports neither torch nor anything else of the run. It ends when it is told to, or when the program is gone.
``python -m utils.painter`` is the painter; it reads jobs (a JSON line, then the bytes of each array).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from utils import curves
from utils.errors import ResourceError, UserError

ROOT = Path(__file__).resolve().parents[1]
DRAWINGS = ("plot_pr_curve", "plot_confidence_curve", "plot_confusion_matrix", "plot_results", "plot_labels")
MOST_PAINTERS = 3


class Painters:
    """``draw`` gives a function of utils.curves to a painter and returns at once; :meth:`close`, or leaving the
    ``with`` block, waits for all of them.

    Arguments are plain data, paths and arrays. Painters start at once, as many as there are cores to spare. What one
    could not do is raised by ``close``, as ResourceError.
    """

    def __init__(self, cores: int | None = None) -> None:
        cores = cores or os.cpu_count() or 1
        self._painters = [_Painter() for _ in range(max(1, min(MOST_PAINTERS, cores // 4)))]
        self._turn = cycle(self._painters)
        # a thread, because a pipe is full until its reader has begun
        self._sender = ThreadPoolExecutor(1, "to the painters")
        self._sent: list[Future] = []

    def draw(self, name: str, *arguments: Any) -> None:
        """Have ``curves.<name>(*arguments)`` done, one of DRAWINGS."""
        self._sent.append(self._sender.submit(next(self._turn).send, name, arguments))

    def close(self) -> None:
        """Wait until everything is drawn. Raises ResourceError when something could not be."""
        for painter in self._painters:  # in so many words: loader processes hold copies of the pipe, which does not end
            self._sent.append(self._sender.submit(painter.send, "", ()))
        self._sender.shutdown()
        failed = [failure for failure in [painter.finish() for painter in self._painters] if failure]
        for job in self._sent:
            job.result()
        if failed:
            raise ResourceError(failed[0])

    def __enter__(self) -> Painters:
        return self

    def __exit__(self, kind: type | None, *exc: object) -> None:
        if kind is None:
            return self.close()
        for painter in self._painters:  # the run has failed: nobody waits for its pictures
            painter.process.kill()
            painter.process.wait()
        self._sender.shutdown(wait=False, cancel_futures=True)


class _Painter:
    def __init__(self) -> None:
        command = [sys.executable, "-m", "utils.painter", os.getcwd()]
        # a session of its own: Ctrl-C is for the program, which ends its painters
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        self._said: list[str] = []
        self._listener = threading.Thread(target=self._listen, name="painter", daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        for line in self.process.stderr:
            self._said.append(line.decode(errors="replace").strip())

    def send(self, name: str, arguments: tuple) -> None:
        with contextlib.suppress(OSError):  # it has ended: finish() says why
            write_job(self.process.stdin, name, arguments)

    def finish(self) -> str:
        """Wait for the end; what went wrong, or ''."""
        status = self.process.wait()
        self._listener.join()
        self.process.stderr.close()
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        return "" if status == 0 else next(reversed(self._said), f"a painter ended with status {status}")


def write_job(file: BinaryIO, name: str, arguments: tuple) -> None:
    """A drawing's name and arguments, for :func:`read_job`."""
    arrays: list[np.ndarray] = []

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            arrays.append(value)
            return {"array": True, "type": value.dtype.str, "shape": value.shape}
        if isinstance(value, Mapping):
            return {"items": [[plain(key), plain(item)] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    file.write(json.dumps({"name": name, "arguments": plain(arguments)}).encode() + b"\n")
    for array in arrays:
        file.write(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
    file.flush()


def read_job(file: BinaryIO) -> tuple[str, list[Any]] | None:
    """The next drawing; None after the last."""
    line = file.readline()
    job = json.loads(line) if line else {"name": ""}
    if not job["name"]:
        return None

    def whole(value: Any) -> Any:  # arrays come in the order in which they were met
        if isinstance(value, dict) and "array" in value:
            kind = np.dtype(value["type"])
            content = file.read(kind.itemsize * math.prod(value["shape"]))
            return np.frombuffer(content, kind).reshape(value["shape"])
        if isinstance(value, dict):
            return {key: whole(item) for key, item in value["items"]}
        return [whole(item) for item in value] if isinstance(value, list) else value

    return job["name"], whole(job["arguments"])


def main(folder: str) -> int:
    """Draw what comes in, with paths below ``folder``; the exit status."""
    os.chdir(folder)
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401 - while the program is still starting

    failure = ""
    while job := read_job(sys.stdin.buffer):
        name, arguments = job
        try:
            if name not in DRAWINGS:
                raise UserError(f"{name}: no drawing")
            getattr(curves, name)(*arguments)
        except UserError as error:
            failure = failure or str(error)
    if failure:
        print(failure, file=sys.stderr)
    return 2 if failure else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
