"""Training and evaluation steps of a Keras model on several replicas of a `tf.distribute` strategy."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import keras
import tensorflow as tf

Result = TypeVar("Result")


class Scope(keras.StatelessScope):
    """A scope in which variables have other values and assignments change only these. It can be nested.

    Within `keras.StatelessScope` a variable that the scope does not list has its stored value, even if an outer scope
    gives it another one. Here it has the value of the outer scope.

    Args:
        values: Pairs of a variable and its value within the scope, a tensor.

    Example:
        >>> import keras
        >>> from robust_tf.training.replicas import Scope
        >>> one, two = keras.Variable(1.0), keras.Variable(2.0)
        >>> with Scope([(one, keras.ops.convert_to_tensor(10.0))]):
        ...     with Scope() as scope:
        ...         _ = two.assign(one + two)
        ...     print(float(two), float(scope.get_current_value(two)))
        2.0 12.0
    """

    def __init__(self, values: Iterable[tuple[keras.Variable, tf.Tensor]] = ()) -> None:
        super().__init__(list(values), initialize_variables=False)
        self.original_scope: keras.StatelessScope | None = None

    def get_current_value(self, variable: keras.Variable) -> tf.Tensor | None:
        """Returns the value of a variable within the scope, or None if neither this scope nor an outer one has one."""
        value = super().get_current_value(variable)
        outer = self.original_scope
        return outer.get_current_value(variable) if value is None and outer is not None else value


class ReplicatedModel(keras.Model):
    """A model whose `fit` and `evaluate` work under every strategy, including strategies with several workers.

    Create it within the strategy's scope, and create all of its variables before the first step. With one
    replica it behaves exactly like `keras.Model`.

    **XLA.** With one replica Keras compiles the whole step. XLA cannot compile the exchange between replicas, so with
    several replicas a step consists of parts: those that a replica computes alone are passed to `alone`, which compiles
    them, and the all-reduce of the gradients and the update of the weights stay outside.
    """

    @property
    def num_replicas(self) -> int:
        """Number of replicas among which a batch is divided."""
        return int(self.distribute_strategy.num_replicas_in_sync)

    @property
    def compiles_parts(self) -> bool:
        """Whether XLA compiles parts of a step, for each replica. A TPU always compiles all of it."""
        on_tpu = isinstance(self.distribute_strategy, tf.distribute.TPUStrategy)
        return self.num_replicas > 1 and not on_tpu and bool(self.jit_compile)

    def alone(self, part: Callable[[], Result], *, compiled: bool = True) -> Result:
        """Runs a part of a step for which a replica needs no other one, compiled with XLA if `compiles_parts` is True.

        Call it in the replica's part of a step, that is, where `strategy.run` runs it. While the compiled part runs,
        variables do not change: assigning to a mirrored variable is an exchange between the replicas. The new values
        are returned by the compiled part and assigned after it.

        Args:
            part: Function of no arguments that returns tensors in any structure, or None in places of them. It may use
                tensors and variables from outside.
            compiled: False to run this part without XLA.
        """
        if not (compiled and self.compiles_parts):
            return part()
        # Each variable once. The optimizer's variables are not listed, since a part reads them but does not change
        # them.
        listed = {id(variable): variable for variable in [*self.variables, *self.metrics_variables]}
        variables = list(listed.values())
        values = [tf.convert_to_tensor(variable.value) for variable in variables]  # this replica's own

        # Made anew each time that the step is traced, for each replica. So it is traced once and compiled once.
        @tf.function(jit_compile=True, autograph=False)
        def run() -> tuple[Any, list[tf.Tensor | None]]:
            before = [tf.identity(value) for value in values]
            with Scope(zip(variables, before, strict=True)) as scope:
                result = part()
            after = [scope.get_current_value(variable) for variable in variables]
            changed = [None if new is old else new for new, old in zip(after, before, strict=True)]
            return result, changed

        result: Result
        result, changed = run()
        for variable, value in zip(variables, changed, strict=True):
            if value is not None:
                variable.assign(value)
        return result

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
