"""Properties of every architecture: names, shapes, dtypes, sizes, gradients and initial weights."""

import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_tf.errors import UserError
from robust_tf.models import ARCHITECTURES, build_classifier
from robust_tf.models.cifar_resnet import resnet_6n
from robust_tf.models.layers import Layers, kaiming_fan_in, kaiming_fan_out, torch_default

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# Only the slow tests build these.
LARGE = {"wide_resnet50_2", "wide_resnet50_4", "densenet161", "vgg16_bn", "cifar_wide_resnet28_10"}
NEEDS_PIXELS = [name for name, entry in ARCHITECTURES.items() if entry.minimum_image_size > 1]


def build(architecture: str, num_classes: int = 3, *, image_size: int = 32) -> keras.Model:
    return build_classifier(architecture, num_classes, image_size=image_size, mean=MEAN, std=STD)


def slow(architecture: str):
    return pytest.param(architecture, marks=pytest.mark.slow)


@pytest.mark.parametrize("architecture", [slow(name) if name in LARGE else name for name in ARCHITECTURES])
def test_contract(architecture):
    classifier = build(architecture, num_classes=5)
    entry = ARCHITECTURES[architecture]
    assert classifier.name == architecture

    assert [(tensor.name, tensor.shape, tensor.dtype) for tensor in classifier.inputs] == [
        ("images", (None, 32, 32, 3), "float32")
    ]
    assert (classifier.output.shape, classifier.output.dtype) == ((None, 5), "float32")
    assert classifier.layers[1].name == "normalization"
    features = classifier.get_layer("features")
    assert features.output.shape == (None, entry.feature_dim)
    assert not features.weights
    assert classifier.layers[-1].name == "logits"
    assert classifier.layers[-1].input is features.output

    assert all(type(layer).__module__.startswith("keras.") for layer in classifier.layers)
    trainable = sum(int(np.prod(variable.shape)) for variable in classifier.trainable_variables)
    assert trainable == entry.parameters + 5 * (entry.feature_dim + 1)

    own_names = {"images", "normalization", "features", "logits"}
    stages = [layer.name.split("_")[0] for layer in classifier.layers if layer.name not in own_names]
    assert set(stages) <= {"stem", "head", *(f"stage{number}" for number in range(1, 8))}
    weighted = [layer.name.split("_")[0] for layer in classifier.layers if layer.weights][:-1]
    in_order = list(dict.fromkeys(weighted))
    numbered = [f"stage{number}" for number in range(1, len(in_order))]
    assert in_order in (["stem", *numbered], ["stem", *numbered[:-1], "head"])
    assert weighted == sorted(weighted, key=in_order.index)

    momentum = 0.9997 if architecture == "mnasnet1_0" else 0.9
    norms = [layer for layer in classifier.layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert {(layer.momentum, layer.epsilon) for layer in norms} == {(momentum, 1e-5)}


@pytest.mark.parametrize("architecture", ["resnet8", "resnet18", "shufflenet_v2_x1_0", *map(slow, NEEDS_PIXELS)])
def test_smallest_image(architecture):
    smallest = ARCHITECTURES[architecture].minimum_image_size
    images = np.full((1, smallest, smallest, 3), 0.5, np.float32)
    assert np.isfinite(build(architecture, image_size=smallest)(images)).all()
    message = f"at least {smallest} pixels.*Received: image_size={smallest - 1}, architecture={architecture}"
    with pytest.raises(UserError, match=message):
        build(architecture, image_size=smallest - 1)


@pytest.mark.parametrize("architecture", ["resnet8", *map(slow, ("resnext50_32x4d", "shufflenet_v2_x1_0", "vgg16_bn"))])
def test_odd_size_trains(architecture):
    """A loss has finite gradients for the images and all variables, in a graph, at a size that halves unevenly."""
    classifier = build(architecture, image_size=45)
    images = tf.random.stateless_uniform((2, 45, 45, 3), seed=(0, 0))

    @tf.function
    def gradients():
        with tf.GradientTape() as tape:
            tape.watch(images)
            logits = classifier(images, training=True)
            loss = tf.reduce_sum(logits * tf.constant([1.0, -2.0, 3.0]))
        return tape.gradient(loss, [images, *classifier.trainable_variables])

    for gradient, variable in zip(gradients(), [images, *classifier.trainable_variables], strict=True):
        assert gradient is not None and gradient.shape == variable.shape
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("architecture", ["resnet8", "shufflenet_v2_x1_0", *map(slow, ("resnext50_32x4d", "vgg16_bn"))])
def test_the_same_weights_work_with_every_image_size(architecture):
    """No layer depends on the image size: only the shape of the input has to be changed for another size."""
    classifier = build(architecture, image_size=96)
    config = classifier.get_config()
    config["layers"][0]["config"]["batch_shape"] = (None, 65, 65, 3)
    moved = keras.Model.from_config(config)
    moved.set_weights(classifier.get_weights())
    assert moved.input_shape == (None, 65, 65, 3)
    assert np.isfinite(moved(np.full((1, 65, 65, 3), 0.5, np.float32))).all()


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_images_and_logits_stay_float32_in_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    classifier = build("resnet8")
    assert classifier.inputs[0].dtype == "float32"
    assert classifier.get_layer("normalization").output.dtype == "float32"
    assert classifier.get_layer("stem_bn").output.dtype == policy[6:]
    assert classifier.output.dtype == "float32"
    logits = classifier(np.full((1, 32, 32, 3), 0.3, np.float32))
    assert logits.dtype == "float32" and np.isfinite(logits).all()


def test_pixels_are_clipped_and_normalized():
    classifier = build("resnet8", image_size=4)
    ends = keras.Model(classifier.input, classifier.get_layer("normalization").output)
    pixels = np.array([-1.0, 0.25, 2.0], np.float32).reshape(3, 1, 1, 1) * np.ones((3, 4, 4, 3), np.float32)
    expected = (np.clip(pixels, 0, 1) - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(ends(pixels), expected, rtol=1e-5)


def test_the_clip_passes_gradients_at_its_bounds_but_not_beyond():
    """PGD moves along the bounds 0 and 1. A gradient of 0 there would stop it."""
    classifier = build("resnet8", image_size=4)
    ends = keras.Model(classifier.input, classifier.get_layer("normalization").output)
    levels = tf.constant([-0.1, 0.0, 0.5, 1.0, 1.1])
    pixels = tf.reshape(levels, (5, 1, 1, 1)) * tf.ones((5, 4, 4, 3))
    with tf.GradientTape() as tape:
        tape.watch(pixels)
        total = tf.reduce_sum(ends(pixels))
    passed = tape.gradient(total, pixels).numpy()[:, 0, 0, 0] * STD[0]
    np.testing.assert_allclose(passed, [0, 1, 1, 1, 0], rtol=1e-5)


@pytest.mark.slow
def test_saved_classifiers_load_without_this_package(tmp_path: pathlib.Path):
    """Loads in safe mode, in a separate process. These two architectures contain all unusual layers."""
    images = np.random.default_rng(0).random((2, 32, 32, 3)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    classifiers = [build("resnet8"), build("shufflenet_v2_x1_0")]
    for classifier in classifiers:
        classifier.save(tmp_path / f"{classifier.name}.keras")
    program = (
        "import sys, keras, numpy as np\n"
        "for name in sys.argv[1:]:\n"
        "    classifier = keras.saving.load_model(name + '.keras', safe_mode=True)\n"
        "    assert classifier.name == name\n"
        "    np.save(name + '.npy', classifier(np.load('images.npy')))\n"
        "assert 'robust_tf' not in sys.modules\n"
    )
    names = [classifier.name for classifier in classifiers]
    subprocess.run([sys.executable, "-c", program, *names], cwd=tmp_path, check=True)
    for classifier in classifiers:
        logits = np.load(tmp_path / f"{classifier.name}.npy")
        np.testing.assert_allclose(logits, classifier(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("groups", [2, 6])
def test_grouped_convolution_equals_keras(groups, strides):
    images = keras.Input((5, 5, 6))
    ours = keras.Model(images, Layers().conv(images, 6, 3, name="conv", strides=strides, groups=groups))
    members = 6 // groups
    kernel = np.random.default_rng(0).standard_normal((3, 3, members, groups, members)).astype(np.float32)
    ours.set_weights([kernel.reshape(3, 3, 6, members)])

    theirs = keras.layers.Conv2D(6, 3, strides, groups=groups, use_bias=False)
    x = np.random.default_rng(1).standard_normal((2, 5, 5, 6)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    theirs.build(padded.shape)
    theirs.set_weights([kernel.reshape(3, 3, members, 6)])
    np.testing.assert_allclose(ours(x), theirs(padded), rtol=1e-4, atol=1e-5)


def test_stride_pads_both_sides():
    """A kernel that selects its upper left pixel returns the padding first; with Keras's "same" it would be pixel 0."""
    images = keras.Input((4, 4, 1))
    model = keras.Model(images, Layers().conv(images, 1, 3, name="conv", strides=2))
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[0, 0] = 1
    model.set_weights([kernel])
    x = np.arange(1, 17, dtype=np.float32).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(model(x)[0, :, :, 0], [[0, 0], [0, 6]])


@pytest.mark.parametrize(
    ("start", "groups", "deviation"),
    [
        (kaiming_fan_out, 1, (2 / (64 * 9)) ** 0.5),
        (kaiming_fan_out, 64, (2 / (64 * 9)) ** 0.5),
        (kaiming_fan_in, 1, (2 / (64 * 9)) ** 0.5),
        (kaiming_fan_in, 64, (2 / 9) ** 0.5),
        (torch_default, 4, (1 / (16 * 9) / 3) ** 0.5),
        (torch_default, 64, (1 / 9 / 3) ** 0.5),
    ],
)
def test_initial_kernels_have_the_distribution_of_pytorch(start, groups, deviation):
    images = keras.Input((8, 8, 64))
    model = keras.Model(images, Layers(kernel_start=start).conv(images, 64, 3, name="conv", groups=groups))
    kernel = np.array(model.weights[0])
    assert abs(kernel.mean()) < 6 * deviation / kernel.size**0.5
    assert np.std(kernel) == pytest.approx(deviation, rel=0.15)
    if start is torch_default:
        assert np.abs(kernel).max() <= deviation * 3**0.5


@pytest.mark.parametrize(
    ("architecture", "kernel_deviation", "kernel_bound", "bias_bound"),
    [
        ("resnet8", (1 / 64 / 3) ** 0.5, 1 / 8, 1 / 8),
        ("shufflenet_v2_x1_0", (1 / 1024 / 3) ** 0.5, 1 / 32, 1 / 32),
        ("mobilenet_v2", 0.01, 0.07, 0),
        ("mnasnet1_0", (1 / 50) ** 0.5, (3 / 50) ** 0.5, 0),
    ],
)
def test_initial_heads_have_the_distribution_of_the_reference(architecture, kernel_deviation, kernel_bound, bias_bound):
    kernel, bias = build(architecture, num_classes=50).get_layer("logits").get_weights()
    assert np.std(kernel) == pytest.approx(kernel_deviation, rel=0.05)
    assert np.abs(kernel).max() <= kernel_bound
    assert np.abs(bias).max() <= bias_bound
    assert (np.std(bias) > 0) == (bias_bound > 0)


def test_the_same_seed_gives_the_same_weights():
    first, second, other = [], [], []
    for seed, weights in ((1, first), (1, second), (2, other)):
        keras.utils.set_random_seed(seed)
        weights.extend(build("resnet8").get_weights())
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_width_of_the_small_resnet():
    images = keras.Input((16, 16, 3))
    narrow = keras.Model(images, resnet_6n(images, blocks=1, width=4))
    assert narrow.output.shape == (None, 16)
    assert not [layer.name for layer in narrow.layers if "shortcut" in layer.name and layer.weights]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"architecture": "resnet-18"}, "Received: 'resnet-18'. Did you mean 'resnet18'?"),
        ({"num_classes": 1}, "Received: num_classes=1"),
        ({"image_size": 0}, "Received: image_size=0, architecture=resnet8"),
        ({"mean": (123.7, 116.3, 103.5)}, "Received: mean=(123.7, 116.3, 103.5)"),
        ({"mean": (0.5,)}, "Received: mean=(0.5,)"),
        ({"mean": (0.5, 0.5, float("nan"))}, "nan"),
        ({"std": (0.2, 0.0, 0.2)}, "Received: std=(0.2, 0.0, 0.2)"),
        ({"std": (0.2, 0.2)}, "Received: std=(0.2, 0.2)"),
    ],
)
def test_bad_input_is_refused(changed, message):
    good = {"architecture": "resnet8", "num_classes": 3, "image_size": 8, "mean": MEAN, "std": STD}
    with pytest.raises(UserError, match=re.escape(message)):
        build_classifier(**(good | changed))


def test_channels_first_in_keras_settings_is_named():
    keras.config.set_image_data_format("channels_first")
    try:
        with pytest.raises(UserError, match="image_data_format='channels_first'.*keras.json"):
            build_classifier("resnet8", 3, image_size=8, mean=(0.5,) * 3, std=(0.2,) * 3)
    finally:
        keras.config.set_image_data_format("channels_last")
