"""What every objective of adversarial training offers, and what it is given."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import keras
import tensorflow as tf

from robust_tf.attacks import AttackConfig
from robust_tf.training.compiled_loss import CompiledLoss

# (images, training) -> outputs of the classifier.
Network = Callable[[tf.Tensor, bool], Any]


class Batch(NamedTuple):
    """One batch of training.

    Attributes:
        images: (batch, height, width, channels) float32 in [0, 1]; without an attack, whatever the model takes.
        labels: whatever the compiled loss takes.
        sample_weight: None, (batch,), or a structure of them.
        seed: (2,) int64, for everything that is drawn at random in this step.
        network: the classifier as a function of the images and of the mode, whatever else it takes as input.
    """

    images: Any
    labels: Any
    sample_weight: Any
    seed: tf.Tensor
    network: Network


class Outputs(NamedTuple):
    """What the classifier gives in training mode.

    Attributes:
        adversarial: for the adversarial images; the compiled metrics look at these.
        clean: for the clean images, where the objective needs them.
    """

    adversarial: Any
    clean: Any = None


class Trainer(Protocol):
    """What an objective uses of `AdversarialTrainer`."""

    classifier: keras.Model
    attack: AttackConfig
    optimizer: Any
    compiled_loss: CompiledLoss

    @property
    def num_replicas(self) -> int: ...
    def strength(self) -> Any: ...
    def compute_loss(
        self, x: Any = ..., y: Any = ..., y_pred: Any = ..., sample_weight: Any = ..., training: bool = ...
    ) -> Any: ...
    def update_clean(self, batch: Batch, loss: tf.Tensor, correct: tf.Tensor) -> None: ...
    def add_weight(self, *args: Any, **kwargs: Any) -> keras.Variable: ...


class Objective:
    """What a training step minimizes. The trainer calls `inputs`, `forward` and `loss`, in this order.

    Only `forward` and `loss` run under the gradient tape of the weights.

    Attributes:
        passes: number of forward passes in training mode that move BatchNorm's statistics in one step.
        replays: number of optimizer steps on each batch.
        knows_clean_figures: whether `inputs` updates the clean metrics on its way, at no extra cost.
    """

    passes = 1
    replays = 1
    knows_clean_figures = True

    @property
    def variables(self) -> list[keras.Variable]:
        """What is kept from one step to the next."""
        return []

    def inputs(self, trainer: Trainer, batch: Batch) -> Any:
        """Returns what goes through the network, such as the adversarial images."""
        raise NotImplementedError

    def forward(self, trainer: Trainer, batch: Batch, inputs: Any) -> Outputs:
        """Returns the outputs for these inputs, with the network in training mode."""
        return Outputs(batch.network(inputs, True))

    def loss(self, trainer: Trainer, batch: Batch, outputs: Outputs) -> tf.Tensor:
        """Returns the loss to minimize, a scalar."""
        return trainer.compute_loss(batch.images, batch.labels, outputs.adversarial, batch.sample_weight)

    def watched(self, inputs: Any) -> list[tf.Tensor]:
        """Returns tensors of the inputs whose gradient `learn` wants."""
        return []

    def learn(self, trainer: Trainer, batch: Batch, inputs: Any, gradients: list[tf.Tensor]) -> None:
        """Takes the gradients of `watched`, after the weights have moved. They are in the scale of the optimizer."""
