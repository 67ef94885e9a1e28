"""Steps of a Keras model on several replicas of a `tf.distribute` strategy, where Keras's own way falls short."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf


class ReplicatedModel(keras.Model):
    """A model whose `fit` and `evaluate` work under every strategy, several workers included.

    It must be made within the strategy's scope, and have all of its variables before the first step. With one replica
    everything is Keras's own.
    """

    @property
    def num_replicas(self) -> int:
        """Among which a batch is shared."""
        return self.distribute_strategy.num_replicas_in_sync

    def make_train_function(self, force: bool = False) -> None:
        if self.num_replicas == 1:
            super().make_train_function(force)
        elif getattr(self, "train_function", None) is None or force:
            self.train_function = self._on_all_replicas(self.train_step)

    def make_test_function(self, force: bool = False) -> None:
        if self.num_replicas == 1:
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
        # Keras averages a batch over the workers for this, and can't. All variables are there already.
        if self.num_replicas == 1:
            super()._maybe_symbolic_build(iterator=iterator, data_batch=data_batch)
