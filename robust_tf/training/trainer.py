"""Adversarial training: each batch is attacked first, then the weights are updated on the adversarial images."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from robust_tf.attacks import AttackConfig, climb
from robust_tf.attacks.checks import assert_pixels
from robust_tf.attacks.loops import for_accelerator
from robust_tf.console import console
from robust_tf.errors import UserError
from robust_tf.models.execution import Execution
from robust_tf.training.batchnorm import flat_layers, has_synchronized_batchnorm, unbiased_statistics
from robust_tf.training.compiled_loss import CompiledLoss
from robust_tf.training.image_input import check_has_images, images_of, trial_outputs, with_images
from robust_tf.training.objectives import Batch, Outputs, Recipe, build_objective
from robust_tf.training.optimizers import average_statistics, averages_of
from robust_tf.training.replicas import ReplicatedModel
from robust_tf.training.runtime_checks import explained, with_first_batch_checked
from robust_tf.training.xla import CompiledByXla


class _Step(NamedTuple):
    """What a replica has computed alone when it meets the others to update the weights.

    Attributes:
        logs: Values of the metrics by name.
        of_weights: Gradients with respect to the trainable weights.
        of_watched: Gradients with respect to the tensors that the objective watches.
        inputs: Inputs of the forward pass, or None if the objective watches none of them.
    """

    logs: dict[str, tf.Tensor]
    of_weights: list[tf.Tensor]
    of_watched: list[tf.Tensor]
    inputs: Any


class AdversarialTrainer(CompiledByXla, ReplicatedModel):
    """Trains a Keras classifier to be robust against adversarial examples.

    Wrap your classifier, then use the trainer like any Keras model, with `compile`, `fit`, `evaluate` and Keras's
    callbacks. Each training step searches, inside a ball around every image of the batch, for the image with the
    highest loss, and updates the weights on the images that it found. `evaluate` attacks the images in the same way.

    The trainer shares its weights with the classifier. So `fit` trains the classifier itself, which you can then use
    and save without this package. `save` and `export` of the trainer write the classifier, while `save_weights` and
    `load_weights` cover the whole state of the training.

    **Loss.** The attack maximizes the same loss that you compile, separately for each image. You can use any loss that
    Keras accepts: integer, one-hot or soft labels, label smoothing, logits or probabilities, one output or several.

    **Metrics.** The compiled loss and metrics are measured on the adversarial images, both in training and in
    `evaluate`: `accuracy` is the robust accuracy. The trainer adds `clean_loss` and, for a classifier whose one output
    holds class scores, `clean_accuracy`, which are measured on the original images with the network in inference mode.
    `clean_accuracy` ignores `class_weight` and `sample_weight`, except that images of weight 0 are not counted.
    Usually both metrics cost nothing, because the first forward pass of the attack provides them. With a random start,
    an attack in training mode, or free adversarial training, they need one extra forward pass.

    **Other objectives.** By default the trainer minimizes Madry's objective, the loss on the adversarial images. Pass
    a `recipe` for TRADES, AWP, free adversarial training, or an epsilon that rises during the first steps, such as
    `recipe=Recipe(trades_beta=6.0)`. See `robust_tf.training.objectives`.

    Args:
        classifier: Built Keras model that maps images in [0, 1], (batch, height, width, channels), to logits
            (batch, num_classes) or to any other outputs that the compiled loss takes. Normalization of the images
            belongs inside the model. It may have several outputs, and further inputs that are not images.
        attack: Attack on the batches of `fit` and `evaluate`. An attack with epsilon 0 means standard training.
        recipe: Objective other than Madry's, with its parameters.
        validation_attack: Attack on the batches of `evaluate`, by default `attack`.
        seed: Seed for the random starting points of the attack. It is combined with the number of the step.
        unbiased_batchnorm: Whether the moving variance of BatchNorm follows the unbiased variance of the batch, as in
            PyTorch, instead of the biased one, as in Keras. Layers whose input size is unknown when the model is built
            always behave as in Keras.
        clean_figures: Whether to report `clean_loss` and `clean_accuracy` in training even if they need an extra
            forward pass.

    Raises:
        UserError: `classifier` is not a Keras model with exactly one image input; there is a recipe but no attack;
            only one of training and validation has an attack; or free adversarial training is used with an unknown
            image size or several replicas. `compile` raises it for a loss that does not fit the classifier, `fit` and
            `evaluate` for images outside [0, 1] and for labels that are not classes.

    Example:
        >>> import keras, numpy
        >>> from robust_tf.training import AdversarialTrainer, AttackConfig
        >>> classifier = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(10)])
        >>> attack = AttackConfig(norm="linf", epsilon=8 / 255, step_size=2 / 255, steps=7)
        >>> trainer = AdversarialTrainer(classifier, attack)
        >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        >>> trainer.compile(optimizer="adam", loss=loss, metrics=["accuracy"])
        >>> images = numpy.random.default_rng(0).random((32, 8, 8, 3))  # float images in [0, 1]
        >>> labels = numpy.arange(32) % 10
        >>> history = trainer.fit(images, labels, epochs=1, verbose=0)
        >>> sorted(history.history)
        ['accuracy', 'clean_accuracy', 'clean_loss', 'loss']
        >>> classifier.predict(images, verbose=0).shape  # the classifier itself has been trained
        (32, 10)
        >>> classifier.save("robust.keras")

    Source: Madry et al. 2018, arXiv 1706.06083. As in MadryLab/robustness, the attack runs in inference mode, and one
    update in training mode follows, on adversarial images only.
    """

    def __init__(
        self,
        classifier: keras.Model,
        attack: AttackConfig,
        *,
        recipe: Recipe | None = None,
        validation_attack: AttackConfig | None = None,
        seed: int = 0,
        unbiased_batchnorm: bool = True,
        clean_figures: bool = True,
    ) -> None:
        recipe = Recipe() if recipe is None else recipe
        if not isinstance(classifier, keras.Model):
            raise UserError(f"classifier must be a keras.Model. Received: {type(classifier).__name__}.")
        # The dtype policy decides whether `compile` scales the loss. It is taken from the classifier, because the
        # global policy may differ, especially for a classifier that was loaded. Without `autocast` the images always
        # stay float32: bfloat16 would round the perturbations away.
        in_float16 = any(layer.compute_dtype == "float16" for layer in flat_layers(classifier))
        super().__init__(name="adversarial_trainer", dtype="mixed_float16" if in_float16 else None, autocast=False)
        if recipe != Recipe() and not attack.active:
            raise UserError(f"A recipe for adversarial training needs an attack. Received: {attack}, {recipe}.")
        if validation_attack is not None and validation_attack.active != attack.active:
            raise UserError(
                "Either both training and validation have an attack, or neither has one. "
                f"Received: attack={attack}, validation_attack={validation_attack}."
            )
        if attack.active and classifier.built:
            check_has_images(classifier)
        self.classifier = classifier
        self._execution = Execution(classifier, unbiased=unbiased_batchnorm)
        self.attack = attack
        self.recipe = recipe
        self._validation_attack = attack if validation_attack is None else validation_attack
        # A variable, so that a job with another seed can use the traced step. It is not part of the state.
        self.seed = keras.Variable(seed, dtype="int64", trainable=False, name="seed", aggregation="only_first_replica")
        self._unbiased_batchnorm = unbiased_batchnorm
        self._clean_figures = clean_figures
        self._compiled_loss: CompiledLoss | None = None
        self._labels_for: Callable[[Any], Any] | None = None
        self.objective = build_objective(recipe, self, attack)
        self._steps = keras.Variable(0, dtype="int64", trainable=False, name="steps", aggregation="only_first_replica")
        if attack.active:
            self._clean_loss = keras.metrics.Mean(name="clean_loss")
            self._clean_accuracy = keras.metrics.Mean(name="clean_accuracy")
        # Callbacks that save and restore check `built` before the first step. All variables exist already.
        self.built = classifier.built

    @property
    def output_names(self) -> list[str]:
        """Names of the classifier's outputs, for use in dicts of losses, metrics and labels."""
        names: list[str] = self.classifier.output_names
        return names

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """The metrics of the trainer: loss, compiled metrics and clean metrics."""
        metrics: list[keras.metrics.Metric] = super().metrics
        loss = self._compiled_loss
        if loss is not None and not loss.counts_hits:
            # Keras would log a metric that is never updated as 0.0.
            metrics = [metric for metric in metrics if metric is not self._clean_accuracy]
        return metrics

    @property
    def compiled_loss(self) -> CompiledLoss:
        """The compiled loss of each image separately, which the attack maximizes."""
        if self._compiled_loss is None:
            raise UserError(
                "The attack maximizes the compiled loss. Received: a trainer that is not compiled. Compile it first."
            )
        return self._compiled_loss

    @property
    def state(self) -> list[keras.Variable]:
        """All variables that change in training. A run continues exactly where it stopped once they are restored.

        These are the weights of the classifier, the variables of the optimizer, `state_variables`, and the variables of
        the metrics. The list is complete after `compile`, building the optimizer, and `build_metrics`.
        """
        variables = [*self.classifier.variables, *self.optimizer.variables]
        return [*variables, *self.state_variables, *self.metrics_variables]

    @property
    def state_variables(self) -> list[keras.Variable]:
        """The variables of the trainer itself: the number of steps so far, and the variables of the objective."""
        return [self._steps, *self.objective.variables]

    @property
    def epsilon(self) -> float:
        """Radius of the ball in the next training step, in [0, 1] pixel units."""
        return self.attack.epsilon * float(self.strength())

    def strength(self) -> Any:
        """Returns the factor on epsilon and on the step size of the attack in the next training step, in [0, 1]."""
        if not self.recipe.epsilon_warmup_steps:
            return 1.0
        steps = tf.cast(self.optimizer.iterations, tf.float32)
        return tf.minimum(steps / self.recipe.epsilon_warmup_steps, 1.0)

    def compile(self, optimizer: Any = "rmsprop", loss: Any = None, loss_weights: Any = None, **kwargs: Any) -> None:
        """Configures the training as `keras.Model.compile` does.

        Args:
            optimizer: Optimizer or its name.
            loss: Loss in any form that Keras accepts. An attack needs one.
            loss_weights: Weights of the losses of several outputs.
            **kwargs: Further arguments of `keras.Model.compile`, such as `metrics`.

        Raises:
            UserError: There is an attack but no loss, or the loss expects probabilities and the classifier returns
                logits, or the other way around.
        """
        super().compile(optimizer=optimizer, loss=loss, loss_weights=loss_weights, **kwargs)
        self._compiled_loss = None
        self._execution = Execution(self.classifier, unbiased=self._unbiased_batchnorm, fused=not self.jit_compile)
        if self.classifier.built:
            self._execution.prepare()
        if self.attack.active:
            names = getattr(self.classifier, "output_names", None) or ()
            outputs = trial_outputs(self.classifier)
            self._compiled_loss = CompiledLoss(loss, loss_weights, outputs=outputs, output_names=names)

    def build_metrics(self, labels_for: Callable[[Any], Any] | None = None) -> None:
        """Creates the variables of the compiled metrics and losses, which Keras would create in the first step.

        Args:
            labels_for: Function from outputs of the classifier to labels of the right shapes and types. By default the
                labels are integer classes, or of the shape of the outputs if the loss is one of Keras's that take such
                labels.
        """
        if labels_for is not None:
            self._labels_for = labels_for
        outputs = keras.tree.map_structure(lambda output: tf.zeros_like(output[:1]), trial_outputs(self.classifier))
        loss = self._compiled_loss
        whole = loss is not None and loss.integer_labels is False
        labels = keras.tree.map_structure(
            lambda output: output if whole else tf.zeros(output.shape[:-1], tf.int32), outputs
        )
        if self._labels_for is not None:
            labels = self._labels_for(outputs)
        images = tf.zeros((1, 1, 1, 1))
        if self.loss is not None and isinstance(outputs, (dict, list, tuple)):
            self.compute_loss(images, labels, outputs, None)  # creates the metrics of the individual losses
        self.compute_metrics(images, labels, outputs, None)
        self.reset_metrics()

    def swap_averages(self) -> None:
        """Swaps the weights and their moving averages, if the optimizer keeps any; a second call swaps them back."""
        for weight, average in averages_of(self.optimizer):
            value = weight.numpy()
            weight.assign(average)
            average.assign(value)

    def call(self, images: Any, training: bool | None = None) -> Any:
        """Returns the classifier's outputs."""
        return self.classifier(images, training=training)

    def save(self, filepath: Any, overwrite: bool = True, **kwargs: Any) -> None:
        """Saves the classifier as `keras.Model.save` does. The file can be loaded without this package."""
        self.classifier.save(filepath, overwrite=overwrite, **kwargs)

    def export(self, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """Exports the classifier as `keras.Model.export` does."""
        return self.classifier.export(filepath, *args, **kwargs)

    def fit(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        """Trains the classifier as `keras.Model.fit` does, with the same arguments."""
        with explained():
            return super().fit(self._checked_data(x, y), y, *args, **kwargs)

    def evaluate(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Measures loss and metrics under attack, with the same arguments as `keras.Model.evaluate`."""
        with explained():
            return super().evaluate(self._checked_data(x, y), y, *args, **kwargs)

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Runs one training step, as `keras.Model.train_on_batch` does."""
        with explained():
            return super().train_on_batch(*args, **kwargs)

    def test_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates one batch, as `keras.Model.test_on_batch` does."""
        with explained():
            return super().test_on_batch(*args, **kwargs)

    def make_train_function(self, force: bool = False) -> None:
        """Builds the optimizer and the metrics, then the training function."""
        if self.classifier.built and not self.optimizer.built:
            # A variable that is created while the first step is traced makes TensorFlow trace the step again. With
            # several replicas it cannot be created there at all.
            with self.distribute_strategy.scope():
                self.optimizer.build(self.trainable_variables)
                average_statistics(self.optimizer, self.classifier)
                loss = self._compiled_loss
                if loss is not None and (loss.integer_labels is not None or self.num_replicas > 1):
                    self.build_metrics()
        if self.compiles_parts and (force or self.train_function is None) and not self._compiled_parts[1]:
            what = "only the attack" if self._compiled_parts[0] else "none of the training step"
            console.print(f"XLA compiles {what}, because BatchNorm is synchronized between the devices.")
        super().make_train_function(force)

    def make_test_function(self, force: bool = False) -> None:
        """Builds the metrics if there are several replicas, then the test function."""
        if self.num_replicas > 1 and self._compiled_loss is not None and self.test_function is None:
            with self.distribute_strategy.scope():
                self.build_metrics()
        super().make_test_function(force)

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Attacks one batch and updates the weights on the adversarial images."""
        # The number of the step is part of the seed, so that a resumed run draws the same numbers as one that was not
        # interrupted. The optimizer's count cannot be used: it does not change while gradients are accumulated, or
        # when a gradient overflows.
        seed = tf.stack([tf.convert_to_tensor(self.seed), tf.convert_to_tensor(self._steps)])
        if self.num_replicas > 1:  # the replicas must not all draw the same starting points
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            seed = tf.random.experimental.stateless_fold_in(seed, replica)
        self._steps.assign_add(1)
        batch = self._batch_of(data, seed)
        logs: dict[str, tf.Tensor] = {}
        for replay in range(self.objective.replays):
            logs = self._update(batch, first=replay == 0)
        if self._clean_figures or self.objective.knows_clean_figures:
            return logs
        return {name: value for name, value in logs.items() if name not in ("clean_loss", "clean_accuracy")}

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Attacks one batch with the validation attack and measures the metrics on the adversarial images."""
        batch = self._batch_of(data, tf.stack([tf.convert_to_tensor(self.seed), tf.constant(-1, tf.int64)]))
        return self.alone(lambda: self._tested(data, batch))

    def _tested(self, data: Any, batch: Batch) -> dict[str, tf.Tensor]:
        images, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        attack = self._validation_attack
        logs: dict[str, tf.Tensor]
        if not attack.active:
            logs = super().test_step(data)
            return logs
        result = self._attacked(batch, attack)
        if attack.random_start:
            self._measure_clean(batch)
        else:
            self.update_clean(batch, result.start_loss, result.start_correct)
        logs = super().test_step((with_images(images, result.images_adv), labels, sample_weight))
        return logs

    def _update(self, batch: Batch, *, first: bool) -> dict[str, tf.Tensor]:
        """Takes one optimizer step as Keras does, but with the inputs, forward pass and loss of the objective.

        With several replicas XLA compiles what lies between the exchanges, as far as it can.

        Args:
            batch: Batch of this replica.
            first: Whether this is the first step on the batch.
        """
        objective = self.objective
        attack_alone, update_alone = self._compiled_parts
        if objective.exchanges or attack_alone != update_alone:
            inputs = self.alone(lambda: self._inputs(batch, first=first), compiled=attack_alone)
            inputs = objective.exchanged(self, inputs)
            step = self.alone(lambda: self._gradients(batch, inputs), compiled=update_alone)
        else:
            step = self.alone(lambda: self._gradients(batch, self._inputs(batch, first=first)), compiled=update_alone)
        weights = self.trainable_weights
        if weights:
            self.optimizer.apply_gradients(zip(step.of_weights, weights, strict=True))
        if step.of_watched:
            objective.learn(self, batch, step.inputs, step.of_watched)
        return step.logs

    def _inputs(self, batch: Batch, *, first: bool) -> Any:
        """Returns the inputs of the forward pass, such as the adversarial images."""
        objective = self.objective
        if first and self.attack.active and self._clean_figures and not objective.knows_clean_figures:
            self._measure_clean(batch)
        folded = self._execution.weights_unchanged() if self.attack.active else contextlib.nullcontext()
        with self._unbiased_statistics(batch.images, objective.input_passes), folded, self._loops():
            return objective.inputs(self, batch)

    def _gradients(self, batch: Batch, inputs: Any) -> _Step:
        """Runs the forward and the backward pass, and updates the metrics."""
        objective = self.objective
        weights = [weight.value for weight in self.trainable_weights]
        watched = objective.watched(inputs)
        with self._unbiased_statistics(batch.images, objective.passes), tf.GradientTape() as tape:
            tape.watch([*watched, *(weight for weight in weights if not isinstance(weight, tf.Variable))])
            outputs: Outputs = objective.forward(self, batch, inputs)
            loss = objective.loss(self, batch, outputs)
            scaled_loss = self.optimizer.scale_loss(loss)
        count = tf.shape(keras.tree.flatten(batch.images)[0])[0]
        for metric in self.metrics:
            if metric.name == "loss":  # each replica computes only its share of the loss
                metric.update_state(loss * self.num_replicas, sample_weight=count)
        gradients = tape.gradient(scaled_loss, [*weights, *watched])
        logs = self.compute_metrics(batch.images, batch.labels, outputs.adversarial, batch.sample_weight)
        of_weights, of_watched = gradients[: len(weights)], gradients[len(weights) :]
        return _Step(logs, of_weights, of_watched, inputs if watched else None)

    @property
    def _compiled_parts(self) -> tuple[bool, bool]:
        """Whether XLA compiles the search for the inputs (the attack), and the computation of the gradients.

        It cannot compile a synchronized BatchNorm in training mode, whose statistics are those of all replicas.
        """
        synchronized = has_synchronized_batchnorm(self.classifier)
        searches = self.attack.active and not (synchronized and self.objective.inputs_train)
        return self.compiles_parts and searches, self.compiles_parts and not synchronized

    def _batch_of(self, data: Any, seed: tf.Tensor) -> Batch:
        inputs, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if not self.attack.active:
            return Batch(inputs, labels, sample_weight, seed, self._network(lambda images: images))
        images = self._checked_images(inputs, labels)
        return Batch(images, labels, sample_weight, seed, self._network(lambda images: with_images(inputs, images)))

    def _network(self, inputs_with: Callable[[Any], Any]) -> Callable[[Any, bool], Any]:
        return lambda images, training: self._execution(inputs_with(images), training=training)

    def _attacked(self, batch: Batch, attack: AttackConfig) -> Any:
        """Attacks the compiled loss with the network in inference mode."""
        loss = self.compiled_loss
        with self._execution.weights_unchanged(), self._loops():
            return climb(
                lambda images: batch.network(images, False),
                batch.images,
                loss=lambda outputs: loss(batch.labels, outputs),
                correct=lambda outputs: loss.hits(batch.labels, outputs),
                attack=attack,
                seed=batch.seed,
            )

    def _loops(self) -> contextlib.AbstractContextManager[None]:
        return for_accelerator() if self.jit_compile else contextlib.nullcontext()

    def _measure_clean(self, batch: Batch) -> None:
        outputs = keras.tree.map_structure(
            lambda output: tf.cast(output, tf.float32), batch.network(batch.images, False)
        )
        loss = self.compiled_loss
        self.update_clean(batch, loss(batch.labels, outputs), loss.hits(batch.labels, outputs))

    def update_clean(self, batch: Batch, loss: tf.Tensor, correct: tf.Tensor) -> None:
        """Updates `clean_loss` with the losses, (batch,), and `clean_accuracy` with the hits, (batch,) bool."""
        weights, counts = batch.sample_weight, None
        if weights is not None and not isinstance(weights, (dict, list, tuple)):
            weights = tf.reshape(tf.cast(weights, tf.float32), [-1])
            loss *= weights  # Keras, too, multiplies by the weights and divides by the number of images
            # With several replicas, images that only fill up a batch have weight 0.
            counts = tf.cast(weights != 0, tf.float32)
        self._clean_loss.update_state(loss)
        if self.compiled_loss.counts_hits:
            self._clean_accuracy.update_state(correct, counts)

    def _unbiased_statistics(self, images: Any, passes: int) -> contextlib.AbstractContextManager[None]:
        if not (self._unbiased_batchnorm and passes):
            return contextlib.nullcontext()
        count = tf.shape(keras.tree.flatten(images)[0])[0]
        fused = self._execution.fused_layers
        return unbiased_statistics(self.classifier, count, passes=passes, replicas=self.num_replicas, besides=fused)

    def _checked_data(self, data: Any, labels: Any) -> Any:
        """Returns the data of `fit` or `evaluate`. Checks the first batch if XLA drops the checks inside the step.

        With several replicas the checks lie outside the compiled parts.
        """
        if not (self.attack.active and self.jit_compile) or self.compiles_parts:
            return data
        return with_first_batch_checked(data, labels, check=self._checked_images)

    def _checked_images(self, inputs: Any, labels: Any) -> tf.Tensor:
        """Checks that the images lie in [0, 1] and that the labels are classes; returns the images as float32."""
        images = assert_pixels(images_of(inputs))
        return self.compiled_loss.with_labels_checked(images, labels)
