"""Adversarial training: the batch is attacked, then Keras does its ordinary step on what came out."""

import contextlib
import dataclasses
from typing import Any

import keras
import tensorflow as tf

from robust_tf.attacks import AttackConfig, run_pgd
from robust_tf.attacks.losses import LOSSES, is_correct
from robust_tf.errors import UserError
from robust_tf.training.batchnorm import flat_layers, unbiased_statistics
from robust_tf.training.objectives import (
    AtPerturbedWeights,
    CleanAndAdversarial,
    Divergence,
    Recipe,
    ascend_divergence,
    moved_perturbation,
    perturbed_weights,
    weight_perturbation,
)
from robust_tf.training.optimizers import averages_of
from robust_tf.training.replicas import ReplicatedModel


class AdversarialTrainer(ReplicatedModel):
    """Trains a classifier on adversarial examples of its own, made anew for each batch.

    Solves min over the weights of the mean over (images, labels) of max over the ball of the loss. Use it like any
    Keras model: `compile`, `fit`, `evaluate`. It shares the classifier's weights and is not meant to be saved: save
    the classifier.

    The compiled loss and metrics are those on the adversarial images, in training and in `evaluate`. With an attack
    there are two more metrics, `clean_loss` and `clean_accuracy`, with the network in inference mode. In training they
    are taken from the attack's first forward pass; only a random start and free adversarial training cost one more for
    them.

    With `recipe` it is another step; metrics stay those on the adversarial images:

    * TRADES: the loss is the compiled one on the clean images + beta * KL(clean || adversarial). Both batches go
      through the network on their own, in training mode, and move BatchNorm's statistics one after the other, clean
      first, as in the authors' code; its second pass over the clean images, which changes nothing but the statistics,
      is left out.
    * AWP: the gradient is that at weights + perturbation, and the step is taken from the weights themselves, which are
      never touched. The pass that finds the perturbation is in training mode and leaves no trace in the statistics, as
      in the authors' code; there, weight decay acts on the perturbed weights.
    * Free adversarial training: `free_replays` optimizer steps on each batch. One gradient computation in training mode
      gives the step of the weights and that of the perturbation, which the next step, of this or the next batch, goes
      on from. BatchNorm's statistics follow every one of them, as in the authors' code.
    * A rising epsilon: in training only.

    Args:
        classifier: any built Keras model from [0, 1] images (batch, height, width, channels) to logits
            (batch, num_classes). Normalisation belongs inside it.
        attack: of the batches in training and in `evaluate`. epsilon 0 is standard training.
        recipe: what is done with the attack, when it isn't Madry's training.
        validation_attack: that of `evaluate`, if not the same.
        seed: of the random start, together with the number of steps so far.
        clean_figures: report `clean_loss` and `clean_accuracy` of training where they cost a forward pass, too.
        unbiased_batchnorm: let BatchNorm's moving variance follow the unbiased batch variance, as PyTorch does, where
            Keras follows the biased one. Layers whose input size is not known when the model is built keep Keras's.

    Raises:
        UserError: classifier is no Keras model, a recipe or the validation is without an attack where there should be
            one, or free adversarial training has an input of unknown size or several replicas.

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
        self.classifier = classifier
        self.attack = attack
        self.recipe = recipe
        self._validation_attack = attack if validation_attack is None else validation_attack
        self._seed = seed
        self._unbiased_batchnorm = unbiased_batchnorm
        self._clean_figures = clean_figures
        self._divergence = Divergence()
        self._full_weights: list[Any] = []  # the TensorFlow variables of `perturbed_weights`, in a step with AWP
        self._perturbation = self._new_perturbation(recipe.free_batch_size) if recipe.free_replays else None
        self._steps = keras.Variable(0, dtype="int64", trainable=False, name="steps", aggregation="only_first_replica")
        # Only where they are updated: Keras logs a metric that never is as 0.0.
        if attack.active:
            self._clean_loss = keras.metrics.Mean(name="clean_loss")
            self._clean_accuracy = keras.metrics.Mean(name="clean_accuracy")

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
        """What the trainer itself keeps: the number of steps so far, and the perturbation of free training."""
        return [self._steps] if self._perturbation is None else [self._steps, self._perturbation]

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

    @property
    def epsilon(self) -> float:
        """The radius of the next training step, in [0, 1] pixel units."""
        return self.attack.epsilon * float(self._strength())

    def call(self, images: Any, training: bool | None = None) -> Any:
        """Logits of images, of `CleanAndAdversarial` images, or of either `AtPerturbedWeights`."""
        if isinstance(images, CleanAndAdversarial):
            return CleanAndAdversarial(*(self.classifier(part, training=training) for part in images))
        if isinstance(images, AtPerturbedWeights):
            weights = perturbed_weights(self.classifier)
            values = [full + added for full, added in zip(self._full_weights, images.perturbations, strict=True)]
            # The variables stay as they are, and the gradient with respect to them is that at the perturbed values.
            with keras.StatelessScope(list(zip(weights, values, strict=True))) as scope:
                logits = self.call(images.images, training=training)
            for variable in self.classifier.non_trainable_variables:
                value = scope.get_current_value(variable)
                if value is not None:  # BatchNorm's statistics, the seeds of Dropout
                    variable.assign(value)
            return logits
        return self.classifier(images, training=training)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> tf.Tensor:
        """The compiled loss, or that of TRADES for `CleanAndAdversarial` logits."""
        if not isinstance(y_pred, CleanAndAdversarial):
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        loss = super().compute_loss(x, y, y_pred.clean, sample_weight, training)
        return loss + self.recipe.trades_beta * self._divergence(y_pred.clean, y_pred.adversarial, sample_weight)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """The compiled metrics, on the adversarial images."""
        if isinstance(y_pred, CleanAndAdversarial):
            y_pred = y_pred.adversarial
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def make_train_function(self, force: bool = False) -> None:
        if self.classifier.built and not self.optimizer.built and self.num_replicas == 1:
            # A variable that is made while the first step is traced has all of it traced once more.
            self.optimizer.build(self.trainable_variables)
            size_is_known = None not in getattr(self.classifier, "input_shape", (None, None))[1:]
            if self.attack.active and size_is_known:  # under an attack labels are numbers
                self.build_metrics()
        super().make_train_function(force)

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        images, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        # The step count as seed: a resumed run draws what the interrupted one would have drawn. Not the optimizer's
        # count: that one stands still while gradients are accumulated, or when one overflows.
        seed = tf.stack([tf.constant(self._seed, tf.int64), tf.convert_to_tensor(self._steps)])
        if self.num_replicas > 1:  # each has other images, and draws other starts
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            seed = tf.random.experimental.stateless_fold_in(seed, replica)
        self._steps.assign_add(1)
        if self._perturbation is not None:
            return self._free_steps(self._perturbation, images, labels, sample_weight)
        if self.recipe.trades_beta is None:
            inputs = self._attacked(images, labels, sample_weight, seed)
        else:
            inputs = self._diverted(images, labels, sample_weight, seed)
        if self.recipe.awp_gamma is not None:
            inputs = AtPerturbedWeights(inputs, self._weight_perturbations(inputs, labels, sample_weight))
        with self._unbiased_statistics(images, passes=1 if self.recipe.trades_beta is None else 2):
            # Loss scaling, weighting and metrics stay Keras's: a step written out here would have to repeat all of it.
            logs = super().train_step((inputs, labels, sample_weight))
        return self._without_unknown_figures(logs)

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        images, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        seed = tf.constant([self._seed, -1], tf.int64)
        attack = self._validation_attack
        images_adv = images
        if attack.active:
            result = run_pgd(self.classifier, images, labels, attack=attack, seed=seed)
            images_adv = result.images_adv
            if attack.random_start:
                self._measure_clean(images, labels, sample_weight)
            else:
                self._update_clean(result.start_loss, result.start_correct, sample_weight)
        return super().test_step((images_adv, labels, sample_weight))

    def _attacked(self, images: tf.Tensor, labels: tf.Tensor, sample_weight: Any, seed: tf.Tensor) -> tf.Tensor:
        """The adversarial images of Madry's training; the clean metrics are updated on the way."""
        if not self.attack.active:
            return images
        result = run_pgd(self.classifier, images, labels, attack=self.attack, strength=self._strength(), seed=seed)
        if not self.attack.random_start:
            self._update_clean(result.start_loss, result.start_correct, sample_weight)
        elif self._clean_figures:
            self._measure_clean(images, labels, sample_weight)
        return result.images_adv

    def _diverted(
        self, images: tf.Tensor, labels: tf.Tensor, sample_weight: Any, seed: tf.Tensor
    ) -> CleanAndAdversarial:
        """The images of TRADES; the clean metrics are updated on the way."""
        images_adv, logits = ascend_divergence(
            self.classifier, images, labels, attack=self.attack, seed=seed, strength=self._strength()
        )
        labels = tf.cast(labels, tf.int32)
        self._update_clean(LOSSES["ce"](logits, labels, labels), is_correct(logits, labels), sample_weight)
        return CleanAndAdversarial(images, images_adv)

    def _weight_perturbations(self, inputs: Any, labels: tf.Tensor, sample_weight: Any) -> list[tf.Tensor]:
        """The perturbations of AWP: one step up the loss of this batch."""
        # Inside `call` mixed precision would give them out rounded.
        self._full_weights = [weight.value for weight in perturbed_weights(self.classifier)]
        none = [tf.zeros_like(weight) for weight in self._full_weights]

        def gradients() -> list[tf.Tensor]:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(none)
                with keras.StatelessScope():  # neither statistics nor metrics know of this pass
                    logits = self.call(AtPerturbedWeights(inputs, none), training=True)
                    loss = self.compute_loss(None, labels, logits, sample_weight)
                scaled_loss = self.optimizer.scale_loss(loss)
            return tape.gradient(scaled_loss, none, unconnected_gradients=tf.UnconnectedGradients.ZERO)

        if self.recipe.awp_warmup_steps:
            started = tf.cast(self.optimizer.iterations, tf.float32) >= self.recipe.awp_warmup_steps
            found = tf.cond(started, gradients, lambda: none)
        else:
            found = gradients()
        if self.num_replicas > 1:  # the loss is that of the whole batch
            found = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, found)
        gamma = self.recipe.awp_gamma
        pairs = zip(self._full_weights, found, strict=True)
        return [weight_perturbation(tf.convert_to_tensor(weight), slope, gamma) for weight, slope in pairs]

    def _free_steps(
        self, kept: keras.Variable, images: tf.Tensor, labels: tf.Tensor, sample_weight: Any
    ) -> dict[str, tf.Tensor]:
        """The steps of free adversarial training on one batch."""
        if self._clean_figures:
            self._measure_clean(images, labels, sample_weight)
        logs: dict[str, tf.Tensor] = {}
        for _ in range(self.recipe.free_replays):
            with self._unbiased_statistics(images):
                logs = self._free_step(kept, images, labels, sample_weight)
        return self._without_unknown_figures(logs)

    def _free_step(
        self, kept: keras.Variable, images: tf.Tensor, labels: tf.Tensor, sample_weight: Any
    ) -> dict[str, tf.Tensor]:
        """One of them: Keras's step written out, since Keras keeps the gradient to itself."""
        count = tf.shape(images)[0]
        perturbation = kept[:count]
        with tf.GradientTape() as tape:
            tape.watch(perturbation)
            images_adv = tf.clip_by_value(tf.cast(images, tf.float32) + perturbation, 0.0, 1.0)
            logits = self(images_adv, training=True)
            loss = self.compute_loss(images_adv, labels, logits, sample_weight)
            scaled_loss = self.optimizer.scale_loss(loss)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss, sample_weight=count)
        weights = self.trainable_weights
        *gradients, slope = tape.gradient(scaled_loss, [*weights, perturbation])
        self.optimizer.apply_gradients(zip(gradients, weights, strict=True))
        # Of the sum, not of the mean: the step of an image doesn't depend on the batch it came in.
        moved = moved_perturbation(perturbation, slope * tf.cast(count, tf.float32), self.attack)
        kept.assign(tf.concat([moved, kept[count:]], axis=0))
        return self.compute_metrics(images_adv, labels, logits, sample_weight)

    def _new_perturbation(self, batch_size: int) -> keras.Variable:
        shape = tuple(self.classifier.input_shape[1:])
        if None in shape:
            raise UserError(
                "Free adversarial training keeps a perturbation of the size of the images, which the classifier must "
                f"know. Received: a classifier with input_shape={self.classifier.input_shape}."
            )
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        if replicas > 1:
            raise UserError(
                "Free adversarial training keeps one perturbation for the batch, so it runs on one device only. "
                f"Received: a strategy of {replicas} replicas."
            )
        return self.add_weight(
            shape=(batch_size, *shape), initializer="zeros", trainable=False, dtype="float32", name="perturbation"
        )

    def _strength(self) -> Any:
        """The share of epsilon and of the step size that the next training step uses, in [0, 1]."""
        if not self.recipe.epsilon_warmup_steps:
            return 1.0
        steps = tf.cast(self.optimizer.iterations, tf.float32)
        return tf.minimum(steps / self.recipe.epsilon_warmup_steps, 1.0)

    def _measure_clean(self, images: tf.Tensor, labels: tf.Tensor, sample_weight: Any) -> None:
        no_attack = dataclasses.replace(self.attack, epsilon=0.0)
        clean = run_pgd(self.classifier, images, labels, attack=no_attack)
        self._update_clean(clean.start_loss, clean.start_correct, sample_weight)

    def _update_clean(self, loss: tf.Tensor, correct: tf.Tensor, sample_weight: Any) -> None:
        self._clean_loss.update_state(loss, sample_weight)
        self._clean_accuracy.update_state(correct, sample_weight)

    def _without_unknown_figures(self, logs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """The logs of training without the clean figures where they were not taken."""
        if self._clean_figures or not (self.attack.random_start or self._perturbation is not None):
            return logs
        return {name: value for name, value in logs.items() if name not in ("clean_loss", "clean_accuracy")}

    def _unbiased_statistics(self, images: tf.Tensor, *, passes: int = 1) -> contextlib.AbstractContextManager[None]:
        if not self._unbiased_batchnorm:
            return contextlib.nullcontext()
        return unbiased_statistics(self.classifier, tf.shape(images)[0], passes=passes, replicas=self.num_replicas)
