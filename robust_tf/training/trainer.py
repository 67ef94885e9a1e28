"""Adversarial training: the batch is attacked, then the weights take an ordinary step on the adversarial images."""

import contextlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from robust_tf.attacks import AttackConfig, climb
from robust_tf.attacks.checks import assert_pixels
from robust_tf.errors import UserError
from robust_tf.training.batchnorm import flat_layers, unbiased_statistics
from robust_tf.training.compiled_loss import CompiledLoss
from robust_tf.training.image_input import check_has_images, images_of, input_shapes, map_shapes, with_images
from robust_tf.training.objectives import Batch, Outputs, Recipe, objective_of
from robust_tf.training.optimizers import average_statistics, averages_of
from robust_tf.training.replicas import ReplicatedModel
from robust_tf.training.runtime_checks import explained

# Images of unknown size are tried at this one, to see what the classifier gives.
_TRIAL_SIZE = 64
_TRIAL_IMAGES = 4
# Of arrays, so many are looked at before the first step where XLA would leave the check out.
_FIRST_IMAGES = 256


class AdversarialTrainer(ReplicatedModel):
    """Trains a classifier on adversarial examples, made anew for each batch.

    Solves min over the weights of the mean over (images, labels) of max over the ball of the loss. Use it like any
    Keras model: `compile`, `fit`, `evaluate`, and Keras's callbacks. It shares the classifier's weights. `save` and
    `export` write the classifier alone; `save_weights` and `load_weights` keep the whole state of training.

    **The loss is the one that you compile**, and the attack climbs the same loss, image by image: integer, one-hot or
    soft labels, label smoothing, logits or probabilities, one output or several. The compiled loss and metrics are
    those on the adversarial images, in training and in `evaluate`. With an attack there are two more metrics, with the
    network in inference mode: `clean_loss`, and `clean_accuracy` where the classifier has one output with scores of
    classes. `clean_accuracy` counts every image once, whatever `class_weight` and `sample_weight` say (an image of
    weight 0 does not count). In training they are taken from the attack's first forward pass; a random start, an attack
    in training mode and free adversarial training cost one more forward pass for them.

    With `recipe` another objective is minimized: TRADES, AWP, free adversarial training, or a rising epsilon. Metrics
    stay those on the adversarial images. See `robust_tf.training.objectives`.

    Args:
        classifier: any built Keras model from [0, 1] images (batch, height, width, channels) to logits
            (batch, num_classes), or to whatever the compiled loss takes. It may have more inputs, as long as one of
            them alone holds images, and more outputs. Normalization belongs inside it.
        attack: attack of the batches in training and in `evaluate`. epsilon 0 is standard training.
        recipe: what is done with the attack, for other objectives than Madry's.
        validation_attack: attack of `evaluate`, if it is not the same.
        seed: seed of the random start, together with the number of steps so far.
        clean_figures: report `clean_loss` and `clean_accuracy` in training even where they cost a forward pass.
        unbiased_batchnorm: let BatchNorm's moving variance follow the unbiased batch variance, as PyTorch does, where
            Keras follows the biased one. Layers whose input size is not known when the model is built keep Keras's.

    Raises:
        UserError: classifier is not a Keras model with one input of images, a recipe or the validation is without an
            attack where there should be one, or free adversarial training has an input of unknown size or several
            replicas. `compile` raises it for a loss that does not fit the classifier; `fit` and `evaluate` raise it
            for images that are not in [0, 1] and labels that are not classes.

    Source: Madry et al. 2018, arXiv 1706.06083; the order of things (attack in inference mode, one update in training
    mode on adversarial images only) as in MadryLab/robustness. For the others see `robust_tf.training.objectives`.
    """

    def __init__(
        self,
        classifier: keras.Model,
        attack: AttackConfig,
        *,
        recipe: Recipe = Recipe(),
        validation_attack: AttackConfig | None = None,
        seed: int = 0,
        unbiased_batchnorm: bool = True,
        clean_figures: bool = True,
    ) -> None:
        if not isinstance(classifier, keras.Model):
            raise UserError(f"classifier must be a keras.Model. Received: {type(classifier).__name__}.")
        # The policy decides whether `compile` scales the loss. The global one may be another by now than that of the
        # classifier, above all of one that was loaded. Without `autocast` the images stay float32 in any case: bfloat16
        # would round the perturbations away.
        in_float16 = any(layer.compute_dtype == "float16" for layer in flat_layers(classifier))
        super().__init__(name="adversarial_trainer", dtype="mixed_float16" if in_float16 else None, autocast=False)
        if recipe != Recipe() and not attack.active:
            raise UserError(f"A recipe of adversarial training needs an attack. Received: {attack}, {recipe}.")
        if validation_attack is not None and validation_attack.active != attack.active:
            raise UserError(
                "Both training and validation have an attack, or neither. "
                f"Received: attack={attack}, validation_attack={validation_attack}."
            )
        if attack.active and classifier.built:
            check_has_images(classifier)
        self.classifier = classifier
        self.attack = attack
        self.recipe = recipe
        self._validation_attack = attack if validation_attack is None else validation_attack
        self._seed = seed
        self._unbiased_batchnorm = unbiased_batchnorm
        self._clean_figures = clean_figures
        self._compiled_loss: CompiledLoss | None = None
        self.objective = objective_of(recipe, self, attack)
        self._steps = keras.Variable(0, dtype="int64", trainable=False, name="steps", aggregation="only_first_replica")
        if attack.active:
            self._clean_loss = keras.metrics.Mean(name="clean_loss")
            self._clean_accuracy = keras.metrics.Mean(name="clean_accuracy")
        # Callbacks that save and restore ask for it before the first step. All variables are there.
        self.built = classifier.built

    @property
    def output_names(self) -> list[str]:
        """Names of the classifier's outputs, which dicts of losses, metrics and labels may use."""
        return self.classifier.output_names

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        metrics = super().metrics
        loss = self._compiled_loss
        if loss is not None and not loss.counts_hits:
            # Keras would log a metric that is never updated as 0.0.
            metrics = [metric for metric in metrics if metric is not self._clean_accuracy]
        return metrics

    @property
    def compiled_loss(self) -> CompiledLoss:
        """The compiled loss of each image, which the attack climbs."""
        if self._compiled_loss is None:
            raise UserError(
                "The attack climbs the compiled loss. Received: a trainer that is not compiled. Compile it."
            )
        return self._compiled_loss

    @property
    def state(self) -> list[keras.Variable]:
        """Everything that changes in training; a run that has it back goes on as if it had not stopped.

        The weights of the classifier, the optimizer's state, `state_variables`, and what the metrics have counted. It
        is complete once the trainer is compiled, the optimizer built, and `build_metrics` called.
        """
        variables = [*self.classifier.variables, *self.optimizer.variables]
        return [*variables, *self.state_variables, *self.metrics_variables]

    @property
    def state_variables(self) -> list[keras.Variable]:
        """What the trainer itself keeps: the number of steps so far, and what the objective keeps."""
        return [self._steps, *self.objective.variables]

    @property
    def epsilon(self) -> float:
        """The radius of the next training step, in [0, 1] pixel units."""
        return self.attack.epsilon * float(self.strength())

    def strength(self) -> Any:
        """The share of epsilon and of the step size that the next training step uses, in [0, 1]."""
        if not self.recipe.epsilon_warmup_steps:
            return 1.0
        steps = tf.cast(self.optimizer.iterations, tf.float32)
        return tf.minimum(steps / self.recipe.epsilon_warmup_steps, 1.0)

    def compile(self, optimizer: Any = "rmsprop", loss: Any = None, loss_weights: Any = None, **kwargs: Any) -> None:
        """Configures training as `keras.Model.compile` does.

        Raises:
            UserError: there is no loss for an attack to climb, or the loss is meant for probabilities and the
                classifier gives logits, or the reverse.
        """
        super().compile(optimizer=optimizer, loss=loss, loss_weights=loss_weights, **kwargs)
        self._compiled_loss = None
        if self.attack.active:
            names = getattr(self.classifier, "output_names", None) or ()
            outputs = self._trial_outputs()
            self._compiled_loss = CompiledLoss(loss, loss_weights, outputs=outputs, output_names=names)

    def build_metrics(self) -> None:
        """Makes the variables of the compiled metrics and losses, which Keras makes in the first step otherwise."""
        outputs = keras.tree.map_structure(lambda output: tf.zeros_like(output[:1]), self._trial_outputs())
        loss = self._compiled_loss
        whole = loss is not None and loss.integer_labels is False
        labels = keras.tree.map_structure(
            lambda output: output if whole else tf.zeros(output.shape[:-1], tf.int32), outputs
        )
        images = tf.zeros((1, 1, 1, 1))
        if self.loss is not None and isinstance(outputs, (dict, list, tuple)):
            self.compute_loss(images, labels, outputs, None)  # makes the metrics of the single losses
        self.compute_metrics(images, labels, outputs, None)
        self.reset_metrics()

    def swap_averages(self) -> None:
        """Exchanges the trained weights and their moving averages, if the optimizer keeps any.

        A second call undoes the first one.
        """
        for weight, average in averages_of(self.optimizer):
            value = weight.numpy()
            weight.assign(average)
            average.assign(value)

    def call(self, images: Any, training: bool | None = None) -> Any:
        """Returns the classifier's outputs."""
        return self.classifier(images, training=training)

    def save(self, filepath: Any, overwrite: bool = True, **kwargs: Any) -> None:
        """Saves the classifier: a plain Keras model, which loads without this package."""
        self.classifier.save(filepath, overwrite=overwrite, **kwargs)

    def export(self, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """Exports the classifier, as `keras.Model.export` does."""
        return self.classifier.export(filepath, *args, **kwargs)

    def fit(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        with explained():
            return super().fit(self._with_first_batch_checked(x, y), y, *args, **kwargs)

    def evaluate(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        with explained():
            return super().evaluate(self._with_first_batch_checked(x, y), y, *args, **kwargs)

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        with explained():
            return super().train_on_batch(*args, **kwargs)

    def test_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        with explained():
            return super().test_on_batch(*args, **kwargs)

    def make_train_function(self, force: bool = False) -> None:
        if self.classifier.built and not self.optimizer.built:
            # A variable that is made while the first step is traced has all of it traced once more; with several
            # replicas it can't be made there at all.
            with self.distribute_strategy.scope():
                self.optimizer.build(self.trainable_variables)
                average_statistics(self.optimizer, self.classifier)
                loss = self._compiled_loss
                if loss is not None and (loss.integer_labels is not None or self.num_replicas > 1):
                    self.build_metrics()
        super().make_train_function(force)

    def make_test_function(self, force: bool = False) -> None:
        if self.num_replicas > 1 and self._compiled_loss is not None and self.test_function is None:
            with self.distribute_strategy.scope():
                self.build_metrics()
        super().make_test_function(force)

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        # The step count as seed: a resumed run draws what the interrupted one would have drawn. Not the optimizer's
        # count: that one stands still while gradients are accumulated, or when one overflows.
        seed = tf.stack([tf.constant(self._seed, tf.int64), tf.convert_to_tensor(self._steps)])
        if self.num_replicas > 1:  # each has other images, and draws other starts
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            seed = tf.random.experimental.stateless_fold_in(seed, replica)
        self._steps.assign_add(1)
        batch = self._batch_of(data, seed)
        if self.attack.active and self._clean_figures and not self.objective.knows_clean_figures:
            self._measure_clean(batch)
        logs: dict[str, tf.Tensor] = {}
        for _ in range(self.objective.replays):
            logs = self._update(batch)
        if self._clean_figures or self.objective.knows_clean_figures:
            return logs
        return {name: value for name, value in logs.items() if name not in ("clean_loss", "clean_accuracy")}

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        images, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        attack = self._validation_attack
        if not attack.active:
            return super().test_step(data)
        batch = self._batch_of(data, tf.constant([self._seed, -1], tf.int64))
        result = self._attacked(batch, attack)
        if attack.random_start:
            self._measure_clean(batch)
        else:
            self.update_clean(batch, result.start_loss, result.start_correct)
        return super().test_step((with_images(images, result.images_adv), labels, sample_weight))

    def _update(self, batch: Batch) -> dict[str, tf.Tensor]:
        """One optimizer step: Keras's, with the inputs, the forward pass and the loss of the objective."""
        objective = self.objective
        with self._unbiased_statistics(batch.images):
            inputs = objective.inputs(self, batch)
            watched = objective.watched(inputs)
            with tf.GradientTape() as tape:
                tape.watch(watched)
                outputs: Outputs = objective.forward(self, batch, inputs)
                loss = objective.loss(self, batch, outputs)
                scaled_loss = self.optimizer.scale_loss(loss)
        count = tf.shape(keras.tree.flatten(batch.images)[0])[0]
        for metric in self.metrics:
            if metric.name == "loss":  # the mean over the replicas' losses, which are shares of the whole
                metric.update_state(loss * self.num_replicas, sample_weight=count)
        weights = self.trainable_weights
        gradients = tape.gradient(scaled_loss, [*weights, *watched])
        if weights:
            self.optimizer.apply_gradients(zip(gradients[: len(weights)], weights, strict=True))
        if watched:
            objective.learn(self, batch, inputs, gradients[len(weights) :])
        return self.compute_metrics(batch.images, batch.labels, outputs.adversarial, batch.sample_weight)

    def _batch_of(self, data: Any, seed: tf.Tensor) -> Batch:
        inputs, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if not self.attack.active:
            return Batch(inputs, labels, sample_weight, seed, self._network(lambda images: images))
        images = self._checked_images(inputs, labels)
        return Batch(images, labels, sample_weight, seed, self._network(lambda images: with_images(inputs, images)))

    def _network(self, inputs_with: Callable[[Any], Any]) -> Callable[[Any, bool], Any]:
        return lambda images, training: self.classifier(inputs_with(images), training=training)

    def _attacked(self, batch: Batch, attack: AttackConfig) -> Any:
        """What an attack on the compiled loss gives, the network in inference mode."""
        loss = self.compiled_loss
        return climb(
            lambda images: batch.network(images, False),
            batch.images,
            loss=lambda outputs: loss(batch.labels, outputs),
            correct=lambda outputs: loss.hits(batch.labels, outputs),
            attack=attack,
            seed=batch.seed,
        )

    def _measure_clean(self, batch: Batch) -> None:
        outputs = keras.tree.map_structure(
            lambda output: tf.cast(output, tf.float32), batch.network(batch.images, False)
        )
        loss = self.compiled_loss
        self.update_clean(batch, loss(batch.labels, outputs), loss.hits(batch.labels, outputs))

    def update_clean(self, batch: Batch, loss: tf.Tensor, correct: tf.Tensor) -> None:
        """Counts the loss (batch,) and the hits (batch,) of the clean images in `clean_loss` and `clean_accuracy`."""
        weights, counts = batch.sample_weight, None
        if weights is not None and not isinstance(weights, (dict, list, tuple)):
            weights = tf.reshape(tf.cast(weights, tf.float32), [-1])
            loss *= weights  # as Keras does, which then divides by the number of images
            counts = tf.cast(weights != 0, tf.float32)  # with several replicas, images that only fill a batch weigh 0
        self._clean_loss.update_state(loss)
        if self.compiled_loss.counts_hits:
            self._clean_accuracy.update_state(correct, counts)

    def _unbiased_statistics(self, images: Any) -> contextlib.AbstractContextManager[None]:
        if not self._unbiased_batchnorm:
            return contextlib.nullcontext()
        count = tf.shape(keras.tree.flatten(images)[0])[0]
        return unbiased_statistics(self.classifier, count, passes=self.objective.passes, replicas=self.num_replicas)

    def _trial_outputs(self) -> Any:
        """What the classifier gives for a few random images."""
        random = np.random.default_rng(0)

        def trial(shape: tuple[int | None, ...]) -> tf.Tensor:
            sizes = [_TRIAL_IMAGES, *(size or _TRIAL_SIZE for size in shape[1:])]
            return tf.constant(random.random(sizes, np.float32))

        if not self.classifier.built:
            raise UserError(
                "The attack needs a classifier that is built. Received: one that has not seen its input yet. Call it "
                "on a batch of images first, or begin it with a keras.Input."
            )
        return self.classifier(map_shapes(trial, input_shapes(self.classifier)), training=False)

    def _with_first_batch_checked(self, data: Any, labels: Any) -> Any:
        """The data of `fit` or `evaluate`. XLA leaves the checks out of the step, so here they come before it."""
        if not (self.attack.active and self.jit_compile):
            return data
        if isinstance(data, tf.data.Dataset):

            def check(index: tf.Tensor, *batch: Any) -> Any:
                images, labels, _ = keras.utils.unpack_x_y_sample_weight(batch)
                valid = tf.cond(index == 0, lambda: self._checked_images(images, labels), lambda: images_of(images))
                with tf.control_dependencies([valid]):
                    return keras.tree.map_structure(tf.identity, batch)

            return data.enumerate().map(lambda index, batch: check(index, *batch))
        if all(isinstance(leaf, (np.ndarray, tf.Tensor)) for leaf in keras.tree.flatten((data, labels))):
            self._checked_images(*keras.tree.map_structure(lambda leaf: leaf[:_FIRST_IMAGES], (data, labels)))
        return data

    def _checked_images(self, inputs: Any, labels: Any) -> tf.Tensor:
        """The images of a batch as float32, once they are known to be in [0, 1] and their labels to be classes."""
        images = assert_pixels(images_of(inputs))
        return self.compiled_loss.with_labels_checked(images, labels)
