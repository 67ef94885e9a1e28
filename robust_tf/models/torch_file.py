"""Reads files of `torch.save` without PyTorch, and without running anything that is in them.

Such a file is a pickle beside raw numbers; `torch_pickle` reads the pickle. A tensor becomes an array only when it is
asked for, and the array is a view of the mapped file: it costs no memory that the system could not take back, and
`let_go` has it taken back at once. Whatever the file says, no more numbers are read or copied than it has bytes.
"""

import math
import mmap
import os
import re
import struct
import zipfile
from typing import Any, BinaryIO

import numpy as np

from robust_tf.errors import UserError
from robust_tf.models.torch_pickle import LONGEST, Budget, Storage, Tensor, Unpickler, Window, short

# Largest directory of a zip archive in bytes: each entry, of about 80 bytes, becomes an object of a kilobyte.
_LARGEST_DIRECTORY = 2**22
_MAX_DIMENSIONS = 32


class TorchFile:
    """What `torch.save` wrote: `content` is made of dict, list, tuple, str, numbers, None and `Tensor`.

    Attributes:
        container: name of the format.
        content: the saved object.
    """

    container: str
    content: Any
    _big_endian: bool

    def __init__(self, file: BinaryIO) -> None:
        self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._arrays: dict[str, np.ndarray] = {}
        self._unread = self._uncopied = len(self._bytes)

    def _offset(self, storage: Storage) -> int:
        """Where a storage begins in the file."""
        raise NotImplementedError

    def array(self, tensor: Tensor) -> np.ndarray:
        """The tensor as a C-contiguous array of the type that is stored; bfloat16 is that of `ml_dtypes`.

        The array is read-only and changes with the file, if that is written to in place.

        Raises:
            UserError: the tensor reaches beyond its storage, or the storage beyond the file.
        """
        storage = self._storage(tensor.storage)
        sizes = (tensor.shape, tensor.strides)
        if not all(isinstance(part, tuple | list) and len(part) <= _MAX_DIMENSIONS for part in sizes):
            raise UserError(f"A tensor must have at most {_MAX_DIMENSIONS} dimensions. Received: {tensor}.")
        counts = (tensor.offset, *tensor.shape, *tensor.strides)
        if len(tensor.shape) != len(tensor.strides) or not all(isinstance(n, int) and n >= 0 for n in counts):
            raise UserError(f"The offset, shape and strides of a tensor must be counts. Received: {tensor}.")
        last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
        elements = math.prod(tensor.shape)
        # More elements than the storage has would mean that they repeat. No weight does that, and a few bytes could
        # ask for terabytes in this way.
        if elements > storage.size or (elements > 0 and last >= storage.size):
            raise UserError(f"A tensor must lie inside its storage. Received: {tensor}.")
        strides = [stride * storage.itemsize for stride in tensor.strides]
        view = np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, strides)
        if not view.flags.c_contiguous:
            self._uncopied -= view.nbytes
            if self._uncopied < 0:
                raise UserError(
                    "The tensors of a checkpoint must not share numbers in other orders so often that the copies are "
                    f"larger than the file. Received: {tensor}."
                )
        return np.asarray(view, order="C")

    def _storage(self, storage: Any) -> np.ndarray:
        if not isinstance(storage, Storage):
            raise UserError(f"A tensor must lie in a storage of numbers. Received: {short(storage)}.")
        if storage.key not in self._arrays:
            self._unread -= storage.count * storage.dtype.itemsize
            if self._unread < 0:
                size = storage.count * storage.dtype.itemsize
                raise UserError(
                    f"Storage {short(storage.key)} must have {size} bytes, more than the rest of the file has. "
                    f"Received: {len(self._bytes)} bytes in all."
                )
            values = np.frombuffer(self._bytes, storage.dtype, storage.count, self._offset(storage))
            if self._big_endian:
                # As integers: ml_dtypes 0.5.1 swaps bfloat16 wrongly.
                values = values.view(f"u{values.itemsize}").byteswap().view(storage.dtype)
            self._arrays[storage.key] = values
        return self._arrays[storage.key]


class _ArchiveSource:
    """The file as `zipfile` reads it, which takes the whole directory of an archive in one piece."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if size > _LARGEST_DIRECTORY:
            raise UserError(
                f"The directory of a checkpoint's zip archive must have at most {_LARGEST_DIRECTORY} bytes. "
                f"Received: {size} bytes."
            )
        return self._file.read(size)


class _ZipFile(TorchFile):
    """Of torch >= 1.6: a zip archive with one pickle and one uncompressed member for each storage."""

    container = "zip"

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._archive = zipfile.ZipFile(_ArchiveSource(file))
        names = self._archive.namelist()
        pickles = [name for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise UserError(f"A zip archive of torch.save holds one data.pkl. Received: {short(names)}.")
        self._folder = pickles[0].removesuffix("data.pkl")
        byte_order = f"{self._folder}byteorder"  # not there before torch 2.1
        self._big_endian = byte_order in names and self._window(byte_order, longest=16).read(16) == b"big"
        self.content = Unpickler(self._window(pickles[0], longest=LONGEST), Budget()).load()

    def _offset(self, storage: Storage) -> int:
        size = storage.count * storage.dtype.itemsize
        return self._place(self._member(f"{self._folder}data/{storage.key}"), size)

    def _window(self, name: str, *, longest: int) -> Window:
        member = self._member(name)
        if member.file_size > longest:
            raise UserError(
                f"{short(name)} of a checkpoint must have at most {longest} bytes. Received: {member.file_size}."
            )
        start = self._place(member, member.file_size)
        return Window(self._bytes, start, start + member.file_size)

    def _place(self, member: zipfile.ZipInfo, size: int) -> int:
        """Where the bytes of a member begin in the file, once they were found whole."""
        if not member.file_size == member.compress_size == size:
            raise UserError(f"{short(member.filename)} must have {size} bytes. Received: {member.file_size}.")
        with self._archive.open(member) as stream:
            while stream.read(2**18):  # at the end, zipfile compares the CRC-32
                pass
        # The member's own header has a length of its own: it may be padded to align the numbers.
        name_length, extra_length = struct.unpack_from("<26xHH", self._bytes, member.header_offset)
        return member.header_offset + 30 + name_length + extra_length

    def _member(self, name: str) -> zipfile.ZipInfo:
        member = self._archive.getinfo(name)
        # torch.save never compresses. A compressed member could be a few bytes that unpack to terabytes.
        if member.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"The members of a checkpoint must not be compressed. Received: {short(name)}.")
        return member


class _LegacyFile(TorchFile):
    """Of torch < 1.6: five pickles (magic number, version, machine, content, storage keys), then the storages."""

    container = "legacy"
    MAGIC = 0x1950A86A20F9469CFC6C

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._budget = Budget()  # of all its pickles together
        magic, version, machine = (self._load(file)[0] for _ in range(3))
        if (magic, version) != (self.MAGIC, 1001):
            received = f"{short(magic)}, {short(version)}"
            raise UserError(f"The file was not written by torch.save. It starts with {received}.")
        self._big_endian = not machine["little_endian"]
        self.content, storages = self._load(file)
        self._offsets: dict[str, int] = {}
        for key in self._load(file)[0]:
            storage = storages[key]
            (count,) = struct.unpack(">q" if self._big_endian else "<q", file.read(8))
            if count != storage.count:
                raise UserError(f"Storage {short(key)} must have {storage.count} elements. Received: {count}.")
            self._offsets[key] = file.tell()
            file.seek(count * storage.dtype.itemsize, os.SEEK_CUR)
        end = file.tell()
        size = file.seek(0, os.SEEK_END)
        if size < end:
            raise UserError(f"The checkpoint is cut short: it must have {end} bytes. Received: {size}. Fetch it again.")

    def _load(self, file: BinaryIO) -> tuple[Any, dict[str, Storage]]:
        """The object of the pickle at the file's position, which moves behind it, and the storages that it names."""
        window = Window(self._bytes, file.tell())
        unpickler = Unpickler(window, self._budget)
        content = unpickler.load()
        file.seek(window.position)
        return content, unpickler.storages

    def _offset(self, storage: Storage) -> int:
        return self._offsets[storage.key]


def let_go(array: np.ndarray) -> None:
    """Has the system take back the memory of the file behind an array; what is read again comes from the disk.

    Where the array is no view of a mapped file, or the system can't, nothing happens.
    """
    base: Any = array
    while isinstance(base, memoryview) or hasattr(base, "base"):  # an array, or what `as_strided` puts between
        base = base.obj if isinstance(base, memoryview) else base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def open_torch_file(file: BinaryIO) -> TorchFile:
    """Reads the structure of a file that `torch.save` wrote; its tensors are read when they are asked for.

    Args:
        file: at its start, to be kept open until all arrays have been made.

    Raises:
        UserError: the format is another one, or the pickle asks for more than `torch_pickle` allows.
        Exception: of nearly any kind, where the file is damaged.
    """
    start = file.read(512)
    file.seek(0)
    if start.startswith(b"PK"):
        return _ZipFile(file)
    if start[257:262] == b"ustar":
        raise UserError(
            "The file is a tar archive of a PyTorch before 0.2: load it there and save it with a newer one."
        )
    if not start.startswith(b"\x80"):
        raise UserError(f"The file was not written by torch.save. It starts with {start[:16]!r}.")
    return _LegacyFile(file)
