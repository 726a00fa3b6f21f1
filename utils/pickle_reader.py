"""Pickles read as data. Nothing is imported and nothing of the file is run.

A pickle is a program for a small stack machine. This machine has the instructions that build numbers, text and
containers; a class or function that the file names becomes a :class:`Named`, an object of such a class a
:class:`Record` (its name and its attributes). The one instruction that could run something, the call, is looked up in
a table of functions, in :mod:`utils.pickle_records` and :mod:`utils.torch_tensors`; a name that is not in the table
refuses the file. Lengths are compared with what is left of the file before anything is allocated.
"""

from __future__ import annotations

import pickle  # the names of the instructions; nothing of it is called
import struct
from collections.abc import Callable, Mapping
from typing import Any

from utils.pickle_records import CALLS, Budget, Call, Named, Record, Refused, check_tree, checked_key, show

MAX_PICKLE = 64_000_000
"""Bytes. The largest checkpoints of YOLOv5 have half a million; tensors are kept elsewhere."""
MAX_LONG_BYTES = 64
MAX_LINE = 10_000
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "pathlib._local": "pathlib"}
_PLAIN_CLASSES = {"collections.OrderedDict", "collections.defaultdict", "builtins.dict", "builtins.set"}


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
    check_tree(value)
    return value, machine.at


def _short(error: Exception) -> str:
    return show((str(error).splitlines() or [type(error).__name__])[0][:100])


class _Machine:
    """The stack machine; its instructions are in the table STEPS below."""

    def __init__(self, data: bytes, start: int, calls: Mapping[str, Call], persistent, budget: Budget) -> None:
        self.data, self.start, self.at = data, start, start
        self.calls, self.persistent, self.budget = calls, persistent, budget
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
        if self.at - self.start > MAX_PICKLE:
            raise Refused(f"its pickle is larger than {MAX_PICKLE // 1_000_000} MB, no checkpoint has that")
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
