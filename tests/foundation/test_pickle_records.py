"""Pickles as data: what is built, what is refused, and that nothing runs, grows or hangs."""

from __future__ import annotations

import argparse
import collections
import copyreg
import os
import pickle
import struct
import time
import tracemalloc
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest

from utils.pickle_reader import read_pickle
from utils.pickle_records import Budget, Named, Record, Refused, records


def read(data: bytes, **options):
    return read_pickle(data, **options)[0]


def refusal(data: bytes) -> str:
    with pytest.raises(Refused) as caught:
        read(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


VALUES = [
    None,
    True,
    [1, -1, 255, 256, 65536, -(2**31), 2**40, -(2**100), 0.5, float("inf")],
    "text with ümlauts \U0001f600",
    b"bytes",
    {"a": {"b": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]}, 3: 4.5, None: False},
    {"set", "of", "words"},
    "x" * 300,
    b"y" * 300,
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
def test_plain_values_come_back(value: object, protocol: int) -> None:
    assert read(pickle.dumps(value, protocol)) == value


def test_containers_of_the_standard_library_become_plain() -> None:
    for protocol in (2, 4):
        ordered = collections.OrderedDict(b=1, a=2)
        ordered.extra = 5  # as torch does with _metadata
        assert read(pickle.dumps(ordered, protocol)) == {"b": 1, "a": 2}
        assert read(pickle.dumps(collections.defaultdict(list, a=[1]), protocol)) == {"a": [1]}
        assert read(pickle.dumps(frozenset({1, 2}), protocol)) == {1, 2}
        assert read(pickle.dumps(PurePosixPath("/data/x.yaml"), protocol)) == "/data/x.yaml"
        assert read(pickle.dumps(PureWindowsPath("C:\\runs\\exp"), protocol)) == "C:\\runs\\exp"
    windows = pickle.dumps(PureWindowsPath("C:\\runs"), 2).replace(b"PureWindowsPath", b"WindowsPath")
    assert read(windows) == "C:\\runs"


class Plain:
    def __init__(self) -> None:
        self.a, self.b = 1, [2]


class Slots:
    __slots__ = ("a",)

    def __init__(self) -> None:
        self.a = 3


class Words(dict):
    pass


class Numbers(list):
    pass


def test_objects_become_records_and_classes_names() -> None:
    found = read(pickle.dumps([Plain(), Plain, argparse.Namespace(x=1)], 2))
    assert isinstance(found[0], Record) and found[0].name == f"{__name__}.Plain" and found[0].kind == "Plain"
    assert found[0].state == {"a": 1, "b": [2]}
    assert found[1] == Named(f"{__name__}.Plain")
    assert found[2].name == "argparse.Namespace" and found[2].state == {"x": 1}
    assert read(pickle.dumps(Slots(), 2)).state == {"a": 3}
    assert read(pickle.dumps(Words(k=1), 2)).entries == {"k": 1}
    assert read(pickle.dumps(Numbers([1, 2]), 2)).items == [1, 2]
    assert read(pickle.dumps(Plain(), 0)).state == {"a": 1, "b": [2]}  # by copyreg._reconstructor
    assert [r.kind for r in records({"x": [found[0]], "y": (found[2],)})] == ["Plain", "Namespace"]


def test_one_object_used_twice_is_one_record() -> None:
    shared = Plain()
    found = read(pickle.dumps([shared, shared], 2))
    assert found[0] is found[1]


class Call:
    def __init__(self, function, *args) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple:
        return self.function, self.args


def hostile(mark: Path) -> dict[str, object]:
    """Name of what is called -> an object that would do it when unpickled."""
    command = f"touch {mark}"
    return {
        "posix.system": Call(os.system, command),
        "builtins.eval": Call(eval, f"open({str(mark)!r}, 'w')"),
        "builtins.exec": Call(exec, f"open({str(mark)!r}, 'w')"),
        "builtins.getattr": Call(getattr, "x", "upper"),
        "io.open": Call(open, str(mark), "w"),
        "posix.remove": Call(os.remove, str(mark)),
        "copyreg._reduce_ex": Call(copyreg._reduce_ex, "x", 2),
        "builtins.__import__": Call(__import__, "antigravity"),
        "copyreg.add_extension": Call(copyreg.add_extension, "os", "system", 1),
    }


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("name", list(hostile(Path("x"))))
def test_calls_outside_the_list_are_refused_by_name(name: str, protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    payload = hostile(mark)[name]
    for content in (payload, [{"deep": (payload,)}], stateful(payload)):
        assert f"calls {name}, which is not allowed; nothing in the file was run" in refusal(
            pickle.dumps(content, protocol)
        )
    assert not mark.exists()


def stateful(value: object) -> Plain:
    """An object whose attributes hold ``value``."""
    plain = Plain()
    plain.a = value
    return plain


TEXT = b"X\x04\x00\x00\x00true"
BY_HAND = {
    "REDUCE": b"cposix\nsystem\n" + TEXT + b"\x85R.",
    "INST": b"(S'true'\niposix\nsystem\n.",
    "OBJ": b"(cposix\nsystem\n" + TEXT + b"o.",
    "NEWOBJ_EX": b"\x80\x04cposix\nsystem\n" + TEXT + b"\x85}\x92.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + TEXT + b"\x85R.",
    "by the memo": b"cposix\nsystem\nq\x010h\x01" + TEXT + b"\x85R.",
}


@pytest.mark.parametrize("way", BY_HAND)
def test_every_kind_of_call_is_refused(way: str) -> None:
    assert "calls posix.system, which is not allowed" in refusal(BY_HAND[way])


OTHERS = {
    "extension codes": (b"\x82\x01.", "an extension code"),
    "long extension codes": (b"\x84\x01\x00\x00\x00.", "an extension code"),
    "out-of-band buffers": (b"\x97.", "instruction 0x97"),
    "persistent ids": (b"K\x01Q.", "outside the file"),
    "text persistent ids": (b"P../../x\n.", "outside the file"),
    "an object with keywords": (b"c__main__\nA\n)}X\x01\x00\x00\x00aK\x01s\x92.", "made with keywords"),
    "attributes for a class": (b"cbuiltins\nset\n}b.", "attributes for a named"),
    "attributes for a number": (b"K\x01}b.", "attributes for a int"),
    "a tuple as a key": (b"}K\x01K\x02\x86K\x03s.", "a tuple as the key"),
    "a huge number as a key": (b"}\x8a\x09" + b"\xff" * 8 + b"\x00K\x03s.", "a int as the key"),
    "an unknown protocol": (b"\x80\x40K\x01.", "protocol"),
    "a memo number that was not stored": (b"h\x05.", "memo number 5"),
    "a negative memo number": (b"K\x01p-4\n.", "memo number -4"),
    "an empty stack": (b".", "stack is empty"),
    "no mark": (b"K\x01t.", "no mark"),
    "a name that is not text": (b"\x80\x04K\x01K\x02\x93.", "is not text"),
    "a call of a number": (b"K\x01)R.", "calls something that is no function"),
    "a call with odd arguments": (b"ccollections\nOrderedDict\nK\x01R.", "no function"),
    "nothing": (b"", "cut short"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_tricks_are_refused(case: str) -> None:
    data, words = OTHERS[case]
    assert words in refusal(data)


CLAIMS = {
    "text": b"X\xff\xff\xff\xff",
    "long text": b"\x8d" + struct.pack("<Q", 2**40),
    "bytes": b"B\xff\xff\xff\xff",
    "long bytes": b"\x8e" + struct.pack("<Q", 2**62),
    "a bytearray": b"\x96" + struct.pack("<Q", 2**63),
    "a number": b"\x8b\xff\xff\xff\x7f",
    "a negative length": b"\x8b\xff\xff\xff\xff",
    "a frame": b"\x95" + struct.pack("<Q", 2**60),
    "a memo number": b"K\x01r\xff\xff\xff\xff.",
    "a memo number in text": b"K\x01p99999999999999999999\n.",
    "digits": b"I" + b"9" * 5000 + b"\n.",
    "a line": b"c" + b"x" * 200_000 + b"\n.",
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_claims_allocate_nothing(claim: str) -> None:
    tracemalloc.start()
    start = time.process_time()
    try:
        read(CLAIMS[claim])
    except Refused as error:
        assert "\n" not in str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000 and time.process_time() - start < 1


def doubled(levels: int, pair: bytes) -> bytes:
    """``levels`` containers, each of which holds the one before twice."""
    return b"]" + b"q\x00" + (b"h\x00h\x00" + pair + b"q\x00") * levels + b"."


BOMBS = {
    "tuples": doubled(60, b"\x86"),
    "sets of tuples": b"(" + doubled(60, b"\x86")[:-1] + b"\x91.",
    "deep lists": b"]" * 400_000 + b"a" * 399_999 + b".",
    "deep tuples": b")" + b"\x85" * 400_000 + b".",
    "marks": b"(" * 2_100_000 + b".",
    "empty sets": b"\x8f" * 2_100_000 + b".",
    "copies by calls": b"X" + struct.pack("<I", 1_000_000) + b"a" * 1_000_000 + b"q\x00X\x06\x00\x00\x00latin1\x86q\x01"
    b"c_codecs\nencode\nq\x02" + b"h\x02h\x01R" * 500_000 + b".",
    "one text many times": b"X" + struct.pack("<I", 100_000) + b"a" * 100_000 + b"q\x00](" + b"h\x00" * 900_000 + b"e.",
    "a list in itself": b"]q\x00h\x00a.",
    "a record in itself": b"c__main__\nA\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_cost_little(bomb: str) -> None:
    start = time.process_time()
    text = refusal(BOMBS[bomb])
    assert any(word in text for word in ("far more objects", "deeper than", "contains itself", "as the key")), text
    assert time.process_time() - start < 10


def test_a_budget_can_be_shared_by_several_pickles() -> None:
    budget = Budget(10)
    value, end = read_pickle(b"K\x01K\x020." + b"K\x05.", budget=budget)
    assert value == 1
    assert read_pickle(b"K\x01K\x020." + b"K\x05.", start=end, budget=budget)[0] == 5
    with pytest.raises(Refused, match="far more objects"):
        read_pickle(b"K\x010" * 5 + b"N.", budget=budget)


def test_every_cut_and_flip_is_refused_or_read() -> None:
    whole = pickle.dumps({"a": [Plain(), {1, 2}, (1.5, "x")], "b": collections.OrderedDict(c=b"z")}, 2)
    for length in range(len(whole)):
        refusal(whole[:length])
    for position in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[position // 8] ^= 1 << position % 8
        try:
            read(bytes(flipped))
        except Refused as error:
            assert "\n" not in str(error)
