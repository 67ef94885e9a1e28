"""Checks the export of a detector or segmenter before it is published: it must answer like the network."""

import pathlib
from collections.abc import Mapping

import keras
import numpy as np
import tensorflow as tf

from robust_tf.data.boxes import BoxPreprocessing
from robust_tf.data.masks import MaskPreprocessing
from robust_tf.data.transforms import Decoding, decode
from robust_tf.errors import UserError
from robust_tf.serving.model import warmup
from robust_tf.serving.model.session import LoadedModel
from robust_tf.serving.model.status import ServingError
from robust_tf.serving.publish.dense_signatures import RAW_SIGNATURE
from robust_tf.serving.publish.verify import expect_close, tolerance_of
from robust_tf.serving.wire.names import DEFAULT_SIGNATURE, IMAGE_BYTES_SIGNATURE, MASK_OUTPUT, PREVIEW_SIGNATURE
from robust_tf.tasks.detection import anchors_for, decode_detections
from robust_tf.tasks.table import task_type_of

Arrays = Mapping[str, np.ndarray]
# Two overlapping candidates whose scores differ by less than the rounding may change places, and then another one of
# them survives. In half precision the rounding is much larger than the distances between scores.
_OTHER_DETECTIONS = 0.05
_OTHER_DETECTIONS_IN_HALF_PRECISION = 0.5


def dense_requests(image_size: int) -> dict[str, dict[str, np.ndarray]]:
    """Returns a request of two images for each signature. The requests also serve as warm-up.

    Args:
        image_size: Side of the network's images.
    """
    rng = np.random.default_rng(0)
    pixels = rng.uniform(size=(2, image_size, image_size, 3)).astype(np.float32)
    shapes = [(max(1, 3 * image_size // 4), image_size, 3), (2 * image_size, image_size + 1, 3)]
    pictures = [tf.io.encode_png(rng.integers(0, 256, shape, np.uint8)).numpy() for shape in shapes]
    image_bytes = np.array(pictures, dtype=object)
    return {
        DEFAULT_SIGNATURE: {"images": pixels},
        IMAGE_BYTES_SIGNATURE: {"image_bytes": image_bytes},
        RAW_SIGNATURE: {"images": pixels},
        PREVIEW_SIGNATURE: {"image_bytes": image_bytes},
    }


def verify_dense_export(
    version_dir: pathlib.Path,
    network: keras.Model,
    requests: Mapping[str, Arrays],
    *,
    labels: list[str],
    decoding: Decoding,
) -> None:
    """Runs every signature and the warm-up as TensorFlow Serving would, and compares the answers with the network.

    Each request is sent with one image and with all of them.

    Args:
        version_dir: Folder of the export.
        network: The exported detector or segmenter.
        requests: The requests of `dense_requests`.
        labels: Names of the classes.
        decoding: How encoded images are decoded.

    Raises:
        UserError: The export cannot be loaded or run, or its answers differ.
    """
    compare = _compare_detector if task_type_of(network) == "detection" else _compare_segmenter
    try:
        model = LoadedModel(version_dir)
        try:
            for count in (1, len(requests[DEFAULT_SIGNATURE]["images"])):
                sent = {
                    name: {key: value[:count] for key, value in request.items()} for name, request in requests.items()
                }
                answers = {name: model.run(name, request) for name, request in sent.items()}
                _compare_raw(answers[RAW_SIGNATURE], network, sent[RAW_SIGNATURE]["images"])
                compare(answers, network, sent, labels=labels, decoding=decoding)
                _compare_previews(answers[PREVIEW_SIGNATURE], sent[PREVIEW_SIGNATURE], decoding)
            warmup.replay_warmup(model)
        finally:
            model.close()
    except ServingError as error:
        raise UserError(
            f"The export cannot be served. Received: {error}. Nothing was published. Perhaps a layer of the network "
            "does not support export."
        ) from error


def _outputs(network: keras.Model, images: np.ndarray) -> dict[str, np.ndarray]:
    outputs = network.predict(images, verbose=0)
    by_name = outputs if isinstance(outputs, dict) else {"logits": outputs}
    return {name: np.asarray(value, np.float32) for name, value in by_name.items()}


def _compare_raw(answer: Arrays, network: keras.Model, images: np.ndarray) -> None:
    for name, expected in _outputs(network, images).items():
        if not np.isfinite(expected).all():
            raise UserError(
                f"The outputs of a network must be finite. Received: NaN or infinity in its {name}. Its training has "
                "diverged."
            )
        expect_close(f"{RAW_SIGNATURE}/{name}", answer[name], expected, tolerance_of(network))


def _compare_detector(
    answers: Mapping[str, Arrays],
    network: keras.Model,
    sent: Mapping[str, Arrays],
    *,
    labels: list[str],
    decoding: Decoding,
) -> None:
    size, anchors, tolerance = network.input_shape[1], anchors_for(network), tolerance_of(network)

    def detected(images: np.ndarray) -> dict[str, np.ndarray]:
        found = decode_detections(_outputs(network, images), anchors, image_size=size)
        return {name: value.numpy() for name, value in found.items()}

    expected = detected(sent[DEFAULT_SIGNATURE]["images"])
    _expect_detections(DEFAULT_SIGNATURE, answers[DEFAULT_SIGNATURE], expected, labels, tolerance, size)

    preprocessing = BoxPreprocessing(image_size=size, decoding=decoding)
    encoded = sent[IMAGE_BYTES_SIGNATURE]["image_bytes"]
    measured = [preprocessing.measured_example(tf.constant(each), tf.constant(b"")) for each in encoded]
    expected = detected(np.stack([image.numpy() for image, _ in measured]))
    sizes = _sizes(encoded, decoding)
    expect_close("image_sizes", answers[IMAGE_BYTES_SIGNATURE]["image_sizes"], sizes, 0.0)
    for row, (_, truth) in enumerate(measured):
        expected["boxes"][row] = np.minimum(expected["boxes"][row] / truth["scale"].numpy(), np.tile(sizes[row], 2))
    top, left, bottom, right = np.moveaxis(expected["boxes"], -1, 0)
    expected["classes"] = np.where((top < bottom) & (left < right), expected["classes"], -1)
    expected["count"] = (expected["classes"] >= 0).sum(axis=1)
    _expect_detections(
        IMAGE_BYTES_SIGNATURE, answers[IMAGE_BYTES_SIGNATURE], expected, labels, tolerance, int(sizes.max())
    )


def _expect_detections(
    name: str, answer: Arrays, expected: Arrays, labels: list[str], tolerance: float, side: int
) -> None:
    """Compares detections with those of the network, in any order. Boxes may differ by `tolerance * side` pixels."""
    classes, count = answer["classes"], answer["count"]
    is_found = np.arange(classes.shape[1]) < count[:, None]
    named = np.array([*labels, ""], object)[np.where(classes < 0, len(labels), classes)]
    if ((classes >= 0) != is_found).any() or [
        [each.decode() for each in row] for row in answer["labels"]
    ] != named.tolist():
        raise UserError(
            f"{name} must answer with `count` detections, their classes and labels, and then padding. Received: "
            f"classes {classes.tolist()} for {count.tolist()} detections. Nothing was published."
        )
    strangers = total = 0
    for row in range(len(classes)):
        first, second = (
            {key: values[key][row][values["classes"][row] >= 0] for key in ("boxes", "scores", "classes")}
            for values in (answer, expected)
        )
        same = first["classes"][:, None] == second["classes"][None]
        same &= np.abs(first["scores"][:, None] - second["scores"][None]) <= tolerance
        distance = np.abs(first["boxes"][:, None] - second["boxes"][None]).max(axis=-1, initial=0.0)
        same &= distance <= tolerance * side
        strangers += int((~same.any(axis=1)).sum() + (~same.any(axis=0)).sum())
        total += same.shape[0] + same.shape[1]
    allowed = _OTHER_DETECTIONS if tolerance <= 1e-4 else _OTHER_DETECTIONS_IN_HALF_PRECISION
    if strangers > allowed * total:
        raise UserError(
            f"The export and the network must find the same boxes in {name}. Received: {strangers} of {total} "
            "detections that the other one has not found. Nothing was published."
        )


def _compare_segmenter(
    answers: Mapping[str, Arrays],
    network: keras.Model,
    sent: Mapping[str, Arrays],
    *,
    labels: list[str],
    decoding: Decoding,
) -> None:
    size, tolerance = network.input_shape[1], tolerance_of(network)

    def probabilities(images: np.ndarray) -> np.ndarray:
        found: np.ndarray = tf.nn.softmax(_outputs(network, images)["logits"]).numpy()
        return found

    answer, expected = answers[DEFAULT_SIGNATURE], probabilities(sent[DEFAULT_SIGNATURE]["images"])
    _expect_mask(DEFAULT_SIGNATURE, answer["mask"], expected, tolerance)
    expect_close("probabilities", answer["probabilities"], expected.max(axis=-1), tolerance)

    answer, encoded = answers[IMAGE_BYTES_SIGNATURE], sent[IMAGE_BYTES_SIGNATURE]["image_bytes"]
    prepare = tf.function(MaskPreprocessing(image_size=size, decoding=decoding).evaluation_example)
    sizes = _sizes(encoded, decoding)
    expect_close("image_sizes", answer["image_sizes"], sizes, 0.0)
    if [[each.decode() for each in row] for row in answer["labels"]] != [labels] * len(encoded):
        raise UserError(
            f"{IMAGE_BYTES_SIGNATURE} must answer with the labels. Received: {answer['labels'].tolist()}. Nothing was "
            "published."
        )
    for picture, image, shape in zip(answer[MASK_OUTPUT], encoded, sizes, strict=True):
        blank = tf.io.encode_png(tf.zeros([*shape, 1], tf.uint8))
        square, _ = prepare(tf.constant(image), blank)
        expected = probabilities(square.numpy()[None])
        rows, columns = (np.floor((np.arange(length) + 0.5) * (size / length)).astype(int) for length in shape)
        mask = tf.io.decode_png(picture)[None, ..., 0].numpy()
        _expect_mask(IMAGE_BYTES_SIGNATURE, mask, expected[:, rows][:, :, columns], tolerance)


def _expect_mask(name: str, mask: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Compares a mask with probabilities. Where two classes are equally probable, either of them is right."""
    if mask.shape != expected.shape[:-1] or mask.max() >= expected.shape[-1]:
        raise UserError(
            f"The export and the network must give the same mask in {name}. Received: shape {mask.shape} instead of "
            f"{expected.shape[:-1]}, classes up to {mask.max()}. Nothing was published."
        )
    chosen = np.take_along_axis(expected, mask[..., None].astype(np.int64), axis=-1)[..., 0]
    wrong = float((chosen < expected.max(axis=-1) - 2 * tolerance).mean())
    if wrong:
        raise UserError(
            f"The export and the network must give the same mask in {name}. Received: {wrong:.2%} of the pixels "
            "differ. Nothing was published."
        )


def _compare_previews(answer: Arrays, request: Arrays, decoding: Decoding) -> None:
    for picture, encoded in zip(answer["preview_image_bytes"], request["image_bytes"], strict=True):
        image = decode(tf.constant(encoded), decoding).numpy()
        shown = tf.io.decode_png(picture, channels=3).numpy()
        if max(image.shape) > max(shown.shape):  # a preview of limited size
            continue
        expect_close(PREVIEW_SIGNATURE, shown.astype(np.float32), image.astype(np.float32), 0.0)


def _sizes(encoded: np.ndarray, decoding: Decoding) -> np.ndarray:
    return np.array([decode(tf.constant(each), decoding).shape[:2] for each in encoded], np.int64)
