"""Runs a SavedModel version in a Session, as TensorFlow Serving does."""

import pathlib

import numpy as np

from robust_tf.errors import UserError
from robust_tf.serving.artifacts.artifact import Artifact
from robust_tf.serving.artifacts.card import FORMATS, read_card
from robust_tf.serving.model.session import LoadedModel
from robust_tf.serving.model.status import ServingError


class SavedModelArtifact(Artifact):
    """A SavedModel that `robust_tf.export` has written.

    Args:
        folder: Folder of the version.

    Attributes:
        model: The loaded version, with all its signatures.

    Raises:
        UserError: The folder holds no such SavedModel.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        card = read_card(folder)
        super().__init__(
            name=FORMATS["savedmodel"].title, labels=card["labels"], image_size=card["image_size"], card=card
        )
        try:
            self.model = LoadedModel(folder)
        except ServingError as error:
            raise UserError(f"The SavedModel cannot be loaded. Received: {folder}: {error}.") from error

    def _run(self, images: np.ndarray) -> np.ndarray:
        if self.model.signature("predict_pixels") is None:
            kind = self.card.get("task_type", "something else")
            raise UserError(
                "Only an artifact with the signature predict_pixels has the logits of a classifier. Received: "
                f"{self.model.path}, a network for {kind}."
            )
        try:
            return self.model.run("predict_pixels", {"images": images}, ("logits",))["logits"]
        except ServingError as error:
            raise UserError(f"The SavedModel refuses the images. Received: {error}.") from error

    def close(self) -> None:
        """Frees the weights."""
        self.model.close()
