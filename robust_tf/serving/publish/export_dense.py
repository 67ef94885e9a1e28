"""Publishes a detector or a segmenter as a verified version in a folder that TensorFlow Serving watches."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from robust_tf.data.transforms import AS_STORED, Decoding
from robust_tf.errors import UserError
from robust_tf.models.folding import fold_batch_norm
from robust_tf.serving.artifacts.card import LABELS_NAME, SAVED_MODEL_FORMAT, write_card, write_labels
from robust_tf.serving.artifacts.latency import latency_entry
from robust_tf.serving.model.session import LoadedModel
from robust_tf.serving.model.warmup import predict_log, write_warmup
from robust_tf.serving.publish.dense_signatures import build_dense_signatures
from robust_tf.serving.publish.model_card import checked_labels, export_facts
from robust_tf.serving.publish.staging import (
    check_version,
    make_readable,
    model_folder,
    rename_into_place,
    staging_folder,
    sync,
)
from robust_tf.serving.publish.verify_dense import dense_requests, verify_dense_export
from robust_tf.serving.wire.names import DEFAULT_SIGNATURE
from robust_tf.tasks.detection import levels_of
from robust_tf.tasks.detection.anchors import BASE, RATIOS, SCALES
from robust_tf.tasks.detection.decoding import IOU_THRESHOLD, MOST_CANDIDATES, MOST_DETECTIONS, SCORE_THRESHOLD
from robust_tf.tasks.table import task_type_of

_MOST_CLASSES = 255  # a pixel of a mask is 8 bits, and 255 stands for ignored pixels in data sets


def export_dense(
    network: keras.Model,
    export_dir: str | os.PathLike[str],
    model_name: str,
    *,
    model_card: Mapping[str, Any],
    labels: Sequence[str] | None = None,
    version: int | None = None,
    decoding: Decoding = AS_STORED,
    world_readable: bool = True,
    measure_latency: bool = False,
) -> pathlib.Path:
    """Publishes a detector or a segmenter as `export_dir/model_name/version`, ready for TensorFlow Serving.

    As with `export_classifier`, the version is written under a temporary name and loaded as TensorFlow Serving loads
    it. Its answers are compared with those of the network, and only then is it renamed into place. The signatures are
    those of `build_dense_signatures`.

    Args:
        network: Network of `build_detector` or `build_segmenter`, for images (batch, size, size, 3) in [0, 1].
        export_dir: Folder of all models.
        model_name: Name of the model in requests and of its folder. It must not contain "/" or ":".
        model_card: Facts to publish as `model_card.json`, such as data, metric, figures and license. The task type,
            sizes, classes, pixel range, versions, and the anchors and thresholds of a detector are added.
        labels: Names of the classes. None names them "0", "1", ...
        version: Number of the version, at least 1. None takes the next free number.
        decoding: How EXIF rotation and transparency of encoded images are treated, as in training.
        world_readable: Whether the version gets the modes 0755 and 0644 regardless of the umask.
        measure_latency: Whether to write the latency per image into the card, which takes seconds.

    Returns:
        The folder of the new version.

    Raises:
        UserError: An argument is not valid, the version exists, the folder cannot be written, or the export does not
            give the same answers as the network.
    """
    task_type = task_type_of(network)
    if task_type == "classification":
        raise UserError(
            "A network for detection or segmentation has outputs 'boxes' and 'classes', or a last layer 'head_mask'. "
            f"Received: {network.name!r}. Publish a classifier with export_classifier."
        )
    image_size = network.input_shape[1]
    if image_size is None:
        raise UserError(f"Serving needs a network for a fixed image size. Received: {network.input_shape}.")
    outputs = network.output["classes"] if task_type == "detection" else network.output
    num_classes = outputs.shape[-1]
    labels = checked_labels(labels, num_classes)
    if task_type == "segmentation" and num_classes > _MOST_CLASSES:
        raise UserError(
            f"A served mask is an image of 8 bits, for at most {_MOST_CLASSES} classes. Received: {num_classes} "
            "classes."
        )
    base = model_folder(pathlib.Path(export_dir), model_name)
    if version is not None:
        check_version(base, version)
    card = dict(model_card) | {"task_type": task_type}
    card |= export_facts(network, model_name, labels=labels, resize_size=image_size, decoding=decoding)
    if task_type == "detection":
        card |= _detection_facts(network)

    served = fold_batch_norm(network)
    with staging_folder(base, world_readable) as staging:
        module = tf.Module()
        module.weights = [weight.value for weight in served.weights]  # see `export_classifier`
        signatures = build_dense_signatures(served, labels=labels, decoding=decoding)
        tf.saved_model.save(module, str(staging), signatures=signatures)
        (staging / "assets").mkdir(exist_ok=True)
        write_labels(staging / "assets" / LABELS_NAME, labels)
        requests = dense_requests(image_size)
        write_warmup(staging, [predict_log(model_name, name, request) for name, request in requests.items()])
        verify_dense_export(staging, network, requests, labels=labels, decoding=decoding)
        if measure_latency:
            card |= _latency(staging, image_size)
        write_card(staging, SAVED_MODEL_FORMAT, card)
        if world_readable:
            make_readable(staging)
        sync(staging)
        return rename_into_place(staging, base, version)


def _detection_facts(network: keras.Model) -> dict[str, Any]:
    """Returns what a program needs to decode the raw outputs of a detector by itself."""
    return {
        "anchors": {
            "strides": [2**level for level in levels_of(network)],
            "base_in_strides": BASE,
            "scales": list(SCALES),
            "height_to_width_ratios": list(RATIOS),
        },
        "most_candidates": MOST_CANDIDATES,
        "most_detections": MOST_DETECTIONS,
        "score_threshold": SCORE_THRESHOLD,
        "iou_threshold": IOU_THRESHOLD,
    }


def _latency(version_dir: pathlib.Path, image_size: int) -> dict[str, Any]:
    model = LoadedModel(version_dir)

    def run(images: np.ndarray) -> None:
        model.run(DEFAULT_SIGNATURE, {"images": images})

    try:
        return latency_entry(run, image_size)
    finally:
        model.close()
