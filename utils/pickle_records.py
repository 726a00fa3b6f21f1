"""What a pickle is read into: plain values, and inert records in place of objects, classes and functions.

:mod:`utils.pickle_reader` makes them. Time and memory are bounded whatever a file claims: everything read spends from a
:class:`Budget`, and the result is a tree of limited depth and size, shared parts counted as often as they are used (so
that walking it is safe).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from utils.safe_names import printable

MAX_WORK = 2_000_000
"""Instructions and what calls cost. The largest checkpoints of YOLOv5 with optimizer state need a tenth."""
MAX_TREE = 4_000_000
MAX_DEPTH = 200
BYTES_PER_WORK = 32


class Refused(Exception):
    """The pickle is damaged or asks for what is not allowed. The text says which, without the file's name."""


@dataclass(frozen=True, slots=True)
class Named:
    """A class or function that the file names; only the name, ``module.attribute``."""

    name: str


@dataclass(slots=True, eq=False)
class Record:
    """An object of a class that the file names. ``state``: its attributes; ``other``: a state that is no dict;
    ``entries`` and ``items``: what it holds as a kind of dict or list; ``args``: what it was made with."""

    name: str
    args: tuple = ()
    state: dict[str, Any] = field(default_factory=dict)
    other: Any = None
    entries: dict = field(default_factory=dict)
    items: list = field(default_factory=list)

    @property
    def kind(self) -> str:
        """The class's name without its module."""
        return self.name.rpartition(".")[2]


class Budget:
    """What is left of the work that one file may cost."""

    def __init__(self, work: int = MAX_WORK) -> None:
        self.left = work

    def spend(self, work: int) -> None:
        """Raises Refused when nothing is left."""
        self.left -= work
        if self.left < 0:
            raise Refused("holds far more objects than a checkpoint does")


Call = Callable[[tuple, Budget], Any]
"""A function of the table: (arguments, budget) -> value. Checks its arguments; raises Refused."""


def show(name: str) -> str:
    """A name from the file for a message: one line, not endless."""
    return printable(name if len(name) <= 80 else f"{name[:77]}...")


def checked_key(key: Any) -> Any:
    """``key``, if hashing it is cheap: nested tuples take exponential time, huge numbers can be made to collide."""
    simple = key is None or isinstance(key, (str, bytes, float, Named))
    if simple or (isinstance(key, int) and abs(key) < 2**63):
        return key
    raise Refused(f"a {type(key).__name__.lower()} as the key of a dict, which no checkpoint needs")


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, Record):
        return (*value.args, *value.state.values(), value.other, *value.entries.values(), *value.items)
    return ()


def walk(root: Any) -> Iterator[Any]:
    """``root`` and everything in it, outermost first; each part once, however often it is used."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        value = waiting.pop()
        if id(value) not in seen:
            seen.add(id(value))
            yield value
            waiting.extend(reversed(list(_children(value))))


def records(root: Any) -> Iterator[Record]:
    """The Records anywhere in a value, also one for each class that is named without an object."""
    for value in walk(root):
        if isinstance(value, (Record, Named)):
            yield value if isinstance(value, Record) else Record(value.name)


def check_tree(root: Any) -> None:
    """Raise Refused when ``root`` contains itself, nests deeper than MAX_DEPTH, or unfolds to more than MAX_TREE.

    A part that is used twice counts twice: forty lists of the list before, twice, unfold to a million millions.
    """
    size: dict[int, int] = {}
    open_: dict[int, list] = {}  # value on the way from the root -> [children left, total so far]
    path = [root]
    while path:
        value = path[-1]
        own = id(value)
        if own not in open_:
            open_[own] = [iter(_children(value)), 1]
        children, _ = open_[own]
        for child in children:
            if id(child) in open_:
                raise Refused("an object that contains itself, which no checkpoint needs")
            if id(child) in size:
                open_[own][1] += size[id(child)]
            elif isinstance(child, (dict, list, tuple, Record)):
                path.append(child)
                break
            else:
                open_[own][1] += 1 + (len(child) // 16 if isinstance(child, (str, bytes)) else 0)
        if path[-1] is value:
            path.pop()
            size[own] = open_.pop(own)[1]
            if path:
                open_[id(path[-1])][1] += size[own]
            if size[own] > MAX_TREE:
                raise Refused("unfolds to far more objects than a checkpoint holds")
        elif len(path) > MAX_DEPTH:
            raise Refused(f"nested deeper than {MAX_DEPTH} levels")


# -- what stands in for classes of the standard library ----------------------------------------------------------------


def _dict_of(args: tuple, budget: Budget) -> dict:
    """OrderedDict(), OrderedDict(pairs)."""
    pairs = args[0] if len(args) == 1 else []
    if len(args) > 1 or not isinstance(pairs, (list, tuple)):
        raise Refused("damaged: a dict made of something else than pairs")
    budget.spend(len(pairs))
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise Refused("damaged: a dict made of something else than pairs")
    return {checked_key(key): value for key, value in pairs}


def _default_dict(args: tuple, budget: Budget) -> dict:
    return {}


def _set_of(args: tuple, budget: Budget) -> set:
    members = args[0] if len(args) == 1 else []
    if len(args) > 1 or not isinstance(members, (list, tuple)):
        raise Refused("damaged: a set made of something else than a list")
    budget.spend(len(members))
    return {checked_key(member) for member in members}


def _reconstructor(args: tuple, budget: Budget) -> Record:
    """copyreg._reconstructor(class, base, value): how protocols 0 and 1 make an object."""
    if len(args) != 3 or not isinstance(args[0], Named):
        raise Refused("damaged: an object of no class")
    return Record(args[0].name, args[1:])


def _path(flavour: type) -> Call:
    def build(args: tuple, budget: Budget) -> str:
        if not all(isinstance(part, str) for part in args):
            raise Refused("damaged: a path that is not text")
        budget.spend(len(args) + sum(map(len, args)) // BYTES_PER_WORK)
        return str(flavour(*(part.replace("\0", "?") for part in args)))

    return build


def _encode(args: tuple, budget: Budget) -> bytes:
    """_codecs.encode(text, "latin1"): how protocol 2 writes bytes."""
    if len(args) != 2 or not isinstance(args[0], str) or args[1] not in ("latin1", "latin-1"):
        raise Refused("damaged: bytes that are not latin1 text")
    budget.spend(len(args[0]) // BYTES_PER_WORK)
    return args[0].encode("latin-1", "replace")


CALLS: dict[str, Call] = {
    "collections.OrderedDict": _dict_of,
    "collections.defaultdict": _default_dict,
    "builtins.dict": _dict_of,
    "builtins.set": _set_of,
    "builtins.frozenset": _set_of,
    "copyreg._reconstructor": _reconstructor,
    "_codecs.encode": _encode,
    **{f"pathlib.{name}": _path(PurePosixPath) for name in ("Path", "PurePath", "PosixPath", "PurePosixPath")},
    **{f"pathlib.{name}": _path(PureWindowsPath) for name in ("WindowsPath", "PureWindowsPath")},
}
"""What a pickle may call: each name and the function of ours that stands in for it. Paths become text."""
