"""Pickles read as data. Nothing is imported and nothing of the file is run.

A pickle is a program for a small stack machine. This machine has the instructions that build numbers, text and
containers; a class or function that the file names becomes a :class:`Named`, an object of such a class a
:class:`Record` (its name and its attributes). The one instruction that could run something, the call, is looked up in
a table of functions written here and in :mod:`utils.torch_file`; a name that is not in the table refuses the file.

Time and memory are bounded whatever the file claims: every instruction and every call spends from a :class:`Budget`,
lengths are compared with what is left of the file, and the result is a tree of limited depth and size, shared parts
counted as often as they are used (so that walking it is safe).
"""

from __future__ import annotations

import pickle  # the names of the instructions; nothing of it is called
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from utils.safe_names import printable

MAX_WORK = 2_000_000
"""Instructions and what calls cost. The largest checkpoints of YOLOv5 with optimizer state need a tenth."""
MAX_TREE = 4_000_000
MAX_DEPTH = 200
MAX_LONG_BYTES = 64
MAX_LINE = 10_000
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


def read_pickle(
    data: bytes,
    calls: Mapping[str, Call] | None = None,
    persistent: Callable[[Any], Any] | None = None,
    start: int = 0,
    budget: Budget | None = None,
) -> tuple[Any, int]:
    """The value of the pickle that begins at ``start``, and where it ends.

    ``calls`` are allowed besides :data:`CALLS`; ``persistent`` turns the persistent ids of a torch file into storages.
    Raises Refused for anything that is damaged, too large, or calls what is not in the tables.
    """
    machine = _Machine(data, start, {**CALLS, **(calls or {})}, persistent, budget or Budget())
    try:
        value = machine.run()
    except (LookupError, ValueError, TypeError, OverflowError, struct.error) as error:
        raise Refused(f"damaged at byte {machine.at:,} of its pickle ({_short(error)})") from None
    _check_tree(value)
    return value, machine.at


def _short(error: Exception) -> str:
    return printable((str(error).splitlines() or [type(error).__name__])[0][:100])


class _Machine:
    """The stack machine; its instructions are in the table STEPS below."""

    def __init__(self, data: bytes, start: int, calls: Mapping[str, Call], persistent, budget: Budget) -> None:
        self.data, self.at, self.calls, self.persistent, self.budget = data, start, calls, persistent, budget
        self.stack: list = []
        self.marks: list[list] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        while True:
            self.budget.spend(1)
            code = self.take(1)
            if code == pickle.STOP:
                return self.pop()
            step = STEPS.get(code)
            if step is None:
                raise Refused(f"pickle instruction 0x{code.hex()}, which no checkpoint needs")
            step(self)

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes; a claim that goes beyond the end is refused before anything is allocated."""
        if not 0 <= count <= len(self.data) - self.at:
            raise Refused(f"cut short or damaged: {count:,} bytes claimed, {len(self.data) - self.at:,} are left")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def counted(self, layout: str) -> bytes:
        return self.take(self.number(layout))

    def line(self, encoding: str = "utf-8") -> str:
        end = self.data.find(b"\n", self.at, self.at + MAX_LINE)
        if end < 0:
            raise Refused("damaged: a line without end")
        return self.take(end + 1 - self.at)[:-1].decode(encoding, "replace")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise Refused("damaged: the stack is empty")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise Refused("damaged: the stack is empty")
        return self.stack[-1]

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def since_mark(self) -> list:
        if not self.marks:
            raise Refused("damaged: no mark")
        values, self.stack = self.stack, self.marks.pop()
        return values

    def put(self, index: int) -> None:
        if not 0 <= index < 2**32:
            raise Refused(f"damaged: memo number {index}")
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise Refused(f"damaged: memo number {index} was never stored")
        self.push(self.memo[index])

    def named(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise Refused("damaged: the name of a class is not text")
        self.push(Named(f"{_OLD_MODULES.get(module, module)}.{name}"))

    def call(self, target: Any, args: Any) -> None:
        """REDUCE and its relatives: only what the table holds."""
        if not isinstance(target, Named) or not isinstance(args, tuple):
            raise Refused("damaged: it calls something that is no function")
        function = self.calls.get(target.name)
        if function is None:
            raise Refused(f"calls {show(target.name)}, which is not allowed; nothing in the file was run")
        self.push(function(args, self.budget))

    def reduce(self) -> None:
        args = self.pop()
        self.call(self.pop(), args)

    def new_object(self) -> None:
        """NEWOBJ: an object of a class without running its constructor: a Record, or a plain dict or set."""
        args, target = self.pop(), self.pop()
        if not isinstance(target, Named) or not isinstance(args, tuple):
            raise Refused("damaged: an object of no class")
        if target.name in _PLAIN_CLASSES:
            self.push(self.calls[target.name](args, self.budget))
        else:
            self.push(Record(target.name, args))

    def new_object_with_keywords(self) -> None:
        keywords, args = self.pop(), self.pop()
        if keywords:
            raise Refused("an object made with keywords, which no checkpoint needs")
        self.call(self.pop(), args)

    def instance(self) -> None:
        """INST, of protocol 0: a call of the class named in the next two lines."""
        self.named(self.line(), self.line())
        target = self.pop()
        self.call(target, tuple(self.since_mark()))

    def object(self) -> None:
        """OBJ, of protocol 1: a call of the first value after the mark."""
        values = self.since_mark()
        self.call(values[0] if values else None, tuple(values[1:]))

    def build(self) -> None:
        """BUILD: the attributes of the object below. What is plain data already takes none."""
        state, target = self.pop(), self.top()
        if isinstance(target, Record):
            _set_state(target, state, self.budget)
        elif target is None or isinstance(target, (Named, str, bytes, int, float, tuple)):
            raise Refused(f"damaged: attributes for a {type(target).__name__.lower()}")

    def persist(self, identity: Any) -> None:
        if self.persistent is None:
            raise Refused("holds a reference to something outside the file")
        self.push(self.persistent(identity))

    def extend(self, values: list) -> None:
        target = self.top()
        if isinstance(target, Record):
            target = target.items
        if not isinstance(target, list):
            raise Refused("damaged: items for what is no list")
        target.extend(values)

    def set_items(self, flat: list) -> None:
        target = self.top()
        if isinstance(target, Record):
            target = target.entries
        if not isinstance(target, dict) or len(flat) % 2:
            raise Refused("damaged: entries for what is no dict")
        for key, value in zip(flat[::2], flat[1::2]):
            target[checked_key(key)] = value

    def add_items(self, values: list) -> None:
        target = self.top()
        if not isinstance(target, set):
            raise Refused("damaged: items for what is no set")
        target.update(map(checked_key, values))

    def last(self, count: int) -> list:
        return [self.pop() for _ in range(count)][::-1]

    def pop_or_unmark(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()


def show(name: str) -> str:
    """A name from the file for a message: one line, not endless."""
    return printable(name if len(name) <= 80 else f"{name[:77]}...")


def checked_key(key: Any) -> Any:
    """``key``, if hashing it is cheap: nested tuples take exponential time, huge numbers can be made to collide."""
    simple = key is None or isinstance(key, (str, bytes, float, Named))
    if simple or (isinstance(key, int) and abs(key) < 2**63):
        return key
    raise Refused(f"a {type(key).__name__.lower()} as the key of a dict, which no checkpoint needs")


def _set_state(record: Record, state: Any, budget: Budget) -> None:
    parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)  # (attributes, slots)
    for part in parts:
        if isinstance(part, dict):
            budget.spend(len(part))
            record.state.update((key, value) for key, value in part.items() if isinstance(key, str))
        elif part is not None:
            record.other = state


def _long(data: bytes) -> int:
    if len(data) > MAX_LONG_BYTES:
        raise Refused(f"a number of {len(data):,} bytes")
    return int.from_bytes(data, "little", signed=True)


def _text_number(line: str) -> int | bool:
    if line in ("00", "01"):
        return line == "01"
    if len(line) > 3 * MAX_LONG_BYTES:
        raise Refused(f"a number of {len(line):,} digits")
    return int(line.removesuffix("L"))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _quoted(line: str) -> str:
    if len(line) < 2 or line[0] != line[-1] or line[0] not in "'\"":
        raise Refused("damaged: text without quotes")
    return line[1:-1]


def _frame(machine: _Machine) -> None:
    if machine.number("<Q") > len(machine.data) - machine.at:
        raise Refused("cut short or damaged: a frame goes beyond the end")


def _protocol(machine: _Machine) -> None:
    if machine.number("<B") > pickle.HIGHEST_PROTOCOL:
        raise Refused("damaged, or of an unknown pickle protocol")


def _extension(machine: _Machine) -> None:
    raise Refused("refers to a registry of the program that wrote it (an extension code), which is not allowed")


STEPS: dict[bytes, Callable[[_Machine], Any]] = {
    pickle.PROTO: _protocol,
    pickle.FRAME: _frame,
    # numbers and text
    pickle.NONE: lambda m: m.push(None),
    pickle.NEWTRUE: lambda m: m.push(True),
    pickle.NEWFALSE: lambda m: m.push(False),
    pickle.BININT: lambda m: m.push(m.number("<i")),
    pickle.BININT1: lambda m: m.push(m.number("<B")),
    pickle.BININT2: lambda m: m.push(m.number("<H")),
    pickle.LONG1: lambda m: m.push(_long(m.counted("<B"))),
    pickle.LONG4: lambda m: m.push(_long(m.counted("<i"))),
    pickle.BINFLOAT: lambda m: m.push(m.number(">d")),
    pickle.INT: lambda m: m.push(_text_number(m.line())),
    pickle.LONG: lambda m: m.push(_text_number(m.line())),
    pickle.FLOAT: lambda m: m.push(float(m.line())),
    pickle.STRING: lambda m: m.push(_quoted(m.line())),
    pickle.UNICODE: lambda m: m.push(m.line("raw-unicode-escape")),
    pickle.BINSTRING: lambda m: m.push(_text(m.counted("<i"))),
    pickle.SHORT_BINSTRING: lambda m: m.push(_text(m.counted("<B"))),
    pickle.BINUNICODE: lambda m: m.push(_text(m.counted("<I"))),
    pickle.SHORT_BINUNICODE: lambda m: m.push(_text(m.counted("<B"))),
    pickle.BINUNICODE8: lambda m: m.push(_text(m.counted("<Q"))),
    pickle.BINBYTES: lambda m: m.push(m.counted("<I")),
    pickle.SHORT_BINBYTES: lambda m: m.push(m.counted("<B")),
    pickle.BINBYTES8: lambda m: m.push(m.counted("<Q")),
    pickle.BYTEARRAY8: lambda m: m.push(m.counted("<Q")),
    # the stack and the memo
    pickle.MARK: _Machine.mark,
    pickle.POP: _Machine.pop_or_unmark,
    pickle.POP_MARK: _Machine.since_mark,
    pickle.DUP: lambda m: m.push(m.top()),
    pickle.PUT: lambda m: m.put(_text_number(m.line())),
    pickle.BINPUT: lambda m: m.put(m.number("<B")),
    pickle.LONG_BINPUT: lambda m: m.put(m.number("<I")),
    pickle.MEMOIZE: lambda m: m.put(len(m.memo)),
    pickle.GET: lambda m: m.get(_text_number(m.line())),
    pickle.BINGET: lambda m: m.get(m.number("<B")),
    pickle.LONG_BINGET: lambda m: m.get(m.number("<I")),
    # containers
    pickle.EMPTY_LIST: lambda m: m.push([]),
    pickle.EMPTY_DICT: lambda m: m.push({}),
    pickle.EMPTY_TUPLE: lambda m: m.push(()),
    pickle.EMPTY_SET: lambda m: m.budget.spend(4) or m.push(set()),  # four times the memory of other containers
    pickle.LIST: lambda m: m.push(m.since_mark()),
    pickle.TUPLE: lambda m: m.push(tuple(m.since_mark())),
    pickle.TUPLE1: lambda m: m.push(tuple(m.last(1))),
    pickle.TUPLE2: lambda m: m.push(tuple(m.last(2))),
    pickle.TUPLE3: lambda m: m.push(tuple(m.last(3))),
    pickle.FROZENSET: lambda m: m.push({checked_key(key) for key in m.since_mark()}),
    pickle.DICT: lambda m: _dict_since_mark(m),
    pickle.APPEND: lambda m: m.extend([m.pop()]),
    pickle.APPENDS: lambda m: m.extend(m.since_mark()),
    pickle.SETITEM: lambda m: m.set_items(m.last(2)),
    pickle.SETITEMS: lambda m: m.set_items(m.since_mark()),
    pickle.ADDITEMS: lambda m: m.add_items(m.since_mark()),
    # names, calls, objects
    pickle.GLOBAL: lambda m: m.named(m.line(), m.line()),
    pickle.STACK_GLOBAL: lambda m: m.named(*m.last(2)),
    pickle.REDUCE: _Machine.reduce,
    pickle.NEWOBJ: _Machine.new_object,
    pickle.NEWOBJ_EX: _Machine.new_object_with_keywords,
    pickle.INST: _Machine.instance,
    pickle.OBJ: _Machine.object,
    pickle.BUILD: _Machine.build,
    pickle.PERSID: lambda m: m.persist(m.line()),
    pickle.BINPERSID: lambda m: m.persist(m.pop()),
    pickle.EXT1: _extension,
    pickle.EXT2: _extension,
    pickle.EXT4: _extension,
}
"""Every instruction that is carried out. Missing on purpose: the out-of-band buffers of protocol 5."""


def _dict_since_mark(machine: _Machine) -> None:
    flat = machine.since_mark()
    machine.push({})
    machine.set_items(flat)


# -- the calls every pickle may make ---------------------------------------------------------------------------------

_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "pathlib._local": "pathlib"}


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

_PLAIN_CLASSES = {"collections.OrderedDict", "collections.defaultdict", "builtins.dict", "builtins.set"}


# -- the result -------------------------------------------------------------------------------------------------------


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


def _check_tree(root: Any) -> None:
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
