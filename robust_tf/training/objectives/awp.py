"""AWP: another objective at the worst weights nearby (Wu et al. 2020, arXiv 2004.05884)."""

from typing import Any, NamedTuple

import keras
import tensorflow as tf

from robust_tf.attacks.threat_models import Scale
from robust_tf.training.objectives.base import Batch, Objective, Outputs, Trainer


class AtPerturbedWeights(NamedTuple):
    """Inputs of another objective, and what is added to the weights that they are put through.

    Attributes:
        inputs: of the objective that AWP goes with.
        perturbations: one for each of `perturbed_weights`, in its order.
    """

    inputs: Any
    perturbations: list[tf.Tensor]


class AdversarialWeights(Objective):
    """The gradient of another objective at weights + perturbation; the step is taken from the weights themselves.

    The pass that finds the perturbation is in training mode and leaves no trace in BatchNorm's statistics, as in the
    authors' code. There, weight decay acts on the perturbed weights; here it acts on the weights.

    Args:
        objective: Madry's or TRADES.
        gamma: size of the perturbation relative to the weights of each layer, at least 0.
        warmup_steps: number of optimizer steps before the first perturbation.
    """

    def __init__(self, objective: Objective, *, gamma: float, warmup_steps: float) -> None:
        self._objective, self._gamma, self._warmup_steps = objective, gamma, warmup_steps
        self.passes, self.knows_clean_figures = objective.passes, objective.knows_clean_figures

    def inputs(self, trainer: Trainer, batch: Batch) -> AtPerturbedWeights:
        inputs = self._objective.inputs(trainer, batch)
        return AtPerturbedWeights(inputs, self._perturbations(trainer, batch, inputs))

    def forward(self, trainer: Trainer, batch: Batch, inputs: AtPerturbedWeights) -> Outputs:
        classifier = trainer.classifier
        weights = perturbed_weights(classifier)
        pairs = zip(weights, inputs.perturbations, strict=True)
        # The variables stay as they are, and the gradient with respect to them is the one at the perturbed values.
        values = [(weight, weight.value + perturbation) for weight, perturbation in pairs]
        with keras.StatelessScope(values) as scope:
            outputs = self._objective.forward(trainer, batch, inputs.inputs)
        for variable in classifier.non_trainable_variables:
            value = scope.get_current_value(variable)
            if value is not None:  # BatchNorm's statistics, the seeds of Dropout
                variable.assign(value)
        return outputs

    def loss(self, trainer: Trainer, batch: Batch, outputs: Outputs) -> tf.Tensor:
        return self._objective.loss(trainer, batch, outputs)

    def _perturbations(self, trainer: Trainer, batch: Batch, inputs: Any) -> list[tf.Tensor]:
        """One step up the loss of this batch, from the weights."""
        weights = [tf.convert_to_tensor(weight.value) for weight in perturbed_weights(trainer.classifier)]
        none = [tf.zeros_like(weight) for weight in weights]

        def gradients() -> list[tf.Tensor]:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(none)
                with keras.StatelessScope():  # neither statistics nor metrics know of this pass
                    outputs = self.forward(trainer, batch, AtPerturbedWeights(inputs, none))
                    loss = self.loss(trainer, batch, outputs)
                scaled_loss = trainer.optimizer.scale_loss(loss)
            return tape.gradient(scaled_loss, none, unconnected_gradients=tf.UnconnectedGradients.ZERO)

        if self._warmup_steps:
            started = tf.cast(trainer.optimizer.iterations, tf.float32) >= self._warmup_steps
            found = tf.cond(started, gradients, lambda: none)
        else:
            found = gradients()
        if trainer.num_replicas > 1:  # the loss belongs to the whole batch
            found = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, found)
        return [weight_perturbation(*pair, self._gamma) for pair in zip(weights, found, strict=True)]


def perturbed_weights(classifier: keras.Model) -> list[keras.Variable]:
    """The weights that AWP perturbs: trainable kernels of convolutions and dense layers, no biases, no BatchNorm.

    The authors' code takes every weight with more than one axis.
    """
    return [weight for weight in classifier.trainable_weights if len(weight.shape) > 1]


def weight_perturbation(weight: tf.Tensor, gradient: tf.Tensor, gamma: Scale) -> tf.Tensor:
    """The perturbation of one layer's kernel: along the gradient, `gamma` times as long as the kernel (L2).

    One step of gradient ascent, whatever its length, projected as equation (10) of the paper. A gradient that is zero
    or not finite (which loss scaling meets and undoes) gives none.

    Args:
        weight: the kernel, float32.
        gradient: of the loss with respect to it, in any scale.
        gamma: relative size, at least 0.

    Returns:
        float32 of the shape of the kernel.

    Source: Wu et al. 2020, arXiv 2004.05884, section 4; csdongxian/AWP, utils_awp.py.
    """
    length = tf.norm(gradient)
    perturbation = gamma * tf.norm(weight) * tf.math.divide_no_nan(gradient, length)
    return tf.where(tf.math.is_finite(length), perturbation, 0.0)
