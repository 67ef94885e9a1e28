"""Adversarial weight perturbation (AWP): minimizes another objective at nearby weights that make its loss high.

Source: Wu et al. 2020, arXiv 2004.05884.
"""

from typing import Any, NamedTuple

import keras
import tensorflow as tf

from robust_tf.attacks.threat_models import Scale
from robust_tf.training.objectives.base import Batch, Objective, Outputs, Trainer
from robust_tf.training.replicas import Scope


class AtPerturbedWeights(NamedTuple):
    """Inputs of the wrapped objective, together with the perturbations of the weights.

    Attributes:
        inputs: Inputs of the wrapped objective.
        perturbations: One tensor for each of `perturbed_weights`, in the same order. Before the replicas have exchanged
            them, the gradients that give the directions of the perturbations.
    """

    inputs: Any
    perturbations: list[tf.Tensor]


class AdversarialWeights(Objective):
    """Wraps another objective: takes its gradient at the perturbed weights, and applies it to the original weights.

    As in the authors' code, the forward pass that finds the perturbation runs in training mode but does not update
    BatchNorm's statistics. Unlike in the authors' code, weight decay acts on the original weights, not on the
    perturbed ones.

    Args:
        objective: Objective to wrap: Madry's loss or TRADES.
        gamma: Size of the perturbation relative to the weights of each layer, at least 0.
        warmup_steps: Number of optimizer steps before the first perturbation.
    """

    exchanges = True
    inputs_train = True

    def __init__(self, objective: Objective, *, gamma: float, warmup_steps: float) -> None:
        self._objective, self._gamma, self._warmup_steps = objective, gamma, warmup_steps
        self.passes, self.input_passes = objective.passes, objective.input_passes
        self.knows_clean_figures = objective.knows_clean_figures

    def inputs(self, trainer: Trainer, batch: Batch) -> AtPerturbedWeights:
        """Returns the inputs of the wrapped objective and the gradients for the perturbations of the weights."""
        inputs = self._objective.inputs(trainer, batch)
        return AtPerturbedWeights(inputs, self._ascent(trainer, batch, inputs))

    def exchanged(self, trainer: Trainer, inputs: AtPerturbedWeights) -> AtPerturbedWeights:
        """Returns the inputs with the perturbations of the weights, which depend on the loss of the whole batch."""
        gradients = inputs.perturbations
        if trainer.num_replicas > 1:
            gradients = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, gradients)
        weights = [tf.convert_to_tensor(weight.value) for weight in perturbed_weights(trainer.classifier)]
        perturbations = [weight_perturbation(*pair, self._gamma) for pair in zip(weights, gradients, strict=True)]
        return inputs._replace(perturbations=perturbations)

    def forward(self, trainer: Trainer, batch: Batch, inputs: AtPerturbedWeights) -> Outputs:
        """Runs the forward pass of the wrapped objective at the perturbed weights."""
        classifier = trainer.classifier
        weights = perturbed_weights(classifier)
        pairs = zip(weights, inputs.perturbations, strict=True)
        # The variables keep their values, but their gradient is taken at the perturbed values.
        values = [(weight, weight.value + perturbation) for weight, perturbation in pairs]
        with Scope(values) as scope:
            outputs = self._objective.forward(trainer, batch, inputs.inputs)
        for variable in classifier.non_trainable_variables:
            value = scope.get_current_value(variable)
            if value is not None:  # BatchNorm's statistics and Dropout's seeds
                variable.assign(value)
        return outputs

    def loss(self, trainer: Trainer, batch: Batch, outputs: Outputs) -> tf.Tensor:
        """Returns the loss of the wrapped objective."""
        return self._objective.loss(trainer, batch, outputs)

    def _ascent(self, trainer: Trainer, batch: Batch, inputs: Any) -> list[tf.Tensor]:
        """Returns the gradients of the loss of this batch with respect to the weights to perturb."""
        weights = [tf.convert_to_tensor(weight.value) for weight in perturbed_weights(trainer.classifier)]
        none = [tf.zeros_like(weight) for weight in weights]

        def gradients() -> list[tf.Tensor]:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(none)
                with Scope():  # this pass must update neither statistics nor metrics
                    outputs = self.forward(trainer, batch, AtPerturbedWeights(inputs, none))
                    loss = self.loss(trainer, batch, outputs)
                scaled_loss = trainer.optimizer.scale_loss(loss)
            found: list[tf.Tensor] = tape.gradient(
                scaled_loss, none, unconnected_gradients=tf.UnconnectedGradients.ZERO
            )
            return found

        if self._warmup_steps:
            started = tf.cast(trainer.optimizer.iterations, tf.float32) >= self._warmup_steps
            return list(tf.cond(started, gradients, lambda: none))
        return gradients()


def perturbed_weights(classifier: keras.Model) -> list[keras.Variable]:
    """Returns the weights that AWP perturbs: every trainable weight with more than one axis, as in the authors' code.

    These are the kernels of convolutions and dense layers, but not the biases or the weights of BatchNorm.
    """
    return [weight for weight in classifier.trainable_weights if len(weight.shape) > 1]


def weight_perturbation(weight: tf.Tensor, gradient: tf.Tensor, gamma: Scale) -> tf.Tensor:
    """Returns the perturbation of one kernel, in the direction of the gradient and `gamma` times as long as the kernel.

    This is one step of gradient ascent, projected as in equation (10) of the paper; lengths are L2 norms. A gradient
    that is zero or not finite gives a perturbation of zero. (Loss scaling can produce such gradients; the
    optimizer skips these steps.)

    Args:
        weight: Kernel, float32.
        gradient: Gradient of the loss with respect to the kernel, in any scale.
        gamma: Relative size, at least 0.

    Returns:
        Perturbation with the shape of the kernel, float32.

    Source: Wu et al. 2020, arXiv 2004.05884, section 4; csdongxian/AWP, utils_awp.py.
    """
    length = tf.norm(gradient)
    perturbation = gamma * tf.norm(weight) * tf.math.divide_no_nan(gradient, length)
    return tf.where(tf.math.is_finite(length), perturbation, 0.0)
