"""New heads and changed copies of a classifier: what is new, what stays the same, and what is refused."""

import keras
import numpy as np
import pytest

from robust_tf.errors import UserError
from robust_tf.models import build_classifier
from robust_tf.transfer.heads import replace_head, with_dtype_policy, with_image_size, with_normalization
from robust_tf.transfer.stages import freeze, stages

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.2, 0.25)


def build(image_size: int = 8) -> keras.Model:
    return build_classifier("resnet8", 3, image_size=image_size, mean=MEAN, std=STD)


def images(size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 1, (4, size, size, 3)).astype("float32")


def loaded(classifier: keras.Model, tmp_path) -> keras.Model:
    classifier.save(tmp_path / "classifier.keras")
    return keras.saving.load_model(tmp_path / "classifier.keras", safe_mode=True)


def head_weights(classifier: keras.Model) -> list[np.ndarray]:
    return [weight for layer in stages(classifier)["head"] for weight in layer.get_weights()]


def test_a_new_head_shares_the_backbone():
    source = build()
    freeze(source, mode="partial", through="stage1")
    classifier = replace_head(source, 7, seed=0)
    assert classifier.name == "resnet8"
    assert classifier(images()).shape == (4, 7)
    for layer in source.layers[:-1]:
        assert classifier.get_layer(layer.name) is layer
    assert [w.path for w in classifier.weights] == [w.path for w in source.weights]
    assert not classifier.get_layer("stage1_block1_conv1").trainable


def test_hidden_layers_are_dense_layers_with_relu_before_the_logits(tmp_path):
    classifier = loaded(replace_head(build(), 5, hidden_layers=2, seed=0), tmp_path)
    assert [layer.name for layer in stages(classifier)["head"]] == ["head_hidden1", "head_hidden2", "logits"]
    k1, b1, k2, b2, k3, b3 = head_weights(classifier)
    assert k1.shape == k2.shape == (64, 64)
    features = keras.Model(classifier.input, classifier.get_layer("features").output)(images()).numpy()
    expected = np.maximum(np.maximum(features @ k1 + b1, 0) @ k2 + b2, 0) @ k3 + b3
    np.testing.assert_allclose(classifier(images()), expected, atol=1e-5)
    assert np.any(features @ k1 + b1 < 0)


def test_the_initializer_pytorch_fills_the_whole_interval():
    bound = 1 / np.sqrt(64)
    for weight in head_weights(replace_head(build(), 100, hidden_layers=1, seed=0)):
        assert 0.9 * bound < weight.max() <= bound
        assert -bound <= weight.min() < -0.9 * bound
        assert abs(weight.mean()) < 0.2 * bound


def test_the_initializer_keras_is_glorot_uniform_and_zeros_lets_hidden_layers_learn():
    kernel, bias = head_weights(replace_head(build(), 100, initializer="keras", seed=0))
    bound = np.sqrt(6 / 164)
    assert 0.95 * bound < kernel.max() <= bound
    assert not bias.any()
    zeros = replace_head(build(), 5, hidden_layers=1, initializer="zeros", seed=0)
    assert not zeros(images()).numpy().any()
    assert zeros.get_layer("head_hidden1").kernel.numpy().any()


@pytest.mark.parametrize("initializer", ["pytorch", "keras"])
def test_the_seed_decides_the_weights_of_the_head(initializer):
    arguments = {"num_classes": 64, "hidden_layers": 1, "initializer": initializer}
    first, again, other = (head_weights(replace_head(build(), seed=seed, **arguments)) for seed in (3, 3, 4))
    for index in (0, 2):
        np.testing.assert_array_equal(first[index], again[index])
        assert not np.array_equal(first[index], other[index])
    assert not np.array_equal(first[0], first[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes=1"),
        ({"num_classes": 2, "hidden_layers": -1}, "hidden_layers=-1"),
        ({"num_classes": 2, "initializer": "pytorhc"}, "'pytorhc'.*Did you mean 'pytorch'"),
    ],
)
def test_wrong_arguments_of_a_head_are_refused_by_value(arguments, message):
    with pytest.raises(UserError, match=message):
        replace_head(build(), seed=0, **arguments)


def test_a_model_without_features_gets_the_new_head_in_place_of_the_old_one():
    inputs = keras.Input((4,), name="images")
    hidden = keras.layers.Dense(3, name="hidden")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2, name="logits")(hidden))
    other = replace_head(model, 3, seed=0)
    assert [layer.name for layer in other.layers] == ["images", "hidden", "features", "logits"]
    assert other.get_layer("hidden") is model.get_layer("hidden")
    with pytest.raises(UserError, match="'normalization'.*hidden, logits"):
        with_normalization(model, MEAN, STD)


def test_another_normalization_is_the_same_network_on_other_inputs(tmp_path):
    classifier = build()
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([0.5, 0.4, 1.0])
    other = loaded(with_normalization(classifier, tuple(mean), tuple(std)), tmp_path)
    after_normalization = keras.Model(classifier.get_layer("normalization").output, classifier.output)
    np.testing.assert_allclose(other(images()), after_normalization((images() - mean) / std), atol=1e-5)


@pytest.mark.parametrize(("mean", "std"), [((0.5, 0.5), STD), (MEAN, (0.2,)), (MEAN, (0.2, 0.0, 0.2))])
def test_a_wrong_normalization_is_refused_by_value(mean, std):
    with pytest.raises(UserError) as error:
        with_normalization(build(), mean, std)
    assert f"mean={mean}, std={std}" in str(error.value)


def test_a_resized_classifier_equals_one_built_for_this_size(tmp_path):
    resized = loaded(with_image_size(build(), 12), tmp_path)
    expected = build(image_size=12)
    expected.set_weights(resized.get_weights())
    assert resized.input_shape == (None, 12, 12, 3)
    np.testing.assert_array_equal(resized(images(12)), expected(images(12)))


def test_weights_that_depend_on_the_image_size_cannot_be_resized():
    inputs = keras.Input((8, 8, 3), name="images")
    features = keras.layers.Flatten(name="features")(keras.layers.Conv2D(2, 3, name="stem_conv")(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2, name="logits")(features), name="flat")
    for size in (9, 2):
        with pytest.raises(UserError, match=f"'flat'.*image_size={size}, built for 8"):
            with_image_size(model, size)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_a_converted_classifier_computes_like_one_built_under_the_policy(policy, tmp_path):
    source = loaded(build(), tmp_path)
    mixed = with_dtype_policy(source, policy)
    keras.config.set_dtype_policy(policy)
    expected = build()
    expected.set_weights(source.get_weights())
    np.testing.assert_array_equal(mixed(images()), expected(images()))
    assert mixed(images()).dtype == "float32"
    assert [layer.compute_dtype for layer in mixed.layers[1:]] == [layer.compute_dtype for layer in expected.layers[1:]]
    assert 0 < np.abs(mixed(images()) - source(images())).max() < 0.1
    back = with_dtype_policy(mixed, "float32")
    np.testing.assert_array_equal(back(images()), source(images()))


def test_an_unknown_policy_is_refused():
    with pytest.raises(UserError, match="'float16'.*Valid: float32, mixed_bfloat16, mixed_float16"):
        with_dtype_policy(build(), "float16")


@pytest.mark.parametrize(
    "copy",
    [
        lambda classifier: with_normalization(classifier, (0, 0, 0), (1, 1, 1)),
        lambda classifier: with_image_size(classifier, 12),
        lambda classifier: with_dtype_policy(classifier, "mixed_bfloat16"),
    ],
)
def test_copies_keep_weights_and_frozen_layers_and_share_no_weights(copy):
    classifier = build()
    freeze(classifier, mode="partial", through="stage2", batchnorm="update")
    copied = copy(classifier)
    assert copied.name == classifier.name
    assert [w.path for w in copied.trainable_weights] == [w.path for w in classifier.trainable_weights]
    assert [layer.trainable for layer in copied.layers] == [layer.trainable for layer in classifier.layers]
    before = [weight.numpy() for weight in classifier.weights]
    for ours, theirs in zip(copied.weights, before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        ours.assign_add(np.ones_like(ours))
    for weight, theirs in zip(classifier.weights, before, strict=True):
        np.testing.assert_array_equal(weight, theirs)


def test_a_sequential_classifier_is_refused():
    classifier = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(3)], name="flat")
    with pytest.raises(UserError, match="Received: 'flat', a Sequential model"):
        with_dtype_policy(classifier, "float32")
