"""The flags of `robust_tf.visualize`."""

import dataclasses
import pathlib
from typing import Literal

from robust_tf.config.attack import Norm
from robust_tf.config.checks import check_choices
from robust_tf.errors import UserError
from robust_tf.flags import flag


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisualizeConfig:
    """What to draw, for which classifiers and images, and where to write the picture."""

    classifier: str = flag("", "Classifier to visualize: the path of a .keras file or the name of a published model.")
    compare: str = flag("", "Second classifier with the same classes, drawn below the first.")
    kind: Literal["gradients", "inversion", "perturbations"] = flag("gradients", "Kind of picture to draw.")
    output: str = flag("", "PNG file to write. By default, <kind>.png next to the classifier.")
    tensorboard: str = flag("", "TensorBoard folder to write the picture to as well.")
    dataset: str = flag(
        "", "Data set to take images from. By default, the one named in the results.json next to the classifier."
    )
    classes: tuple[int, ...] = flag(
        (), "Labels to keep. By default, those in the results.json next to the classifier, or all of them."
    )
    data_dir: str = flag("", "Folder of TensorFlow Datasets. By default, the library's own default folder.")
    num_images: int = flag(8, "Number of test images to draw.")
    seed: int = flag(0, "Seed for the choice of images and for the noise.")
    steps: int | None = flag(
        None, "Number of steps of --kind=inversion (by default 1000) or --kind=perturbations (by default 60)."
    )
    norm: Norm = flag("l2", "Norm of --kind=perturbations.")
    epsilon: float | None = flag(
        None,
        "Radius of --kind=perturbations in [0, 1] pixel units. By default, 5 times the radius that the classifier was "
        "trained with.",
    )

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.classifier:
            raise UserError("--classifier is needed: a .keras file or the name of a published model. Received: none.")
        if self.num_images < 1 or self.seed < 0 or (self.steps is not None and self.steps < 1):
            raise UserError(
                "--num_images and --steps must be 1 or more, --seed 0 or more. Received: "
                f"{self.num_images}, {self.steps}, {self.seed}."
            )

    @property
    def picture(self) -> pathlib.Path:
        """Path of the picture."""
        beside = pathlib.Path(self.classifier)
        folder = beside.parent if beside.suffix == ".keras" else pathlib.Path()
        return pathlib.Path(self.output) if self.output else folder / f"{self.kind}.png"
