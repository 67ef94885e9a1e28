"""The attacks on one model as compiled functions, with XLA or without it."""

import concurrent.futures
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import tensorflow as tf

from robust_tf.attacks.checks import check_logits, check_threat_model
from robust_tf.attacks.loops import for_accelerator
from robust_tf.attacks.losses import Model, logits_of
from robust_tf.attacks.outputs import callable_in_graphs, with_classes
from robust_tf.attacks.table import ATTACKS
from robust_tf.attacks.threat_models import NORMS
from robust_tf.errors import UserError

# Up to this number of pixels in a batch, several attacks are compiled at once. Each of them then takes its memory for a
# whole batch at the same time, which could be too much for larger batches.
_PIXELS_FOR_COMPILING_AT_ONCE = 512 * 64 * 64

# Largest number of forward passes times pixels in a batch of an attack without XLA on a CPU, unless the batch has only
# a few images. It lets the state be saved, and the progress bar move, every few minutes, where a whole batch could take
# hours. Smaller batches would be slower.
_PASSES_TIMES_PIXELS = 2 * 10**8
_FEW_IMAGES = 8

# What TensorFlow raises if XLA does not know an operation or a type, or if parts of XLA or CUDA are missing.
_CANNOT_COMPILE = (
    tf.errors.InvalidArgumentError,
    tf.errors.UnimplementedError,
    tf.errors.InternalError,
    tf.errors.NotFoundError,
    tf.errors.UnknownError,
)


class CompiledAttacks:
    """The attacks on one model, each compiled once and kept for all batches, radii and data sets.

    With XLA an attack is one program for the device, including its loop. XLA compiles it for one batch size. A smaller
    batch is filled up, which does not change the result of the other images.

    Args:
        model: Callable from images in [0, 1] to logits (batch, classes).
        norm: Norm of the ball, "linf", "l2" or "l1".
        jit_compile: Whether XLA compiles the attacks. "auto" uses XLA if there is a GPU and XLA can compile the model.
            On a CPU it is usually slower.
        tell: Function that is called with a sentence when XLA starts to compile, when it is done, and when "auto" goes
            on without it. None tells nobody.
        settings: Arguments of attacks that replace their published settings, by the name of the attack.

    Raises:
        UserError: The norm or `jit_compile` is unknown, or XLA cannot compile the model although `jit_compile` is True.

    Example:
        >>> import numpy as np
        >>> import tensorflow as tf
        >>> from robust_tf.attacks import CompiledAttacks, cascade
        >>> def dark_or_bright(images):
        ...     brightness = tf.reduce_mean(images, axis=(1, 2, 3)) - 0.5
        ...     return tf.stack([-brightness, brightness], axis=1)
        >>> images, labels = np.full((2, 8, 8, 3), 0.45, np.float32), np.array([0, 0])
        >>> compiled = CompiledAttacks(dark_or_bright, "linf", jit_compile=True)
        >>> for epsilon in (0.04, 0.06):
        ...     *_, state = cascade(compiled, images, labels, attacks=["fgsm"], norm="linf", epsilon=epsilon)
        ...     print(epsilon, state.robust_accuracy)
        0.04 1.0
        0.06 0.0
        >>> compiled.sizes("fgsm")
        [2]
    """

    def __init__(
        self,
        model: Model,
        norm: str,
        *,
        jit_compile: bool | Literal["auto"] = False,
        tell: Callable[[str], None] | None = None,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        check_threat_model(norm, 0.0)
        if jit_compile not in (True, False, "auto"):
            raise UserError(f"jit_compile must be True, False or 'auto'. Received: {jit_compile!r}.")
        self.model = model
        self.norm = norm
        has_gpu = bool(tf.config.list_logical_devices("GPU"))
        self._may_fall_back = jit_compile == "auto"
        self.jit_compile = has_gpu if jit_compile == "auto" else bool(jit_compile)
        # Without XLA, too, a GPU takes long to get ready for each new batch size.
        self._whole = self.jit_compile or has_gpu
        self._tell = tell or (lambda _: None)
        self._settings = settings or {}
        self._clean: Any = None
        # The functions of each attack by batch size. The size None is any.
        self._functions: dict[str, dict[int | None, Any]] = {}

    def sizes(self, name: str) -> list[int]:
        """Returns the batch sizes that an attack was compiled for, smallest first; empty if it runs with any size."""
        return sorted(size for size in self._functions.get(name, {}) if size is not None)

    def images_at_once(self, name: str, image_shape: Sequence[int], *, batch_size: int) -> int:
        """Returns how many images one call of `attack` should get, so that it ends within minutes.

        XLA compiles an attack for a batch size, so it always gets whole batches. Without it, a long attack gets fewer
        images on a CPU. How many depends only on the attack and the size of the images, not on the machine.

        Args:
            name: Name in `ATTACKS`.
            image_shape: Height, width and channels of an image.
            batch_size: Largest number of images.
        """
        if self._whole:
            return batch_size
        cost = ATTACKS[name].forward_passes * image_shape[0] * image_shape[1]
        return min(batch_size, max(_FEW_IMAGES, _PASSES_TIMES_PIXELS // cost))

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Returns the logits (batch, classes) float32 of images (batch, height, width, channels) float32."""
        if self._clean is None:
            first = tf.constant(images[:1])
            model = callable_in_graphs(self.model, first)
            outputs = logits_of(model, first)
            check_logits(outputs.numpy(), num_images=1)
            # Otherwise the output of, for example, a tf.numpy_function would have no static shape in graphs.
            self.model = with_classes(model, outputs.shape[-1])
            signature = [tf.TensorSpec([None, *images.shape[1:]], tf.float32)]
            function = tf.function(lambda x: logits_of(self.model, x), input_signature=signature, autograph=False)
            self._clean = function.get_concrete_function()
        return cast(np.ndarray, self._clean(tf.constant(images)).numpy())

    def prepare(self, names: Sequence[str], images: np.ndarray, *, batch_size: int) -> None:
        """Compiles attacks for batches of as many images as these. It does nothing if they are compiled already.

        An attack that was compiled for a larger batch is not compiled again. All that are missing are compiled at once,
        if the images are small.

        Args:
            names: Names in `ATTACKS`.
            images: Some of the images, (batch, height, width, channels) float32.
            batch_size: Largest number of images in any batch. The attacks are compiled for this number divided by a
                power of two.

        Raises:
            UserError: XLA cannot compile the model, and `jit_compile` is True.
        """
        if not self._whole:
            return
        missing = [name for name in names if not any(size >= len(images) for size in self.sizes(name))]
        size = _size_for(len(images), largest=batch_size)
        for name in missing:
            self._functions.setdefault(name, {})[size] = self._traced(name, images.shape[1:], size)
        if missing and self.jit_compile:
            self._compile(missing, images[:1], size)

    def attack(
        self, name: str, images: np.ndarray, labels: np.ndarray, *, epsilon: float, seeds: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Runs one attack and projects its result into the ball and [0, 1], whatever the attack returns.

        Args:
            name: Name in `ATTACKS`.
            images: Images (batch, height, width, channels) float32.
            labels: Labels (batch,) int32.
            epsilon: Radius of the ball, in [0, 1] pixel units.
            seeds: Seeds (batch, 2) int32, a pair for each image.

        Returns:
            The adversarial images (batch, height, width, channels) float32, and their logits (batch, classes) float32.

        Raises:
            UserError: XLA cannot compile the model, and `jit_compile` is True; or the device has too little memory.
        """
        self.prepare([name], images, batch_size=len(images))
        if not self._whole:  # now, because `prepare` may have fallen back
            functions = self._functions.setdefault(name, {})
            if None not in functions:
                functions[None] = self._traced(name, images.shape[1:], None)
            images_adv, logits = self._run(functions[None], images, labels, epsilon, seeds)
            return images_adv, logits
        count = len(images)
        size = next(size for size in self.sizes(name) if size >= count)
        # The batch is filled up with copies of its first image.
        rows = np.where(np.arange(size) < count, np.arange(size), 0)
        function = self._functions[name][size]
        images_adv, logits = self._run(function, images[rows], labels[rows], epsilon, seeds[rows], count=count)
        return images_adv[:count], logits[:count]

    def _run(
        self,
        function: Any,
        images: np.ndarray,
        labels: np.ndarray,
        epsilon: float,
        seeds: np.ndarray,
        *,
        count: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        try:
            images_adv, logits = function(
                tf.constant(images),
                tf.constant(labels),
                tf.constant(epsilon, tf.float32),
                tf.constant(seeds),
                tf.constant(len(images) if count is None else count),
            )
            return images_adv.numpy(), logits.numpy()
        except tf.errors.ResourceExhaustedError:
            raise UserError(
                f"The memory of the device is too small for the attack. Received: batches of {len(images)} images. "
                "Choose a smaller batch_size."
            ) from None

    def _traced(self, name: str, image_shape: tuple[int, ...], size: int | None) -> Any:
        attack, settings = ATTACKS[name], self._settings.get(name, {})

        # Without a size the batch size is left open, so that a smaller batch is not traced again.
        @tf.function(
            input_signature=[
                tf.TensorSpec([size, *image_shape], tf.float32),
                tf.TensorSpec([size], tf.int32),
                tf.TensorSpec([], tf.float32),
                tf.TensorSpec([size, 2], tf.int32),
                tf.TensorSpec([], tf.int32),
            ],
            autograph=False,
            jit_compile=self.jit_compile,
        )
        def run(
            images: tf.Tensor, labels: tf.Tensor, epsilon: tf.Tensor, seeds: tf.Tensor, count: tf.Tensor
        ) -> tuple[tf.Tensor, tf.Tensor]:
            if size is not None:
                labels = _wrong_from(count, labels, logits_of(self.model, images))
            images_adv = attack(self.model, images, labels, norm=self.norm, epsilon=epsilon, seed=seeds, **settings)
            images_adv = NORMS[self.norm].project(images_adv, images, epsilon)
            return images_adv, logits_of(self.model, images_adv)

        if size is None:
            return run.get_concrete_function()
        with for_accelerator():
            return run.get_concrete_function()

    def _compile(self, names: Sequence[str], first: np.ndarray, size: int) -> None:
        """Lets XLA compile attacks, by running them on a batch that contains nothing to attack."""
        batch = np.repeat(first, size, axis=0)
        labels, seeds = np.zeros(size, np.int32), np.zeros((size, 2), np.int32)

        def compile_one(name: str) -> None:
            self._run(self._functions[name][size], batch, labels, 0.0, seeds, count=0)

        attacks = ", ".join(names)
        self._tell(f"XLA compiles {attacks} for batches of {size} images.")
        start = time.perf_counter()
        at_once = len(names) if size * first.shape[1] * first.shape[2] <= _PIXELS_FOR_COMPILING_AT_ONCE else 1
        try:
            with concurrent.futures.ThreadPoolExecutor(at_once) as threads:
                list(threads.map(compile_one, names))
        except _CANNOT_COMPILE as error:
            reason = _reason_of(error)
            if not self._may_fall_back:
                raise UserError(
                    f"XLA cannot compile {attacks} on this model. Received: {reason} Go on without XLA "
                    "(jit_compile=False)."
                ) from None
            self._tell(f"XLA cannot compile {attacks} on this model: {reason} The attacks run without XLA.")
            self.jit_compile = False
            self._whole = bool(tf.config.list_logical_devices("GPU"))
            self._functions.clear()
            self.prepare(names, np.repeat(first, size, axis=0), batch_size=size)
            return
        self._tell(f"XLA has compiled {attacks} in {time.perf_counter() - start:.0f} s.")


def _size_for(count: int, *, largest: int) -> int:
    """Returns the smallest of `largest`, its half, its quarter and so on, all rounded up, that is at least `count`."""
    size = max(largest, count)
    while size > 1 and -(-size // 2) >= count:
        size = -(-size // 2)
    return size


def _wrong_from(count: tf.Tensor, labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Returns the labels, but a wrong class from position `count` on, so that no attack has anything to do there."""
    wrong = (tf.argmax(logits, axis=-1, output_type=tf.int32) + 1) % logits.shape[-1]
    return tf.where(tf.range(tf.shape(labels)[0]) < count, labels, wrong)


def _reason_of(error: tf.errors.OpError) -> str:
    """Returns the first line of an error of TensorFlow, which says what XLA cannot compile."""
    line = str(error.message).strip().partition("\n")[0]
    return line if len(line) <= 300 else f"{line[:297]}..."
