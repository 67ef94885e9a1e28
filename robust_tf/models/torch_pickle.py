"""Reads the pickle in a `torch.save` file as data, at a bounded cost.

A pickle is a program for a stack machine. Python's own machine lets a pickle call any function, and lets a pickle of a
few bytes build gigabytes. The machine in this module knows only the operations that weights need. It looks up names
only in the table `_ALLOWED`, and it charges every operation, and every object that an operation makes, to a budget.
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

# Longest pickle in bytes. The pickles of the largest networks with their optimizers have about a megabyte.
LONGEST = 2**24
# _BUDGET is what the pickles of one file may use, in bytes. An operation costs _OPERATION in addition to the object
# that it makes. A tensor costs _TENSOR, which includes its later array. The budget allows 600,000 operations, which
# take a few seconds and about as much memory as the budget says. A tensor in a checkpoint takes about 35 operations.
_BUDGET = 2**26
_OPERATION = 100
_TENSOR = 1000
_MAX_DIMENSIONS = 32
# Magic numbers have 80 bits. All other numbers of a checkpoint fit into 64 bits.
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
    """Returns a text of at most 120 characters for a value from a file, whose full text may be extremely long.

    Args:
        value: Any value.
    """
    text = _REPR.repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


class Budget:
    """The number of bytes that the pickles of one file may still use."""

    def __init__(self) -> None:
        self._left = _BUDGET

    def charge(self, cost: int) -> None:
        """Deducts from the budget.

        Args:
            cost: Number of bytes.

        Raises:
            UserError: The budget is exceeded.
        """
        self._left -= cost
        if self._left < 0:
            raise UserError(
                f"The checkpoint's pickle must not build more than {_BUDGET:,} bytes of objects, not counting the "
                "numbers of the tensors. Received: more. If you trust the file, save only its weights in PyTorch with "
                "torch.save(checkpoint['model'], path), and read that file."
            )


# Objects that a pickle may build ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Storage:
    """A sequence of numbers in the file.

    Attributes:
        key: Name of the storage in the file.
        type: NumPy's code of the type of the numbers, or "bfloat16".
        count: Number of elements.
    """

    key: str
    type: str
    count: int

    @property
    def dtype(self) -> np.dtype:
        """Type of the stored numbers."""
        return np.dtype(ml_dtypes.bfloat16 if self.type == _BFLOAT16 else self.type)


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A view of a storage. Its fields are checked only when it becomes an array.

    Attributes:
        storage: Storage with the numbers.
        offset: Position of the first element, counted in elements.
        shape: Shape of the tensor.
        strides: Distance between neighbors along each axis, counted in elements.
    """

    storage: Any
    offset: Any
    shape: Any
    strides: Any

    def __repr__(self) -> str:
        """Returns a short text, because a pickle of a few bytes can describe a tensor with an extremely long text."""
        parts = (f"{name}={short(getattr(self, name))[:60]}" for name in ("offset", "shape", "strides"))
        return f"Tensor({', '.join(parts)})"


@dataclasses.dataclass(frozen=True, eq=False)
class _Function:
    """A function in `_ALLOWED`, to be called with a budget and the arguments from the pickle."""

    call: Callable[..., Any]


@dataclasses.dataclass(frozen=True, eq=False)
class _NumpyType:
    name: str


def _ordered_dict(budget: Budget, pairs: Any = ()) -> dict[Any, Any]:
    """Returns a plain dict. PyTorch adds an attribute `_metadata` to an OrderedDict, which is not needed here."""
    if not isinstance(pairs, list | tuple):
        raise UserError(f"An OrderedDict must be made of a list of pairs. Received: {short(pairs)}.")
    budget.charge(_OPERATION * len(pairs))
    mapping: dict[Any, Any] = {}
    for key, value in pairs:
        _set_item(mapping, key, value)
    return mapping


def _set_item(mapping: Any, key: Any, value: Any) -> None:
    """Sets `mapping[key]`.

    Only strings and integers of up to 64 bits are accepted as keys: their hashes are quick to compute, and a hostile
    file cannot easily make many of them collide.
    """
    if not isinstance(mapping, dict) or not (isinstance(key, str) or (isinstance(key, int) and abs(key) < 2**63)):
        raise UserError(
            f"The keys of a checkpoint's dictionaries must be strings or 64-bit integers. Received: {short(key)}."
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
    number: float = np.frombuffer(data, f"<{numpy_type.name}")[0].item()
    return number


# All names that a file may refer to. The strings are the types of storages and cannot be called.
_ALLOWED: dict[tuple[str, str], _Function | str] = {
    ("collections", "OrderedDict"): _Function(_ordered_dict),
    ("torch._utils", "_rebuild_tensor"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(lambda _, data, *__: data),
    ("torch", "Size"): _Function(_size),
    ("torch", "device"): _Function(lambda *_: None),
    # For numbers that NumPy computed, such as an interpolated learning rate.
    ("numpy", "dtype"): _Function(_numpy_type),
    ("numpy.core.multiarray", "scalar"): _Function(_numpy_scalar),
    ("numpy._core.multiarray", "scalar"): _Function(_numpy_scalar),
    ("_codecs", "encode"): _Function(_encode),
    **{("torch", name): code for name, code in _STORAGE_TYPES.items()},
}


class Window:
    """A part of a memory-mapped file with the methods that `pickletools` needs. Only what is read is copied."""

    def __init__(self, data: mmap.mmap, start: int, stop: int | None = None) -> None:
        self._data, self.position = data, start
        self._stop = min(len(data), start + LONGEST, len(data) if stop is None else stop)

    def tell(self) -> int:
        """Returns the position in the whole file."""
        return self.position

    def read(self, size: int) -> bytes:
        """Returns the next `size` bytes, or fewer at the end."""
        start, self.position = self.position, min(self.position + size, self._stop)
        return self._data[start : self.position]

    def readline(self) -> bytes:
        """Returns the bytes up to and including the next line break, or up to the end."""
        end = self._data.find(b"\n", self.position, self._stop)
        return self.read((self._stop if end < 0 else end + 1) - self.position)


# The machine -----------------------------------------------------------------------------------------------------

_MARK = object()


class Unpickler:
    """Runs one pickle.

    Attributes:
        storages: Storages that the pickle refers to, by key.
    """

    def __init__(self, file: Window, budget: Budget) -> None:
        self.storages: dict[str, Storage] = {}
        self._file, self._budget = file, budget
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """Returns the object of the pickle, made of dict, list, tuple, str, bytes, numbers, None and `Tensor`."""
        for opcode, argument, position in pickletools.genops(self._file):  # type: ignore[arg-type]  # not an IO object
            name = opcode.name
            # Every argument is charged, even an unused one, because it has been read already.
            self._budget.charge(_OPERATION + (0 if argument is None else sys.getsizeof(argument)))
            if name == "STOP":
                return self._stack.pop()
            if name in _CONSTANTS:
                self._stack.append(_FIXED.get(name, argument))
                if isinstance(argument, int) and argument.bit_length() > _MAX_BITS:
                    raise UserError(
                        f"The integers of a checkpoint's pickle must have at most {_MAX_BITS} bits. Received: {name} "
                        f"with {argument.bit_length()} bits."
                    )
                continue
            if name not in _ACTIONS or (name.endswith("PUT") and (argument or 0) > (position or 0)):
                # A pickler numbers its objects, so the index of a PUT can never exceed the position in the file.
                raise UserError(
                    "The checkpoint's pickle must contain only operations that weights need. Received: "
                    f"{name} {short(argument)}."
                )
            _ACTIONS[name](self, argument)
        raise AssertionError("genops ends with STOP or raises")

    def _to_mark(self) -> list[Any]:
        """Removes the topmost mark and everything above it; returns what was above it."""
        taken = []
        while (value := self._stack.pop()) is not _MARK:
            taken.append(value)
        return taken[::-1]

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise UserError(
                "The checkpoint's pickle takes more objects from its stack than there are. Received: a damaged pickle."
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
                f"and none of its code was run. Received: {received}. If you trust the file, save only its weights in "
                "PyTorch with torch.save(checkpoint['model'], path), and convert that file."
            )
        return _ALLOWED[module, name]

    def _call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, _Function) or not isinstance(arguments, tuple | list):
            raise UserError(f"The checkpoint's pickle must call functions only. Received: {short(function)}.")
        # No function of a checkpoint needs more. Unpacking makes a copy, and a file can ask for one with three bytes.
        if len(arguments) > _MAX_DIMENSIONS:
            raise UserError(f"A function can have at most {_MAX_DIMENSIONS} arguments. Received: {len(arguments)}.")
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
# What each operation does, by its name in `pickletools`: a function of the machine and the operation's argument.
_ACTIONS: dict[str, Callable[[Unpickler, Any], Any]] = {
    "PROTO": lambda _machine, _: None,
    "FRAME": lambda _machine, _: None,
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
    "BUILD": lambda machine, _: machine._pop(1),  # the state is dropped
    "BINPERSID": lambda machine, _: machine._persistent(machine._stack.pop()),
    "MEMOIZE": lambda machine, _: machine._memoize(None),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda machine, index: machine._memoize(index)),
    **dict.fromkeys(
        ("GET", "BINGET", "LONG_BINGET"), lambda machine, index: machine._stack.append(machine._memo[index])
    ),
}
