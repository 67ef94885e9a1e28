"""Reads files that `torch.save` wrote, without PyTorch and without running any code in them.

Such a file consists of a pickle, which `torch_pickle` reads, and raw numbers. A tensor becomes an array only on
request. The array is a view of the memory-mapped file. The system can reclaim the memory of such a view at any time,
and `let_go` makes it do so at once. Whatever sizes a file claims, the numbers that are read or copied never take more
bytes than the file has.
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

# Largest directory of a zip archive in bytes. Each entry of about 80 bytes becomes an object of a kilobyte.
_LARGEST_DIRECTORY = 2**22
_MAX_DIMENSIONS = 32


class TorchFile:
    """The content of a file that `torch.save` wrote.

    Attributes:
        container: Name of the format.
        content: The saved object, which consists of dict, list, tuple, str, numbers, None and `Tensor`.
    """

    container: str
    content: Any
    _big_endian: bool

    def __init__(self, file: BinaryIO) -> None:
        self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._arrays: dict[str, np.ndarray] = {}
        self._unread = self._uncopied = len(self._bytes)

    def _offset(self, storage: Storage) -> int:
        """Returns the position in the file at which a storage begins."""
        raise NotImplementedError

    def array(self, tensor: Tensor) -> np.ndarray:
        """Returns a tensor as a C-contiguous array of the stored type; bfloat16 is the type of `ml_dtypes`.

        The array is read-only. It changes if the file is written to in place.

        Args:
            tensor: A tensor in `content`.

        Raises:
            UserError: The tensor reaches beyond its storage, or the storage beyond the file.
        """
        storage = self._storage(tensor.storage)
        sizes = (tensor.shape, tensor.strides)
        if not all(isinstance(part, tuple | list) and len(part) <= _MAX_DIMENSIONS for part in sizes):
            raise UserError(f"A tensor must have at most {_MAX_DIMENSIONS} dimensions. Received: {tensor}.")
        counts = (tensor.offset, *tensor.shape, *tensor.strides)
        if len(tensor.shape) != len(tensor.strides) or not all(isinstance(n, int) and n >= 0 for n in counts):
            raise UserError(
                f"The offset, shape and strides of a tensor must be integers of at least 0. Received: {tensor}."
            )
        last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
        elements = math.prod(tensor.shape)
        # A tensor with more elements than its storage would repeat some of them. No weight does that, and a file of a
        # few bytes could demand terabytes in this way.
        if elements > storage.size or (elements > 0 and last >= storage.size):
            raise UserError(f"A tensor must lie inside its storage. Received: {tensor}.")
        strides = [stride * storage.itemsize for stride in tensor.strides]
        view = np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, strides)
        if not view.flags.c_contiguous:
            self._uncopied -= view.nbytes
            if self._uncopied < 0:
                raise UserError(
                    "The tensors that must be copied, because they are stored in another order, must not be larger in "
                    f"total than the file. Received: {tensor}."
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
                    f"Storage {short(storage.key)} needs {size} bytes, more than the rest of the file has. "
                    f"Received: a file of {len(self._bytes)} bytes."
                )
            values = np.frombuffer(self._bytes, storage.dtype, storage.count, self._offset(storage))
            if self._big_endian:
                # Swapped as integers, because ml_dtypes 0.5.1 swaps bfloat16 incorrectly.
                values = values.view(f"u{values.itemsize}").byteswap().view(storage.dtype)
            self._arrays[storage.key] = values
        return self._arrays[storage.key]


class _ArchiveSource:
    """Wraps a file for `zipfile` and limits the size of the archive's directory, which `zipfile` reads at once."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable
        self._file = file

    def read(self, size: int = -1) -> bytes:
        """Reads `size` bytes unless that exceeds the limit."""
        if size > _LARGEST_DIRECTORY:
            raise UserError(
                f"The directory of a checkpoint's zip archive must have at most {_LARGEST_DIRECTORY} bytes. "
                f"Received: {size} bytes."
            )
        return self._file.read(size)


class _ZipFile(TorchFile):
    """The format of torch >= 1.6: a zip archive with one pickle and one uncompressed member for each storage."""

    container = "zip"

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._archive = zipfile.ZipFile(_ArchiveSource(file))
        names = self._archive.namelist()
        pickles = [name for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise UserError(f"A zip archive of torch.save must hold one data.pkl. Received: {short(names)}.")
        self._folder = pickles[0].removesuffix("data.pkl")
        byte_order = f"{self._folder}byteorder"  # missing in files of torch < 2.1
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
        """Returns the position of a member's bytes in the file after verifying them."""
        if not member.file_size == member.compress_size == size:
            raise UserError(f"{short(member.filename)} must have {size} bytes. Received: {member.file_size}.")
        with self._archive.open(member) as stream:
            while stream.read(2**18):  # at the end zipfile compares the CRC-32
                pass
        # The length of the member's header varies, because it may be padded to align the numbers.
        lengths: tuple[int, int] = struct.unpack_from("<26xHH", self._bytes, member.header_offset)
        return member.header_offset + 30 + sum(lengths)

    def _member(self, name: str) -> zipfile.ZipInfo:
        member = self._archive.getinfo(name)
        # torch.save never compresses a member, and a few compressed bytes could unpack to terabytes.
        if member.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"The members of a checkpoint must not be compressed. Received: {short(name)}.")
        return member


class _LegacyFile(TorchFile):
    """The format of torch < 1.6: pickles of the magic number, version, machine, content and keys, then the numbers."""

    container = "legacy"
    MAGIC = 0x1950A86A20F9469CFC6C

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._budget = Budget()  # for all pickles together
        magic, version, machine = (self._load(file)[0] for _ in range(3))
        if (magic, version) != (self.MAGIC, 1001):
            received = f"{short(magic)}, {short(version)}"
            raise UserError(f"The file was not written by torch.save. Received: a file that starts with {received}.")
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
            raise UserError(
                f"The checkpoint is truncated: it must have {end} bytes. Received: {size}. Download it again."
            )

    def _load(self, file: BinaryIO) -> tuple[Any, dict[str, Storage]]:
        """Reads the pickle at the file's position; returns its object and the storages that it refers to."""
        window = Window(self._bytes, file.tell())
        unpickler = Unpickler(window, self._budget)
        content = unpickler.load()
        file.seek(window.position)
        return content, unpickler.storages

    def _offset(self, storage: Storage) -> int:
        return self._offsets[storage.key]


def let_go(array: np.ndarray) -> None:
    """Makes the system free the memory that an array's part of the file takes. Later reads come from the disk again.

    Nothing happens if the array is not a view of a memory-mapped file, or if the system does not support it.

    Args:
        array: Array from `TorchFile.array`.
    """
    base: Any = array
    while isinstance(base, memoryview) or hasattr(base, "base"):  # an array, or the wrapper of `as_strided`
        base = base.obj if isinstance(base, memoryview) else base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def open_torch_file(file: BinaryIO) -> TorchFile:
    """Reads the structure of a file that `torch.save` wrote. The tensors are read later, on request.

    Args:
        file: File, positioned at its start. Keep it open until all arrays have been made.

    Raises:
        UserError: The file has another format, or the pickle asks for more than `torch_pickle` allows.
        Exception: The file is damaged. The exception can be of almost any type.
    """
    start = file.read(512)
    file.seek(0)
    if start.startswith(b"PK"):
        return _ZipFile(file)
    if start[257:262] == b"ustar":
        raise UserError(
            "Files of PyTorch before 0.2 cannot be read. Received: a tar archive. Load it with an old version of "
            "PyTorch and save it with a newer one."
        )
    if not start.startswith(b"\x80"):
        raise UserError(f"The file was not written by torch.save. Received: a file that starts with {start[:16]!r}.")
    return _LegacyFile(file)
