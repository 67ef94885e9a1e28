"""The attack of adversarial training maximizes the loss that was compiled, whatever it is."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_tf.attacks import AttackConfig, pgd
from robust_tf.errors import UserError
from robust_tf.training import AdversarialTrainer
from robust_tf.training.compiled_loss import CompiledLoss
from robust_tf.training.objectives import Recipe

LINF = AttackConfig(norm="linf", epsilon=0.1, step_size=0.04, steps=3)
SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
ONE_HOT = keras.losses.CategoricalCrossentropy(from_logits=True)
BINARY = keras.losses.BinaryCrossentropy(from_logits=True)


def classifier(units: int = 3, activation: str | None = None) -> keras.Model:
    """A classifier of images (8, 8, 3), with the same weights for the same number of units."""
    keras.utils.set_random_seed(0)
    images = keras.Input((8, 8, 3), name="images")
    x = keras.layers.Conv2D(4, 3, activation="tanh")(images)
    x = keras.layers.Flatten()(x)
    return keras.Model(images, keras.layers.Dense(units, activation=activation, name="scores")(x))


def data(count: int = 16) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.random((count, 8, 8, 3)).astype(np.float32), rng.integers(0, 3, count)


def trained(model, labels, loss, *, images=None, recipe=None, fit=None, **options):
    """Trains one epoch; returns the weights and the logs."""
    trainer = AdversarialTrainer(model, LINF, recipe=recipe)
    trainer.compile(keras.optimizers.SGD(0.1), loss, **options)
    images = data()[0] if images is None else images
    history = trainer.fit(images, labels, batch_size=8, shuffle=False, verbose=0, **(fit or {})).history
    return model.get_weights(), {name: values[0] for name, values in history.items()}


def assert_same(ours, theirs, atol=1e-5):
    for our_weight, their_weight in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(our_weight, their_weight, rtol=0, atol=atol)


def one_hot_again(y, p):
    return keras.losses.categorical_crossentropy(tf.one_hot(tf.cast(y, tf.int32), 3), p, from_logits=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "encode", "loss"),
    [
        (None, lambda y: y[:, None], SPARSE),
        (None, lambda y: np.eye(3, dtype=np.float32)[y], ONE_HOT),
        (None, lambda y: y, functools.partial(keras.losses.sparse_categorical_crossentropy, from_logits=True)),
        (None, lambda y: y, one_hot_again),
        ("softmax", lambda y: y, "sparse_categorical_crossentropy"),
        ("softmax", lambda y: y, "crossentropy"),
        ("softmax", lambda y: np.eye(3, dtype=np.float32)[y], keras.losses.CategoricalCrossentropy()),
    ],
    ids=["column", "one_hot", "partial", "custom", "softmax_name", "by_shape", "softmax_one_hot"],
)
def test_equivalent_losses_give_the_same_training(activation, encode, loss):
    """Integer or one-hot labels, logits or probabilities: weights and metrics equal those of the plain loss."""
    _, labels = data()
    expected, figures = trained(classifier(), labels, SPARSE, metrics=["accuracy"])
    found, logs = trained(classifier(activation=activation), encode(labels), loss, metrics=["accuracy"])
    assert_same(found, expected)
    assert logs == pytest.approx(figures, abs=1e-4)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(trades_beta=3.0), Recipe(trades_beta=3.0, awp_gamma=0.01)])
def test_a_sigmoid_trains_like_its_logit(recipe):
    labels = data()[1] % 2
    expected, figures = trained(classifier(1), labels, BINARY, recipe=recipe, metrics=["accuracy"])
    found, logs = trained(classifier(1, "sigmoid"), labels, "binary_crossentropy", recipe=recipe, metrics=["accuracy"])
    assert_same(found, expected, atol=1e-4)
    assert logs["clean_loss"] == pytest.approx(figures["clean_loss"], abs=1e-4)
    assert logs["clean_accuracy"] == figures["clean_accuracy"]


def test_trades_with_a_softmax_equals_trades_with_its_logits():
    _, labels = data()
    expected, _ = trained(classifier(), labels, SPARSE, recipe=Recipe(trades_beta=3.0))
    found, _ = trained(
        classifier(activation="softmax"), labels, "sparse_categorical_crossentropy", recipe=Recipe(trades_beta=3.0)
    )
    assert_same(found, expected, atol=1e-4)


def test_the_attack_maximizes_the_loss_of_soft_labels():
    """With mixed labels it increases the loss of the mixture, not the loss of one class."""
    images, labels = data()
    soft = 0.6 * np.eye(3, dtype=np.float32)[labels] + 0.4 * np.eye(3, dtype=np.float32)[(labels + 1) % 3]
    model = classifier()
    trainer = AdversarialTrainer(model, LINF)
    trainer.compile(loss=ONE_HOT)
    reached = trainer.evaluate(images, soft, verbose=0, return_dict=True)["loss"]
    of_hard = pgd(model, images, labels, norm="linf", epsilon=0.1, step_size=0.04, steps=3)
    assert reached > float(ONE_HOT(soft, model(of_hard))) > float(ONE_HOT(soft, model(images)))


def test_losses_of_several_outputs_are_added_as_in_keras():
    images, labels = data()
    inputs = keras.Input((8, 8, 3))
    keras.utils.set_random_seed(0)
    x = keras.layers.Flatten()(inputs)
    outputs = [keras.layers.Dense(3, name="kind")(x), keras.layers.Dense(1, name="size")(x)]
    model = keras.Model(inputs, outputs)
    losses, weights = {"kind": SPARSE, "size": BINARY}, {"kind": 1.0, "size": 0.5}
    trainer = AdversarialTrainer(model, LINF)
    trainer.compile(loss=losses, loss_weights=weights, metrics={"kind": "accuracy"})
    targets = {"kind": labels, "size": labels % 2}
    figures = trainer.evaluate(images, targets, verbose=0, return_dict=True)

    def total(points):
        kind, size = model(points)
        return SPARSE(labels, kind) + 0.5 * BINARY((labels % 2)[:, None], size)

    assert figures["clean_loss"] == pytest.approx(float(total(images)), rel=1e-5)
    points = tf.constant(images)
    for _ in range(3):
        with tf.GradientTape() as tape:
            tape.watch(points)
            loss = total(points)
        moved = points + 0.04 * tf.sign(tape.gradient(loss, points))
        points = tf.clip_by_value(tf.clip_by_value(moved, images - 0.1, images + 0.1), 0, 1)
    assert figures["loss"] == pytest.approx(float(total(points)), rel=1e-3)
    assert "clean_accuracy" not in figures and "kind_accuracy" in figures


def test_named_inputs_and_outputs():
    images, labels = data()
    inputs = {"picture": keras.Input((8, 8, 3), name="picture"), "age": keras.Input((1,), name="age")}
    x = keras.layers.Concatenate()([keras.layers.Flatten()(inputs["picture"]), inputs["age"]])
    model = keras.Model(inputs, {"scores": keras.layers.Dense(3, name="scores")(x)})
    batch = {"picture": images, "age": np.ones((16, 1), np.float32)}
    _, logs = trained(model, {"scores": labels}, {"scores": SPARSE}, images=batch)
    assert logs["loss"] > logs["clean_loss"] and 0 <= logs["clean_accuracy"] <= 1


def test_subclassed_model():
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.flatten, self.scores = keras.layers.Flatten(), keras.layers.Dense(3)

        def call(self, images):
            return self.scores(self.flatten(images))

    images, labels = data()
    model = Subclassed()
    with pytest.raises(UserError, match="has not seen any input yet"):
        AdversarialTrainer(model, LINF).compile(loss=SPARSE)
    model(images[:1])
    _, logs = trained(model, labels, SPARSE, metrics=["accuracy"])
    assert set(logs) == {"loss", "accuracy", "clean_loss", "clean_accuracy"}


def test_regression_has_no_accuracy():
    images, _ = data()
    targets = np.random.default_rng(1).random((16, 3)).astype(np.float32)
    _, logs = trained(classifier(), targets, "mean_squared_error")
    assert set(logs) == {"loss", "clean_loss"} and logs["loss"] > logs["clean_loss"]


def test_clean_accuracy_is_unweighted_under_class_weight():
    """Keras's own `metrics` are unweighted, too; `clean_loss` is weighted like the loss."""
    images, labels = data()
    model = classifier()
    logits = model(images)
    weights = {0: 5.0, 1: 1.0, 2: 0.5}
    hits = np.mean(np.argmax(logits, axis=1) == labels)
    losses = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    trainer = AdversarialTrainer(model, LINF)
    trainer.compile(keras.optimizers.SGD(0.0), SPARSE)
    history = trainer.fit(images, labels, batch_size=16, class_weight=weights, verbose=0).history
    assert history["clean_accuracy"][0] == pytest.approx(hits)
    expected = np.mean([weights[label] * loss for label, loss in zip(labels, losses.numpy(), strict=True)])
    assert history["clean_loss"][0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("activation", "loss", "message"),
    [
        ("softmax", SPARSE, "the classifier returns probabilities.*from_logits=False"),
        (None, "sparse_categorical_crossentropy", "the classifier returns logits.*from_logits=True"),
        (None, "crossentropy", "the classifier returns logits"),
        (None, keras.losses.CategoricalCrossentropy(), "the classifier returns logits"),
        (None, None, "loss=None"),
        (None, {"other": SPARSE}, r"\['scores'\]. Received: \['other'\]"),
        (None, [SPARSE, SPARSE], "Received: 2 entries"),
    ],
)
def test_an_unsuitable_loss_is_refused_before_training(activation, loss, message):
    with pytest.raises(UserError, match=message):
        AdversarialTrainer(classifier(activation=activation), LINF).compile(loss=loss)


def test_a_loss_without_a_value_for_each_image_is_refused():
    images, labels = data()
    with pytest.raises(UserError, match="one number for the whole batch"):
        trained(classifier(), labels, lambda y, p: tf.reduce_mean(p))


def test_trades_needs_class_scores():
    images, _ = data()
    with pytest.raises(UserError, match="a single output of class scores"):
        trained(classifier(), np.zeros((16, 3), np.float32), "mean_squared_error", recipe=Recipe(trades_beta=1.0))


def test_losses_of_an_image_with_several_positions_are_averaged():
    """As in segmentation, where an image has a label for every position."""
    outputs = tf.random.stateless_normal((2, 4, 4, 3), (1, 2))
    labels = tf.random.stateless_uniform((2, 4, 4), (3, 4), maxval=3, dtype=tf.int32)
    found = CompiledLoss(SPARSE, None, outputs=outputs)(labels, outputs)
    np.testing.assert_allclose(found[0], SPARSE(labels[:1], outputs[:1]), rtol=1e-5)
    assert found.shape == (2,)
