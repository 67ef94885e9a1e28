"""What the PyTorch reference keeps in its checkpoints: the weights, and how far and how well the training went."""

import dataclasses
import hashlib
import pathlib
import re
from typing import Any

import numpy as np

from robust_tf.errors import UserError
from robust_tf.models.torch_file import Tensor, TorchFile, open_torch_file


@dataclasses.dataclass(frozen=True)
class ReferenceCheckpoint:
    """A checkpoint of the reference, without its optimizer.

    Attributes:
        state: the checkpoint's own keys to arrays of PyTorch's shapes, without the `attacker.` copy of the model.
            The types are as stored, bfloat16 that of `ml_dtypes`. The arrays are read-only views of the file: leave it
            as it is while they are in use.
        epoch: the last finished epoch, if stored.
        accuracies: what the reference stored as `nat_prec1` and `adv_prec1`, in percent.
        container: "zip" (torch >= 1.6) or "legacy".
        sha256: digest of the file, in hexadecimal.
        size: of the file, in bytes.
    """

    state: dict[str, np.ndarray]
    epoch: int | None
    accuracies: dict[str, float]
    container: str
    sha256: str
    size: int


def read_reference_checkpoint(path: str | pathlib.Path) -> ReferenceCheckpoint:
    """Reads a checkpoint that `torch.save` wrote, as data: neither PyTorch nor dill is needed, no code in it runs.

    The weights may stand under `model`, under `state_dict`, or alone (torchvision's `.pth`).

    Args:
        path: of the file, in the zip format or in the older one.

    Returns:
        the weights, and what is known about them.

    Raises:
        UserError: the file is missing, damaged, in another format or without weights, or its pickle asks for
            something that is not needed to rebuild tensors (named in the message).
    """
    path = pathlib.Path(path)
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
            file.seek(0)
            saved = open_torch_file(file)
            state = {key: saved.array(tensor) for key, tensor in _tensors(saved.content).items()}
            epoch = _number(saved, "epoch")
            epoch = None if epoch is None else int(epoch)
            accuracies = {name: _number(saved, name) for name in ("nat_prec1", "adv_prec1")}
    except UserError as error:
        raise UserError(f"{error} File: {path}.") from None
    except OSError as error:
        raise UserError(f"Cannot read the checkpoint {path}: {error.strerror or error}.") from error
    except Exception as error:
        # A damaged pickle or archive can raise nearly every exception there is.
        raise UserError(
            f"The checkpoint is damaged or cut short ({type(error).__name__}: {error}). Fetch it again. "
            f"File: {path} ({size} bytes)."
        ) from error
    return ReferenceCheckpoint(
        state=state,
        epoch=epoch,
        accuracies={name: accuracy for name, accuracy in accuracies.items() if accuracy is not None},
        container=saved.container,
        sha256=sha256,
        size=size,
    )


def _tensors(content: Any) -> dict[str, Tensor]:
    """The model's state. The attacker holds the same model once more; that copy is left out."""
    if isinstance(content, dict):
        for state in (content.get("model"), content.get("state_dict"), content):  # "model" may be a mere name
            if isinstance(state, dict) and all(
                isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
            ):
                tensors = {key: value for key, value in state.items() if not re.match(r"(module\.)?attacker\.", key)}
                if tensors:
                    return tensors
    received = ", ".join(sorted(map(str, content))) if isinstance(content, dict) else type(content).__name__
    raise UserError(
        "A checkpoint must hold tensors by name, under `model`, under `state_dict` or at its top level. "
        f"Received: {received[:200]}."
    )


def _number(saved: TorchFile, name: str) -> float | None:
    """A number that the checkpoint may hold, as such or as a tensor of one element."""
    value = saved.content.get(name)
    if isinstance(value, Tensor):
        value = saved.array(value).item()
    return value if isinstance(value, int | float) else None
