"""Writes files like `torch.save` without PyTorch, including files that no honest program would write."""

import dataclasses
import io
import pathlib
import pickle
import struct
import zipfile
from typing import Any

import numpy as np

STORAGE_TYPES = {
    "float16": "HalfStorage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "int64": "LongStorage",
    "uint16": "BFloat16Storage",  # its bits
}


@dataclasses.dataclass(frozen=True)
class Global:
    """A name in the pickle, which need not be importable here."""

    module: str
    name: str

    def __call__(self) -> None:
        raise AssertionError("only written, never called")


@dataclasses.dataclass(eq=False)
class Call:
    """A function call in the pickle, and the state that it sets on the result."""

    function: Any
    arguments: tuple = ()
    state: Any = None


@dataclasses.dataclass(eq=False)
class Storage:
    values: np.ndarray  # one-dimensional
    count: int | None = None  # number of elements in the pickle, if it is not the true one
    view: tuple | None = None


def tensor(
    values: np.ndarray, *, storage: Storage | None = None, offset: int = 0, shape: Any = None, strides: Any = None
) -> Call:
    """Returns a tensor with a new storage, or a view of a given one. Offset and strides count elements."""
    values = np.asarray(values)
    storage = storage or Storage(values.ravel())
    shape = values.shape if shape is None else shape
    strides = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))) if strides is None else strides
    hooks = Call(Global("collections", "OrderedDict"))
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), (storage, offset, shape, strides, False, hooks))


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, Call]:
    """Returns a state dict in which every array is a tensor with a separate storage."""
    return {name: tensor(values) for name, values in arrays.items()}


# The Python version can be made to write names that do not exist. Its type stub knows little of it.
_PythonPickler: Any = pickle._Pickler


class _Pickler(_PythonPickler):
    dispatch: dict[type, Any] = dict(_PythonPickler.dispatch)

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.storages: list[Storage] = []

    def persistent_id(self, value: Any) -> tuple | None:
        if not isinstance(value, Storage):
            return None
        if value not in self.storages:
            self.storages.append(value)
        count = len(value.values) if value.count is None else value.count
        storage_type = Global("torch", STORAGE_TYPES[value.values.dtype.name])
        view = () if value.view is None else (value.view,)
        return ("storage", storage_type, str(self.storages.index(value)), "cuda:0", count, *view)

    def _save_global(self, value: Global) -> None:
        self.write(f"c{value.module}\n{value.name}\n".encode())

    def _save_call(self, value: Call) -> None:
        self.save_reduce(value.function, value.arguments, value.state, obj=value)

    dispatch[Global] = _save_global
    dispatch[Call] = _save_call


def _pickled(content: Any) -> tuple[bytes, list[Storage]]:
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(content)
    return file.getvalue(), pickler.storages


def write_zip(
    path: pathlib.Path, content: Any, *, compression: int = zipfile.ZIP_STORED, big_endian: bool = False
) -> pathlib.Path:
    """Writes the format of torch >= 1.6."""
    data, storages = _pickled(content)
    write_zip_members(
        path,
        {
            "data.pkl": data,
            "byteorder": b"big" if big_endian else b"little",
            **{f"data/{key}": _bytes(storage, big_endian) for key, storage in enumerate(storages)},
            "version": b"3\n",
        },
        compression=compression,
    )
    return path


def write_zip_members(
    path: pathlib.Path, members: dict[str, bytes], *, compression: int = zipfile.ZIP_STORED
) -> pathlib.Path:
    """Writes a zip archive with these members in the folder that torch.save would use."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)
    return path


def write_legacy(path: pathlib.Path, content: Any, *, big_endian: bool = False) -> pathlib.Path:
    """Writes the format of torch < 1.6."""
    data, storages = _pickled(content)
    machine = {"protocol_version": 1001, "little_endian": not big_endian, "type_sizes": {"int": 4}}
    with path.open("wb") as file:
        for part in (0x1950A86A20F9469CFC6C, 1001, machine):
            pickle.dump(part, file, protocol=2)
        file.write(data)
        pickle.dump([str(key) for key in range(len(storages))], file, protocol=2)
        for storage in storages:
            file.write(struct.pack(">q" if big_endian else "<q", len(storage.values)))
            file.write(_bytes(storage, big_endian))
    return path


def _bytes(storage: Storage, big_endian: bool) -> bytes:
    return (storage.values.byteswap() if big_endian else storage.values).tobytes()
