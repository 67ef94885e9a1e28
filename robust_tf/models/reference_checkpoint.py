"""Reads the checkpoints of the PyTorch reference: the weights, the epoch and the accuracies."""

import dataclasses
import hashlib
import pathlib
import re
from typing import Any, BinaryIO

import numpy as np

from robust_tf.errors import UserError
from robust_tf.models.safetensors_file import is_safetensors, read_safetensors
from robust_tf.models.torch_file import TorchFile, open_torch_file
from robust_tf.models.torch_pickle import Tensor, short

# Training code wraps networks, which adds these prefixes to the keys in any order: the reference's attacker (model),
# DataParallel and AveragedModel (module), torch.compile (_orig_mod), Lightning and timm.
_WRAPPERS = re.compile(r"(?:(?:module|model|_orig_mod|net|network|ema|ema_model)\.)+")
_LONGEST_MESSAGE = 490


@dataclasses.dataclass(frozen=True)
class ReferenceCheckpoint:
    """A checkpoint of the reference, without the state of the optimizer.

    Attributes:
        state: Arrays in PyTorch's shapes by the keys of the checkpoint, without the `attacker.` copy of the model. The
            types are as stored; bfloat16 is the type of `ml_dtypes`. The arrays are read-only views of the file, so the
            file must not change while they are in use.
        epoch: The last finished epoch, or None if it is not stored.
        accuracies: Stored accuracies `nat_prec1` and `adv_prec1`, in percent.
        container: Format of the file: "zip" (torch >= 1.6), "legacy" or "safetensors".
        sha256: SHA-256 of the file, in hexadecimal.
        size: Size of the file, in bytes.

    Example:
        >>> ReferenceCheckpoint(state={"fc.bias": np.zeros(2)}, epoch=90, accuracies={"nat_prec1": 57.9}).epoch
        90
    """

    state: dict[str, np.ndarray]
    epoch: int | None = None
    accuracies: dict[str, float] = dataclasses.field(default_factory=dict)
    container: str = ""
    sha256: str = ""
    size: int = 0


def read_reference_checkpoint(path: str | pathlib.Path) -> ReferenceCheckpoint:
    """Reads a file of `torch.save` or safetensors as data. PyTorch is not needed, and no code in the file is run.

    The weights may be under `model`, under `state_dict`, at the top level (torchvision's `.pth`), or under any other
    key if there is only one dictionary of tensors. For any file, even a hostile one, the memory use is below 3 times
    the size of the file plus 200 MB.

    Args:
        path: Path of the file, in PyTorch's zip format, PyTorch's older format, or the safetensors format.

    Returns:
        The weights, and the information stored with them.

    Raises:
        UserError: The file is missing, damaged, in another format, or without weights, or its pickle asks for
            something that is not needed to rebuild tensors. The message names it.

    Example:
        >>> header = b'{"fc.bias": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
        >>> with open("model.safetensors", "wb") as file:
        ...     _ = file.write(len(header).to_bytes(8, "little") + header + bytes(8))
        >>> read_reference_checkpoint("model.safetensors").state["fc.bias"].tolist()
        [0.0, 0.0]
    """
    path = pathlib.Path(path)
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
            file.seek(0)
            state, numbers, container = _read(file)
    except UserError as error:
        raise UserError(_with_file(str(error), path)) from None
    except OSError as error:
        raise UserError(f"Cannot read the checkpoint {path}: {error.strerror or error}.") from error
    except Exception as error:
        # A damaged pickle or archive can raise almost any exception.
        problem = f"{type(error).__name__}: {str(error)[:100]}"
        message = f"The checkpoint is damaged or truncated ({problem}). It has {size} bytes. Download it again."
        raise UserError(_with_file(message, path)) from error
    epoch = numbers.get("epoch")
    return ReferenceCheckpoint(
        state=state,
        epoch=None if epoch is None else int(epoch),
        accuracies={name: value for name, value in numbers.items() if name != "epoch"},
        container=container,
        sha256=sha256,
        size=size,
    )


def _with_file(message: str, path: pathlib.Path) -> str:
    """Adds the name of the file to a message, and shortens the message if it is long because it quotes the file."""
    name = str(path) if len(str(path)) <= 300 else f"...{str(path)[-297:]}"
    room = _LONGEST_MESSAGE - len(name)
    return f"{message if len(message) <= room else message[: room - 3] + '...'} File: {name}."


def without_wrappers(key: str) -> str:
    """Returns a key without the prefixes of training code: `conv1.weight` for `_orig_mod.module.conv1.weight`.

    Args:
        key: Key of a checkpoint.
    """
    wrappers = _WRAPPERS.match(key)
    return key[wrappers.end() :] if wrappers else key


def _read(file: BinaryIO) -> tuple[dict[str, np.ndarray], dict[str, float], str]:
    """Returns the weights, whichever of `epoch`, `nat_prec1` and `adv_prec1` are stored, and the name of the format."""
    start = file.read(9)
    file.seek(0)
    if is_safetensors(start):
        state = {key: array for key, array in read_safetensors(file).items() if not _is_attacker(key)}
        if not state:
            raise UserError("A checkpoint must hold tensors by name. Received: a .safetensors file without tensors.")
        return state, {}, "safetensors"
    saved = open_torch_file(file)
    state = {key: saved.array(tensor) for key, tensor in _tensors(saved.content).items()}
    numbers = {name: _number(saved, name) for name in ("epoch", "nat_prec1", "adv_prec1")}
    return state, {name: number for name, number in numbers.items() if number is not None}, saved.container


def _is_attacker(key: str) -> bool:
    return without_wrappers(key).startswith("attacker.")


def _tensors(content: Any) -> dict[str, Tensor]:
    """Returns the state of the model, without the second copy of the model in the attacker."""
    if isinstance(content, dict):
        # The value under "model" need not be a state; it may be just a name.
        named: list[Any] = [content.get("model"), content.get("state_dict"), content]
        named = [state for state in named if _is_state(state)]
        others = [state for state in content.values() if _is_state(state)]
        for state in named or (others if len(others) == 1 else []):
            tensors = {key: value for key, value in state.items() if not _is_attacker(key)}
            if tensors:
                return tensors
    keys = list(content) if isinstance(content, dict) else []
    received = ", ".join(short(key)[:40] for key in keys[:8]) if keys else type(content).__name__
    raise UserError(
        "A checkpoint must hold tensors by name, under `model`, under `state_dict` or at its top level. "
        f"Received: {received}{f' and {len(keys) - 8} more' if len(keys) > 8 else ''}."
    )


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(key, str) and isinstance(item, Tensor) for key, item in value.items())
    )


def _number(saved: TorchFile, name: str) -> float | None:
    """Returns a number that is stored as such or as a tensor of one element, or None."""
    value = saved.content.get(name)
    if isinstance(value, Tensor):
        array = saved.array(value)
        value = array.item() if array.size == 1 else None
    return value if isinstance(value, int | float) and abs(value) < 2**63 else None
