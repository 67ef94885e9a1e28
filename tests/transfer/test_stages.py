"""Stages and freezing: a real training step changes exactly the weights that should train."""

import re

import keras
import numpy as np
import pytest

from robust_tf.errors import UserError
from robust_tf.models import ARCHITECTURES, build_classifier
from robust_tf.transfer.stages import freeze, parameter_counts, stage_of, stages

SMALL = {"resnet8", "resnet18"}
MEAN, STD = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
STATISTICS = re.compile(r".*/moving_(mean|variance)")


def build(architecture: str = "resnet8", image_size: int = 8) -> keras.Model:
    size = max(image_size, ARCHITECTURES[architecture].minimum_image_size)
    return build_classifier(architecture, 3, image_size=size, mean=MEAN, std=STD)


def moved_by_one_step(classifier: keras.Model, **freezing: str) -> set[str]:
    """Returns the paths of the weights in which one training step changes any bit."""
    freeze(classifier, **freezing)
    # No momentum, because its buffers would cost memory. Weight decay also moves weights that have no gradient.
    optimizer = keras.optimizers.SGD(0.1, weight_decay=0.1)
    classifier.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), run_eagerly=True)
    before = {weight.path: weight.numpy() for weight in classifier.weights}
    images = np.random.default_rng(0).uniform(0, 1, (4, *classifier.input_shape[1:])).astype("float32")
    classifier.train_on_batch(images, np.array([0, 1, 2, 0]))
    return {weight.path for weight in classifier.weights if not np.array_equal(weight.numpy(), before[weight.path])}


@pytest.mark.parametrize(
    "architecture",
    [name if name in SMALL else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES],
)
def test_one_step_changes_exactly_the_weights_that_train(architecture):
    classifier = build(architecture)
    everything = {weight.path for weight in classifier.weights}
    statistics = {path for path in everything if STATISTICS.fullmatch(path)}
    head = {"logits/kernel", "logits/bias"}
    *backbone, _ = stages(classifier)

    assert moved_by_one_step(classifier, mode="fixed_feature", batchnorm="update") == head | statistics
    assert moved_by_one_step(classifier, mode="fixed_feature") == head
    if ARCHITECTURES[architecture].parameters > 100_000_000:
        return  # a step of the whole network takes minutes; a narrower network of the family is tested instead
    assert moved_by_one_step(classifier, mode="full_network") == everything
    for index, stage in enumerate(backbone):
        if architecture in SMALL or stage == backbone[-2]:
            frozen = tuple(f"{name}_" for name in backbone[: index + 1])
            assert moved_by_one_step(classifier, mode="partial", through=stage) == {
                path for path in everything if not path.startswith(frozen)
            }


@pytest.mark.parametrize("batchnorm", ["frozen", "update"])
def test_frozen_weights_do_not_change_in_fit(batchnorm):
    classifier = build()
    freeze(classifier, mode="partial", through="stage2", batchnorm=batchnorm)
    classifier.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = {weight.path: weight.numpy() for weight in classifier.weights}
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 1, (24, 8, 8, 3)).astype("float32")
    classifier.fit(images, rng.integers(0, 3, 24), batch_size=8, epochs=2, verbose=0)
    for weight in classifier.weights:
        trains = stage_of(weight.path.partition("/")[0]) in {"stage3", "head"}
        updates = batchnorm == "update" and STATISTICS.fullmatch(weight.path)
        assert np.array_equal(weight.numpy(), before[weight.path]) != bool(trains or updates), weight.path


def test_updating_batchnorm_normalizes_with_the_statistics_of_the_batch():
    classifier = build()
    batchnorm = classifier.get_layer("stem_bn")
    x = np.random.default_rng(0).normal(5, 3, (8, 4, 4, 16)).astype("float32")
    freeze(classifier, mode="fixed_feature", batchnorm="update")
    assert abs(float(np.mean(batchnorm(x, training=True)))) < 1e-3
    freeze(classifier, mode="fixed_feature")
    assert float(np.mean(batchnorm(x, training=True))) > 1


def test_freeze_forgets_what_was_frozen_before():
    classifier = build()
    freeze(classifier, mode="fixed_feature", batchnorm="update")
    freeze(classifier, mode="partial", through="stage1")
    fresh = build()
    freeze(fresh, mode="partial", through="stage1")
    assert [w.path for w in classifier.trainable_weights] == [w.path for w in fresh.trainable_weights]
    freeze(classifier, mode="full_network")
    assert parameter_counts(classifier)[0] == parameter_counts(build())[0]


def test_a_loaded_classifier_can_be_frozen_again(tmp_path):
    classifier = build()
    freeze(classifier, mode="fixed_feature", batchnorm="update")
    classifier.save(tmp_path / "classifier.keras")
    loaded = keras.saving.load_model(tmp_path / "classifier.keras", safe_mode=True)
    freeze(loaded, mode="fixed_feature", batchnorm="update")
    assert [weight.path for weight in loaded.trainable_weights] == ["logits/kernel", "logits/bias"]
    assert loaded.get_layer("stem_bn").trainable


def test_stages_are_in_order_and_complete():
    names = [f"stage{number}_dense" for number in (10, 2, 1)]
    x = images = keras.Input((4,), name="images")
    for name in ["head_hidden1", *names, "stem_dense"]:
        x = keras.layers.Dense(4, name=name)(x)
    classifier = keras.Model(images, keras.layers.Dense(2, name="logits")(keras.layers.ReLU(name="extra")(x)))
    assert list(stages(classifier)) == ["stem", "stage1", "stage2", "stage10", "head"]
    assert [layer.name for layer in stages(classifier)["head"]] == ["head_hidden1", "logits"]


def test_parameter_counts_include_moving_statistics_only_in_the_total():
    images = keras.Input((8, 8, 3), name="images")
    x = keras.layers.Conv2D(4, 3, use_bias=False, name="stem_conv")(images)
    x = keras.layers.BatchNormalization(name="stem_bn")(x)
    features = keras.layers.GlobalAveragePooling2D(name="features")(x)
    classifier = keras.Model(images, keras.layers.Dense(2, name="logits")(features))
    assert parameter_counts(classifier) == (108 + 8 + 10, 108 + 16 + 10)
    freeze(classifier, mode="fixed_feature", batchnorm="update")
    assert parameter_counts(classifier) == (10, 108 + 16 + 10)


def test_freeze_reaches_into_nested_models():
    inside = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(4), keras.layers.BatchNormalization(), keras.layers.Dense(3)]
    )
    images = keras.Input((4,), name="images")
    features = keras.layers.Identity(name="features")(inside(images))
    classifier = keras.Model(images, keras.layers.Dense(2, name="logits")(features))
    freeze(classifier, mode="fixed_feature", batchnorm="update")
    assert [weight.path for weight in classifier.trainable_weights] == ["logits/kernel", "logits/bias"]
    assert inside.layers[1].trainable


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "full_netwrok"}, r"'full_netwrok'.*Did you mean 'full_network'"),
        ({"mode": "partial", "through": "layer2"}, r"'layer2'.*Valid: stage1, stage2, stage3, stem"),
        ({"mode": "partial", "through": "head"}, r"'head'.*Valid: stage1, stage2, stage3, stem"),
        ({"mode": "partial"}, r"mode='partial', through=None"),
        ({"mode": "fixed_feature", "through": "stage1"}, r"mode='fixed_feature', through='stage1'"),
        ({"mode": "fixed_feature", "batchnorm": "train"}, r"'train'.*Valid: frozen, update"),
    ],
)
def test_wrong_arguments_are_refused_by_value_and_change_nothing(arguments, message):
    classifier = build()
    classifier.get_layer("stem_conv").trainable = False
    with pytest.raises(UserError, match=message):
        freeze(classifier, **arguments)
    assert [layer.name for layer in classifier.layers if not layer.trainable] == ["stem_conv"]


def test_layers_without_a_stage_are_refused_by_name():
    images = keras.Input((4,), name="images")
    x = keras.layers.Dense(3, name="encoder")(keras.layers.Normalization(name="normalization")(images))
    classifier = keras.Model(images, keras.layers.Dense(2, name="logits")(keras.layers.Dense(3, name="stage0_fc")(x)))
    with pytest.raises(
        UserError, match="name: encoder, stage0_fc; stages found: head. Use .* fixed_feature or full_network"
    ):
        stages(classifier)
    with pytest.raises(UserError, match="without it; its last layers are .*stage0_fc, logits"):
        freeze(classifier, mode="fixed_feature")
    freeze(classifier, mode="full_network")


def test_quantized_weights_cannot_be_trained():
    images = keras.Input((4,), name="images")
    x = keras.layers.Dense(3, name="features")(images)
    classifier = keras.Model(images, keras.layers.Dense(2, name="logits")(x))
    classifier.get_layer("features").quantize("int8")
    for mode, through in (("full_network", None), ("partial", "stem")):
        with pytest.raises(UserError, match=f"mode='{mode}'.*quantized layers: features. Use fixed_feature"):
            freeze(classifier, mode=mode, through=through)
    freeze(classifier, mode="fixed_feature")
