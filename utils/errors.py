"""What goes wrong because of the input, told in one line.

UserError                 the user can mend it; one line on stderr, exit status 2
 +- ConfigError           a flag, a hyp.yaml, a model.yaml
 +- DataError             a dataset YAML, an image, a label file
 +- CheckpointError       a weights file
 +- SourceError           something detect.py was asked to read
 +- ExportError           a file in another format
 +- ResourceError         memory, disk, permissions, a device that is not there
     +- MissingPackage    an optional package that is not installed

Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import atexit
import difflib
import errno
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from utils.safe_names import printable
from utils.signals import Termination, sigterm_as_interrupt


class UserError(Exception):
    """Base of every error that the user can mend. The text is the whole message: what, where, what to do."""

    exit_code = 2


class ConfigError(UserError):
    """A flag or a configuration file asks for something that cannot be."""


class DataError(UserError):
    """A dataset YAML, image or label file is missing or faulty."""


class CheckpointError(UserError):
    """A weights file is missing, damaged, foreign or does not fit the model."""


class SourceError(UserError):
    """A picture, video or stream given to detect.py cannot be read."""


class ExportError(UserError):
    """A model could not be written or read back in another format."""


class ResourceError(UserError):
    """Memory, disk space, permissions or a device are not there."""


class MissingPackage(ResourceError):
    """An optional package is not installed: what needs it, and the command that installs it."""

    def __init__(self, purpose: str, package: str) -> None:
        super().__init__(f"{purpose} needs a package that is not installed: pip install {package}")


def is_installed(module: str) -> bool:
    """Whether ``import module`` would find something (nothing is imported)."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # ValueError: sys.modules holds a stand-in
        return False


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` for the nearest known word, or an empty string. A suffix in common (``.yaml``) says
    nothing and does not count."""
    suffix = os.path.splitext(str(word))[1]
    stems = {str(name).removesuffix(suffix): name for name in known}
    near = difflib.get_close_matches(str(word).removesuffix(suffix), stems, n=1, cutoff=0.6)
    return f", did you mean '{stems[near[0]]}'?" if near else ""


_OS_HINTS = {
    errno.ENOSPC: "the disk is full: free some space or choose another --project folder",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another --project folder",
    errno.EFBIG: "the file would be larger than allowed here (ulimit -f, or the file system): choose another --project",
    errno.ENOMEM: "memory ran out: use a smaller --batch-size, fewer --workers, no --cache",
    errno.EROFS: "the file system is read-only: choose another --project folder",
    errno.EACCES: "permission denied: choose a folder you may write to (--project)",
    errno.EPERM: "not permitted: choose a folder you may write to (--project)",
    errno.ENOENT: "it or its folder is not there any more: was it removed during the run?",
    errno.ENAMETOOLONG: "the name is longer than the file system allows",
    errno.ELOOP: "symbolic links lead in a circle",
}


def explain_os_error(error: OSError) -> str | None:
    """One line for the faults of disks and permissions; None for an OSError that is more likely a bug."""
    hint = _OS_HINTS.get(error.errno or 0)
    return f"{error.filename or 'cannot write'}: {hint}" if hint else None


_MEMORY_SIGNS = ("out of memory", "can't allocate memory", "Insufficient memory", "Unable to allocate")


def explain_memory_error(error: Exception) -> str | None:
    """One line when the allocator of Python, numpy, OpenCV or torch (CPU or GPU) gave up; None for another error.

    Errors are told apart by their text: neither torch nor OpenCV is imported here.
    """
    reason = (str(error).strip().splitlines() or [""])[0][:200]
    if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in _MEMORY_SIGNS):
        return None
    detail = f" ({reason})" if reason else ""
    return f"memory ran out{detail}: use a smaller --batch-size or --imgsz, fewer --workers, no --cache"


def explain_lost_worker(error: Exception) -> str | None:
    """One line for torch's error about a loader process that died, which its signal handler raises wherever the program
    stands; None for another error."""
    if "DataLoader worker (pid" not in str(error):  # without it, the worker tells of an error of its own
        return None
    return (
        f"a data loading process died ({str(error).splitlines()[0]}): most often memory is short or, in a container, "
        "/dev/shm is (docker run --shm-size 8g); use fewer --workers, or --workers 0 (a training goes on with --resume)"
    )


_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "remote worker", "NCCL", "Broken pipe")
_DISTRIBUTED_ERRORS = {"DistBackendError", "DistNetworkError", "DistStoreError"}


def explain_lost_peer(error: Exception) -> str | None:
    """One line for what gloo and NCCL raise when another process of the training is gone; None for another error, and
    in a run of one process."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if not kinds & _DISTRIBUTED_ERRORS and not any(sign in str(error) for sign in _LOST_PEER):
        return None
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    reason = reason.rsplit("] ", 1)[-1].split(". ")[0][:200]  # without torch's own source file, and its advice
    return (
        f"lost contact with another process of this training ({reason}): it has ended, and its own message says why; "
        "the checkpoints of completed epochs are whole: go on with --resume"
    )


def run_cli(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a script's ``main(argv)`` and turn what the user can mend into one line and an exit status.

    Returns 0 (or what main returned), 2 for a UserError, a full disk or exhausted memory, 130 after Ctrl-C,
    143 after SIGTERM, 129 after SIGHUP. ``--debug`` anywhere in argv keeps tracebacks. Bugs propagate untouched.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    _share_the_cores()
    with sigterm_as_interrupt() as terminated:
        return _guarded(main, argv, terminated)


SPINS = ("GOMP_SPINCOUNT", "10000")
"""Setting of GNU's OpenMP: so often a thread that waits looks again before it sleeps."""


def _share_the_cores() -> None:
    """Let torch's threads sleep soon where they wait for one another, if torch is not loaded yet.

    By default GNU's OpenMP spins for a millisecond and more. With another program on the same cores, such as a loader
    process, the thread that is waited for then does not run: two detect.py on two cores took 210 to 290 ms an image
    each, and 107 with this, where one alone takes 34 either way. A setting of the user's stays.
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault(*SPINS)


def end_process(status: int) -> NoReturn:
    """End the program. After a success at once: all is written, and to take Python, torch and CUDA apart piece by piece
    takes a second or more. What was registered for the end (it ends loader processes) is run."""
    if status == 0:
        atexit._run_exitfuncs()
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:  # the reader left
            pass
        os._exit(0)
    sys.exit(status)


def _guarded(main: Callable[[Sequence[str]], int | None], argv: list[str], terminated: Termination) -> int:
    debug = "--debug" in argv
    try:
        return main(argv) or 0
    except UserError as error:
        if debug:
            raise
        _say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt as error:
        if debug:
            raise
        word, status = ("terminated", 128 + terminated.number) if terminated.is_set() else ("interrupted", 130)
        _say(f"{word}{f': {error}' if str(error) else ''}")
        return status
    except BrokenPipeError:  # `detect.py ... | head`: the reader left, nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ModuleNotFoundError as error:
        package = REQUIRED.get((error.name or "").partition(".")[0])
        if debug or package is None:
            raise
        _say(
            f"error: {package} is not installed for {sys.executable}: run the python of the environment that has it "
            f"(.venv/bin/python after make setup), or pip install -r requirements.txt"
        )
        return ResourceError.exit_code
    except OSError as error:
        line = explain_os_error(error)
        if debug or line is None:
            raise
        _say(f"error: {line}")
        return ResourceError.exit_code
    except Exception as error:
        if terminated.is_set():  # libraries may turn the interrupt into an error of their own
            print("terminated", file=sys.stderr)
            return 128 + terminated.number
        line = explain_memory_error(error) or explain_lost_worker(error) or explain_lost_peer(error)
        if debug or line is None:
            raise
        _say(f"error: {line}")
        return ResourceError.exit_code


REQUIRED = {
    "torch": "torch", "torchvision": "torchvision", "numpy": "numpy", "cv2": "opencv-python-headless", "PIL": "pillow",
    "yaml": "PyYAML",
}  # fmt: skip
"""Modules that no command can do without, and the packages that hold them (requirements.txt)."""

MAX_LINE = 2000


def _say(line: str) -> None:
    """One line on stderr, by which process where there are several. It may quote file names and file contents: control
    characters are shown, not obeyed."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        line = f"rank {os.environ.get('RANK', '?')}: {line}"
    print(printable(line[:MAX_LINE]) + ("..." if len(line) > MAX_LINE else ""), file=sys.stderr)
