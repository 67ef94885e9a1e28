"""Publishes a classifier for TensorFlow Serving.

    python -m robust_tf.export --classifier=W/classifier.keras --export_dir=E --model_name=pets

This writes `E/pets/1`, or the next free version number. The version appears only after it has been checked. The names
of the classes, the data set and the accuracies come from the `results.json` that the training job wrote next to its
classifier; flags take precedence over it.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from robust_tf.environment import start_tensorflow
from robust_tf.errors import UserError, exit_on_user_error
from robust_tf.files import check_output_folder
from robust_tf.flags import flag, parse_flags
from robust_tf.results import FILE_NAME, JobResults


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What to publish, where, and with which signatures."""

    classifier: str = flag("", "The .keras file to publish.")
    export_dir: str = flag("", "Folder that holds all served models.")
    model_name: str = flag("", "Name of the model in requests.")
    version: int | None = flag(None, "Version number. By default, the next free one.")
    labels: str = flag(
        "",
        "Text file with the names of the classes in the order of the logits, one on each line. By default, the names "
        "in results.json.",
    )
    resize_size: int | None = flag(
        None,
        "Length in pixels that the shorter side of an encoded image is resized to before the center crop. By default, "
        "the one in results.json, or the size of the classifier's images.",
    )
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


def main(argv: Sequence[str]) -> None:
    """Runs the program: reads the flags, then publishes a version and prints its folder."""
    config, rest = parse_flags(ExportConfig, argv, __doc__ or "")
    if rest:
        raise UserError(f"This program takes flags only, --name=value. Received: {rest[0]!r}.")
    path = pathlib.Path(config.classifier)
    start_tensorflow()  # which takes seconds, so only after the flags have been checked
    from robust_tf.models import image_shape, pixel_warning, plain_classifier, read_model
    from robust_tf.serving.publish.export import export_classifier, model_folder, readers_of
    from robust_tf.serving.publish.model_card import card_from_results, decoding_from_results, probe_from_results

    check_output_folder(model_folder(pathlib.Path(config.export_dir), config.model_name), "--export_dir")
    results = JobResults.read(path.with_name(FILE_NAME)) or JobResults()
    if results.downscale is not None:
        raise UserError(
            "A served model takes images as they are, but this classifier was trained on images whose size was "
            f"reduced first. Received: {path}, trained with --downscale={results.downscale}. Train it without this "
            "flag."
        )
    probe = None
    if config.attack_probe:
        probe = probe_from_results(results, norm=config.norm, steps=config.attack_steps)
    model = read_model(path)
    results.check_image_size(image_shape(model)[1], path)
    classifier = plain_classifier(model)
    if warning := pixel_warning(classifier):
        print(f"WARNING: {warning}")
    version_dir = export_classifier(
        classifier,
        config.export_dir,
        config.model_name,
        version=config.version,
        labels=_read_labels(config.labels) if config.labels else results.class_names or None,
        resize_size=results.resize_size if config.resize_size is None else config.resize_size,
        decoding=decoding_from_results(results),
        model_card=card_from_results(results, license_name=config.license),
        attack_probe=probe,
        original=model,
        world_readable=config.world_readable,
    )
    print(f"Published {version_dir} ({readers_of(version_dir)})")


def _read_labels(path: str) -> list[str]:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels must be a text file. Received: {path}: {error}.") from error


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv)
