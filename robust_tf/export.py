"""Publishes a classifier for TensorFlow Serving, ONNX Runtime and LiteRT, or a detector or segmenter for TF Serving.

    python -m robust_tf.export --classifier=W/classifier.keras --export_dir=E --model_name=pets
    python -m robust_tf.export --classifier=W/classifier.keras --export_dir=E --model_name=pets --format=onnx,litert

The first command writes `E/pets/1`, or the next free version number, and the second one `E/pets/onnx/2/model.onnx` and
`E/pets/litert/2/model.tflite`. A version appears only after it has been checked. The names of the classes, the
data set and the accuracies come from the `results.json` that the training job wrote next to its classifier; flags take
precedence over it.

A network for detection or segmentation is recognized, and is published as a SavedModel only.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from robust_tf.environment import start_tensorflow
from robust_tf.errors import UserError, exit_on_user_error
from robust_tf.files import check_output_folder
from robust_tf.flags import flag, parse_flags, to_text
from robust_tf.serving.artifacts.card import FORMATS, INT8_FORMAT, SAVED_MODEL_FORMAT, check_formats, read_labels

if TYPE_CHECKING:
    import keras

    from robust_tf.config.data import TaskType
    from robust_tf.results import JobResults
    from robust_tf.serving.publish.formats import Samples

_NUM_SAMPLES = 600  # the first half for the ranges of the activations, the rest for comparing int8 with the classifier


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What to publish, where, and with which signatures."""

    classifier: str = flag(
        "",
        "Classifier, detector or segmenter to publish: the path of a .keras file, or the name of a published model.",
    )
    export_dir: str = flag("", "Folder that holds all served models.")
    model_name: str = flag("", "Name of the model in requests.")
    format: tuple[str, ...] = flag(
        (SAVED_MODEL_FORMAT,),
        f"Formats to publish, separated by commas: {', '.join(FORMATS)}. onnx needs the extra [onnx], and the two "
        "others the extra [litert]. litert_int8 also needs the data set of the training job (or --dataset), from whose "
        "validation images it takes the ranges of the activations.",
    )
    version: int | None = flag(
        None, "Version number. By default, the next number that is free in all formats of the model."
    )
    labels: str = flag(
        "",
        "Text file with the names of the classes in the order of the logits, one on each line. By default, the names "
        "in results.json or, for a published model, those of its data set in TFDS.",
    )
    resize_size: int | None = flag(
        None,
        "Length in pixels that the shorter side of an encoded image is resized to before the center crop. By default, "
        "the one in results.json, or the size of the classifier's images.",
    )
    dataset: str = flag(
        "", "Data set of the images for litert_int8. By default, the one of the training job in results.json."
    )
    classes: tuple[int, ...] = flag(
        (),
        "Labels of this data set to keep, in the order of the logits. By default, those of the training job, or all.",
    )
    data_dir: str = flag("", "Folder of TensorFlow Datasets, for litert_int8. By default, the library's own folder.")
    license: str = flag("", "License of the classifier, for the model card.")
    attack_probe: bool = flag(
        False, "Also serve the signature attack_probe, with which clients can attack an image and see the answer."
    )
    norm: str = flag("", "Norm of the attack probe, l2 or linf. By default, the one in results.json.")
    attack_steps: int = flag(20, "Number of steps of the attack probe.")
    world_readable: bool = flag(
        True,
        "Let every user read the version (modes 0755 and 0644), because a server usually runs as another user. With "
        "false, the umask decides.",
    )

    def __post_init__(self) -> None:
        for name in ("classifier", "export_dir", "model_name"):
            if not getattr(self, name):
                raise UserError(f"--classifier, --export_dir and --model_name are needed. Received: no --{name}.")
        check_formats(self.format)
        for name in ("dataset", "classes", "data_dir"):
            if getattr(self, name) and INT8_FORMAT not in self.format:
                raise UserError(
                    f"--{name} is for --format={INT8_FORMAT}. Received: --{name}={to_text(getattr(self, name))} with "
                    f"--format={','.join(self.format)}."
                )


def main(argv: Sequence[str]) -> None:
    """Runs the program: reads the flags, then publishes a version and prints its folder."""
    config, rest = parse_flags(ExportConfig, argv, __doc__ or "")
    if rest:
        raise UserError(f"This program takes flags only, --name=value. Received: {rest[0]!r}.")
    start_tensorflow()  # which takes seconds, so only after the flags have been checked
    from robust_tf.evaluation.subject import job_of
    from robust_tf.models import PUBLISHED, fetch_published, image_shape, pixel_warning, plain_classifier, read_model
    from robust_tf.serving.publish.export import export_classifier
    from robust_tf.serving.publish.model_card import card_from_results, decoding_from_results, probe_from_results
    from robust_tf.serving.publish.staging import format_folder, model_folder, readers_of
    from robust_tf.tasks.table import task_type_of

    base = model_folder(pathlib.Path(config.export_dir), config.model_name)
    check_output_folder(base, "--export_dir")
    published = config.classifier in PUBLISHED
    path = fetch_published(config.classifier) if published else pathlib.Path(config.classifier)
    results = job_of(path, config.classifier)
    if results.downscale is not None:
        raise UserError(
            "A served model takes images as they are, but this classifier was trained on images whose size was "
            f"reduced first. Received: {path}, trained with --downscale={results.downscale}. Train it without this "
            "flag."
        )
    model = read_model(path)
    results.check_image_size(image_shape(model)[1], path)
    task_type = task_type_of(model)
    if task_type != "classification":
        _publish_dense(config, model, results, task_type)
        return
    probe = None
    if config.attack_probe:
        probe = probe_from_results(results, norm=config.norm, steps=config.attack_steps)
    classifier = plain_classifier(model)
    if warning := pixel_warning(classifier):
        print(f"WARNING: {warning}")
    first = export_classifier(
        classifier,
        config.export_dir,
        config.model_name,
        version=config.version,
        labels=read_labels(config.labels) if config.labels else results.class_names or None,
        resize_size=results.resize_size if config.resize_size is None else config.resize_size,
        decoding=decoding_from_results(results),
        model_card=card_from_results(results, license_name=config.license),
        attack_probe=probe,
        original=model,
        world_readable=config.world_readable,
        formats=config.format,
        samples=_samples(config) if INT8_FORMAT in config.format else None,
        fresh_process=True,
    )
    for name in config.format:
        version_dir = format_folder(base, name) / first.name
        print(f"Published {version_dir} ({readers_of(version_dir)})")


def _publish_dense(config: ExportConfig, network: "keras.Model", results: "JobResults", task_type: "TaskType") -> None:
    """Publishes a network for detection or segmentation."""
    from robust_tf.serving.publish.export_dense import export_dense
    from robust_tf.serving.publish.model_card import card_from_results, decoding_from_results
    from robust_tf.serving.publish.staging import readers_of

    subject = f"{config.classifier}, a network for {task_type}"
    if config.format != (SAVED_MODEL_FORMAT,):
        raise UserError(
            f"A network for {task_type} is published as --format={SAVED_MODEL_FORMAT}. Received: {subject}, "
            f"--format={','.join(config.format)}."
        )
    for name in ("attack_probe", "resize_size", "norm"):
        if getattr(config, name) not in (None, False, ""):
            raise UserError(
                f"--{name} is for classifiers. Received: {subject}, --{name}={getattr(config, name)}. Leave it out."
            )
    version_dir = export_dense(
        network,
        config.export_dir,
        config.model_name,
        version=config.version,
        labels=read_labels(config.labels) if config.labels else results.class_names or None,
        decoding=decoding_from_results(results),
        model_card=card_from_results(results, license_name=config.license, task_type=task_type),
        world_readable=config.world_readable,
        measure_latency=True,
    )
    print(f"Published {version_dir} ({readers_of(version_dir)})")


def _samples(config: ExportConfig) -> "Samples":
    """Returns validation images of --dataset or, without it, of the data set on which the classifier was trained."""
    from robust_tf.evaluation.subject import load_subject
    from robust_tf.serving.publish.formats import Samples

    subject = load_subject(config.classifier, dataset=config.dataset, classes=config.classes, data_dir=config.data_dir)
    return Samples(*subject.task.preview(_NUM_SAMPLES))


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv)
