"""Converts PyTorch checkpoints into Keras classifiers, and classifiers into checkpoints. PyTorch is not needed.

Convert a file written by torch.save, or a .safetensors file. It is read as data, so no code in it is run:

    python -m robust_tf.convert --checkpoint=resnet50.ckpt --architecture=resnet50 --output=resnet50.keras

Download and convert a published model; list the published models:

    python -m robust_tf.convert --source=resnet50_l2_eps3 --output=resnet50.keras
    python -m robust_tf.convert --list

Write the weights of a classifier as a plain state_dict for PyTorch:

    python -m robust_tf.convert --classifier=W/classifier.keras --to_reference=W/classifier.npz
"""

import dataclasses
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from robust_tf.environment import start_tensorflow
from robust_tf.errors import UserError, exit_on_user_error
from robust_tf.files import check_output_file, replaced_atomically
from robust_tf.flags import flag, parse_flags

if TYPE_CHECKING:
    import keras

    from robust_tf.models.reference_checkpoint import ReferenceCheckpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """The flags of this program."""

    checkpoint: str = flag(
        "", "Checkpoint to convert: a file written by torch.save (.ckpt, .pt, .pth), or a .safetensors file."
    )
    source: str = flag("", "Name of a published model to convert. See --list.")
    architecture: str = flag("", "Architecture of --checkpoint.")
    image_size: int = flag(224, "Height and width of the images in pixels. Use 32 for models of CIFAR images.")
    output: str = flag("", "Path of the .keras file to write.")
    verbose: bool = flag(False, "Show all layers with weights, and the modules that the weights come from.")
    classifier: str = flag("", "Classifier (.keras file) to convert into a checkpoint.")
    to_reference: str = flag("", "Path of the .npz file to write for PyTorch.")
    list: bool = flag(False, "Show the published models and their accuracies.")
    cache_dir: str = flag("", "Folder for downloaded models. Default: robust_tf in the user's cache folder.")

    def __post_init__(self) -> None:
        tasks = [name for name in ("checkpoint", "source", "classifier", "list") if getattr(self, name)]
        if len(tasks) != 1:
            raise UserError(
                "Use exactly one of --checkpoint, --source, --classifier and --list. Received: "
                f"{', '.join(f'--{task}' for task in tasks) or 'none'}."
            )
        if self.checkpoint and not self.architecture:
            raise UserError(f"--checkpoint needs --architecture. Received: --checkpoint={self.checkpoint} alone.")
        if (self.checkpoint or self.source) and pathlib.Path(self.output).suffix != ".keras":
            raise UserError(f"--output must be the .keras file to write. Received: --output={self.output}.")
        if self.classifier and pathlib.Path(self.to_reference).suffix != ".npz":
            raise UserError(f"--to_reference must be the .npz file to write. Received: {self.to_reference!r}.")


def main(argv: Sequence[str]) -> None:
    """Runs the program.

    Args:
        argv: Name of the program and its flags.
    """
    config, rest = parse_flags(ConvertConfig, argv, __doc__ or "")
    if rest:
        raise UserError(f"This program takes flags only, --name=value. Received: {rest[0]!r}.")
    start_tensorflow(onednn=False)
    if config.list:
        list_published()
    elif config.classifier:
        convert_to_reference(pathlib.Path(config.classifier), pathlib.Path(config.to_reference))
    else:
        convert_to_classifier(config)


def list_published() -> None:
    """Prints the table of published models."""
    from robust_tf.models.published import PUBLISHED

    print(f"{'name':<32}{'data set':<15}{'norm':<6}{'epsilon':<9}{'clean top-1':>11}")
    for name, model in PUBLISHED.items():
        epsilon = f"{255 * model.epsilon:g}/255" if model.norm == "linf" else f"{model.epsilon:g}"
        accuracy = "" if model.clean_accuracy is None else f"{model.clean_accuracy:.2f} %"
        print(f"{name:<32}{model.dataset:<15}{model.norm:<6}{epsilon:<9}{accuracy:>11}")


def convert_to_classifier(config: ConvertConfig) -> None:
    """Converts a checkpoint into a classifier and prints a summary of it.

    Args:
        config: The flags.
    """
    # Imported here, because TensorFlow takes seconds to import, and a mistyped flag should be reported at once.
    from robust_tf.models.classifier_file import save_classifier
    from robust_tf.models.conversion import classifier_from_checkpoint
    from robust_tf.models.published import fetch_checkpoint, published_model
    from robust_tf.models.reference_checkpoint import read_reference_checkpoint

    output = pathlib.Path(config.output)
    check_output_file(output, "--output")
    path, architecture = pathlib.Path(config.checkpoint), config.architecture
    if config.source:
        path = fetch_checkpoint(config.source, cache_dir=config.cache_dir or None)
        architecture = published_model(config.source).architecture
    checkpoint = read_reference_checkpoint(path)
    classifier = classifier_from_checkpoint(checkpoint, architecture, image_size=config.image_size)
    print_summary(path, checkpoint, classifier)
    if config.verbose:
        print_layers(classifier)
    del checkpoint  # releases the memory-mapped file
    save_classifier(classifier, output)
    print(f"Wrote {config.output}")


def convert_to_reference(classifier_path: pathlib.Path, output: pathlib.Path) -> None:
    """Writes the weights of a classifier as a PyTorch state_dict in an `.npz` file.

    Args:
        classifier_path: Path of the classifier.
        output: Path of the `.npz` file.
    """
    from robust_tf.models import load_classifier, to_reference_state

    check_output_file(output, "--to_reference")
    classifier = load_classifier(classifier_path)
    state = to_reference_state(classifier)
    with replaced_atomically(output) as temporary:
        np.savez(temporary, **state)  # type: ignore[arg-type]  # the type stub does not allow arbitrary keywords
    normalization = classifier.get_layer("normalization")
    print(f"Wrote {output}: {len(state)} arrays of {classifier.name}. In PyTorch:")
    print(f"  state = {{key: torch.from_numpy(array) for key, array in numpy.load({str(output)!r}).items()}}")
    print("  model.load_state_dict(state)")
    print(f"Normalize images in [0, 1] with mean {_numbers(normalization.mean)}")
    print(f"and standard deviation {_numbers(normalization.variance**0.5)}.")


def print_summary(path: pathlib.Path, checkpoint: "ReferenceCheckpoint", classifier: "keras.Model") -> None:
    """Prints a summary of a checkpoint and its classifier.

    Args:
        path: Path of the checkpoint.
        checkpoint: Content of the checkpoint.
        classifier: Classifier of the checkpoint.
    """
    from robust_tf.models import reference_normalization

    parameters = sum(math.prod(variable.shape) for variable in classifier.trainable_variables)
    print(f"checkpoint   {path} ({checkpoint.container} format, {checkpoint.size / 1e6:.1f} MB)")
    print(f"SHA-256      {checkpoint.sha256}")
    print(f"network      {classifier.name}, {classifier.output_shape[-1]} classes, {parameters:,} parameters")
    print(f"epoch        {'not stored' if checkpoint.epoch is None else checkpoint.epoch}")
    accuracies = ", ".join(f"{name} {accuracy:.2f} %" for name, accuracy in checkpoint.accuracies.items())
    print(f"accuracies   {accuracies or 'not stored'}")
    normalization = classifier.get_layer("normalization")
    stored = "" if reference_normalization(checkpoint.state) else " (not stored; ImageNet's)"
    print(f"mean         {_numbers(normalization.mean)}{stored}")
    print(f"std          {_numbers(normalization.variance**0.5)}{stored}")


def print_layers(classifier: "keras.Model") -> None:
    """Prints the layers that have weights, and the modules of the reference from which the weights come.

    Args:
        classifier: Classifier whose name is an architecture.
    """
    from robust_tf.models import ARCHITECTURES

    reference_module = ARCHITECTURES[classifier.name].reference_module
    print(f"{'layer':<32}{'reference module':<36}{'output shape':<22}{'parameters':>12}")
    for layer in classifier.layers:
        if layer.weights and layer.name != "normalization":
            shape = str(layer.output.shape)
            print(f"{layer.name:<32}{reference_module(layer.name):<36}{shape:<22}{layer.count_params():>12,}")


def _numbers(values: Any) -> str:
    return " ".join(f"{value:.4f}" for value in np.ravel(values))


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv)
