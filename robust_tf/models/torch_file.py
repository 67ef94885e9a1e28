"""Reads files of `torch.save` without PyTorch, and without running anything that is in them.

Such a file is a pickle beside raw numbers, and a pickle may name any function of any installed package and have it
called. Here a name is looked up in the table `_ALLOWED` and nowhere else; what stands there builds plain records. A
tensor becomes an array only when it is asked for, and the array is a view of the mapped file: it costs no memory that
the system could not take back, and `let_go` has it taken back at once.
"""

import dataclasses
import io
import math
import mmap
import os
import pickle
import pickletools
import re
import reprlib
import struct
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from robust_tf.errors import UserError

_BFLOAT16 = "bfloat16"
_STORAGE_TYPES = {
    "FloatStorage": "f4",
    "DoubleStorage": "f8",
    "HalfStorage": "f2",
    "BFloat16Storage": _BFLOAT16,
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
_NUMPY_SCALARS = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1")
# Of all that lies in a tuple, tuples in it unfolded. A tensor has about 30, the state of Python's random generator 630.
_LARGEST_TUPLE = 2000


_SHORT = reprlib.Repr()
_SHORT.maxtuple = 8
# Opcodes that put any number of things into a list, a dictionary or a set.
_FILLS = {"LIST", "APPEND", "APPENDS", "DICT", "SETITEM", "SETITEMS", "ADDITEMS", "POP_MARK", "STOP"}


# What a pickle is rebuilt from -----------------------------------------------------------------------------------


class _Inert:
    """Base of what a pickle may build. The state that a BUILD opcode wants to set is dropped."""

    def __setstate__(self, state: Any) -> None:
        del state


class _Mapping(dict, _Inert):
    """Stands for `collections.OrderedDict`; PyTorch hangs a `_metadata` attribute on it, which nothing here needs."""


class _Function(_Inert):
    """A name of `_ALLOWED` that can be called; an object of its own for every mention, so that nothing is shared."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


# Compared by identity: a hash of their fields would be as costly as what a hostile file puts into these.
@dataclasses.dataclass(frozen=True, eq=False)
class _Storage(_Inert):
    """A run of `count` numbers somewhere in the file."""

    key: Any
    type: str
    count: Any

    @property
    def dtype(self) -> np.dtype:
        """Type of the stored numbers."""
        return np.dtype(ml_dtypes.bfloat16 if self.type == _BFLOAT16 else self.type)


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor(_Inert):
    """A view into a storage; offset and strides count elements. Nothing is checked before it becomes an array."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any

    def __repr__(self) -> str:
        """Shortened, since a few bytes of a pickle can stand for an endless text."""
        parts = (f"{name}={reprlib.repr(getattr(self, name))}" for name in ("offset", "shape", "strides"))
        return f"Tensor({', '.join(parts)})"


@dataclasses.dataclass(frozen=True, eq=False)
class _NumpyType(_Inert):
    name: Any


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    return Tensor(storage, offset, shape, strides)


def _numpy_scalar(numpy_type: Any, data: Any) -> float:
    if not isinstance(numpy_type, _NumpyType) or numpy_type.name not in _NUMPY_SCALARS:
        received = reprlib.repr(getattr(numpy_type, "name", numpy_type))
        raise UserError(f"A stored NumPy number must be one of {', '.join(_NUMPY_SCALARS)}. Received: {received}.")
    return np.frombuffer(data, f"<{numpy_type.name}")[0].item()


# All that a file may name. The strings stand for the storage types and do nothing.
_ALLOWED: dict[tuple[str, str], Callable[..., Any] | str] = {
    ("collections", "OrderedDict"): _Mapping,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch", "Size"): list,
    ("torch", "device"): lambda *_: None,
    # Numbers that NumPy made, such as a learning rate that was interpolated.
    ("numpy", "dtype"): lambda name, *_: _NumpyType(name),
    ("numpy.core.multiarray", "scalar"): _numpy_scalar,
    ("numpy._core.multiarray", "scalar"): _numpy_scalar,
    ("_codecs", "encode"): lambda text, *_: text.encode("latin1"),
    **{("torch", name): code for name, code in _STORAGE_TYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Looks names up in `_ALLOWED` alone, and keeps the storages that it met."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise UserError(
                "The checkpoint's pickle asks for something that is not needed to rebuild tensors, so it was refused "
                f"and nothing in it was run. Received: {module}.{name}. If you trust the file, save its weights alone "
                "in PyTorch, torch.save(checkpoint['model'], path), and convert that."
            )
        allowed = _ALLOWED[module, name]
        return allowed if isinstance(allowed, str) else _Function(allowed)

    def persistent_load(self, pid: Any) -> _Storage:
        kind, code, key, _, count, *view = pid
        known = kind == "storage" and code in _STORAGE_TYPES.values()
        if not known or not isinstance(count, int) or count < 0 or any(part is not None for part in view):
            raise UserError(f"The checkpoint must refer to whole storages of numbers. Received: {_SHORT.repr(pid)}.")
        return self.storages.setdefault(key, _Storage(key, code, count))


def _unpickler(file: BinaryIO) -> _Unpickler:
    """For the pickle at the file's position, once all its opcodes have been looked through."""
    start = file.tell()
    _check_opcodes(file)
    file.seek(start)
    return _Unpickler(file)


def _check_opcodes(file: BinaryIO) -> None:
    """Refuses what `find_class` never sees: the extension registry, which has a cache of its own, and three bombs.

    The memo grows to whatever index a PUT names (a pickler counts its objects, so it never gets ahead of the opcodes).
    The hash of a dictionary's key goes through all tuples in it: with sharing, 100 bytes make it endless, and without,
    it descends until the stack of the process overflows. Hence the sizes of tuples are added up here.
    """
    stack: list[int | None] = []  # the size of each object; None is a mark
    memo: dict[Any, int | None] = {}
    for position, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name = opcode.name
        if name.startswith("EXT") or (name.endswith("PUT") and (argument or 0) > position):
            raise UserError(f"The checkpoint's pickle was not made by a pickler. Received: {name} {argument}.")
        if name.endswith("PUT") or name == "MEMOIZE":
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name.endswith("GET"):
            stack.append(memo[argument])
        elif name in {"POP", "DUP"}:
            top = stack.pop()
            stack += [top, top] if name == "DUP" else []
        elif name == "MARK":
            stack.append(None)
        else:
            taken: list[int] = []
            before = opcode.stack_before
            if pickletools.markobject in before:
                while (size := stack.pop()) is not None:
                    taken.append(size)
                before = before[: before.index(pickletools.markobject)]
            taken += [stack.pop() or 0 for _ in before]
            for after in opcode.stack_after:
                # What can change has no hash, and stands for one thing wherever it is put.
                stack.append(1 if after.name in {"list", "dict", "set"} else 1 + sum(taken))
            if sum(taken) > _LARGEST_TUPLE and name not in _FILLS:
                raise UserError(
                    f"The checkpoint's pickle was not made for weights: no tuple has more than {_LARGEST_TUPLE} "
                    f"items in all, nested ones included. Received: {name} of {sum(taken)}."
                )


# The files -------------------------------------------------------------------------------------------------------


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

    def _offset(self, storage: _Storage) -> int:
        """Where a storage begins in the file."""
        raise NotImplementedError

    def array(self, tensor: Tensor) -> np.ndarray:
        """The tensor as a C-contiguous array of the type that is stored; bfloat16 is that of `ml_dtypes`.

        The array is read-only and changes with the file, if that is written to in place.

        Raises:
            UserError: the tensor reaches beyond its storage, or the storage beyond the file.
        """
        storage = self._storage(tensor.storage)
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
        return np.asarray(view, order="C")

    def _storage(self, storage: Any) -> np.ndarray:
        if not isinstance(storage, _Storage):
            raise UserError(f"A tensor must lie in a storage of numbers. Received: {reprlib.repr(storage)}.")
        if storage.key not in self._arrays:
            values = np.frombuffer(self._bytes, storage.dtype, storage.count, self._offset(storage))
            if self._big_endian:
                # As integers: ml_dtypes 0.5.1 swaps bfloat16 wrongly.
                values = values.view(f"u{values.itemsize}").byteswap().view(storage.dtype)
            self._arrays[storage.key] = values
        return self._arrays[storage.key]


class _ZipFile(TorchFile):
    """Of torch >= 1.6: a zip archive with one pickle and one uncompressed member for each storage."""

    container = "zip"

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._archive = zipfile.ZipFile(file)
        names = self._archive.namelist()
        pickles = [name for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise UserError(f"A zip archive of torch.save holds one data.pkl. Received: {str(names)[:200]}.")
        self._folder = pickles[0].removesuffix("data.pkl")
        byte_order = f"{self._folder}byteorder"  # not there before torch 2.1
        self._big_endian = byte_order in names and self._archive.read(self._member(byte_order)) == b"big"
        self.content = _unpickler(io.BytesIO(self._archive.read(self._member(pickles[0])))).load()

    def _offset(self, storage: _Storage) -> int:
        member = self._member(f"{self._folder}data/{storage.key}")
        size = storage.count * storage.dtype.itemsize
        if member.file_size != size:
            raise UserError(f"Storage {storage.key!r} must have {size} bytes. Received: {member.file_size}.")
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
            raise UserError(f"The members of a checkpoint must not be compressed. Received: {name!r}.")
        return member


class _LegacyFile(TorchFile):
    """Of torch < 1.6: five pickles (magic number, version, machine, content, storage keys), then the storages."""

    container = "legacy"
    MAGIC = 0x1950A86A20F9469CFC6C

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        magic, version, machine = (_unpickler(file).load() for _ in range(3))
        if (magic, version) != (self.MAGIC, 1001):
            received = f"{reprlib.repr(magic)}, {reprlib.repr(version)}"
            raise UserError(f"The file was not written by torch.save. It starts with {received}.")
        self._big_endian = not machine["little_endian"]
        unpickler = _unpickler(file)
        self.content = unpickler.load()
        self._offsets: dict[str, int] = {}
        for key in _unpickler(file).load():
            storage = unpickler.storages[key]
            (count,) = struct.unpack(">q" if self._big_endian else "<q", file.read(8))
            if count != storage.count:
                raise UserError(f"Storage {key!r} must have {storage.count} elements. Received: {count}.")
            self._offsets[key] = file.tell()
            file.seek(count * storage.dtype.itemsize, os.SEEK_CUR)
        end = file.tell()
        size = file.seek(0, os.SEEK_END)
        if size < end:
            raise UserError(f"The checkpoint is cut short: it must have {end} bytes. Received: {size}. Fetch it again.")

    def _offset(self, storage: _Storage) -> int:
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
        UserError: the format is another one, or the pickle asks for more than `_ALLOWED`.
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
