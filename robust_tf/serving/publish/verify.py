"""Checks an export before it is published: run as in TensorFlow Serving, it must answer like the classifier."""

import pathlib
from collections.abc import Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

from robust_tf.attacks.outputs import looks_like_probabilities
from robust_tf.data.transforms import AS_STORED, Decoding
from robust_tf.errors import UserError
from robust_tf.models import features_of, outputs_of
from robust_tf.serving.model import inference, warmup
from robust_tf.serving.model.session import LoadedModel
from robust_tf.serving.model.status import ServingError
from robust_tf.serving.publish.probe import AttackProbe
from robust_tf.serving.publish.signatures import decode_images

# Largest difference between the served numbers and `classifier.predict`, relative to the largest expected number or 1,
# whichever is larger. The graph optimizer fuses layers, which changes the rounding, especially in half precision.
_TOLERANCES = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 8e-2}


def sample_requests(image_size: int, attack_probe: AttackProbe | None) -> dict[str, dict[str, np.ndarray]]:
    """Returns a request of two images for each signature that Predict can run. The requests also serve as warm-up.

    Args:
        image_size: Side of the classifier's images.
        attack_probe: The served attack, or None.
    """
    images = np.random.default_rng(0).integers(0, 256, (2, image_size, image_size, 3), dtype=np.uint8)
    images[1] = np.linspace(0, 255, image_size, dtype=np.uint8)[:, None, None]
    image_bytes = np.array([tf.io.encode_png(image).numpy() for image in images], dtype=object)
    pixels = images.astype(np.float32) / np.float32(255)
    requests = {
        "serving_default": {"image_bytes": image_bytes},
        "predict_pixels": {"images": pixels},
        "predict_uint8": {"images": images},
        "features": {"images": pixels},
        "preview": {"image_bytes": image_bytes},
    }
    if attack_probe is not None:
        requests["attack_probe"] = {
            "image_bytes": image_bytes,
            "label": np.array([0, -1], np.int64),
            "epsilon": np.array([0.0, attack_probe.epsilon], np.float32),
        }
    return requests


def warmup_logs(
    model_name: str, requests: Mapping[str, Mapping[str, np.ndarray]]
) -> list[prediction_log_pb2.PredictionLog]:
    """Returns the sample requests as warm-up records, and one more for Classify.

    Args:
        model_name: Name of the model.
        requests: The sample requests, by signature.
    """
    logs = [warmup.predict_log(model_name, name, request) for name, request in requests.items()]
    examples = _examples(requests["serving_default"]["image_bytes"])
    return [*logs, warmup.classify_log(model_name, "classify", examples)]


def _examples(image_bytes: np.ndarray) -> list[bytes]:
    def example(value: bytes) -> tf.train.Example:
        feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        return tf.train.Example(features=tf.train.Features(feature={"image/encoded": feature}))

    return [example(value).SerializeToString() for value in image_bytes]


def verify_export(
    version_dir: pathlib.Path,
    classifier: keras.Model,
    requests: Mapping[str, Mapping[str, np.ndarray]],
    *,
    labels: Sequence[str],
    resize_size: int,
    decoding: Decoding = AS_STORED,
    original: keras.Model,
) -> None:
    """Runs every signature and the warm-up as TensorFlow Serving would, and compares the answers with the classifier.

    Args:
        version_dir: Folder of the export.
        classifier: The exported classifier.
        requests: The sample requests, by signature.
        labels: Names of the classes.
        resize_size: Length to which the shorter side of an encoded image is resized.
        decoding: How encoded images are decoded.
        original: Model that the classifier was made from. The probabilities are compared with it as well, because it
            is the model that the user knows.

    Raises:
        UserError: The export cannot be loaded or run, or its answers differ.
    """
    try:
        model = LoadedModel(version_dir)
        try:
            _compare(model, classifier, requests, labels=labels, resize_size=resize_size, decoding=decoding)
            _compare_probabilities(model, classifier, original, requests["predict_pixels"])
            warmup.replay_warmup(model)
        finally:
            model.close()
    except ServingError as error:
        raise UserError(
            f"The export cannot be served. Received: {error}. Nothing was published. Perhaps a layer of the classifier "
            "does not support export."
        ) from error


def _compare(
    model: LoadedModel,
    classifier: keras.Model,
    requests: Mapping[str, Mapping[str, np.ndarray]],
    *,
    labels: Sequence[str],
    resize_size: int,
    decoding: Decoding,
) -> None:
    pixels = requests["predict_pixels"]["images"]
    image_bytes = requests["serving_default"]["image_bytes"]
    decoded = decode_images(
        tf.constant(image_bytes),
        image_size=classifier.input_shape[1],
        resize_size=resize_size,
        decoding=decoding,
    ).numpy()
    from_pixels, from_bytes = np.split(logits_from(classifier, np.concatenate([pixels, decoded])), 2)
    if not (np.isfinite(from_pixels).all() and np.isfinite(from_bytes).all()):
        raise UserError(
            f"The classifier's logits must be finite. Received: {from_pixels.tolist()}. Its training has diverged."
        )
    tolerance = tolerance_of(classifier)
    for name, logits in [
        ("serving_default", from_bytes),
        ("predict_pixels", from_pixels),
        ("predict_uint8", from_pixels),
    ]:
        answer = model.run(name, requests[name])
        expect_close(f"{name}/logits", answer["logits"], logits, tolerance)
        expect_close(f"{name}/probabilities", answer["probabilities"], _softmax(logits), tolerance)
        named = [[labels[index].encode() for index in row] for row in answer["top_k"]]
        if answer["classes"].tolist() != named:
            raise UserError(f"{name}/classes must be the labels of top_k. Received: {answer['classes'].tolist()}.")
    features = model.run("features", requests["features"])["features"]
    expect_close("features", features, logits_from(features_of(classifier), pixels), tolerance)
    scores = np.asarray(inference.classify(model, _examples(image_bytes), signature_name="classify").scores)
    best = np.sort(_softmax(from_bytes))[:, ::-1][:, : scores.shape[1]]
    expect_close("classify/scores", scores, best, tolerance)
    pictures = model.run("preview", requests["preview"])["preview_image_bytes"]
    shown = np.stack([tf.io.decode_png(picture).numpy() for picture in pictures]).astype(np.float32) / 255.0
    expect_close("preview", shown, decoded, 1.0 / 255.0)  # a PNG is rounded to 8 bits
    if "attack_probe" in requests:  # its first epsilon is 0, which must give the answer for the clean image
        probed = model.run("attack_probe", requests["attack_probe"])["adversarial_probabilities"]
        expect_close("attack_probe at epsilon 0", probed[:1], _softmax(from_bytes[:1]), tolerance)


def _compare_probabilities(
    model: LoadedModel, classifier: keras.Model, original: keras.Model, request: Mapping[str, np.ndarray]
) -> None:
    """Compares the served probabilities with those of the original model, which may return logits or probabilities."""
    answer = model.run("predict_pixels", request)
    outputs = outputs_of(original, request["images"]).numpy().astype(np.float32)
    if outputs.shape[1] == 1:
        # A single output that is served unchanged is a logit. Otherwise it is a probability, and the export removed its
        # sigmoid.
        is_logit = np.allclose(outputs[:, 0], answer["logits"][:, 1], rtol=1e-3, atol=1e-3)
        of_class_1 = tf.sigmoid(outputs).numpy() if is_logit else outputs
        expected = np.concatenate([1.0 - of_class_1, of_class_1], axis=1)
    else:
        expected = outputs if looks_like_probabilities(outputs) else _softmax(outputs)
    difference = float(np.max(np.abs(answer["probabilities"] - expected)))
    if not difference <= tolerance_of(classifier):
        ending = "probabilities" if expected is outputs else "outputs"
        raise UserError(
            f"The served probabilities must be those of the classifier. Received: {original.name!r}, whose {ending} "
            f"differ from them by {difference:g}. Nothing was published. Its last layers cannot be turned into logits: "
            "build it again as keras.Model(inputs, logits), where logits are the numbers that go into the softmax."
        )


def tolerance_of(classifier: keras.Model) -> float:
    """Returns the largest relative difference that is allowed between an export and its classifier."""
    return max(_TOLERANCES.get(layer.compute_dtype, _TOLERANCES["float32"]) for layer in classifier.layers)


def _softmax(logits: np.ndarray) -> np.ndarray:
    probabilities: np.ndarray = tf.nn.softmax(logits).numpy()
    return probabilities


def logits_from(model: keras.Model, images: np.ndarray) -> np.ndarray:
    """Returns the outputs of a model in inference mode, as float32."""
    outputs: np.ndarray = model.predict(images, verbose=0).astype(np.float32)
    return outputs


def expect_close(what: str, received: np.ndarray, expected: np.ndarray, tolerance: float) -> float:
    """Returns the largest difference, relative to the largest expected number or 1, whichever is larger.

    Args:
        what: What the numbers are, for the message.
        received: Numbers of the export.
        expected: Numbers of the classifier.
        tolerance: Largest relative difference that is allowed.

    Raises:
        UserError: The difference is larger, or the shapes differ.
    """
    if received.shape != expected.shape:
        raise UserError(
            f"The export and the classifier must give the same shape for {what}. Received: {received.shape} instead of "
            f"{expected.shape}. Nothing was published."
        )
    difference = float(np.max(np.abs(received - expected)) / max(1.0, float(np.max(np.abs(expected)))))
    if not difference <= tolerance:
        raise UserError(
            f"The export and the classifier must give the same numbers for {what}. Received: a difference of "
            f"{difference:g}, where {tolerance:g} is allowed. Nothing was published."
        )
    return difference
