"""The two old forms of ``torch.save``: plain pickles (torch before 1.6) and a tar (before 0.2), read as data."""

from __future__ import annotations

import struct
import tarfile
from typing import Any, BinaryIO

import torch
from torch import Tensor

from utils.pickle_reader import read_pickle
from utils.pickle_records import Budget, Named, Refused
from utils.torch_tensors import Storage, Tensors, damaged, described, flat_tensor, key_of, same_storage

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The first pickle of a file of torch before 1.6: a number that says so."""


def part_of(storage: Any, place: tuple) -> Storage:
    """``place`` = (offset, count): early versions of torch had storages that were parts of others."""
    if not isinstance(storage, Storage) or len(place) != 2 or not all(type(n) is int and n >= 0 for n in place):
        raise Refused("damaged: the description of a storage")
    if sum(place) > len(storage.flat):
        raise Refused("a part of a storage reaches beyond it")
    return Storage(storage.flat[place[0] : sum(place)])


class LegacyFile:
    """Five pickles (magic number, version, machine, content, keys of the storages), then each storage's numbers."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.size = size
        file.seek(0)
        self.data = file.read()
        self.budget = Budget()
        self.storages: dict[str, Storage] = {}
        self.left = size

    def read(self) -> Any:
        at = len(LEGACY_MAGIC)
        version, at = read_pickle(self.data, start=at, budget=self.budget)
        machine, at = read_pickle(self.data, start=at, budget=self.budget)
        if version != 1001 or not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise Refused("of an unknown version of torch's old form, or written on a big-endian machine")
        calls = Tensors(self.size).calls
        content, at = read_pickle(self.data, calls, self.storage, at, self.budget)
        keys, at = read_pickle(self.data, start=at, budget=self.budget)
        if not isinstance(keys, list) or sorted(map(key_of, keys)) != sorted(self.storages):
            raise damaged(self.size)
        for key in keys:
            at = self._fill(self.storages[key_of(key)].flat, at)
        return content

    def storage(self, identity: Any) -> Storage | Named:
        """A storage of zeros, filled later; its claim is compared with what the file has."""
        if isinstance(identity, tuple) and len(identity) == 4 and identity[0] == "module":
            if not isinstance(identity[1], Named):
                raise Refused("damaged: the source text of no class")
            return identity[1]  # beside it the file has the class's source text, which is left alone
        dtype, key, count = described(identity)
        if key not in self.storages:
            self.left -= count * dtype.itemsize
            if self.left < 0:
                raise Refused(f"its storages claim more than the {self.size:,} bytes of the file")
            self.storages[key] = Storage(torch.zeros(count, dtype=dtype))
        storage = same_storage(self.storages[key], dtype, count)
        if len(identity) == 5 or identity[5] is None:
            return storage
        return part_of(storage, identity[5][1:] if isinstance(identity[5], tuple) else ())

    def _fill(self, flat: Tensor, at: int) -> int:
        """Copy a storage's numbers, which follow their count, from position ``at``; returns where they end."""
        end = at + 8 + len(flat) * flat.element_size()
        if end > self.size or struct.unpack("<q", self.data[at : at + 8])[0] != len(flat):
            raise damaged(self.size)
        flat.copy_(flat_tensor(self.data[at + 8 : end], flat.dtype))
        return end


class TarFile:
    """torch before 0.2: a tar of ``storages``, ``tensors`` and ``pickle``, the content."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.budget = Budget()
        self.objects: dict[str, Any] = {}  # storages and tensors by key

    def read(self) -> Any:
        try:
            self.file.seek(0)
            with tarfile.open(fileobj=self.file, mode="r:") as archive:
                parts = {name: self._member(archive, name) for name in ("storages", "tensors", "pickle")}
        except (tarfile.TarError, EOFError, ValueError, LookupError):
            raise damaged(self.size) from None
        self._storages(parts["storages"])
        tensors = Tensors(self.size)
        self._tensors(parts["tensors"], tensors)
        return read_pickle(parts["pickle"], tensors.calls, self._object, 0, self.budget)[0]

    def _member(self, archive: tarfile.TarFile, name: str) -> bytes:
        for _ in range(100):  # torch wrote three
            member = archive.next()
            if member is None:
                break
            if member.name.removeprefix("./") == name and member.isreg() and not member.issparse():
                stream = archive.extractfile(member)
                return stream.read(min(member.size, self.size))
        raise damaged(self.size)

    def _object(self, key: Any) -> Any:
        if isinstance(key, tuple) and key and isinstance(key[0], Named):
            return key[0]  # a class, beside it its source text
        if key_of(key) not in self.objects:
            raise Refused("refers to a tensor that is not in the file")
        return self.objects[key_of(key)]

    def _count(self, data: bytes) -> tuple[int, int]:
        count, at = read_pickle(data, budget=self.budget)
        if type(count) is not int or not 0 <= count <= len(data):
            raise damaged(self.size)
        return count, at

    def _unpack(self, layout: str, data: bytes, at: int) -> tuple[tuple, int]:
        end = at + struct.calcsize(layout)
        if end > len(data):
            raise damaged(self.size)
        return struct.unpack(layout, data[at:end]), end

    def _storages(self, data: bytes) -> None:
        count, at = self._count(data)
        for _ in range(count):
            entry, at = read_pickle(data, start=at, budget=self.budget)
            if not isinstance(entry, tuple) or len(entry) != 3:
                raise damaged(self.size)
            key, location, kind = entry
            dtype, key, _ = described(("storage", kind, key, location, 0))
            (length,), at = self._unpack("<q", data, at)
            end = at + length * dtype.itemsize
            if not at <= end <= len(data):
                raise damaged(self.size)
            self.objects[key] = Storage(flat_tensor(data[at:end], dtype))
            at = end
        views, at = read_pickle(data, start=at, budget=self.budget)
        for view in views if isinstance(views, list) else []:
            if not isinstance(view, tuple) or len(view) != 4:
                raise damaged(self.size)
            self.objects[key_of(view[0])] = part_of(self._object(view[1]), view[2:])

    def _tensors(self, data: bytes, tensors: Tensors) -> None:
        count, at = self._count(data)
        for _ in range(count):
            entry, at = read_pickle(data, start=at, budget=self.budget)
            if not isinstance(entry, tuple) or len(entry) != 3:
                raise damaged(self.size)
            (dims, _), at = self._unpack("<ii", data, at)
            if not 0 <= dims <= 16:
                raise damaged(self.size)
            numbers, at = self._unpack(f"<{2 * dims + 1}q", data, at)
            args = (self._object(entry[1]), numbers[-1], numbers[:dims], numbers[dims:-1])
            self.objects[key_of(entry[0])] = tensors.tensor(args, self.budget)
