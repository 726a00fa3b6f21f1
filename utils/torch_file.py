"""Files of ``torch.save`` read as data.

Tensors come back as tensors, classes as inert records (:mod:`utils.pickle_records`). Nothing is extracted to disk, no
code runs, and nothing is allocated on the word of the file: compressed archives are refused, and what an entry or a
storage claims is compared with the bytes that are there.
"""

from __future__ import annotations

import errno
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from utils.errors import CheckpointError
from utils.pickle_reader import MAX_PICKLE, read_pickle
from utils.pickle_records import Refused, show
from utils.torch_legacy import LEGACY_MAGIC, LegacyFile, TarFile
from utils.torch_tensors import Storage, Tensors, damaged, described, flat_tensor, same_storage

MAX_DIRECTORY = 16_000_000
"""Bytes of a zip's table of contents; the largest checkpoints have half a million."""


def read_torch_file(path: str | Path) -> Any:
    """The content of a file that ``torch.save`` wrote: plain values, tensors on the CPU, and Records for the rest.

    Raises CheckpointError, in one line, for a file that is missing, empty, cut short, damaged (checksums are
    compared), too large inside, none of torch's, or that calls what is not in the list.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # a pipe would be waited for, /dev/zero not end
            raise Refused("cannot be read (not a file)")
        with path.open("rb") as file:
            return read_torch_stream(file)
    except Refused as error:
        raise CheckpointError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_torch_stream(file: BinaryIO) -> Any:
    """The same from an open file. Raises Refused."""
    size = file.seek(0, 2)
    file.seek(0)
    start = file.read(512)
    if size == 0:
        raise Refused("is empty")
    if start.startswith(b"PK"):
        return _ZipFile(file, size).read()
    if start.startswith(LEGACY_MAGIC):
        return LegacyFile(file, size).read()
    if start[257:262] == b"ustar":
        return TarFile(file, size).read()
    raise Refused("not a checkpoint (not a file that torch.save wrote)")


class _ZipFile:
    """ROOT/data.pkl is the pickle, ROOT/data/KEY the numbers of one storage, uncompressed."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.storages: dict[str, Storage] = {}

    def read(self) -> Any:
        try:
            _check_directory(self.file, self.size)
            with zipfile.ZipFile(self.file) as archive:
                self.archive, self.entries = archive, self._checked_entries(archive)
                self.root = self._root()
                pickled = self._bytes(f"{self.root}data.pkl")
                return read_pickle(bytes(pickled), Tensors(self.size).calls, self.storage)[0]
        except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, ValueError, OSError) as e:
            if isinstance(e, OSError) and e.errno not in (
                None,
                errno.EINVAL,
            ):  # a position before the start of the file
                raise
            raise damaged(self.size) from None
        except (RuntimeError, LookupError, TypeError):  # zipfile, on headers that contradict each other
            raise damaged(self.size) from None

    def _checked_entries(self, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
        """By name; nothing twice, nothing compressed or encrypted, together no more than the file."""
        entries: dict[str, zipfile.ZipInfo] = {}
        total = 0
        for entry in archive.infolist():
            if entry.filename in entries:
                raise Refused(f"an archive with two entries named {show(entry.filename)}")
            if ".." in entry.filename.replace("\\", "/").split("/") or entry.filename.startswith(("/", "\\")):
                raise Refused(f"an archive with an entry named {show(entry.filename)}, which points out of it")
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise Refused("not a checkpoint (a compressed or encrypted archive; torch.save writes neither)")
            total += entry.file_size
            entries[entry.filename] = entry
        if total > self.size:
            raise Refused(f"an archive of {self.size:,} bytes that claims to hold {total:,}")
        return entries

    def _root(self) -> str:
        roots = [name.removesuffix("data.pkl") for name in self.entries if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise Refused("not a checkpoint (an archive of something else)")
        root = roots[0]
        if f"{root}constants.pkl" in self.entries:
            raise Refused("a TorchScript program, not a checkpoint; give the .pt that it was exported from")
        if f"{root}byteorder" in self.entries and bytes(self._bytes(f"{root}byteorder")) == b"big":
            raise Refused("was written on a big-endian machine, which is not supported")
        if self.entries[f"{root}data.pkl"].file_size > MAX_PICKLE:
            raise Refused(f"its pickle is larger than {MAX_PICKLE // 1_000_000} MB, no checkpoint has that")
        return root

    def _bytes(self, name: str) -> bytearray:
        """An entry's content; its length is no more than the file's, its checksum is compared."""
        entry = self.entries[name]
        content, at = bytearray(entry.file_size), 0
        with self.archive.open(entry) as stream:
            while block := stream.read(1 << 20):
                content[at : at + len(block)] = block
                at += len(block)
        if at != entry.file_size:
            raise zipfile.BadZipFile
        return content

    def storage(self, identity: Any) -> Storage:
        """The storage that a persistent id means; the same one for the same key."""
        dtype, key, count = described(identity)
        name = f"{self.root}data/{key}"
        if key not in self.storages:
            if name not in self.entries:
                raise Refused(f"storage {show(key)} is missing in the archive")
            claimed, there = count * dtype.itemsize, self.entries[name].file_size
            if claimed != there:
                raise Refused(f"storage {show(key)} claims {claimed:,} bytes, the archive has {there:,}")
            self.storages[key] = Storage(flat_tensor(self._bytes(name), dtype))
        return same_storage(self.storages[key], dtype, count)


def _check_directory(file: BinaryIO, size: int) -> None:
    """Raise Refused unless a table of contents of bounded size ends the file: zipfile makes an object of each entry."""
    file.seek(max(size - 98, 0))  # the last record (22 bytes), before it for large files a locator (20) and one of 56
    end = file.read(98)
    if end[-22:-18] != b"PK\5\6":
        raise damaged(size)
    length = struct.unpack("<L", end[-10:-6])[0]
    if end[-42:-38] == b"PK\6\7":
        if end[-98:-94] != b"PK\6\6":
            raise damaged(size)
        length = struct.unpack("<Q", end[-58:-50])[0]
    if length > MAX_DIRECTORY:
        raise Refused(f"an archive with a table of contents of {length:,} bytes, no checkpoint has that")
