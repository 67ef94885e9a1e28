"""The training steps of robust_tf as a process that `tests.bench.gpu_step` starts."""

from robust_tf.environment import set_tensorflow_defaults

set_tensorflow_defaults()

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from robust_tf.attacks import AttackConfig  # noqa: E402
from robust_tf.models import build_classifier  # noqa: E402
from robust_tf.training import AdversarialTrainer  # noqa: E402
from robust_tf.training.optimizers import build_optimizer  # noqa: E402
from tests.bench.step_process import StepSettings, serve  # noqa: E402


class KerasStep:
    """A training step with SGD, on random images that are already on the device. See `Step`."""

    def __init__(self, settings: StepSettings) -> None:
        if not tf.config.list_physical_devices(settings.device):
            raise RuntimeError(f"TensorFlow sees no {settings.device}.")
        keras.config.set_dtype_policy("mixed_bfloat16" if settings.precision == "bfloat16" else "float32")
        classifier = build_classifier(
            settings.architecture,
            settings.num_classes,
            image_size=settings.image_size,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        )
        attack = AttackConfig(
            norm=settings.norm,
            epsilon=settings.epsilon if settings.steps else 0.0,
            step_size=settings.step_size,
            steps=settings.steps,
            use_best=settings.use_best,
        )
        self._trainer = AdversarialTrainer(classifier, attack)
        self._trainer.compile(
            build_optimizer("sgd", learning_rate=1e-4, momentum=0.9, weight_decay=1e-4),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            jit_compile=settings.compiled,
        )
        rng = np.random.default_rng(0)
        size, batch = settings.image_size, settings.batch_size
        with tf.device(f"/{settings.device}:0"):
            self._images = tf.constant(rng.random((batch, size, size, 3), np.float32))
            self._labels = tf.constant(rng.integers(0, settings.num_classes, batch), tf.int32)
        self._has_gpu = settings.device == "GPU"
        if self._has_gpu:
            tf.config.experimental.reset_memory_stats("GPU:0")

    def run(self) -> None:
        self._trainer.train_on_batch(self._images, self._labels)  # fetches the loss, and so waits for the device

    def peak_gib(self) -> float | None:
        if not self._has_gpu:
            return None
        peak: float = tf.config.experimental.get_memory_info("GPU:0")["peak"] / 2**30
        return peak


if __name__ == "__main__":
    serve(KerasStep)
