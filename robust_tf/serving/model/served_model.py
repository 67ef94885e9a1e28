"""The interface of a model in memory."""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
from tensorflow.core.protobuf import meta_graph_pb2


class ServedModel(Protocol):
    """One version of a model in memory, ready to run: a `LoadedModel`, or a wrapper around one.

    Attributes:
        path: Folder of the version.
        signatures: The signatures that the SavedModel declares, by name. They include the entry that initializes it.
        checks_methods: Whether to refuse requests for signatures that are meant for another method.
    """

    path: pathlib.Path
    signatures: dict[str, meta_graph_pb2.SignatureDef]
    checks_methods: bool

    def signature(self, name: str) -> meta_graph_pb2.SignatureDef | None:
        """Returns the signature with this name, or None. "" stands for `serving_default`."""

    def run(
        self,
        signature_name: str,
        inputs: Mapping[str, np.ndarray],
        outputs: Iterable[str] = (),
        *,
        timeout_ms: int = 0,
    ) -> dict[str, np.ndarray]:
        """Runs one signature; see `LoadedModel.run`."""

    def close(self) -> None:
        """Frees the model. No request may be using it."""
