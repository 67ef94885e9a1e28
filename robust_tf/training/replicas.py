"""Training and evaluation steps of a Keras model on several replicas of a `tf.distribute` strategy."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf


class ReplicatedModel(keras.Model):
    """A model whose `fit` and `evaluate` work under every strategy, including strategies with several workers.

    Create it within the strategy's scope, and create all of its variables before the first step. With one
    replica it behaves exactly like `keras.Model`.
    """

    @property
    def num_replicas(self) -> int:
        """Number of replicas among which a batch is divided."""
        return int(self.distribute_strategy.num_replicas_in_sync)

    def make_train_function(self, force: bool = False) -> None:
        """Makes the function that runs one training step on all replicas."""
        if self.num_replicas == 1:
            super().make_train_function(force)
        elif getattr(self, "train_function", None) is None or force:
            self.train_function = self._on_all_replicas(self.train_step)

    def make_test_function(self, force: bool = False) -> None:
        """Makes the function that runs one evaluation step on all replicas."""
        if self.num_replicas == 1:
            super().make_test_function(force)
        elif getattr(self, "test_function", None) is None or force:
            self.test_function = self._on_all_replicas(self.test_step)

    def _on_all_replicas(self, step: Callable[[Any], dict[str, tf.Tensor]]) -> Callable[[Any], dict[str, tf.Tensor]]:
        """Returns a function that runs one step on all replicas and averages their metrics.

        Keras itself takes the metrics of one replica, and fails with several workers (keras-team/keras#20585).
        """
        strategy = self.distribute_strategy

        @tf.function(reduce_retracing=True, autograph=False)
        def on_next_batch(iterator: Any) -> dict[str, tf.Tensor]:
            logs = strategy.run(step, args=(next(iterator),))
            # Reduces all metrics as one tensor, since every reduction costs a round trip over the network.
            names = sorted(logs)
            values = strategy.run(
                lambda logs: tf.stack([tf.cast(logs[name], tf.float32) for name in names]), args=(logs,)
            )
            return dict(zip(names, tf.unstack(strategy.reduce("MEAN", values, axis=None)), strict=True))

        function: Callable[[Any], dict[str, tf.Tensor]] = on_next_batch
        return function

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        # With several workers Keras would fail here, because it tries to average a batch over them. This build is not
        # needed: all variables exist already.
        if self.num_replicas == 1:
            super()._maybe_symbolic_build(iterator=iterator, data_batch=data_batch)
