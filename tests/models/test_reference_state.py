"""Conversion between classifiers and PyTorch states: parity with the reference's outputs, names, layouts, errors."""

import json
import lzma
import pathlib
import re

import keras
import numpy as np
import pytest
from weights_rule import MEAN, STD, images, weight

from robust_tf.errors import UserError
from robust_tf.models import (
    ARCHITECTURES,
    build_classifier,
    load_reference_state,
    reference_architecture,
    reference_normalization,
    reference_num_classes,
    to_reference_state,
)

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
REFERENCE_KEYS = json.loads(lzma.decompress((FIXTURES / "reference_keys.json.xz").read_bytes()))
FAST = ("resnet18", "shufflenet_v2_x1_0")


def bare_state(architecture: str) -> dict[str, np.ndarray]:
    """Returns a checkpoint of the reference with 1000 classes, by core key."""
    keys = REFERENCE_KEYS[architecture].items()
    return {key: weight(key, tuple(shape), architecture=architecture) for key, shape in keys}


def wrapped_state(state: dict[str, np.ndarray], *, extra: str) -> dict[str, np.ndarray]:
    """Returns a state as saved by the reference's attacker in DataParallel; torchvision's networks add "model."."""
    mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (MEAN, STD))
    return (
        {"module.normalizer.new_mean": mean, "module.normalizer.new_std": std}
        | {f"module.model.{extra}{key}": array for key, array in state.items()}
        | {"module.attacker.normalize.new_mean": mean, "module.attacker.normalize.new_std": std}
        | {f"module.attacker.model.{extra}{key}": array for key, array in state.items()}
    )


def small(architecture: str = "resnet8", num_classes: int = 3) -> keras.Model:
    return build_classifier(architecture, num_classes, image_size=8, mean=MEAN, std=STD)


def small_state(architecture: str = "resnet8", num_classes: int = 3) -> dict[str, np.ndarray]:
    state = to_reference_state(small(architecture, num_classes))
    return {key: weight(key, array.shape) for key, array in state.items()}


def slow(architecture: str):
    return pytest.param(architecture, marks=pytest.mark.slow)


@pytest.mark.parametrize("architecture", [name if name in FAST else slow(name) for name in REFERENCE_KEYS])
def test_logits_and_features_equal_the_reference(architecture):
    state = bare_state(architecture)
    extra = "" if "resnet" in architecture else "model."
    wrapped = wrapped_state(state, extra=extra)
    assert reference_architecture(wrapped) == architecture
    mean, std = reference_normalization(wrapped)
    num_classes = reference_num_classes(wrapped, architecture)
    classifier = build_classifier(architecture, num_classes, image_size=224, mean=mean, std=std)
    load_reference_state(classifier, wrapped)

    both = keras.Model(classifier.input, [classifier.get_layer("features").output, classifier.output])
    features, logits = both(images())
    with np.load(FIXTURES / "reference_outputs.npz") as expected:
        np.testing.assert_allclose(features.numpy()[:, ::20], expected[f"{architecture}/features"], atol=2e-4, rtol=0)
        np.testing.assert_allclose(logits.numpy()[:, ::20], expected[f"{architecture}/logits"], atol=2e-4, rtol=0)

    same_state(to_reference_state(classifier), state)


def loaded(architecture: str) -> tuple[keras.Model, dict[str, np.ndarray]]:
    """Returns a small classifier and the state that was loaded into it, and checks that the classifier returns it."""
    state = small_state(architecture)
    classifier = small(architecture)
    load_reference_state(classifier, state)
    same_state(to_reference_state(classifier), state)
    assert reference_architecture(state) == architecture
    return classifier, state


def same_state(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for key, array in expected.items():
        assert actual[key].dtype == array.dtype, key
        np.testing.assert_array_equal(actual[key], array, err_msg=key)


@pytest.mark.parametrize("architecture", ["resnet8", "resnet20"])
def test_networks_without_a_reference_keep_every_weight(architecture):
    _, state = loaded(architecture)
    assert state["layer2.0.conv1.weight"].shape == (32, 16, 3, 3)
    assert "layer2.0.shortcut.0.weight" not in state


def convolve(x: np.ndarray, kernel: np.ndarray, strides: int) -> np.ndarray:
    """PyTorch's convolution, channels first, padded by half of the kernel."""
    half = kernel.shape[-1] // 2
    x = np.pad(x, ((0, 0), (0, 0), (half, half), (half, half)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], axis=(2, 3))[:, :, ::strides, ::strides]
    return np.moveaxis(np.tensordot(windows, kernel, axes=((1, 4, 5), (1, 2, 3))), -1, 1)


def batch_norm(x: np.ndarray, state: dict[str, np.ndarray], module: str) -> np.ndarray:
    gamma, beta, mean, variance = (
        state[f"{module}.{leaf}"].reshape(1, -1, 1, 1) for leaf in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / np.sqrt(variance + 1e-5) * gamma + beta


def normalized(pixels: np.ndarray) -> np.ndarray:
    return ((pixels - np.array(MEAN)) / np.array(STD)).transpose(0, 3, 1, 2)


def test_cifar_resnet18_computes_the_function_of_its_state():
    """The function is written in NumPy with the reference's names and layouts, since there are no stored outputs."""
    classifier, state = loaded("cifar_resnet18")
    pixels = np.random.default_rng(0).random((2, 8, 8, 3)).astype(np.float32)

    x = np.maximum(batch_norm(convolve(normalized(pixels), state["conv1.weight"], 1), state, "bn1"), 0)
    for layer in range(1, 5):
        for block in range(2):
            module = f"layer{layer}.{block}"
            strides = 2 if layer > 1 and block == 0 else 1
            y = batch_norm(convolve(x, state[f"{module}.conv1.weight"], strides), state, f"{module}.bn1")
            y = batch_norm(convolve(np.maximum(y, 0), state[f"{module}.conv2.weight"], 1), state, f"{module}.bn2")
            if f"{module}.shortcut.0.weight" in state:
                x = batch_norm(
                    convolve(x, state[f"{module}.shortcut.0.weight"], strides), state, f"{module}.shortcut.1"
                )
            x = np.maximum(x + y, 0)
    logits = x.mean(axis=(2, 3)) @ state["linear.weight"].T + state["linear.bias"]
    np.testing.assert_allclose(classifier(pixels), logits, atol=2e-4, rtol=0)


@pytest.mark.slow
def test_wide_resnet_computes_the_function_of_its_state():
    classifier, state = loaded("cifar_wide_resnet28_10")
    pixels = np.random.default_rng(0).random((1, 8, 8, 3)).astype(np.float32)

    x = convolve(normalized(pixels), state["conv1.weight"], 1)
    for group in range(1, 4):
        for block in range(4):
            module = f"block{group}.layer.{block}"
            strides = 2 if group > 1 and block == 0 else 1
            activated = np.maximum(batch_norm(x, state, f"{module}.bn1"), 0)
            y = batch_norm(convolve(activated, state[f"{module}.conv1.weight"], strides), state, f"{module}.bn2")
            y = convolve(np.maximum(y, 0), state[f"{module}.conv2.weight"], 1)
            if f"{module}.convShortcut.weight" in state:
                x = convolve(activated, state[f"{module}.convShortcut.weight"], strides)
            x = x + y
    x = np.maximum(batch_norm(x, state, "bn1"), 0)
    logits = x.mean(axis=(2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    np.testing.assert_allclose(classifier(pixels), logits, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {f"module.{key}": array for key, array in state.items()},
        lambda state: {f"model.{key}": array for key, array in state.items()},
        lambda state: wrapped_state(state, extra=""),
        lambda state: wrapped_state(state, extra="model."),
        lambda state: {key: array for key, array in state.items() if not key.endswith("num_batches_tracked")},
    ],
    ids=["bare", "data_parallel", "model", "attacker", "attacker_model", "no_counters"],
)
def test_all_prefixes_are_removed(wrap):
    state = small_state()
    classifier = small()
    load_reference_state(classifier, wrap(state))
    for key, array in to_reference_state(classifier).items():
        np.testing.assert_array_equal(array, state[key], err_msg=key)


@pytest.mark.slow
def test_old_densenet_names_are_accepted():
    classifier = build_classifier("densenet161", 1000, image_size=29, mean=MEAN, std=STD)
    state = bare_state("densenet161")
    old = {re.sub(r"(denselayer\d+\.[a-z]+)([12])", r"\1.\2", key): array for key, array in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    load_reference_state(classifier, old)
    same_state(to_reference_state(classifier), state)


def test_half_precision_is_converted():
    state = small_state()
    half = {
        key: array if array.dtype == np.int64 else array.astype(np.float16)
        for key, array in wrapped_state(state, extra="").items()
    }
    classifier = small()
    load_reference_state(classifier, half)  # the mean and std are rounded, but still match the classifier
    kernel = to_reference_state(classifier)["conv1.weight"]
    np.testing.assert_array_equal(kernel, state["conv1.weight"].astype(np.float16).astype(np.float32))
    assert reference_normalization(half) == (MEAN, STD)  # the shortest decimals that round to the stored values


def test_normalization_is_found_in_either_place_or_is_none():
    wrapped = wrapped_state(small_state(), extra="")
    assert reference_normalization(wrapped) == (MEAN, STD)
    only_the_copy = {key: array for key, array in wrapped.items() if not key.startswith("module.normalizer")}
    assert reference_normalization(only_the_copy) == (MEAN, STD)
    assert reference_normalization(small_state()) is None


def test_hidden_layers_of_the_head_become_a_sequential():
    classifier = small()
    x = classifier.get_layer("features").output
    for index in (1, 2):
        x = keras.layers.Dense(64, activation="relu", name=f"head_hidden{index}")(x)
    logits = keras.layers.Dense(5, name="logits")(x)
    state = to_reference_state(keras.Model(classifier.input, logits, name="resnet8"))
    head = {key: array.shape for key, array in state.items() if key.startswith("linear")}
    assert head == {
        "linear.0.weight": (64, 64),
        "linear.0.bias": (64,),
        "linear.2.weight": (64, 64),
        "linear.2.bias": (64,),
        "linear.4.weight": (5, 64),
        "linear.4.bias": (5,),
    }


def refused(classifier: keras.Model, state: dict[str, np.ndarray], *texts: str) -> None:
    """Checks that loading fails with a message that contains the texts, and that no weight has changed."""
    before = [np.array(value) for value in classifier.get_weights()]
    with pytest.raises(UserError) as error:
        load_reference_state(classifier, state)
    for text in texts:
        assert text in str(error.value)
    for old, new in zip(before, classifier.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_missing_keys_are_named():
    state = small_state()
    del state["layer3.0.bn2.running_var"]
    del state["bn1.bias"]
    refused(small(), state, "2 missing: bn1.bias, layer3.0.bn2.running_var")


def test_only_the_first_of_many_keys_are_named():
    state = {key: array for key, array in small_state().items() if not key.startswith("layer1")}
    refused(small(), state, "10 missing: layer1.0.bn1.bias, layer1.0.bn1.running_mean, layer1.0.bn1.running_var and 7")


def test_left_over_keys_are_named():
    state = small_state() | {"layer9.0.conv1.weight": np.zeros((1, 1, 3, 3), np.float32)}
    refused(small(), state, "1 left over: layer9.0.conv1.weight")


def test_another_shape_is_named():
    state = small_state()
    state["conv1.weight"] = state["conv1.weight"][:, :, :1]
    refused(small(), state, "1 of another shape: conv1.weight (16, 3, 1, 3), not (16, 3, 3, 3)")


def test_integers_are_refused_as_weights():
    state = small_state()
    state["conv1.weight"] = state["conv1.weight"].astype(np.int32)
    refused(small(), state, "conv1.weight (int32)", "damaged or edited")


def test_another_number_of_classes_is_named():
    refused(small(), small_state(num_classes=7), "resnet8 with 3 classes", "architecture=resnet8 with num_classes=7")


def test_another_architecture_is_named():
    refused(small(), small_state("resnet20", 7), "resnet8", "architecture=resnet20 with num_classes=7")
    refused(small(), {"weight": np.zeros((2, 2), np.float32)}, "1 left over: weight", "No other architecture fits")


def test_a_weight_that_is_stored_twice_is_refused():
    state = small_state()
    refused(small(), state | {"module.conv1.weight": state["conv1.weight"]}, "module.conv1.weight for conv1.weight")


def test_another_normalization_is_refused():
    wrapped = wrapped_state(small_state(), extra="")
    classifier = build_classifier("resnet8", 3, image_size=8, mean=MEAN, std=(0.229, 0.224, 0.226))
    refused(classifier, wrapped, "Received: std=(0.229, 0.224, 0.225) in the checkpoint", "0.226)")


def test_the_number_of_classes_needs_the_head():
    assert reference_num_classes(small_state(num_classes=7), "resnet8") == 7
    with pytest.raises(
        UserError, match=r"'fc.weight'. Received: architecture=resnet18, keys bn1.bias, .*more. It fits"
    ):
        reference_num_classes(small_state(), "resnet18")
    with pytest.raises(UserError, match="'resnet19'"):
        reference_num_classes(small_state(), "resnet19")


def test_a_classifier_of_unknown_architecture_is_refused():
    classifier = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)], name="perceptron")
    with pytest.raises(UserError, match="'perceptron'"):
        to_reference_state(classifier)


def test_a_layer_without_counterpart_is_refused():
    classifier = small()
    logits = keras.layers.Dense(2, name="extra")(classifier.output)
    with pytest.raises(UserError, match="'extra'"):
        to_reference_state(keras.Model(classifier.input, logits, name="resnet8"))


def test_head_and_number_of_parameters_distinguish_all_architectures():
    marks = {
        (entry.reference_module("logits"), entry.feature_dim, entry.parameters) for entry in ARCHITECTURES.values()
    }
    assert len(marks) == len(ARCHITECTURES)


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "net.", "ema_model.", "module._orig_mod.", "ema_model.module.net.model."]
)
def test_prefixes_of_other_training_code_are_removed(prefix):
    state = to_reference_state(small())
    loaded = small()
    load_reference_state(
        loaded, {prefix + key: array + 1 for key, array in state.items()} | {"n_averaged": np.array(3)}
    )
    for key, array in to_reference_state(loaded).items():
        if not key.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(array, state[key] + 1, err_msg=key)


def test_unknown_keys_are_listed_briefly():
    state = {f"student.{'x' * 5000}{n}.weight": np.zeros((2, 2), np.float32) for n in range(50)}
    with pytest.raises(UserError, match="holds no head .*keys student.xxx.* and 47 more") as caught:
        reference_num_classes(state, "resnet8")
    assert len(str(caught.value)) < 500


def test_a_normalization_must_have_one_number_for_each_channel():
    state = {"new_mean": np.zeros(100_000, np.float32), "new_std": np.ones(100_000, np.float32)}
    with pytest.raises(UserError, match=r"one number for each channel. Received: float32 of shape \(100000,\)"):
        reference_normalization(state)


def test_a_head_with_few_columns_does_not_build_a_large_classifier():
    with pytest.raises(UserError, match=r"in rows of 64. Received: uint8 of shape \(1000000, 1\)"):
        reference_num_classes({"linear.weight": np.zeros((10**6, 1), np.uint8)}, "resnet8")
