"""Publishes a classifier as a verified version in a folder that TensorFlow Serving watches."""

import contextlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from robust_tf.data.transforms import AS_STORED, Decoding
from robust_tf.errors import UserError
from robust_tf.models import plain_classifier
from robust_tf.models.folding import fold_batch_norm
from robust_tf.serving.artifacts.card import (
    FORMATS,
    INT8_FORMAT,
    LABELS_NAME,
    SAVED_MODEL_FORMAT,
    check_formats,
    write_card,
    write_labels,
)
from robust_tf.serving.model.warmup import write_warmup
from robust_tf.serving.publish.formats import CONVERTERS, Samples
from robust_tf.serving.publish.model_card import checked_labels, export_facts
from robust_tf.serving.publish.probe import AttackProbe
from robust_tf.serving.publish.signatures import build_signatures
from robust_tf.serving.publish.staging import (
    check_version,
    format_folder,
    make_readable,
    model_folder,
    rename_into_place,
    staging_folder,
    sync,
)
from robust_tf.serving.publish.verify import sample_requests, verify_export, warmup_logs
from robust_tf.serving.publish.verify_artifact import verify_artifact


def export_classifier(
    classifier: keras.Model,
    export_dir: str | os.PathLike[str],
    model_name: str,
    *,
    model_card: Mapping[str, Any],
    labels: Sequence[str] | None = None,
    version: int | None = None,
    resize_size: int | None = None,
    decoding: Decoding = AS_STORED,
    attack_probe: AttackProbe | None = None,
    original: keras.Model | None = None,
    world_readable: bool = True,
    formats: Sequence[str] = (SAVED_MODEL_FORMAT,),
    samples: Samples | None = None,
    fresh_process: bool = False,
) -> pathlib.Path:
    """Publishes a classifier as `export_dir/model_name/version`, ready for TensorFlow Serving, or in other formats.

    The version is first written under a temporary name and loaded as TensorFlow Serving loads it. Every signature is
    run and compared with `classifier.predict`, and the warm-up requests are replayed. Only then is the version renamed
    into place. So a server that watches the folder never sees part of a version, and an export that is interrupted or
    fails publishes nothing. The SavedModel is for inference only, so each BatchNorm after a float32 convolution is
    folded into the convolution.

    A version in another format is the folder `export_dir/model_name/format/version`, see `format_folder`. It holds the
    file, `model_card.json` and `labels.txt`. It is loaded in a fresh process, in its own runtime, and has to give the
    classifier's logits for one image and for five. Nothing is published unless all formats pass.

    Args:
        classifier: Any Keras model that `plain_classifier` accepts, for images (batch, size, size, 3) in [0, 1].
        export_dir: Folder of all models.
        model_name: Name of the model in requests and of its folder. It must not contain "/" or ":".
        model_card: Facts to publish as `model_card.json`, such as data, metric, accuracies and license. Sizes,
            classes, pixel range and versions are added.
        labels: Names of the classes in the order of the logits. None names them "0", "1", ...
        version: Number of the version, at least 1. None takes the next free number.
        resize_size: Length to which the shorter side of an encoded image is resized before the center crop. None
            takes the size of the classifier's images.
        decoding: How EXIF rotation and transparency of encoded images are treated, as in training.
        attack_probe: Attack to serve as the signature `attack_probe`. None serves no attack.
        original: Model that `classifier` was made from. The served probabilities must equal those of this model.
        world_readable: Whether the version and the folders created for it get the modes 0755 and 0644 regardless of the
            umask. A server usually runs as another user, who could not read them under umask 077. With False, the
            umask decides.
        formats: Names in `FORMATS`.
        samples: Images of the classifier's data set, which the format "litert_int8" needs.
        fresh_process: Whether to try the SavedModel in a fresh process, too, and write its latency into the card. This
            takes seconds, in which the process imports TensorFlow. The other formats are always tried in one.

    Returns:
        The folder of the new version in the first of the formats. It has the same number in all of them.

    Raises:
        UserError: An argument is not valid, the version exists, the folder cannot be written, or the export does not
            give the same answers as the classifier.

    Example:
        >>> import tempfile
        >>> images = keras.Input((8, 8, 3))
        >>> classifier = keras.Model(images, keras.layers.Dense(2)(keras.layers.Flatten()(images)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_classifier(classifier, folder, "tiny", model_card={}, labels=["cat", "dog"]).name
        '1'
    """
    original = original or classifier
    classifier = plain_classifier(classifier)
    image_size, num_classes = _sizes(classifier)
    labels = checked_labels(labels, num_classes)
    resize_size = image_size if resize_size is None else resize_size
    if resize_size < image_size:
        raise UserError(
            f"resize_size must be at least the classifier's image size, {image_size}. Received: "
            f"resize_size={resize_size}."
        )
    base = model_folder(pathlib.Path(export_dir), model_name)
    check_formats(formats)
    if INT8_FORMAT in formats and samples is None:
        raise UserError(
            f"The format {INT8_FORMAT} needs images of the classifier's data set, which show the ranges of the "
            "activations. Received: samples=None."
        )
    if version is not None:
        for name in formats:
            check_version(format_folder(base, name), version)

    served = fold_batch_norm(classifier)
    card = dict(model_card) | export_facts(
        classifier,
        model_name,
        labels=labels,
        resize_size=resize_size,
        decoding=decoding,
    )

    def write_saved_model(staging: pathlib.Path) -> None:
        module = tf.Module()
        # Only the tf.Variables are stored. The weights of a Keras model would be stored twice, and TensorFlow Serving's
        # loader would not find Keras variables.
        module.weights = [weight.value for weight in served.weights]
        signatures = build_signatures(
            served, labels=labels, resize_size=resize_size, decoding=decoding, attack_probe=attack_probe
        )
        tf.saved_model.save(module, str(staging), signatures=signatures)
        (staging / "assets").mkdir(exist_ok=True)
        write_labels(staging / "assets" / LABELS_NAME, labels)
        requests = sample_requests(image_size, attack_probe)
        write_warmup(staging, warmup_logs(model_name, requests))
        verify_export(
            staging,
            classifier,
            requests,
            labels=labels,
            resize_size=resize_size,
            decoding=decoding,
            original=original,
        )

    with contextlib.ExitStack() as stack:
        stagings = [stack.enter_context(staging_folder(format_folder(base, name), world_readable)) for name in formats]
        for name, staging in zip(formats, stagings, strict=True):
            facts = card
            if name == SAVED_MODEL_FORMAT:
                write_saved_model(staging)
                facts = card | {"attack_probe": None if attack_probe is None else vars(attack_probe)}
            else:
                CONVERTERS[name](served, staging / FORMATS[name].file, samples)
                write_labels(staging / LABELS_NAME, labels)
            write_card(staging, name, facts)  # without which the process that tries the artifact would not open it
            if name != SAVED_MODEL_FORMAT or fresh_process:
                found = verify_artifact(staging, classifier, samples if name == INT8_FORMAT else None)
                write_card(staging, name, facts | found)
            if world_readable:
                make_readable(staging)
            sync(staging)
        published = []
        for staging in stagings:
            published.append(rename_into_place(staging, base, version))
            version = int(published[0].name)
        return published[0]


def _sizes(classifier: keras.Model) -> tuple[int, int]:
    """Returns the side of the images and the number of classes."""
    _, height, width, channels = classifier.input_shape
    if height is None or height != width or channels != 3:
        raise UserError(
            "Serving needs a classifier of square RGB images of a fixed size. Received: input shape "
            f"{classifier.input_shape}."
        )
    return height, classifier.output_shape[-1]
