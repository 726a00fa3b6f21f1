"""Files: safe YAML with line numbers, writes that are whole or absent, run folders exp, exp2, exp3, ..."""

from __future__ import annotations

import glob
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from utils.errors import ConfigError, ResourceError

ROOT = Path(__file__).resolve().parents[1]
"""The repository's folder."""

EXPORTED_MODELS = (".onnx", ".torchscript", ".pt2", ".engine", "_openvino_model", "_ncnn_model")
"""How the names of files and folders of export.py end that are run as they are (the table is deploy/formats.py)."""

MAX_YAML_BYTES = 2_000_000
MAX_YAML_VALUES = 100_000  # the largest data sets have some 13,000 classes; this many are read in a few seconds
MAX_YAML_DEPTH = 50
MAX_YAML_DIGITS = 60  # beyond, a number costs more time than its text suggests, and no float holds it


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases (a few lines of them can expand to gigabytes) and without repeated keys; depth, count
    of values and length of numbers are bounded."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.MarkedYAMLError(problem="YAML aliases (*name) are not accepted here", problem_mark=mark)
        self._values += 1
        if self._values > MAX_YAML_VALUES:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_YAML_VALUES:,} values", problem_mark=mark)
        if self._depth == MAX_YAML_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_YAML_DEPTH} levels", problem_mark=mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        is_number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if is_number and len(node.value) > MAX_YAML_DIGITS:
            problem = f"a number of {len(node.value):,} characters"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError):  # !!int x, !!bool x, 2001-99-99
            problem = f"'{str(node.value)[:40]}' is no {node.tag.rpartition(':')[2]}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():  # else: !!map [a]
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a plain word", problem_mark=key_node.start_mark)
            key = key_node.value
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key '{key}' appears twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class YamlFile(dict):
    """A YAML mapping that knows its file and the line of each top-level key and of each item of its lists."""

    def __init__(self, data: dict, path: Path, lines: dict[tuple, int]) -> None:
        super().__init__(data)
        self.path = path
        self.lines = lines

    def where(self, *keys: Any) -> str:
        """``file:line`` of a key (or of ``key, index`` for a list's item), as far as it is known."""
        line = self.lines.get(tuple(keys)) or self.lines.get(tuple(keys[:1]))
        return f"{self.path}:{line}" if line else str(self.path)


def _key_lines(root: yaml.Node | None) -> dict[tuple, int]:
    lines: dict[tuple, int] = {}
    if not isinstance(root, yaml.MappingNode):
        return lines
    for key_node, value_node in root.value:
        lines[(key_node.value,)] = key_node.start_mark.line + 1
        if isinstance(value_node, yaml.SequenceNode):
            for index, item in enumerate(value_node.value):
                lines[(key_node.value, index)] = item.start_mark.line + 1
        elif isinstance(value_node, yaml.MappingNode):
            for sub_key, _ in value_node.value:
                lines[(key_node.value, sub_key.value)] = sub_key.start_mark.line + 1
    return lines


def load_yaml(path: str | Path) -> YamlFile:
    """Read a YAML mapping as plain data.

    Raises ConfigError, with file and line, for a missing file, a syntax error, a tag, an alias, a repeated key,
    a top level that is not a mapping, or more than the limits above.
    """
    path = Path(path)
    try:
        if not path.is_file() and path.exists():  # reading a pipe would wait for ever, /dev/zero never end
            raise ConfigError(f"{path}: cannot be read (not a file)")
        if path.stat().st_size > MAX_YAML_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_YAML_BYTES // 1_000_000} MB, not a configuration file")
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return parse_yaml(content.decode("utf-8"), path)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not a text file in UTF-8; save it as such") from None


def parse_yaml(text: str, path: Path) -> YamlFile:
    """:func:`load_yaml` of the text of ``path``."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            data = loader.construct_document(node) if node is not None else {}
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{path}:{line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines, found a {type(data).__name__}")
    return YamlFile(data, path, _key_lines(node))


def dump_yaml(data: dict) -> str:
    """Plain data as YAML text, keys in the order given."""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)


@contextmanager
def atomic_open(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path`` for binary writing; on success it is flushed, fsynced and renamed.

    A reader sees the old file or the whole new one, never a half. On any error the temporary file is removed and
    the old file stays as it was.
    """
    path = Path(path)
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        if error.filename is None and error.errno is not None:  # a failed write does not say to what
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_leftovers(*folders: Path, of: str = "", older_than: float = 0.0) -> None:
    """Remove the temporary files that a kill left in these folders, or those of one file's name. ``older_than``:
    seconds; above 0 for folders in which another process may be writing now."""
    newest = time.time() - older_than
    for folder in folders:
        for path in folder.glob(f".{glob.escape(of)}*.tmp"):
            try:
                if path.stat().st_mtime <= newest:
                    path.unlink()
            except OSError:  # gone already, or not ours
                continue


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Write a whole text (UTF-8) or bytes file through :func:`atomic_open`."""
    with atomic_open(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def new_run_dir(project: str | Path, name: str, exist_ok: bool = False) -> Path:
    """Create and return ``project/name``, or name2, name3, ... when it exists (``exist_ok`` reuses it).

    Raises ResourceError when the folder cannot be made.
    """
    project = Path(project)
    try:
        project.mkdir(parents=True, exist_ok=True)
        if exist_ok:
            (project / name).mkdir(exist_ok=True)
            refuse_links(project / name)
            return project / name
        number = 1
        while True:
            folder = project / (name if number == 1 else f"{name}{number}")
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                number += 1
    except OSError as error:
        raise ResourceError(f"{project / name}: cannot make this folder ({error.strerror}); use --project") from None


def refuse_links(run_dir: Path) -> None:
    """Raise ResourceError for a link in a run's folder that leads out of it: a run that writes there again would
    replace what it points to. (The folder itself may be a link.)"""
    inside = os.path.join(os.path.realpath(run_dir), "")
    for pattern in ("*", "*/*", "*/*/*"):
        for path in run_dir.glob(pattern):
            if path.is_symlink() and not os.path.realpath(path).startswith(inside):
                raise ResourceError(f"{path}: a link out of the run's folder; remove it or use another --name")


def find_file(name: str | Path, folders: tuple[str, ...] = ("data", "models")) -> Path | None:
    """The file called ``name``: as given, else below the repository's folders (users write ``--cfg yolov5s.yaml``).

    Returns None when there is none; raises ConfigError when several match.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_absolute() or str(name) == "":
        return None
    if (ROOT / path).is_file():
        return ROOT / path
    found = sorted({p for folder in folders for p in (ROOT / folder).rglob(path.name) if p.is_file()})
    found = [p for p in found if str(p).endswith(str(path))]
    if len(found) > 1:
        raise ConfigError(f"{name}: several files match, give a path: {', '.join(map(str, found))}")
    return found[0] if found else None
