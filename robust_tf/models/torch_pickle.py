"""Reads the pickle of a `torch.save` file as data, at a bounded cost.

A pickle is a program for a stack machine, and Python's own machine may call any function, and may be asked to build
gigabytes from a few bytes. The machine here knows only the operations that weights need. It looks names up in the
table `_ALLOWED` and nowhere else, and it charges every operation, and every object that one makes, to a budget.
"""

import dataclasses
import mmap
import pickletools
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from robust_tf.errors import UserError

# Longest pickle in bytes. The largest networks with their optimizers have about a megabyte.
LONGEST = 2**24
# Bytes of a file's budget, what an operation costs of it besides the object that it makes, and what a tensor costs
# (with the array that is made of it later). They allow 600,000 operations, which take a few seconds and about as much
# memory as the budget says; a tensor in a checkpoint takes about 35.
_BUDGET = 2**26
_OPERATION = 100
_TENSOR = 1000
_MAX_DIMENSIONS = 32
# Magic numbers have 80 bits; all other numbers of a checkpoint fit into 64.
_MAX_BITS = 128

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

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxtuple, _REPR.maxstring, _REPR.maxother = 2, 8, 80, 80


def short(value: Any) -> str:
    """A text of at most 120 characters for a value of a file, which may stand for an endless one."""
    text = _REPR.repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


class Budget:
    """The bytes that the pickles of one file may still take."""

    def __init__(self) -> None:
        self._left = _BUDGET

    def charge(self, cost: int) -> None:
        """Takes `cost` bytes away.

        Raises:
            UserError: there are not so many left.
        """
        self._left -= cost
        if self._left < 0:
            raise UserError(
                f"The checkpoint's pickle must not build more than {_BUDGET:,} bytes of objects besides the tensors' "
                "numbers. Received: more. If you trust the file, save its weights alone in PyTorch, "
                "torch.save(checkpoint['model'], path), and read that."
            )


# What a pickle is rebuilt from -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Storage:
    """A run of `count` numbers somewhere in the file."""

    key: str
    type: str
    count: int

    @property
    def dtype(self) -> np.dtype:
        """Type of the stored numbers."""
        return np.dtype(ml_dtypes.bfloat16 if self.type == _BFLOAT16 else self.type)


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A view into a storage; offset and strides count elements. Nothing is checked before it becomes an array."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any

    def __repr__(self) -> str:
        """Shortened, since a few bytes of a pickle can stand for an endless text."""
        parts = (f"{name}={short(getattr(self, name))[:60]}" for name in ("offset", "shape", "strides"))
        return f"Tensor({', '.join(parts)})"


@dataclasses.dataclass(frozen=True, eq=False)
class _Function:
    """A name of `_ALLOWED` that can be called with a budget and the pickle's arguments."""

    call: Callable[..., Any]


@dataclasses.dataclass(frozen=True, eq=False)
class _NumpyType:
    name: str


def _ordered_dict(budget: Budget, pairs: Any = ()) -> dict[Any, Any]:
    """PyTorch hangs a `_metadata` attribute on it, which nothing here needs: a plain dictionary does."""
    if not isinstance(pairs, list | tuple):
        raise UserError(f"An OrderedDict must be made of a list of pairs. Received: {short(pairs)}.")
    budget.charge(_OPERATION * len(pairs))
    mapping: dict[Any, Any] = {}
    for key, value in pairs:
        _set_item(mapping, key, value)
    return mapping


def _set_item(mapping: Any, key: Any, value: Any) -> None:
    """Sets `mapping[key]`.

    Only the hashes of texts and of numbers up to 64 bits are both quick and hard to make equal on purpose.
    """
    if not isinstance(mapping, dict) or not (isinstance(key, str) or (isinstance(key, int) and abs(key) < 2**63)):
        raise UserError(
            f"The keys of a checkpoint's dictionaries must be texts or integers of 64 bits. Received: {short(key)}."
        )
    mapping[key] = value


def _rebuild_tensor(budget: Budget, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    budget.charge(_TENSOR)
    return Tensor(storage, offset, shape, strides)


def _size(_: Budget, numbers: Any = ()) -> tuple[int, ...]:
    known = isinstance(numbers, list | tuple) and len(numbers) <= _MAX_DIMENSIONS
    if not known or not all(isinstance(number, int) for number in numbers):
        raise UserError(f"A torch.Size must be made of at most {_MAX_DIMENSIONS} integers. Received: {short(numbers)}.")
    return tuple(numbers)


def _encode(budget: Budget, text: Any, *_: Any) -> bytes:
    if not isinstance(text, str):
        raise UserError(f"Only text can be encoded. Received: {short(text)}.")
    budget.charge(len(text))
    return text.encode("latin1")


def _numpy_type(_: Budget, name: Any, *__: Any) -> _NumpyType:
    if name not in _NUMPY_SCALARS:
        raise UserError(f"A stored NumPy number must be one of {', '.join(_NUMPY_SCALARS)}. Received: {short(name)}.")
    return _NumpyType(name)


def _numpy_scalar(_: Budget, numpy_type: Any, data: Any) -> float:
    size = np.dtype(numpy_type.name).itemsize if isinstance(numpy_type, _NumpyType) else 0
    if not isinstance(data, bytes) or len(data) != size:
        raise UserError(
            f"A stored NumPy number must have a type and the bytes of one number. Received: {short(numpy_type)}, "
            f"{short(data)}."
        )
    return np.frombuffer(data, f"<{numpy_type.name}")[0].item()


# All that a file may name. The strings stand for the storage types and do nothing.
_ALLOWED: dict[tuple[str, str], _Function | str] = {
    ("collections", "OrderedDict"): _Function(_ordered_dict),
    ("torch._utils", "_rebuild_tensor"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(lambda _, data, *__: data),
    ("torch", "Size"): _Function(_size),
    ("torch", "device"): _Function(lambda *_: None),
    # Numbers that NumPy made, such as a learning rate that was interpolated.
    ("numpy", "dtype"): _Function(_numpy_type),
    ("numpy.core.multiarray", "scalar"): _Function(_numpy_scalar),
    ("numpy._core.multiarray", "scalar"): _Function(_numpy_scalar),
    ("_codecs", "encode"): _Function(_encode),
    **{("torch", name): code for name, code in _STORAGE_TYPES.items()},
}


class Window:
    """A part of a mapped file, as `pickletools` reads it: nothing is copied that isn't asked for."""

    def __init__(self, data: mmap.mmap, start: int, stop: int | None = None) -> None:
        self._data, self.position = data, start
        self._stop = min(len(data), start + LONGEST, len(data) if stop is None else stop)

    def tell(self) -> int:
        """The place in the whole file."""
        return self.position

    def read(self, size: int) -> bytes:
        """The next `size` bytes, or as many as there are."""
        start, self.position = self.position, min(self.position + size, self._stop)
        return self._data[start : self.position]

    def readline(self) -> bytes:
        """The bytes up to the next line break, or all that there are."""
        end = self._data.find(b"\n", self.position, self._stop)
        return self.read((self._stop if end < 0 else end + 1) - self.position)


# The machine -----------------------------------------------------------------------------------------------------

_MARK = object()


class Unpickler:
    """Runs one pickle.

    Attributes:
        storages: the storages that it refers to, by key.
    """

    def __init__(self, file: Window, budget: Budget) -> None:
        self.storages: dict[str, Storage] = {}
        self._file, self._budget = file, budget
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The object that the pickle stands for: dict, list, tuple, str, bytes, numbers, None and `Tensor`."""
        for opcode, argument, position in pickletools.genops(self._file):  # type: ignore[arg-type]  # a Window will do
            name = opcode.name
            # Charged once more than it is made: the argument of an operation is read before it is known to be one.
            self._budget.charge(_OPERATION + (0 if argument is None else sys.getsizeof(argument)))
            if name == "STOP":
                return self._stack.pop()
            if name in _CONSTANTS:
                self._stack.append(argument if name not in _FIXED else _FIXED[name])
                if isinstance(argument, int) and argument.bit_length() > _MAX_BITS:
                    raise UserError(f"The numbers of a checkpoint's pickle must be short. Received: {name} of 2^...")
                continue
            if name not in _ACTIONS or (name.endswith("PUT") and (argument or 0) > (position or 0)):
                # A pickler counts its objects: the index of a PUT never gets ahead of the bytes.
                raise UserError(
                    f"The checkpoint's pickle was not made by a pickler of weights. Received: {name} {short(argument)}."
                )
            _ACTIONS[name](self, argument)
        raise AssertionError("genops ends with STOP or raises")

    def _to_mark(self) -> list[Any]:
        """What lies above the topmost mark, which is taken off as well."""
        taken = []
        while (value := self._stack.pop()) is not _MARK:
            taken.append(value)
        return taken[::-1]

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise UserError(
                "The checkpoint's pickle takes more off its stack than lies there. Received: a damaged one."
            )
        taken = self._stack[-count:]
        del self._stack[-count:]
        return taken

    def _extend(self, values: Iterable[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise UserError(f"The checkpoint's pickle must append to lists only. Received: {short(target)}.")
        target.extend(values)

    def _set_items(self, values: list[Any]) -> None:
        pairs: Iterator[Any] = iter(values)
        for key, value in zip(pairs, pairs, strict=True):
            _set_item(self._stack[-1], key, value)

    def _dict(self) -> None:
        values = self._to_mark()
        self._stack.append({})
        self._set_items(values)

    def _find(self, module: Any, name: Any) -> _Function | str:
        if not (isinstance(module, str) and isinstance(name, str)) or (module, name) not in _ALLOWED:
            received = (
                f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else short((module, name))
            )
            received = received if len(received) <= 120 else f"{received[:117]}..."
            raise UserError(
                "The checkpoint's pickle asks for something that is not needed to rebuild tensors, so it was refused "
                f"and nothing in it was run. Received: {received}. If you trust the file, save its weights alone "
                "in PyTorch, torch.save(checkpoint['model'], path), and convert that."
            )
        return _ALLOWED[module, name]

    def _call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, _Function) or not isinstance(arguments, tuple | list):
            raise UserError(f"The checkpoint's pickle must call functions only. Received: {short(function)}.")
        # No function of a checkpoint takes more; unpacking them would copy what a file can repeat for three bytes.
        if len(arguments) > _MAX_DIMENSIONS:
            raise UserError(f"A function has at most {_MAX_DIMENSIONS} arguments. Received: {len(arguments)}.")
        self._stack.append(function.call(self._budget, *arguments))

    def _instance(self, named: str) -> None:
        self._call(self._find(*named.split(" ", 1)), self._to_mark())

    def _persistent(self, pid: Any) -> None:
        parts: list[Any] = list(pid) if isinstance(pid, tuple) and 5 <= len(pid) <= 6 else [None] * 5
        kind, code, key, _, count, *view = parts
        known = kind == "storage" and code in _STORAGE_TYPES.values() and isinstance(key, str)
        if not known or not isinstance(count, int) or count < 0 or any(part is not None for part in view):
            raise UserError(f"The checkpoint must refer to whole storages of numbers. Received: {short(pid)}.")
        self._stack.append(self.storages.setdefault(key, Storage(key, code, count)))

    def _memoize(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]


_FIXED: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_CONSTANTS = {
    *_FIXED,
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
# By the names of `pickletools`; each takes the machine and the operation's argument.
_ACTIONS: dict[str, Callable[[Unpickler, Any], Any]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "POP": lambda machine, _: machine._stack.pop(),
    "POP_MARK": lambda machine, _: machine._to_mark(),
    "DUP": lambda machine, _: machine._stack.append(machine._stack[-1]),
    "EMPTY_LIST": lambda machine, _: machine._stack.append([]),
    "EMPTY_DICT": lambda machine, _: machine._stack.append({}),
    "LIST": lambda machine, _: machine._stack.append(machine._to_mark()),
    "TUPLE": lambda machine, _: machine._stack.append(tuple(machine._to_mark())),
    "TUPLE1": lambda machine, _: machine._stack.append(tuple(machine._pop(1))),
    "TUPLE2": lambda machine, _: machine._stack.append(tuple(machine._pop(2))),
    "TUPLE3": lambda machine, _: machine._stack.append(tuple(machine._pop(3))),
    "DICT": lambda machine, _: machine._dict(),
    "APPEND": lambda machine, _: machine._extend(machine._pop(1)),
    "APPENDS": lambda machine, _: machine._extend(machine._to_mark()),
    "SETITEM": lambda machine, _: machine._set_items(machine._pop(2)),
    "SETITEMS": lambda machine, _: machine._set_items(machine._to_mark()),
    "GLOBAL": lambda machine, named: machine._stack.append(machine._find(*named.split(" ", 1))),
    "STACK_GLOBAL": lambda machine, _: machine._stack.append(machine._find(*machine._pop(2))),
    "REDUCE": lambda machine, _: machine._call(*machine._pop(2)),
    "NEWOBJ": lambda machine, _: machine._call(*machine._pop(2)),
    "INST": lambda machine, named: machine._instance(named),
    "OBJ": lambda machine, _: machine._call((values := machine._to_mark())[0], values[1:]),
    "BUILD": lambda machine, _: machine._pop(1),  # no state is set on anything
    "BINPERSID": lambda machine, _: machine._persistent(machine._stack.pop()),
    "MEMOIZE": lambda machine, _: machine._memoize(None),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda machine, index: machine._memoize(index)),
    **dict.fromkeys(
        ("GET", "BINGET", "LONG_BINGET"), lambda machine, index: machine._stack.append(machine._memo[index])
    ),
}
