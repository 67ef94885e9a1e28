"""Adversarial training: the batch is attacked, then Keras does its ordinary step on what came out."""

import dataclasses
from typing import Any

import keras
import tensorflow as tf

from robust_tf.attacks import AttackConfig, run_pgd
from robust_tf.errors import UserError


class AdversarialTrainer(keras.Model):
    """Trains a classifier on adversarial examples of its own, made anew for each batch.

    Solves min over the weights of the mean over (images, labels) of max over the ball of the loss. Use it like any
    Keras model: `compile`, `fit`, `evaluate`. It shares the classifier's weights and is not meant to be saved: save
    the classifier.

    The compiled loss and metrics are those on the adversarial images, in training and in `evaluate`. With an attack
    there are two more metrics, `clean_loss` and `clean_accuracy`, with the network in inference mode. In training they
    are taken from the attack's first forward pass; only a random start costs one more for them.

    Args:
        classifier: any built Keras model from [0, 1] images (batch, height, width, channels) to logits
            (batch, num_classes). Normalisation belongs inside it.
        attack: of the batches in training and in `evaluate`. epsilon 0 is standard training.
        seed: of the random start, together with the optimizer's step count.
        unbiased_batchnorm: let BatchNorm's moving variance follow the unbiased batch variance, as PyTorch does, where
            Keras follows the biased one. Layers whose input size is not known when the model is built keep Keras's.

    Source: Madry et al. 2018, arXiv 1706.06083; the order of things (attack in inference mode, one update in training
    mode on adversarial images only) as in MadryLab/robustness.
    """

    def __init__(
        self,
        classifier: keras.Model,
        attack: AttackConfig,
        *,
        seed: int = 0,
        unbiased_batchnorm: bool = True,
    ) -> None:
        if not isinstance(classifier, keras.Model):
            raise UserError(f"classifier must be a keras.Model. Received: {type(classifier).__name__}.")
        # The policy decides whether `compile` scales the loss. The global one may be another by now than that of the
        # classifier, above all of one that was loaded. Without `autocast` the images stay float32 in any case: bfloat16
        # would round the perturbations away.
        in_float16 = any(layer.compute_dtype == "float16" for layer in _flat_layers(classifier))
        super().__init__(name="adversarial_trainer", dtype="mixed_float16" if in_float16 else None, autocast=False)
        self.classifier = classifier
        self.attack = attack
        self._seed = seed
        self._unbiased_batchnorm = unbiased_batchnorm
        # Only where they are updated: Keras logs a metric that never is as 0.0.
        if attack.active:
            self._clean_loss = keras.metrics.Mean(name="clean_loss")
            self._clean_accuracy = keras.metrics.Mean(name="clean_accuracy")

    def call(self, images: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        return self.classifier(images, training=training)

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        images, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        # The step count as seed: a resumed run draws what the interrupted one would have drawn.
        seed = tf.stack([tf.constant(self._seed, tf.int64), tf.cast(self.optimizer.iterations, tf.int64)])
        images_adv = self._attacked(images, labels, sample_weight, seed)
        before = [(layer, tf.identity(layer.moving_variance)) for layer in self._updated_batchnorms()]
        # Loss scaling, weighting and metrics stay Keras's: a step written out here would have to repeat all of it.
        logs = super().train_step((images_adv, labels, sample_weight))
        for layer, variance in before:
            _make_unbiased(layer, variance, tf.shape(images)[0])
        return logs

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        images, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        seed = tf.constant([self._seed, -1], tf.int64)
        images_adv = self._attacked(images, labels, sample_weight, seed)
        return super().test_step((images_adv, labels, sample_weight))

    def _attacked(self, images: tf.Tensor, labels: tf.Tensor, sample_weight: Any, seed: tf.Tensor) -> tf.Tensor:
        """The adversarial images; the clean metrics are updated on the way."""
        if not self.attack.active:
            return images
        result = clean = run_pgd(self.classifier, images, labels, attack=self.attack, seed=seed)
        if self.attack.random_start:
            no_attack = dataclasses.replace(self.attack, epsilon=0.0)
            clean = run_pgd(self.classifier, images, labels, attack=no_attack)
        self._clean_loss.update_state(clean.start_loss, sample_weight)
        self._clean_accuracy.update_state(clean.start_correct, sample_weight)
        return result.images_adv

    def _updated_batchnorms(self) -> list[keras.layers.BatchNormalization]:
        if not self._unbiased_batchnorm:
            return []
        return [
            layer
            for layer in _flat_layers(self.classifier)
            if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable and _positions(layer) is not None
        ]


def _flat_layers(model: keras.Model) -> list[keras.layers.Layer]:
    layers: list[keras.layers.Layer] = []
    for layer in model.layers:
        layers += _flat_layers(layer) if isinstance(layer, keras.Model) else [layer]
    return layers


def _positions(layer: keras.layers.Layer) -> int | None:
    """How many values each image adds to a channel's statistics, or None where that isn't known beforehand."""
    try:
        shape = layer.input.shape
    except (AttributeError, ValueError):  # not in a functional graph, or used more than once
        return None
    channel_axis = layer.axis % len(shape)
    count = 1
    for axis, size in enumerate(shape):
        if axis not in (0, channel_axis):
            if size is None:
                return None
            count *= size
    return count


def _make_unbiased(layer: keras.layers.BatchNormalization, variance_before: tf.Tensor, batch_size: tf.Tensor) -> None:
    """Replaces the biased batch variance in the moving variance by the unbiased one, n / (n - 1) times as large."""
    count = tf.cast(batch_size * _positions(layer), tf.float32)
    kept = layer.momentum * variance_before
    followed = layer.moving_variance - kept
    layer.moving_variance.assign(kept + followed * count / tf.maximum(count - 1.0, 1.0))
