"""Unfreezing during `fit`: weights stay frozen before, train afterwards, and no optimizer state is lost."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from smallbn import build_smallbn, golden_batches

from robust_tf.errors import UserError
from robust_tf.training.optimizers import OPTIMIZERS, build_optimizer
from robust_tf.training.unfreezing import UnfreezeAtEpoch, carry_over_optimizer_state, unfreeze
from robust_tf.transfer.stages import freeze

IMAGES, LABELS = (array.reshape(-1, *array.shape[3:]) for array in golden_batches())
DATASET = tf.data.Dataset.from_tensor_slices((IMAGES, LABELS)).batch(32)


class Recorder(keras.callbacks.Callback):
    """Records the weights and the momentum of the head at the end of every epoch."""

    def __init__(self, classifier: keras.Model):
        super().__init__()
        self.classifier = classifier
        self.weights: list[dict[str, np.ndarray]] = []
        self.momentum: list[np.ndarray] = []

    def record(self) -> None:
        self.weights.append({weight.path: weight.numpy() for weight in self.classifier.weights})
        by_name = {variable.name: variable.numpy() for variable in self.model.optimizer.variables}
        self.momentum.append(by_name["logits_kernel_momentum"])

    def on_epoch_end(self, epoch, logs=None):
        self.record()


class Recompile:
    def __init__(self, model: keras.Model):
        self.model = model

    def __call__(self, optimizer: keras.optimizers.Optimizer) -> None:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile(optimizer, loss, metrics=["accuracy"])


def compiled(**freezing: str) -> tuple[keras.Model, keras.Model, Recompile]:
    """Returns a classifier, a compiled model on its layers, and the function that compiles it."""
    classifier = build_smallbn()
    freeze(classifier, **freezing)
    model = keras.Model(classifier.input, classifier.output)
    recompile = Recompile(model)
    recompile(build_optimizer("sgd", learning_rate=0.05, weight_decay=5e-4))
    return classifier, model, recompile


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_frozen_weights_are_bit_equal_until_the_epoch_and_change_after_it(policy):
    keras.config.set_dtype_policy(policy)
    classifier, model, recompile = compiled(mode="fixed_feature")
    start = {weight.path: weight.numpy() for weight in classifier.weights}
    recorder = Recorder(classifier)
    unfreezing = UnfreezeAtEpoch(2, classifier, recompile=recompile, mode="partial", through="stem")
    history = model.fit(
        DATASET, validation_data=DATASET, epochs=4, shuffle=False, verbose=0, callbacks=[unfreezing, recorder]
    )
    for path in start:
        still = [np.array_equal(weights[path], start[path]) for weights in recorder.weights]
        expected = {"stem": [True] * 4, "stage1": [True, True, False, False], "logits": [False] * 4}
        assert still == expected[path.replace("/", "_").split("_")[0]], path
    assert len(history.history["val_accuracy"]) == 4
    assert int(model.optimizer.iterations) > 2 * 3  # fewer than 4 * 3 if the loss scale has to fall first


def test_unfreezing_nothing_changes_nothing():
    """If the same weights train before and after, the run equals one without the callback, so all state is kept."""
    runs = []
    for with_callback in (False, True):
        classifier, model, recompile = compiled(mode="partial", through="stem")
        recorder = Recorder(classifier)
        unfreezing = UnfreezeAtEpoch(1, classifier, recompile=recompile, mode="partial", through="stem")
        callbacks = [unfreezing, recorder] if with_callback else [recorder]
        model.fit(DATASET, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
        runs.append(recorder)
    for plain, unfrozen in zip(*(run.weights for run in runs), strict=True):
        for path, weight in plain.items():
            np.testing.assert_allclose(unfrozen[path], weight, atol=1e-6, err_msg=path)
    np.testing.assert_allclose(runs[1].momentum[-1], runs[0].momentum[-1], atol=1e-6)


def test_the_momentum_and_the_learning_rate_of_the_head_are_kept():
    classifier, model, recompile = compiled(mode="fixed_feature")
    recorder = Recorder(classifier)
    model.fit(DATASET, epochs=1, shuffle=False, verbose=0, callbacks=[recorder])
    model.optimizer.learning_rate = 0.003
    unfreeze(model, classifier, recompile=recompile)
    recorder.record()
    np.testing.assert_array_equal(recorder.momentum[0], recorder.momentum[1])
    assert recorder.momentum[0].any()
    assert float(model.optimizer.learning_rate) == pytest.approx(0.003)
    assert [weight.path for weight in model.trainable_weights] == [w.path for w in build_smallbn().trainable_weights]


def test_a_resumed_run_does_not_unfreeze_again():
    classifier, model, recompile = compiled(mode="fixed_feature")
    unfreezing = UnfreezeAtEpoch(1, classifier, recompile=recompile)
    model.fit(DATASET, epochs=4, initial_epoch=2, shuffle=False, verbose=0, callbacks=[unfreezing])
    assert [weight.path for weight in model.trainable_weights] == ["logits/kernel", "logits/bias"]


def dense(name: str) -> list[keras.Variable]:
    layer = keras.layers.Dense(2, name=name)
    layer.build((None, 2))
    return layer.trainable_weights


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("scaled", [False, True])
def test_state_of_common_weights_is_carried_over(name, scaled):
    """The old weights continue as if nothing had happened, and the new ones start with their first step."""
    head, backbone = dense("logits"), dense("stage1_fc")
    gradients = [tf.constant([[0.1, -0.2], [0.3, 0.4]]), tf.constant([0.5, -0.6])]

    def optimizer() -> keras.optimizers.Optimizer:
        made = build_optimizer(name, learning_rate=0.1, weight_decay=0.01)
        return keras.optimizers.LossScaleOptimizer(made, name="scaled") if scaled else made

    scale = 2.0**14 if scaled else 1.0  # loss scale after one overflow, which halves the initial 2**15

    used = optimizer()
    if scaled:
        used.apply([gradient * np.inf for gradient in gradients], head)
    for _ in range(3):
        used.apply([gradient * scale for gradient in gradients], head)
    new = type(used).from_config(used.get_config())
    new.build([*backbone, *head])
    carry_over_optimizer_state(used, new)
    assert int(new.iterations) == 3
    if scaled:
        assert float(new.dynamic_scale) == scale

    start = [weight.numpy() for weight in (*backbone, *head)]
    new.apply([gradient * scale for gradient in gradients * 2], [*backbone, *head])
    together = [weight.numpy() for weight in (*backbone, *head)]
    for weight, value in zip((*backbone, *head), start, strict=True):
        weight.assign(value)
    used.apply([gradient * scale for gradient in gradients], head)
    fresh = build_optimizer(name, learning_rate=0.1, weight_decay=0.01)
    fresh.apply(gradients, backbone)
    for weight, value in zip((*backbone, *head), together, strict=True):
        np.testing.assert_allclose(weight, value, rtol=1e-5, atol=1e-6, err_msg=weight.path)


def test_state_is_carried_over_only_between_optimizers_of_the_same_class():
    weights = dense("logits")
    used = build_optimizer("sgd", learning_rate=0.1)
    used.build(weights)
    with pytest.raises(UserError, match="PyTorchSGD 'pytorch_sgd' and StagewiseAdam 'adam'"):
        new = build_optimizer("adam", learning_rate=0.1)
        new.build(weights)
        carry_over_optimizer_state(used, new)
    with pytest.raises(UserError, match="new.build"):
        carry_over_optimizer_state(used, build_optimizer("sgd", learning_rate=0.1))
    twice = build_optimizer("sgd", learning_rate=0.1)
    twice.build(weights + dense("logits"))
    with pytest.raises(UserError, match="'pytorch_sgd/logits_kernel_momentum'"):
        carry_over_optimizer_state(used, twice)
