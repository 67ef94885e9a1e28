"""The loops of the attacks: on a CPU their steps are separate functions, with the same results."""

import os
import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_tf.attacks import pgd
from robust_tf.attacks.loops import for_accelerator, repeat, repeat_while_resisting, step_of_loop

on_cpu = pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="a GPU needs no functions")


def separate_functions(function, *arguments) -> int:
    """Returns the number of functions in the graph of a function that are not inlined."""
    graph = str(function.get_concrete_function(*arguments).graph.as_graph_def())
    return len(re.findall(r'key: "_noinline"\s+value {\s+b: true', graph))


def counted(i, state):
    return {**state, "count": state["count"] + i, "fallen": state["count"] > 3}


@on_cpu
@pytest.mark.parametrize("loop", [repeat, repeat_while_resisting])
def test_a_step_is_a_function_in_graphs_but_not_for_accelerators(loop):
    start = {"count": tf.zeros([2], tf.int32), "fallen": tf.zeros([2], tf.bool)}
    run = tf.function(lambda state: loop(counted, state, 4), autograph=False)
    assert separate_functions(run, start) == 1
    plain = tf.function(lambda state: loop(counted, state, 4), autograph=False)
    with for_accelerator():
        assert separate_functions(plain, start) == 0
    for results in (run(start), plain(start), loop(counted, start, 4)):
        assert results["count"].numpy().tolist() == [6, 6]
    assert step_of_loop(counted) is counted  # eagerly


@on_cpu
def test_one_step_is_neither_a_loop_nor_a_function():
    """It may then update variables that several replicas share, which no function may."""
    start = {"count": tf.zeros([2], tf.int32), "fallen": tf.zeros([2], tf.bool)}
    run = tf.function(lambda state: repeat(counted, state, 1), autograph=False)
    assert separate_functions(run, start) == 0


def pooled_classifier() -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = keras.layers
    parts = [layers.Conv2D(16, 3, padding="same"), layers.MaxPooling2D(3, 2), layers.Conv2D(16, 3), layers.ReLU()]
    return keras.Sequential([keras.Input((16, 16, 3)), *parts, layers.GlobalAveragePooling2D(), layers.Dense(4)])


def test_functions_do_not_change_the_adversarial_images():
    classifier, rng = pooled_classifier(), np.random.default_rng(0)
    images, labels = tf.constant(rng.random((4, 16, 16, 3), np.float32)), tf.range(4)

    def attacked():
        run = tf.function(lambda x: pgd(classifier, x, labels, norm="l2", epsilon=1.0, steps=3), autograph=False)
        return run(images).numpy()

    with for_accelerator():
        expected = attacked()
    np.testing.assert_allclose(attacked(), expected, rtol=0, atol=1e-6)  # TensorFlow may merge other operations
    assert np.abs(expected - images).max() > 0.01


@on_cpu
@pytest.mark.slow
def test_the_gradient_of_max_pooling_is_computed_by_onednn_in_every_step():
    """In the cycle of a loop, TensorFlow does not always find the pooling that belongs to a gradient."""
    program = (
        "import tensorflow as tf\n"
        "from robust_tf.attacks import pgd\n"
        "from robust_tf.models import build_classifier\n"
        "classifier = build_classifier('resnet18', 4, image_size=32, mean=(0.5,) * 3, std=(0.2,) * 3)\n"
        "images = tf.random.stateless_uniform((8, 32, 32, 3), [0, 0])\n"
        "labels = tf.zeros([8], tf.int32)\n"
        "tf.function(lambda: pgd(classifier, images, labels, norm='l2', epsilon=1.0, steps=5), autograph=False)()\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"ONEDNN_VERBOSE": "1"},
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    kernels = [line for line in (found.stdout + found.stderr).splitlines() if "exec" in line and "pooling" in line]
    if not kernels:
        pytest.skip("TensorFlow computes no pooling with oneDNN on this machine")
    assert sum("backward" in line for line in kernels) == 5
