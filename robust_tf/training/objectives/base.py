"""The interface between `AdversarialTrainer` and its objectives."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import keras
import tensorflow as tf

from robust_tf.attacks import AttackConfig
from robust_tf.training.compiled_loss import CompiledLoss

# A function of (images, training) that returns the outputs of the classifier.
Network = Callable[[tf.Tensor, bool], Any]


class Batch(NamedTuple):
    """One training batch.

    Attributes:
        images: Images (batch, height, width, channels), float32 in [0, 1]. Without an attack, whatever the model takes.
        labels: Labels in the form that the compiled loss takes.
        sample_weight: Weights of the images: None, an array (batch,), or a structure of such arrays.
        seed: Seed (2,) int64 for all random numbers of this step.
        network: The classifier as a function of (images, training). Any other inputs of the classifier are filled in.
    """

    images: Any
    labels: Any
    sample_weight: Any
    seed: tf.Tensor
    network: Network


class Outputs(NamedTuple):
    """Outputs of the classifier in training mode.

    Attributes:
        adversarial: Outputs for the adversarial images. The compiled metrics are updated with them.
        clean: Outputs for the clean images, or None if the objective does not need them.
    """

    adversarial: Any
    clean: Any = None


class Trainer(Protocol):
    """The part of `AdversarialTrainer` that objectives use."""

    classifier: keras.Model
    attack: AttackConfig
    optimizer: Any
    compiled_loss: CompiledLoss

    @property
    def num_replicas(self) -> int:
        """Number of replicas that share a batch."""

    def strength(self) -> Any:
        """Returns the factor on epsilon and on the step size in this training step."""

    def compute_loss(
        self, x: Any = ..., y: Any = ..., y_pred: Any = ..., sample_weight: Any = ..., training: bool = ...
    ) -> Any:
        """Returns the compiled loss of a batch, as `keras.Model.compute_loss` does."""

    def update_clean(self, batch: Batch, loss: tf.Tensor, correct: tf.Tensor) -> None:
        """Updates `clean_loss` and `clean_accuracy`."""

    def add_weight(self, *args: Any, **kwargs: Any) -> keras.Variable:
        """Adds a variable to the trainer, as `keras.layers.Layer.add_weight` does."""


class Objective:
    """Base class of the objectives: defines what a training step minimizes.

    In each step the trainer calls `inputs`, `exchanged`, `forward` and `loss`, in this order. Only `forward` and `loss`
    run under the gradient tape of the weights. With several replicas XLA may compile all of them but `exchanged`, so
    only `exchanged` may use what the other replicas have computed.

    Attributes:
        passes: Number of forward passes in `forward` that update BatchNorm's moving statistics.
        input_passes: Number of forward passes in `inputs` that update BatchNorm's moving statistics.
        inputs_train: Whether `inputs` runs the network in training mode, whether or not it updates the statistics.
        exchanges: Whether `exchanged` does anything.
        replays: Number of optimizer steps on each batch.
        knows_clean_figures: Whether the clean metrics are known without an extra forward pass, because `inputs` updates
            them with `trainer.update_clean` or because there is no attack.
    """

    passes = 1
    input_passes = 0
    inputs_train = False
    exchanges = False
    replays = 1
    knows_clean_figures = True

    @property
    def variables(self) -> list[keras.Variable]:
        """The variables that carry state from one step to the next, and are saved in checkpoints."""
        return []

    def inputs(self, trainer: Trainer, batch: Batch) -> Any:
        """Returns the inputs of `exchanged` and `forward`, such as the adversarial images: tensors in any structure."""
        raise NotImplementedError

    def exchanged(self, trainer: Trainer, inputs: Any) -> Any:
        """Returns the inputs of `forward` after the replicas have exchanged what they need of each other."""
        return inputs

    def forward(self, trainer: Trainer, batch: Batch, inputs: Any) -> Outputs:
        """Returns the outputs for these inputs, with the network in training mode."""
        return Outputs(batch.network(inputs, True))

    def loss(self, trainer: Trainer, batch: Batch, outputs: Outputs) -> tf.Tensor:
        """Returns the loss to minimize, a scalar."""
        return trainer.compute_loss(batch.images, batch.labels, outputs.adversarial, batch.sample_weight)

    def watched(self, inputs: Any) -> list[tf.Tensor]:
        """Returns the tensors among the inputs whose gradients `learn` needs."""
        return []

    def learn(self, trainer: Trainer, batch: Batch, inputs: Any, gradients: list[tf.Tensor]) -> None:
        """Uses the gradients with respect to the `watched` tensors, after the optimizer step.

        The gradients are multiplied by the optimizer's loss scale, if it has one.
        """
