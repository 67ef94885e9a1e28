"""PGD compared with the PyTorch reference, and its properties in float32 and in mixed precision."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from smallcnn import STORED_IMAGES, build_smallcnn, golden, inputs

from robust_tf.attacks import AttackConfig, pgd, run_pgd
from robust_tf.attacks.losses import find_loss, slope_of
from robust_tf.errors import UserError

# Settings of each case of the reference: (norm, epsilon, step_size, steps).
CASES = {
    "l2_1step": ("l2", 0.5, 0.1, 1),
    "linf_1step": ("linf", 8 / 255, 2 / 255, 1),
    "l2_eps0.5": ("l2", 0.5, 0.1, 7),
    "l2_eps0.5_targeted": ("l2", 0.5, 0.1, 7),
    "l2_eps3_step0.5": ("l2", 3.0, 0.5, 3),
    "l2_eps3_step2": ("l2", 3.0, 2.0, 3),
    "linf_8_255": ("linf", 8 / 255, 2 / 255, 7),
    "l2_overshoot": ("l2", 1.0, 3.0, 6),
    "l2_overshoot_targeted": ("l2", 1.0, 3.0, 6),
    "linf_overshoot": ("linf", 0.3, 0.3, 5),
    "l2_oob": ("l2", 3.0, 2.0, 3),
    "linf_oob": ("linf", 8 / 255, 2 / 255, 7),
}


@pytest.fixture(scope="module")
def classifier():
    return build_smallcnn()


def linear_model(weight: np.ndarray):
    """Returns a model with the logits (0, <weight, image>) for images of one channel."""
    weight = tf.constant(weight.reshape(-1, 1), tf.float32)

    def logits(images: tf.Tensor) -> tf.Tensor:
        score = tf.reshape(images, (tf.shape(images)[0], -1)) @ weight
        return tf.concat([tf.zeros_like(score), score], axis=1)

    return logits


# The reference has the one-step cases only without use_best.
@pytest.mark.filterwarnings("ignore:The images have values from:robust_tf.errors.AttackWarning")  # the cases "oob"
@pytest.mark.parametrize(
    ("case", "use_best"), [(case, best) for case in CASES for best in (True, False) if not (best and "1step" in case)]
)
def test_pgd_equals_the_reference(classifier, case, use_best):
    norm, epsilon, step_size, steps = CASES[case]
    data, arrays = inputs(), golden()
    images = data["images_oob" if case.endswith("oob") else "images"]
    targeted = case.endswith("targeted")
    images_adv = pgd(
        classifier,
        images,
        data["targets" if targeted else "labels"],
        norm=norm,
        epsilon=epsilon,
        step_size=step_size,
        steps=steps,
        use_best=use_best,
        targeted=targeted,
    )
    # If use_best makes no difference, only one of the two results is stored.
    expected = arrays.get(f"{case}/use_best={int(use_best)}/images_adv", arrays.get(f"{case}/use_best=1/images_adv"))
    difference = np.abs(images_adv.numpy()[list(STORED_IMAGES)] - expected.transpose(0, 2, 3, 1))
    if norm == "l2":
        assert difference.max() < 1e-5
    else:  # rounding may change the sign of a gradient that is nearly 0
        assert (difference > 1e-5).sum() <= 3


@pytest.mark.parametrize("case", ["l2_overshoot", "linf_overshoot", "l2_overshoot_targeted"])
def test_iterates_have_the_losses_of_the_reference(classifier, case):
    norm, epsilon, step_size, steps = CASES[case]
    data, losses = inputs(), golden()[f"{case}/iterate_losses"]
    targeted = case.endswith("targeted")
    labels = data["targets" if targeted else "labels"]
    for stop in range(1, steps + 1):
        images_adv = pgd(
            classifier,
            data["images"],
            labels,
            norm=norm,
            epsilon=epsilon,
            step_size=step_size,
            steps=stop,
            use_best=False,
            targeted=targeted,
        )
        loss = keras.losses.sparse_categorical_crossentropy(labels, classifier(images_adv), from_logits=True)
        np.testing.assert_allclose(loss, losses[stop], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("random_start", [True, False])
def test_the_result_is_in_the_ball_and_in_the_pixel_range(classifier, norm, random_start):
    data = inputs()
    epsilon = {"l2": 2.0, "linf": 0.1}[norm]
    images_adv = pgd(
        classifier,
        data["images"],
        data["labels"],
        norm=norm,
        epsilon=epsilon,
        step_size=epsilon,
        steps=4,
        random_start=random_start,
        seed=3,
    ).numpy()
    perturbation = (images_adv - data["images"]).reshape(8, -1)
    size = np.linalg.norm(perturbation, axis=1) if norm == "l2" else np.abs(perturbation).max(axis=1)
    assert size.max() <= epsilon + 1e-6
    assert size.min() > 0.5 * epsilon  # a strong attack on a smooth model goes to the boundary
    assert images_adv.min() >= 0 and images_adv.max() <= 1


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_pgd_finds_the_optimum_of_a_linear_model(norm):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 4)).astype(np.float32)
    images = np.full((3, 4, 4, 1), 0.5, np.float32)  # far enough from 0 and 1 for the pixel range not to matter
    images_adv = pgd(
        linear_model(weight), images, np.ones(3, int), norm=norm, epsilon=0.1, step_size=0.03, steps=10
    ).numpy()
    steepest = np.sign(weight) if norm == "linf" else weight / np.linalg.norm(weight)
    np.testing.assert_allclose(images_adv, images - 0.1 * steepest[None, :, :, None], atol=1e-5)


def test_epsilon_zero_returns_the_images(classifier):
    data = inputs()
    images_adv = pgd(classifier, data["images"], data["labels"], norm="linf", epsilon=0.0, step_size=0.1, steps=5)
    np.testing.assert_array_equal(images_adv, data["images"])


def test_use_best_never_ends_below_the_clean_loss(classifier):
    data = inputs()
    attack = {"norm": "l2", "epsilon": 8.0, "step_size": 40.0, "steps": 3}  # steps that are far too long
    images_adv = pgd(classifier, data["images"], data["labels"], **attack)

    def loss(images):
        return keras.losses.sparse_categorical_crossentropy(data["labels"], classifier(images), from_logits=True)

    assert np.all(loss(images_adv) >= loss(data["images"]))


def test_the_result_for_an_image_does_not_depend_on_its_batch(classifier):
    data = inputs()
    attack = {"norm": "l2", "epsilon": 0.5, "step_size": 0.1, "steps": 7}
    together = pgd(classifier, data["images"], data["labels"], **attack)
    for index in range(8):
        alone = pgd(classifier, data["images"][index : index + 1], data["labels"][index : index + 1], **attack)
        np.testing.assert_allclose(alone[0], together[index], atol=1e-6)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_graph_gives_the_same_result_as_an_eager_call(classifier, jit_compile):
    data = inputs()
    images, labels = tf.constant(data["images"]), tf.constant(data["labels"])
    attack = {"norm": "l2", "epsilon": 1.0, "step_size": 0.3, "steps": 5}
    compiled = tf.function(lambda x, y: pgd(classifier, x, y, **attack), jit_compile=jit_compile)
    np.testing.assert_allclose(compiled(images, labels), pgd(classifier, images, labels, **attack), atol=1e-5)


def test_the_seed_decides_the_random_start(classifier):
    data = inputs()

    def attacked(seed):
        return pgd(
            classifier,
            data["images"],
            data["labels"],
            norm="linf",
            epsilon=0.1,
            step_size=0.001,
            steps=1,
            random_start=True,
            use_best=False,
            seed=seed,
        ).numpy()

    np.testing.assert_array_equal(attacked(1), attacked(1))
    assert np.abs(attacked(1) - attacked(2)).mean() > 0.03
    assert np.abs(attacked(None) - attacked(None)).mean() > 0.03


def test_the_random_start_for_l2_lies_on_the_sphere(classifier):
    images = np.full((4, 32, 32, 3), 0.5, np.float32)
    images_adv = pgd(
        classifier,
        images,
        np.zeros(4, int),
        norm="l2",
        epsilon=1.0,
        step_size=1e-6,
        steps=1,
        random_start=True,
        use_best=False,
        seed=0,
    )
    norms = np.linalg.norm((images_adv - images).numpy().reshape(4, -1), axis=1)
    np.testing.assert_allclose(norms, 1.0, atol=1e-4)


def test_pgd_leaves_the_statistics_of_batchnorm_unchanged():
    classifier = keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.BatchNormalization(), keras.layers.Flatten(), keras.layers.Dense(3)]
    )
    before = [variable.numpy() for variable in classifier.variables]
    images = np.random.default_rng(0).random((4, 8, 8, 3))
    pgd(classifier, images, np.zeros(4, int), norm="l2", epsilon=1.0, step_size=0.5, steps=3)
    for variable, value in zip(classifier.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)


def test_loss_and_correctness_at_the_start_belong_to_the_clean_images(classifier):
    data = inputs()
    attack = AttackConfig(norm="l2", epsilon=1.0, step_size=0.3, steps=3)
    result = run_pgd(classifier, data["images"], data["labels"], attack=attack)
    logits = classifier(data["images"])
    loss = keras.losses.sparse_categorical_crossentropy(data["labels"], logits, from_logits=True)
    np.testing.assert_allclose(result.start_loss, loss, rtol=1e-5)
    np.testing.assert_array_equal(result.start_correct, np.argmax(logits, axis=1) == data["labels"])


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_the_attack_is_as_strong_in_mixed_precision_as_in_float32(policy):
    """Gradients that underflow to zero would make the attack weaker."""
    keras.config.set_dtype_policy(policy)
    low = build_smallcnn()
    # Logits scaled down by 2^-12 have gradients that underflow in float16 if they are not scaled.
    kernel, bias = low.get_layer("fc").get_weights()
    low.get_layer("fc").set_weights([kernel * 2.0**-12, bias * 2.0**-12])
    keras.config.set_dtype_policy("float32")
    full = build_smallcnn()
    full.get_layer("fc").set_weights([kernel * 2.0**-12, bias * 2.0**-12])
    data = inputs()
    attack = {"norm": "l2", "epsilon": 1.0, "step_size": 0.3, "steps": 5}

    def gain(model):
        images_adv = pgd(model, data["images"], data["labels"], **attack)
        loss = [
            keras.losses.sparse_categorical_crossentropy(data["labels"], full(images), from_logits=True)
            for images in (images_adv, data["images"])
        ]
        return np.mean(loss[0] - loss[1])

    assert gain(low) > 0.97 * gain(full)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_images_with_a_confident_prediction_keep_their_gradient_in_mixed_precision(policy):
    """Float16 would lose such a small slope under any scale that suits the other images."""
    directions = {}
    for name in ("float32", policy):
        keras.config.set_dtype_policy(name)
        model = build_smallcnn()
        kernel, bias = model.get_layer("fc").get_weights()
        model.get_layer("fc").set_weights([15 * kernel, 15 * bias])
        images = tf.constant(inputs()["images"])
        labels = tf.argmax(model(images), axis=-1, output_type=tf.int32)
        slope = slope_of(model, images, lambda logits, labels=labels: find_loss("ce")(logits, labels, labels), labels)
        gradients = slope.gradient.numpy().reshape(8, -1)
        lengths = np.linalg.norm(gradients, axis=1, keepdims=True)
        assert 0 < lengths.min() < 1e-12
        directions[name] = gradients / lengths
    assert np.all(np.sum(directions["float32"] * directions[policy], axis=1) > 0.95)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "l3"}, "Received: 'l3'"),
        ({"epsilon": 8.0, "norm": "linf"}, "Did you mean 8/255"),
        ({"epsilon": -0.5}, "epsilon=-0.5"),
        ({"epsilon": float("nan")}, "epsilon=nan"),
        ({"step_size": 0.0}, "step_size=0.0"),
        ({"steps": -1}, "steps=-1"),
        ({"images": np.full((1, 32, 32, 3), 200)}, "from 200 to 200"),
    ],
)
def test_wrong_arguments_are_refused_by_value(classifier, change, message):
    good = {"norm": "l2", "epsilon": 0.5, "step_size": 0.1, "steps": 2, "images": np.zeros((1, 32, 32, 3))}
    with pytest.raises(UserError, match=message):
        pgd(classifier, labels=np.zeros(1, int), **{**good, **change})
