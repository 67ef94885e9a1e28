"""The interface of a deployed classifier."""

import abc
import types
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from robust_tf.errors import UserError

# Largest number of float32 values in a batch, 64 MiB. The activations of a network take many times as much memory.
_MOST_VALUES = 2**24


class Artifact(abc.ABC):
    """A deployed classifier in its own runtime, from `open_artifact`. `close`, or the end of a `with` block, frees it.

    Attributes:
        name: Name of the format: "SavedModel", "ONNX", "LiteRT", "LiteRT int8" or "server".
        labels: Names of the classes in the order of the logits.
        image_size: Side of the images, in pixels.
        card: Content of the artifact's model_card.json. Empty for a server.
    """

    def __init__(self, *, name: str, labels: Sequence[str], image_size: int, card: Mapping[str, Any]) -> None:
        self.name = name
        self.labels = tuple(labels)
        self.image_size = image_size
        self.card = dict(card)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Returns the logits of images, which are processed in batches that fit into the memory.

        Args:
            images: Images (count, image_size, image_size, 3) float32 in [0, 1].

        Returns:
            Logits (count, classes) float32.

        Raises:
            UserError: The images have another shape or type, the artifact cannot run, or a logit is not finite.
        """
        expected = (self.image_size, self.image_size, 3)
        if images.shape[1:] != expected or images.dtype != np.float32:
            raise UserError(
                f"This artifact takes float32 images of shape (count, {', '.join(map(str, expected))}). Received: "
                f"{images.dtype} of shape {images.shape}."
            )
        size = self._batch_size
        parts = [self._run(images[start : start + size]) for start in range(0, len(images), size)]
        logits = np.concatenate(parts) if parts else np.empty((0, len(self.labels)), np.float32)
        if not np.isfinite(logits).all():
            raise UserError(f"The logits of a classifier must be finite numbers. Received: NaN or infinity, {self}.")
        return logits.astype(np.float32, copy=False)

    @property
    def _batch_size(self) -> int:
        """Largest number of images that `_run` receives at once."""
        return max(1, _MOST_VALUES // (3 * self.image_size**2))

    @abc.abstractmethod
    def _run(self, images: np.ndarray) -> np.ndarray:
        """Returns the logits of one batch."""

    def close(self) -> None:  # noqa: B027  # most runtimes free their memory with the object
        """Frees the memory, or closes the connections."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: types.TracebackType | type | BaseException | None) -> None:
        self.close()

    def __str__(self) -> str:
        return f"from the {self.name} artifact"
