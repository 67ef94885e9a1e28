"""A client for a classifier or an export that runs in this process, without a server."""

import pathlib
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from scipy.special import softmax
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import meta_graph_pb2

from robust_tf.data.transforms import Decoding
from robust_tf.errors import UserError, unknown_name
from robust_tf.models import PUBLISHED, fetch_published, image_shape, plain_classifier, read_model
from robust_tf.models.published_results import published_results
from robust_tf.results import FILE_NAME, JobResults
from robust_tf.serving.artifacts import open_artifact
from robust_tf.serving.artifacts.saved_model import SavedModelArtifact
from robust_tf.serving.client.base import Client, ServerError, Signature, TensorInfo
from robust_tf.serving.model.inference import predict
from robust_tf.serving.model.session import LoadedModel, from_tensorflow, shape_of
from robust_tf.serving.model.status import ServingError
from robust_tf.serving.publish.dense_signatures import build_dense_signatures
from robust_tf.serving.publish.model_card import checked_labels, decoding_from_results, probe_from_results
from robust_tf.serving.publish.signatures import TOP_K, build_signatures, decode_images
from robust_tf.serving.wire.names import DEFAULT_SIGNATURE
from robust_tf.tasks.table import task_type_of

Function = Callable[..., Mapping[str, Any]]


class LocalClient(Client):
    """A `Client` that calls functions of this process.

    Args:
        functions: For each signature, the function that computes its outputs, by name, from its inputs.
        read_signatures: Function that returns the names, types and shapes of the inputs and outputs.
        close: Function that frees the model.
    """

    def __init__(
        self,
        functions: Mapping[str, Function],
        read_signatures: Callable[[], dict[str, Signature]],
        close: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self._functions = functions
        self._read = read_signatures
        self._close = close

    def predict(self, inputs: Mapping[str, Any], *, signature_name: str = DEFAULT_SIGNATURE) -> dict[str, np.ndarray]:
        """Runs a signature; see `Client.predict`."""
        try:
            outputs = self._functions[signature_name](**{name: _as_array(value) for name, value in inputs.items()})
        except KeyError:
            raise ServerError("FAILED_PRECONDITION", f'Serving signature key "{signature_name}" not found.') from None
        except ServingError as error:
            raise ServerError(error.code, error.message) from error
        except tf.errors.OpError as error:
            refusal = from_tensorflow(error)
            raise ServerError(refusal.code, refusal.message) from error
        return {name: np.asarray(value) for name, value in outputs.items()}

    def has_signature(self, name: str) -> bool:
        """Returns whether the model has a signature of this name."""
        return name in self._functions

    def available(self) -> bool:
        """Returns True, because the model is in the memory of this process."""
        return True

    def close(self) -> None:
        """Frees the model."""
        self._close()

    def _read_signatures(self) -> dict[str, Signature]:
        return self._read()


def open_classifier(name: str, *, labels: Sequence[str] = (), with_probe: bool = False, norm: str = "") -> LocalClient:
    """Returns a client for a classifier, detector or segmenter, with the functions that an export of it would serve.

    The names of the classes and the preprocessing come from the `results.json` next to the file, as in an export. For
    a published model, the names are those of its data set in TFDS.

    Args:
        name: Path of a `.keras` file, or name of a published model.
        labels: Names of the classes in the order of the logits. By default, see above.
        with_probe: Whether the client can attack images.
        norm: Norm of this attack, "linf" or "l2". "" takes the norm of the job's evaluation.

    Raises:
        UserError: There is no such classifier, or the norm of the attack is not known.
    """
    path = pathlib.Path(name)
    if path.suffix == ".keras":
        results = JobResults.read(path.with_name(FILE_NAME)) or JobResults()
    elif name in PUBLISHED:
        path, results = fetch_published(name), published_results(name)
        norm = norm or PUBLISHED[name].norm
    else:
        raise unknown_name(
            "classifier (neither the path of a .keras file nor the name of a published model)", name, PUBLISHED
        )
    if results.downscale is not None:
        raise UserError(
            "Images can be classified as they are only by a classifier that was trained on such images. Received: "
            f"{name}, trained with --downscale={results.downscale}."
        )
    model = read_model(path)
    results.check_image_size(image_shape(model)[1], path)
    task_type = task_type_of(model)
    if task_type != "classification":
        if with_probe:
            raise UserError(f"An attack probe is for classifiers. Received: {name}, a network for {task_type}.")
        decoding = decoding_from_results(results)
        names = checked_labels(labels or results.class_names or None, _num_classes(model))
        return _client_of(build_dense_signatures(model, labels=names, decoding=decoding))
    classifier = plain_classifier(model)
    size, num_classes = classifier.input_shape[1], classifier.output_shape[-1]
    if size is None:
        raise UserError(
            "Only a classifier for images of a fixed size can prepare encoded images. Received: the input shape "
            f"{classifier.input_shape} of {name}."
        )
    labels = list(labels or results.class_names or map(str, range(num_classes)))
    if len(labels) != num_classes:
        raise UserError(f"Each of the {num_classes} classes of {name} needs a label. Received: {len(labels)} labels.")
    functions = build_signatures(
        classifier,
        labels=labels,
        resize_size=results.resize_size or size,
        decoding=decoding_from_results(results),
        attack_probe=probe_from_results(results, norm=norm) if with_probe else None,
    )
    return _client_of(functions)


def _client_of(functions: Mapping[str, Function]) -> LocalClient:
    return LocalClient(functions, lambda: {key: _signature_of(function) for key, function in functions.items()})


def _num_classes(network: keras.Model) -> int:
    outputs = network.output["classes"] if isinstance(network.output, dict) else network.output
    return int(outputs.shape[-1])


def open_export(location: str) -> LocalClient:
    """Returns a client for an export of any format, in its own runtime.

    A SavedModel has all its signatures. An ONNX or LiteRT file takes encoded images only, which are prepared as its
    model card says.

    Args:
        location: Folder or file of a version; see `open_artifact`.

    Raises:
        UserError: There is no export, or it cannot be loaded.
    """
    artifact = open_artifact(location)
    if isinstance(artifact, SavedModelArtifact):
        model = artifact.model
        names = [name for name in model.signatures if model.signature(name) is not None]
        functions: dict[str, Function] = {name: partial(_run, model, name) for name in names}
        return LocalClient(functions, lambda: {name: _declared(model, name) for name in names}, artifact.close)
    card = artifact.card
    decoding = Decoding(exif=card["exif"], alpha_background=card["alpha_background"])
    size = artifact.image_size

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")])
    def prepare(image_bytes: tf.Tensor) -> tf.Tensor:
        return decode_images(image_bytes, image_size=size, resize_size=card["resize_size"], decoding=decoding)

    lock = threading.Lock()  # an interpreter of LiteRT runs one batch at a time

    def serving_default(image_bytes: np.ndarray) -> dict[str, np.ndarray]:
        images = prepare(tf.constant(image_bytes.tolist(), tf.string)).numpy()
        with lock:
            logits = artifact.logits(images)
        best = np.argsort(-logits, axis=1, kind="stable")[:, :TOP_K]
        return {
            "probabilities": softmax(logits, axis=1),
            "logits": logits,
            "classes": np.array([label.encode() for label in artifact.labels], object)[best],
            "top_k": best,
        }

    def signatures() -> dict[str, Signature]:
        classes = len(artifact.labels)
        floats, most = TensorInfo("DT_FLOAT", (None, classes)), min(TOP_K, classes)
        outputs = {"probabilities": floats, "logits": floats}
        outputs |= {"classes": TensorInfo("DT_STRING", (None, most)), "top_k": TensorInfo("DT_INT64", (None, most))}
        return {DEFAULT_SIGNATURE: Signature({"image_bytes": TensorInfo("DT_STRING", (None,))}, outputs)}

    return LocalClient({DEFAULT_SIGNATURE: serving_default}, signatures, artifact.close)


def _run(model: LoadedModel, signature_name: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    return predict(model, inputs, signature_name=signature_name)


def _as_array(value: Any) -> np.ndarray:
    """Returns an input as an array. Bytes become objects, because NumPy would strip zeros from their ends."""
    first = next(iter(value), None) if isinstance(value, list) else None
    return np.array(value, object) if isinstance(first, bytes) else np.asarray(value)


def _signature_of(function: Any) -> Signature:
    inputs = {spec.name: _info(spec) for spec in function.input_signature}
    outputs = function.get_concrete_function().structured_outputs
    return Signature(inputs, {name: _info(spec) for name, spec in outputs.items()})


def _info(spec: tf.TensorSpec) -> TensorInfo:
    return TensorInfo(types_pb2.DataType.Name(spec.dtype.as_datatype_enum), tuple(spec.shape.as_list()))


def _declared(model: LoadedModel, name: str) -> Signature:
    definition = model.signatures[name]
    inputs, outputs = (
        {key: TensorInfo(types_pb2.DataType.Name(info.dtype), _shape(info)) for key, info in tensors.items()}
        for tensors in (definition.inputs, definition.outputs)
    )
    return Signature(inputs, outputs)


def _shape(info: meta_graph_pb2.TensorInfo) -> tuple[int | None, ...] | None:
    shape = shape_of(info)
    return None if shape is None else tuple(shape)
