"""Adversarial training: the batch is attacked, then Keras does its ordinary step on what came out."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from robust_tf.attacks import AttackConfig, run_pgd
from robust_tf.errors import UserError
from robust_tf.training.optimizers import averages_of


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
        seed: of the random start, together with the number of steps so far.
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
        super().__init__(name="adversarial_trainer")
        if not isinstance(classifier, keras.Model):
            raise UserError(f"classifier must be a keras.Model. Received: {type(classifier).__name__}.")
        self.classifier = classifier
        self.attack = attack
        self._seed = seed
        self._unbiased_batchnorm = unbiased_batchnorm
        self._steps = keras.Variable(0, dtype="int64", trainable=False, name="steps", aggregation="only_first_replica")
        # Only where they are updated: Keras logs a metric that never is as 0.0.
        if attack.active:
            self._clean_loss = keras.metrics.Mean(name="clean_loss")
            self._clean_accuracy = keras.metrics.Mean(name="clean_accuracy")

    @property
    def state(self) -> list[keras.Variable]:
        """Everything that changes in training; a run that has it back goes on as if it had not stopped.

        The weights of the classifier, the optimizer's state, the step count, and what the metrics have counted. It is
        complete once the trainer is compiled, the optimizer built, and `build_metrics` called.
        """
        return [*self.classifier.variables, *self.optimizer.variables, self._steps, *self.metrics_variables]

    def build_metrics(self) -> None:
        """Makes the variables of the compiled metrics, which Keras makes in the first step otherwise."""
        images = tf.zeros((1, *self.classifier.input_shape[1:]))
        labels, logits = tf.zeros([1], tf.int32), tf.zeros((1, self.classifier.output_shape[-1]))
        self.compute_metrics(images, labels, logits, None)
        self.reset_metrics()

    def swap_averages(self) -> None:
        """Exchanges the trained weights and their moving averages, if the optimizer keeps any; twice is not at all."""
        for weight, average in averages_of(self.optimizer):
            value = weight.numpy()
            weight.assign(average)
            average.assign(value)

    def call(self, images: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        return self.classifier(images, training=training)

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        images, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        # The step count as seed: a resumed run draws what the interrupted one would have drawn. Not the optimizer's
        # count: that one stands still while gradients are accumulated, or when one overflows.
        seed = tf.stack([tf.constant(self._seed, tf.int64), tf.convert_to_tensor(self._steps)])
        if self._num_replicas > 1:  # each has other images, and draws other starts
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            seed = tf.random.experimental.stateless_fold_in(seed, replica)
        self._steps.assign_add(1)
        images_adv = self._attacked(images, labels, sample_weight, seed)
        before = [(layer, tf.identity(layer.moving_variance)) for layer in self._updated_batchnorms()]
        # Loss scaling, weighting and metrics stay Keras's: a step written out here would have to repeat all of it.
        logs = super().train_step((images_adv, labels, sample_weight))
        for layer, variance in before:
            replicas = self._num_replicas if layer.synchronized else 1
            _make_unbiased(layer, variance, tf.shape(images)[0] * replicas)
        return logs

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        images, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        seed = tf.constant([self._seed, -1], tf.int64)
        images_adv = self._attacked(images, labels, sample_weight, seed)
        return super().test_step((images_adv, labels, sample_weight))

    @property
    def _num_replicas(self) -> int:
        return self.distribute_strategy.num_replicas_in_sync

    def make_train_function(self, force: bool = False) -> None:
        if self._num_replicas == 1:
            super().make_train_function(force)
        elif getattr(self, "train_function", None) is None or force:
            self.train_function = self._on_all_replicas(self.train_step)

    def make_test_function(self, force: bool = False) -> None:
        if self._num_replicas == 1:
            super().make_test_function(force)
        elif getattr(self, "test_function", None) is None or force:
            self.test_function = self._on_all_replicas(self.test_step)

    def _on_all_replicas(self, step: Callable[[Any], dict[str, tf.Tensor]]) -> Callable[[Any], dict[str, tf.Tensor]]:
        """One step on a batch that is shared among the replicas; the figures are means over them.

        Keras's own way takes the figures of one replica, and fails with several workers (keras-team/keras#20585).
        """
        strategy = self.distribute_strategy

        @tf.function(reduce_retracing=True, autograph=False)
        def on_next_batch(iterator: Any) -> dict[str, tf.Tensor]:
            logs = strategy.run(step, args=(next(iterator),))
            # In one piece: every reduction is a round over the network.
            names = sorted(logs)
            values = strategy.run(
                lambda logs: tf.stack([tf.cast(logs[name], tf.float32) for name in names]), args=(logs,)
            )
            return dict(zip(names, tf.unstack(strategy.reduce("MEAN", values, axis=None)), strict=True))

        return on_next_batch

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        # Keras averages a batch over the workers for this, and can't. `build_metrics` has made what is to be made.
        if self._num_replicas == 1:
            super()._maybe_symbolic_build(iterator=iterator, data_batch=data_batch)

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
