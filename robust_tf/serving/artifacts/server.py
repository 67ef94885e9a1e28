"""Asks a running server for logits, over REST or gRPC."""

import numpy as np

from robust_tf.errors import UserError
from robust_tf.serving.artifacts.artifact import Artifact
from robust_tf.serving.client import ServerError, connect

_SIGNATURE = "predict_pixels"
# Limits of a request: a server may batch at most so many images, and a proxy may refuse long bodies. As JSON, these
# values take about 12 MB.
_MOST_IMAGES = 32
_MOST_VALUES = 2**20


class ServerArtifact(Artifact):
    """A model of a TensorFlow Serving, or of a `robust_tf.serve`, which serves a version of `robust_tf.export`.

    The protocol tells the names of the most probable classes of each image only. `labels` holds the names that the
    answers have contained so far, and the index in place of each of the others.

    Args:
        address: Address of the server and the model, such as "grpc://localhost:8500/pets".

    Raises:
        UserError: The server does not answer, or its model is not such a version.
    """

    def __init__(self, address: str) -> None:
        scheme, _, rest = address.partition("://")
        server, _, path = rest.partition("/")
        model_name = path.strip("/").removeprefix("v1/models/")
        self._address = address
        try:
            self._client = connect(f"{scheme}://{server}", model_name=model_name)
            try:
                shape = self._client.signatures[_SIGNATURE].inputs["images"].shape or ()
                answer = self._client.predict(
                    {"images": np.zeros((1, *shape[1:]), np.float32)}, signature_name=_SIGNATURE
                )
                labels = [str(index) for index in range(answer["logits"].shape[1])]
                super().__init__(name="server", labels=labels, image_size=int(shape[1] or 0), card={})
            except Exception:  # any error is raised again once the connection is closed
                self._client.close()
                raise
        except (ServerError, KeyError, IndexError, TypeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(
                f"A server must serve a version of robust_tf.export, with the signature {_SIGNATURE}. Received: "
                f"{address}: {reason}. Name the model as in http://host:port/MODEL, and check that the server runs."
            ) from error
        self._learn_labels(answer)

    @property
    def _batch_size(self) -> int:
        return min(_MOST_IMAGES, max(1, _MOST_VALUES // (3 * self.image_size**2)))

    def _run(self, images: np.ndarray) -> np.ndarray:
        try:
            answer = self._client.predict({"images": images}, signature_name=_SIGNATURE)
        except ServerError as error:
            raise UserError(f"The server cannot answer. Received: {self._address}: {error}.") from error
        self._learn_labels(answer)
        return answer["logits"]

    def _learn_labels(self, answer: dict[str, np.ndarray]) -> None:
        labels = list(self.labels)
        for index, label in zip(answer["top_k"].ravel().tolist(), answer["classes"].ravel().tolist(), strict=True):
            labels[index] = label.decode("utf-8")
        self.labels = tuple(labels)

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()
