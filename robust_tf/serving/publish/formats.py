"""Converts a classifier to ONNX and LiteRT.

Both converters read a SavedModel with a single signature. Converting the Keras model itself, as its own
`export(format="onnx")` does, would turn the constants of its normalization into two further inputs.
"""

import contextlib
import pathlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from robust_tf.errors import UserError
from robust_tf.serving.artifacts.card import INT8_FORMAT
from robust_tf.serving.model.session import without_deprecation_warning

# The newest operator set that tf2onnx 1.17 writes. ONNX Runtime reads it since version 1.14 (2023).
_OPSET = 18


class Samples(NamedTuple):
    """Images of a classifier's data set that are not test images.

    Attributes:
        images: Images (count, size, size, 3) float32 in [0, 1].
        labels: Labels (count,) int.
    """

    images: np.ndarray
    labels: np.ndarray

    @property
    def for_calibration(self) -> np.ndarray:
        """The first half of the images, from which the ranges of the activations are taken."""
        return self.images[: len(self.images) // 2]

    @property
    def for_checking(self) -> "Samples":
        """The second half, with which the result is compared with the classifier."""
        half = len(self.images) // 2
        return Samples(self.images[half:], self.labels[half:])


def to_onnx(classifier: keras.Model, path: pathlib.Path, samples: Samples | None = None) -> None:
    """Writes a classifier as an ONNX file with the input `images` and the output `logits`, for any batch size.

    Args:
        classifier: Plain classifier.
        path: File to write.
        samples: Not needed.

    Raises:
        UserError: A layer cannot be converted.
    """
    del samples
    # Imported here because the package belongs to an extra. `check_formats` says so if it is missing.
    import tf2onnx
    from tf2onnx import tf_loader

    with _saved_model(classifier) as folder, without_deprecation_warning(), _conversion("onnx", classifier):
        graph, inputs, outputs, names = tf_loader.from_saved_model(
            folder, None, None, tag=["serve"], signatures=["serving_default"], return_tensors_to_rename=True
        )
        tf2onnx.convert.from_graph_def(
            graph,
            name=classifier.name,
            input_names=inputs,
            output_names=outputs,
            tensors_to_rename=names,
            opset=_OPSET,
            output_path=str(path),
        )


def to_litert(classifier: keras.Model, path: pathlib.Path, samples: Samples | None = None) -> None:
    """Writes a classifier as a LiteRT file in float32, with the signature `images` -> `logits`.

    Args:
        classifier: Plain classifier.
        path: File to write.
        samples: Not needed.

    Raises:
        UserError: A layer cannot be converted.
    """
    del samples
    with _saved_model(classifier) as folder, _conversion("litert", classifier):
        path.write_bytes(tf.lite.TFLiteConverter.from_saved_model(folder).convert())


def to_litert_int8(classifier: keras.Model, path: pathlib.Path, samples: Samples | None) -> None:
    """Writes a classifier as a LiteRT file whose weights and activations are 8-bit integers.

    Input and output stay float32, so that callers need not know the scales. Every operation between them computes with
    integers, or the conversion fails.

    Args:
        classifier: Plain classifier.
        path: File to write.
        samples: Images that show the range of the activations.

    Raises:
        UserError: A layer cannot be converted.
    """
    images = () if samples is None else samples.for_calibration

    def representative() -> Iterator[dict[str, np.ndarray]]:
        for image in images:
            yield {"images": image[None]}

    with _saved_model(classifier) as folder, _conversion(INT8_FORMAT, classifier):
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = representative
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        with warnings.catch_warnings():
            # The converter runs the images in TensorFlow's own interpreter, which says that it will move to LiteRT.
            warnings.filterwarnings("ignore", "(?s).*tf.lite.Interpreter is deprecated", UserWarning)
            path.write_bytes(converter.convert())


# The function that writes each format except SavedModel.
CONVERTERS: dict[str, Callable[[keras.Model, pathlib.Path, Samples | None], None]] = {
    "onnx": to_onnx,
    "litert": to_litert,
    INT8_FORMAT: to_litert_int8,
}


@contextlib.contextmanager
def _saved_model(classifier: keras.Model) -> Iterator[str]:
    """Yields the folder of a SavedModel with the signature `images` -> `logits` and nothing else."""
    signature = tf.TensorSpec([None, *classifier.input_shape[1:]], tf.float32, name="images")

    @tf.function(input_signature=[signature])
    def logits(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"logits": tf.cast(classifier(images, training=False), tf.float32)}

    module = tf.Module()
    module.weights = [weight.value for weight in classifier.weights]
    with tempfile.TemporaryDirectory(prefix="robust_tf-") as folder:
        tf.saved_model.save(module, folder, signatures={"serving_default": logits})
        yield folder


@contextlib.contextmanager
def _conversion(format_name: str, classifier: keras.Model) -> Iterator[Any]:
    """Turns whatever a converter raises into an error that names the format."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # the converters raise many classes of errors
        reason = str(error).strip().partition("\n")[0][:300] or type(error).__name__
        raise UserError(
            f"The classifier cannot be converted to the format {format_name}. Received: {classifier.name!r}: {reason}. "
            "Nothing was published. Leave this format out, or use layers that it supports."
        ) from error
