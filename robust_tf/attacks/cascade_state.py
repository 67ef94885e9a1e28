"""The state of a cascade of attacks, which can be stored as JSON."""

import base64
import dataclasses
from typing import Any

import numpy as np

from robust_tf.errors import UserError, unknown_name

CLEAN = "clean"  # takes the place of an attack's name where the prediction for the clean image is already wrong


@dataclasses.dataclass(frozen=True, kw_only=True)
class CascadeState:
    """The state of an evaluation, from which it can continue.

    Attributes:
        run: Run that the state belongs to: attacks, norm, epsilon, seed, batch_size, num_images and a digest of images
            and labels. `cascade` refuses a state of another run.
        felled_by: For each image, the name of the attack that made its prediction wrong, "clean" if it was wrong before
            any attack, or "" while the image resists.
        attack: Position of the running attack in ("clean", *attacks); past the end when the evaluation is done.
        images_done: Number of images that the running attack has finished.
        images_to_do: Number of images that the running attack was given.
        predictions: Predicted class for the last version of each image that was tried, clean or adversarial,
            (num_images,) int.
        seconds: Time spent in each attack, in seconds.
        warnings: Signs that the robust accuracy is an overestimate, as a sentence for each. See `warning_flags`.
        kept: Last adversarial image, (height, width, channels) float32, for each image id in `cascade`'s argument
            `keep`. If an attack made the prediction wrong, this is the image with which it did so.

    Example:
        >>> from robust_tf.attacks import CascadeState
        >>> run = {"attacks": ["pgd", "square"], "num_images": 4}
        >>> state = CascadeState(run=run, felled_by=("clean", "", "pgd", ""), attack=2)
        >>> state.running, state.robust_accuracy, state.accuracy_after("clean")
        ('square', 0.5, 0.75)
    """

    run: dict[str, Any]
    felled_by: tuple[str, ...]
    attack: int = 0
    images_done: int = 0
    images_to_do: int = 0
    predictions: tuple[int, ...] = ()
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    warnings: dict[str, str] = dataclasses.field(default_factory=dict)
    kept: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether all attacks have run."""
        return self.attack > len(self.run["attacks"])

    @property
    def running(self) -> str:
        """Name of the running attack, or of the last one if all have run."""
        names: tuple[str, ...] = (CLEAN, *self.run["attacks"])
        return names[min(self.attack, len(names) - 1)]

    @property
    def robust(self) -> np.ndarray:
        """Whether each image still resists, (num_images,) bool."""
        return np.array([not name for name in self.felled_by])

    @property
    def robust_accuracy(self) -> float:
        """Share of all images that still resist."""
        return float(self.robust.mean())

    def accuracy_after(self, attack: str) -> float:
        """Returns the share of all images that still resist after this attack and all before it.

        Args:
            attack: "clean" or the name of an attack of this run.

        Raises:
            UserError: The run does not have this attack.
        """
        names = (CLEAN, *self.run["attacks"])
        if attack not in names:
            raise unknown_name("attack of this run", attack, names)
        fallen = set(names[: names.index(attack) + 1])
        return sum(name not in fallen for name in self.felled_by) / len(self.felled_by)

    def to_json(self) -> dict[str, Any]:
        """Returns the state as a dict that JSON can hold; `from_json` reads it."""
        content = dataclasses.asdict(self)
        content["kept"] = {
            str(number): {"shape": list(image.shape), "float32": base64.b64encode(image.tobytes()).decode()}
            for number, image in self.kept.items()
        }
        return content

    @classmethod
    def from_json(cls, content: Any) -> "CascadeState":
        """Returns the state that `to_json` has written.

        Args:
            content: Dict of `to_json`, from a file.

        Raises:
            UserError: The content is not the state of a cascade.
        """
        try:
            kept = {
                int(number): np.frombuffer(base64.b64decode(image["float32"]), np.float32).reshape(image["shape"])
                for number, image in content["kept"].items()
            }
            state = cls(
                **{
                    **content,
                    "kept": kept,
                    "felled_by": tuple(content["felled_by"]),
                    "predictions": tuple(content["predictions"]),
                }
            )
            complete = (
                len(state.felled_by) == len(state.predictions) == state.run["num_images"]
                and isinstance(state.run["attacks"], list)
                and all(isinstance(n, int) and n >= 0 for n in (state.attack, state.images_done, state.images_to_do))
            )
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise UserError(
                f"This is not the state of a cascade of attacks: {type(error).__name__}: {error}."
            ) from None
        if not complete:
            raise UserError("This is not the state of a cascade of attacks: its parts do not fit together.")
        return state
