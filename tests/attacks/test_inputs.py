"""Unusual and wrong inputs: every attack gives the right result, one clear error message, or a warning."""

import functools
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_models import linear_model, small_batch, small_network, without_gradients

from robust_tf.attacks import AttackConfig, AttackWarning, apgd, autoattack, fab, fgsm, pgd, run_pgd, square
from robust_tf.attacks.checks import assert_pixels, pixel_error, training_batch
from robust_tf.attacks.losses import LOSSES, slope_of
from robust_tf.attacks.threat_models import NORMS
from robust_tf.errors import UserError


def cascade(model, images, labels, **threat_model):
    result = autoattack(model, images, labels, version="custom", attacks=["fgsm", "square"], **threat_model)
    return tf.constant(result.images_adv)


FOLLOW_GRADIENTS = {
    "pgd": functools.partial(pgd, steps=2),
    "fgsm": fgsm,
    "apgd": functools.partial(apgd, steps=1),
    "fab": functools.partial(fab, steps=1, targets=1),
}
DIRECT = {**FOLLOW_GRADIENTS, "square": functools.partial(square, queries=2)}
ATTACKS = {**DIRECT, "autoattack": cascade}
THREAT_MODEL = {"norm": "linf", "epsilon": 0.05}
NETWORK = small_network()
IMAGES, LABELS = small_batch(NETWORK, count=4)


def dense(units: int, activation: str | None = None) -> keras.Model:
    keras.utils.set_random_seed(0)
    flat = [keras.Input((8, 8, 1)), keras.layers.Flatten()]
    return keras.Sequential([*flat, keras.layers.Dense(units, activation=activation)])


# For each case, the arguments that are changed and what the message says.
REFUSED = {
    "0..255": ({"images": 255 * IMAGES}, r"in \[0, 1\]. Received: values from .* to 25.*Divide 0-255"),
    "whole numbers": ({"images": np.round(3 * IMAGES)}, "values from 0 to 3"),
    "-0.5..0.5": ({"images": IMAGES - 0.5}, "values from -0.49.* to 0.49"),
    "-1..1": ({"images": 2 * IMAGES - 1}, "values from -0.9.* to 0.9"),
    "normalized": ({"images": (IMAGES - IMAGES.mean()) / IMAGES.std()}, "values from -1.7.* to 1.7"),
    "uint8": ({"images": (IMAGES > 0.5).astype(np.uint8)}, "images of type uint8"),
    "NaN": ({"images": np.full_like(IMAGES, np.nan)}, "values from nan to nan"),
    "one image": ({"images": IMAGES[0]}, r"shape \(8, 8, 1\).*images\[None\]"),
    "no image": ({"images": IMAGES[:0], "labels": LABELS[:0]}, r"nothing to attack. Received: .*\(0, 8, 8, 1\)"),
    "one-hot": ({"labels": np.eye(5)[LABELS]}, r"labels of shape \(4, 5\).*argmax"),
    "float labels": ({"labels": LABELS.astype(np.float32)}, "type float32"),
    "high labels": ({"labels": LABELS + 5}, r"in 0\.\.4"),
    "few labels": ({"labels": LABELS[:3]}, r"shape \(3,\)"),
    "np.inf": ({"norm": np.inf}, "Received: inf. Did you mean 'linf'"),
    "2": ({"norm": 2}, "Received: 2. Did you mean 'l2'"),
    "epsilon list": ({"epsilon": [0.1]}, r"one number.*Received: epsilon=\[0.1\]"),
    "epsilon text": ({"epsilon": "8/255"}, "Received: epsilon='8/255'"),
    "epsilon tensor": ({"epsilon": tf.constant(8.0)}, "Did you mean 8/255"),
    "dict": ({"model": lambda x: {"output_0": NETWORK(x)}}, r"a dict with the keys \['output_0'\].*\['output_0'\]"),
    "list": ({"model": lambda x: [NETWORK(x), NETWORK(x)]}, r"a list of 2 outputs.*model\(images\)\[0\]"),
    "None": ({"model": lambda x: None}, "one tensor of logits.* Received: None"),
    "rank 4": ({"model": lambda x: x}, r"outputs of shape \(\d, 8, 8, 1\)"),
    "one logit": ({"model": dense(1), "labels": 0 * LABELS}, r"one output for each image.*tf\.pad"),
    "one row": ({"model": lambda x: tf.ones([7, 5])}, r"outputs of shape \(7, 5\)"),
    "infinity": ({"model": lambda x: NETWORK(x) + np.inf}, "infinity for"),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("case", REFUSED)
def test_every_attack_refuses_wrong_arguments_by_value(attack, case):
    changed, message = REFUSED[case]
    arguments = {"model": NETWORK, "images": IMAGES, "labels": LABELS, **THREAT_MODEL, **changed}
    model, images, labels = (arguments.pop(name) for name in ("model", "images", "labels"))
    with pytest.raises(UserError, match=message):
        ATTACKS[attack](model, images, labels, **arguments)


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_takes_float64_images_and_a_column_of_labels(attack):
    with warnings.catch_warnings():
        warnings.simplefilter("error", AttackWarning)
        images_adv = ATTACKS[attack](NETWORK, IMAGES.astype(np.float64), LABELS[:, None].tolist(), **THREAT_MODEL)
    assert images_adv.shape == IMAGES.shape


@pytest.mark.parametrize("attack", ["pgd", "square", "autoattack"])
@pytest.mark.parametrize(
    ("images", "message"),
    [(1.3 * IMAGES - 0.15, "values from -0.1.* to 1.1.* clip them"), (IMAGES / 255, "divided by 255 twice")],
    ids=["slightly outside", "divided twice"],
)
def test_doubtful_pixels_cause_a_warning(attack, images, message):
    with pytest.warns(AttackWarning, match=message):
        ATTACKS[attack](NETWORK, images, NETWORK(images).numpy().argmax(axis=1), **THREAT_MODEL)


def test_a_constant_image_causes_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", AttackWarning)
        for value in (0.0, 0.5, 1.0):
            images = np.full_like(IMAGES, value)
            assert fgsm(NETWORK, images, NETWORK(images).numpy().argmax(axis=1), **THREAT_MODEL).shape == IMAGES.shape


SOFTMAX = dense(5, "softmax")
PROBABILITIES = {
    "softmax layer": (SOFTMAX, "softmax"),
    "softmax in a function": (lambda x: tf.nn.softmax(NETWORK(x)), "softmax"),
    "low precision": (lambda x: tf.cast(tf.nn.softmax(NETWORK(x)), tf.bfloat16), "softmax"),
    "sigmoid layer": (dense(5, "sigmoid"), "sigmoid"),
}


@pytest.mark.parametrize("model", PROBABILITIES)
def test_gradient_attacks_refuse_probabilities_and_the_others_warn(model):
    model, kind = PROBABILITIES[model]
    for attack in FOLLOW_GRADIENTS.values():
        with pytest.raises(UserError, match=rf"probabilities \({kind}\).*activation = None"):
            attack(model, IMAGES, LABELS, **THREAT_MODEL)
        with pytest.raises(
            UserError, match=rf"^This attack .* probabilities \({kind}\)"
        ):  # a graph sees the last operation
            tf.function(lambda x, y, attack=attack: attack(model, x, y, **THREAT_MODEL))(IMAGES, LABELS)
    for name in ("square", "autoattack"):
        with pytest.warns(AttackWarning, match="look like probabilities"):
            ATTACKS[name](model, IMAGES, LABELS, **THREAT_MODEL)


def half_of_the_images(x: tf.Tensor) -> tf.Tensor:
    return tf.where(tf.reduce_mean(x, axis=(1, 2, 3))[:, None] < CUT, tf.stop_gradient(NETWORK(x)), NETWORK(x))


CUT = np.median(IMAGES.mean(axis=(1, 2, 3)))
OPAQUE = {
    "rounding": (without_gradients(NETWORK), 1.0),
    "rounded pixels": (lambda x: NETWORK(tf.round(255.0 * x) / 255.0), 1.0),
    "NumPy": (lambda x: NETWORK(tf.constant(np.asarray(x))).numpy(), 1.0),
    "half": (half_of_the_images, 0.5),
}


@pytest.mark.parametrize("model", OPAQUE)
@pytest.mark.parametrize("attack", FOLLOW_GRADIENTS)
def test_a_model_without_gradients_causes_a_warning(attack, model):
    model, share = OPAQUE[model]
    labels = np.asarray(model(IMAGES)).argmax(axis=1)
    with pytest.warns(AttackWarning, match=f"gradient is zero at {share:.1%} of the images.*use square") as issued:
        ATTACKS[attack](model, IMAGES, labels, **THREAT_MODEL)
    assert len(issued) == 1 and issued[0].filename == __file__


def test_square_attacks_a_model_without_gradients_without_a_warning():
    predict = OPAQUE["NumPy"][0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", AttackWarning)
        images_adv = square(predict, IMAGES, LABELS, norm="linf", epsilon=0.2, queries=100)
    assert np.mean(predict(images_adv).argmax(axis=1) == LABELS) < 0.5


def test_a_model_without_gradients_causes_a_warning_in_a_graph():
    with pytest.warns(AttackWarning, match="no gradient with respect to its images"):
        tf.function(lambda x, y: pgd(OPAQUE["rounding"][0], x, y, steps=1, **THREAT_MODEL))(IMAGES, LABELS)


# --- graphs, which check the pixels when they run ---


@pytest.mark.parametrize("attack", ["pgd", "fgsm", pytest.param("apgd", marks=pytest.mark.slow), "fab", "square"])
def test_a_graph_refuses_pixels_when_it_runs(attack):
    run = tf.function(lambda x, y: DIRECT[attack](NETWORK, x, y, **THREAT_MODEL))
    assert run(IMAGES, LABELS).shape == IMAGES.shape
    for images in (255 * IMAGES, np.where(IMAGES.max() == IMAGES, np.nan, IMAGES)):
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"Images must be in \[0, 1\]") as raised:
            run(images.astype(np.float32), LABELS)
        assert str(pixel_error(raised.value)).startswith("Images must be in [0, 1]. Received: values from ")


def test_a_training_step_refuses_pixels_out_of_range():
    attack = AttackConfig(norm="linf", epsilon=0.03, step_size=0.01, steps=1)
    run = tf.function(lambda x, y, attack: run_pgd(NETWORK, x, y, attack=attack).images_adv)
    with pytest.raises(tf.errors.InvalidArgumentError) as raised:
        run(np.full_like(IMAGES, 255), LABELS, attack)
    expected = "Images must be in [0, 1]. Received: values from 255 to 255. Divide 0-255 images by 255, and put the "
    assert str(pixel_error(raised.value)) == expected + "normalization inside the model."
    with pytest.raises(UserError) as eager:
        assert_pixels(tf.fill([1, 2, 2, 1], 255.0))
    assert str(eager.value) == str(pixel_error(raised.value))
    no_attack = AttackConfig(norm="linf", epsilon=0.0, step_size=0.01, steps=1)
    np.testing.assert_array_equal(run(np.full_like(IMAGES, 255), LABELS, no_attack), np.full_like(IMAGES, 255))
    assert pixel_error(tf.errors.InvalidArgumentError(None, None, "another one")) is None


def test_a_training_batch_must_have_images_of_rank_4():
    with pytest.raises(UserError, match=r"images of shape \(4, 8, 8\). A single image"):
        training_batch(IMAGES[..., 0], LABELS)
    images, labels = training_batch(IMAGES, LABELS[:, None])
    assert images.shape == (4, 8, 8, 1) and labels.shape == (4,)


# --- confident classifiers and tiny gradients ---

SCALES = [1.0, 10.0, 100.0, 1e4, 1e-8, 1e-12]


@pytest.mark.slow
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("attack", ["pgd", "fgsm", "apgd"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_scaling_the_logits_does_not_make_a_classifier_robust(attack, norm, scale):
    """On a linear model one step along the gradient is optimal. All margins are 4 at scale 1."""
    weights = np.stack([np.ones((4, 4, 1)), -np.ones((4, 4, 1))]).astype(np.float32)
    model = linear_model(scale * weights, scale * np.array([-6.0, 6.0]))
    images, labels = np.full((3, 4, 4, 1), 0.5, np.float32), np.zeros(3, np.int32)
    epsilon = {"linf": 0.3, "l2": 1.2}[norm]
    run = {"pgd": functools.partial(pgd, steps=3), "apgd": functools.partial(apgd, steps=5), "fgsm": fgsm}[attack]
    with warnings.catch_warnings():
        warnings.simplefilter("error", AttackWarning)
        images_adv = run(model, images, labels, norm=norm, epsilon=epsilon).numpy()
    assert np.all(model(images_adv).numpy().argmax(axis=1) == 1)
    reached = np.linalg.norm((images_adv - images).reshape(3, -1), axis=1) if norm == "l2" else 0.5 - images_adv
    # APGD compares losses, and at the tiny scales they differ only by rounding.
    np.testing.assert_allclose(reached, epsilon, rtol=0.02 if attack == "apgd" else 1e-4)


def test_the_cross_entropy_equals_tensorflows_where_that_has_a_gradient():
    rng = np.random.default_rng(0)
    logits = tf.constant(rng.normal(size=(500, 10)) * rng.choice([0.01, 1, 5, 20], (500, 1)), tf.float32)
    labels = tf.argmax(logits, axis=1, output_type=tf.int32)
    labels = tf.where(tf.range(500) % 2 == 0, labels, (labels + 1) % 10)

    def slope(loss_of):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            loss = loss_of(logits)
        return loss.numpy(), tape.gradient(loss, logits).numpy()

    def tensorflows(logits):
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)

    theirs, their_gradient = slope(tensorflows)
    loss, gradient = slope(lambda logits: LOSSES["ce"](logits, labels, labels))
    sure = theirs == 0
    assert 5 < sure.sum() < 100
    np.testing.assert_array_equal(loss[~sure], theirs[~sure])
    np.testing.assert_array_equal(gradient[~sure], their_gradient[~sure])
    behind = logits.numpy().astype(np.float64) - np.take_along_axis(logits.numpy(), labels.numpy()[:, None], axis=1)
    exact = np.log1p(np.where(behind == 0, 0, np.exp(behind)).sum(axis=1))
    near = sure & (exact > 1e-25)
    np.testing.assert_allclose(loss[near], exact[near], rtol=1e-4)
    np.testing.assert_allclose(gradient[near].sum(axis=1), 0, atol=1e-3 * exact[near].max())
    assert np.all(gradient[sure, labels.numpy()[sure]] < 0)


def test_the_cross_entropy_falls_with_the_margin_however_large():
    margins = tf.constant([20.0, 50, 59, 61, 90, 200, 1000, 1e5])
    logits = tf.stack([margins, 0 * margins, 0 * margins - 1], axis=1)
    labels = tf.zeros(8, tf.int32)
    loss = LOSSES["ce"](logits, labels, labels).numpy()
    assert np.all(np.diff(loss) < 0) and np.all(np.abs(loss) < 1e-8)


def test_a_step_along_a_tiny_gradient_has_its_full_length():
    gradient = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
    for scale in (1e-7, 1e-12, 1e-20, 1e-30):
        step = NORMS["l2"].step(tf.constant(scale * gradient), 0.5).numpy()
        np.testing.assert_allclose(np.linalg.norm(step.reshape(2, -1), axis=1), 0.5, rtol=1e-5)
    length = tf.sqrt(tf.reduce_sum(tf.square(gradient), axis=(1, 2, 3), keepdims=True))
    np.testing.assert_array_equal(NORMS["l2"].step(tf.constant(gradient), 0.5), 0.5 * gradient / (length + 1e-10))
    assert np.all(NORMS["l2"].step(tf.zeros((1, 4, 4, 3)), 0.5) == 0)


def test_a_confident_classifier_has_a_gradient_in_float16():
    weights = np.stack([np.ones((4, 4, 1)), -np.ones((4, 4, 1))]).astype(np.float32)
    labels = tf.zeros(1, tf.int32)
    for scale in (1.0, 5.0, 40.0):
        model = linear_model(scale * weights)
        half = slope_of(
            lambda x, model=model: tf.cast(model(x), tf.float16),
            tf.fill([1, 4, 4, 1], 0.5),
            lambda logits: LOSSES["ce"](logits, labels, labels),
            labels,
        ).gradient.numpy()
        assert np.all(half < 0)


# --- the warnings of AutoAttack, which look at the losses in use ---


@pytest.mark.parametrize(("attacks", "flagged"), [(["pgd"], True), (["apgd-dlr"], False)])
def test_the_flag_zero_gradients_considers_only_the_losses_in_use(attacks, flagged, monkeypatch):
    """The cross-entropy is replaced by a flat one."""
    monkeypatch.setitem(LOSSES, "ce", lambda logits, labels, targets: 0.0 * logits[:, 0])
    arguments = {"norm": "linf", "epsilon": 0.01, "version": "custom", "attacks": attacks}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttackWarning)
        result = autoattack(NETWORK, IMAGES, LABELS, **arguments)
    assert ("zero_gradients" in result.warnings) == flagged
