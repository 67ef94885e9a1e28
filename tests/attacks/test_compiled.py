"""Attacks that XLA compiles: the same verdicts as without it, one compilation for each attack, and ways out."""

import os
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from small_models import small_batch, small_network

from robust_tf.attacks import ATTACKS, CascadeState, CompiledAttacks, attacks_of_version, autoattack, cascade, seeds
from robust_tf.attacks import compiled as compiled_module
from robust_tf.attacks.loops import for_accelerator, repeat_while_resisting
from robust_tf.attacks.seeds import image_seeds
from robust_tf.errors import UserError

# At these radii some of the images resist every attack.
EPSILONS = {"linf": 0.04, "l2": 0.25, "l1": 1.2}
# The attacks that evaluations mostly use, each with one norm. The others are slow tests, because XLA takes seconds to
# compile each of them: every other attack once, and all attacks of AutoAttack's standard version with l1.
USUAL = [("fgsm", "linf"), ("pgd", "l2"), ("apgd-ce", "linf"), ("apgd-t", "l2"), ("fab-t", "linf"), ("square", "l2")]
OTHERS = [
    ("pgd-100x10", "linf"),
    ("apgd-dlr", "l2"),
    ("apgd-ce-x5", "l2"),
    ("apgd-dlr-x5", "linf"),
    ("fab-x5", "l2"),
    ("apgd-ce-rand", "linf"),
    ("apgd-dlr-rand", "l1"),
    *((name, "l1") for name in attacks_of_version("standard")),
]


def test_every_attack_is_compared_with_xla():
    assert {name for name, _ in [*USUAL, *OTHERS]} == set(ATTACKS)


@pytest.fixture(scope="module")
def case():
    """A model, 24 images and their labels, two of which are wrong."""
    model = small_network()
    images, labels = small_batch(model)
    labels[[3, 11]] = (labels[[3, 11]] + 1) % 5
    return model, images, labels


def last(states):
    *_, state = states
    return state


def assert_the_same_with_xla(case, name, norm):
    model, images, labels = case

    def results_of(compiled, count):
        images_adv, logits = compiled.attack(
            name,
            images[:count],
            labels[:count],
            epsilon=EPSILONS[norm],
            seeds=image_seeds(0, name, np.arange(count)),
        )
        return images_adv, logits.argmax(axis=1) == labels[:count]

    compiled, with_xla = (CompiledAttacks(model, norm, jit_compile=jit_compile) for jit_compile in (False, True))
    for each in (compiled, with_xla):
        each.logits(images)
    plain, resists = results_of(compiled, 11)
    images_adv, resists_xla = results_of(with_xla, 11)
    np.testing.assert_array_equal(resists_xla, resists)
    assert not resists[3] and resists.any()
    # Most images fall within a few steps. In the hundreds of steps on an image that resists, rounding can send another
    # way a random search, or steps along the signs of a gradient of nearly zero. The DLR loss is flat where the label
    # has the third highest logit. In l1, which starts at three times the radius, this happens to images that fall.
    moved = np.abs(images_adv - plain).max(axis=(1, 2, 3)) > 1e-5
    assert moved.sum() <= 3
    if (name, norm) != ("apgd-dlr-rand", "l1"):
        assert not (moved & ~resists).any()
    # What fills up a batch changes nothing, not even the rounding.
    partial, resists_partial = results_of(with_xla, 5)
    np.testing.assert_array_equal(partial, images_adv[:5])
    np.testing.assert_array_equal(resists_partial, resists[:5])
    assert (compiled.sizes(name), with_xla.sizes(name)) == ([], [11])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "norm"), USUAL)
def test_an_attack_gives_the_same_result_with_xla(case, name, norm):
    assert_the_same_with_xla(case, name, norm)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "norm"), OTHERS)
def test_each_other_attack_gives_the_same_result_with_xla(case, name, norm):
    assert_the_same_with_xla(case, name, norm)


@pytest.mark.slow
def test_a_cascade_with_xla_gives_the_same_verdicts_and_can_change_over(case):
    """The last batch is a partial one. An interrupted run continues with XLA, without it, and with it again."""
    model, images, labels = case
    arguments: dict[str, Any] = {
        "attacks": ["fgsm", "pgd", "apgd-ce"],
        "norm": "l2",
        "epsilon": 0.35,
        "batch_size": 10,
        "seed": 3,
    }
    told = []
    both = [CompiledAttacks(model, "l2"), CompiledAttacks(model, "l2", jit_compile=True, tell=told.append)]
    plain, with_xla = (list(cascade(each, images, labels, **arguments)) for each in both)
    assert len(set(plain[-1].felled_by)) >= 4  # "clean", at least two attacks, and images that resist
    assert [state.felled_by for state in with_xla] == [state.felled_by for state in plain]
    assert with_xla[-1].predictions == plain[-1].predictions
    assert told[0] == "XLA compiles fgsm, pgd, apgd-ce for batches of 10 images."
    assert len(told) == 2 and told[1].startswith("XLA has compiled fgsm, pgd, apgd-ce in ")
    assert all(both[1].sizes(name) == [10] for name in arguments["attacks"])
    for stop in range(len(plain) - 1):
        state = CascadeState.from_json((plain, with_xla)[stop % 2][stop].to_json())
        for turn in range(100):
            states = cascade(both[(stop + turn + 1) % 2], images, labels, state=state, **arguments)
            state = next(states)
            if state.done:
                break
        assert (state.felled_by, state.predictions) == (plain[-1].felled_by, plain[-1].predictions)
    assert len(told) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "version"), [("linf", "standard"), ("l2", "standard"), ("l1", "standard"), ("linf", "rand")]
)
def test_autoattack_with_xla_gives_the_same_verdicts(case, norm, version):
    model, images, labels = case
    arguments = {"norm": norm, "epsilon": EPSILONS[norm], "version": version, "batch_size": 10}
    plain, with_xla = (
        autoattack(model, images, labels, jit_compile=jit_compile, **arguments) for jit_compile in (False, True)
    )
    assert with_xla.felled_by == plain.felled_by
    assert set(plain.felled_by) >= {"", "clean", attacks_of_version(version)[0]}
    fallen = ~plain.robust
    np.testing.assert_allclose(with_xla.images_adv[fallen], plain.images_adv[fallen], atol=1e-5)


@pytest.mark.slow
def test_xla_compiles_once_for_all_batches_and_radii(tmp_path):
    """XLA writes each program that it compiles into a folder, so the files are counted."""
    code = """
        import numpy as np
        from small_models import small_batch, small_network
        from robust_tf.attacks import CompiledAttacks, cascade

        model = small_network()
        images, labels = small_batch(model, count=21)
        compiled = CompiledAttacks(model, "l2", jit_compile=True)
        for epsilon, count in ((0.1, 21), (0.3, 21), (0.2, 6)):
            attack = {"attacks": ["pgd", "square"], "norm": "l2", "epsilon": epsilon, "batch_size": 8}
            *_, state = cascade(compiled, images[:count], labels[:count], **attack)
            assert len(state.seconds) == 3 and state.robust_accuracy > 0
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={
            **os.environ,
            "XLA_FLAGS": f"--xla_dump_to={tmp_path}",
            "PYTHONPATH": os.pathsep.join([*sys.path, os.path.dirname(__file__)]),
        },
        check=True,
        capture_output=True,
    )
    compilations = [path.name for path in tmp_path.iterdir() if path.name.endswith("before_optimizations.txt")]
    assert len(compilations) == 2, compilations


def test_the_sizes_of_batches_are_halves_and_a_larger_batch_is_compiled_anew(case):
    assert [compiled_module._size_for(count, largest=100) for count in (100, 51, 50, 26, 1)] == [100, 100, 50, 50, 1]
    assert compiled_module._size_for(7, largest=5) == 7
    model, images, labels = case
    compiled = CompiledAttacks(model, "linf", jit_compile=True)
    compiled.logits(images)
    for count, sizes in ((3, [3]), (2, [3]), (8, [3, 8]), (4, [3, 8])):
        number = np.arange(count)
        images_adv, _ = compiled.attack(
            "fgsm", images[:count], labels[:count], epsilon=0.1, seeds=image_seeds(0, "fgsm", number)
        )
        assert images_adv.shape == (count, 8, 8, 1)
        assert compiled.sizes("fgsm") == sizes


def test_what_fills_up_a_batch_has_a_wrong_label_and_needs_no_step():
    logits = tf.constant([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    labels = compiled_module._wrong_from(tf.constant(1), tf.constant([0, 1, 2]), logits)
    assert labels.numpy().tolist() == [0, 2, 0]


def in_python(images):
    """A model of NumPy code, which XLA cannot compile."""
    return tf.ensure_shape(tf.numpy_function(lambda x: x[:, 0, :5, 0] * 10.0, [images], tf.float32), [None, 5])


@pytest.mark.slow
def test_a_model_that_xla_cannot_compile_is_refused_or_runs_without_it(case, monkeypatch):
    images = case[1][:12]
    labels = images[:, 0, :5, 0].argmax(axis=1)
    attack = {"attacks": ["square"], "norm": "linf", "epsilon": 0.02, "batch_size": 10}
    with pytest.raises(
        UserError, match=r"XLA cannot compile square on this model. Received: .*PyFunc.*jit_compile=Fal"
    ):
        list(cascade(CompiledAttacks(in_python, "linf", jit_compile=True), images, labels, **attack))
    # As if there were a GPU, because without one "auto" does not try XLA.
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: ["a GPU"] if kind == "GPU" else [])
    told = []
    compiled = CompiledAttacks(in_python, "linf", jit_compile="auto", tell=told.append)
    assert compiled.jit_compile
    state = last(cascade(compiled, images, labels, **attack))
    assert not compiled.jit_compile
    assert len(told) == 2 and told[1].endswith("The attacks run without XLA.")
    # On a GPU, batches keep their size even without XLA.
    assert compiled.sizes("square") == [10]
    monkeypatch.undo()
    plain = last(cascade(in_python, images, labels, **attack))
    assert state.felled_by == plain.felled_by and 0 < plain.robust_accuracy < 1


@pytest.mark.slow
def test_too_little_memory_is_an_error_that_names_the_batch_size(case, monkeypatch):
    model, images, labels = case

    def too_large(*args, **kwargs):
        return lambda *values: tf.raw_ops.Empty(shape=[2**31 - 1, 2**20], dtype=tf.float32)

    monkeypatch.setattr(CompiledAttacks, "_traced", too_large)
    with pytest.raises(UserError, match="Received: batches of 8 images. Choose a smaller batch_size"):
        list(cascade(model, images, labels, attacks=["fgsm"], norm="linf", epsilon=0.1, batch_size=8))


def test_auto_leaves_xla_out_on_a_cpu_and_other_values_are_refused(case):
    if not tf.config.list_logical_devices("GPU"):
        assert not CompiledAttacks(case[0], "l2", jit_compile="auto").jit_compile
    with pytest.raises(UserError, match="Received: 'yes'"):
        CompiledAttacks(case[0], "l2", jit_compile="yes")


def test_a_loop_over_a_whole_batch_ends_when_all_have_fallen():
    limits = tf.constant([2, 7, 0, 4])
    start = {
        "limits": limits,
        "fallen": tf.equal(limits, 0),
        "steps": tf.zeros([4], tf.int32),
        "images_adv": tf.zeros([4, 1, 1, 1]),
    }

    def step(i, state):
        return {
            **state,
            "steps": state["steps"] + 1,
            "fallen": state["fallen"] | (state["limits"] <= i + 1),
            "images_adv": state["images_adv"] + 1.0,
        }

    with for_accelerator():
        state = repeat_while_resisting(step, start, 100)
    assert state["steps"].numpy().tolist() == [7, 7, 7, 7]
    # The result of an image no longer changes after it has fallen, as in a batch that shrinks.
    assert state["images_adv"][:, 0, 0, 0].numpy().tolist() == [2, 7, 0, 4]
    shrinking = repeat_while_resisting(step, start, 100)
    np.testing.assert_array_equal(shrinking["images_adv"], state["images_adv"])


@pytest.mark.parametrize("shape", [(1,), (3, 5), (8, 8, 3)])
def test_random_numbers_are_those_of_tensorflow_with_and_without_xla(shape):
    pairs = np.array([[0, 0], [1, 2], [-5, 7], [2**31 - 1, -(2**31)], [123456, 999]], np.int32)
    for draw, single, tolerance in (
        (seeds.uniform, tf.random.stateless_uniform, 0),
        (seeds.normal, tf.random.stateless_normal, 3e-6),  # sines and cosines are rounded in different ways
    ):
        expected = np.stack([single(shape, pair) for pair in pairs])
        np.testing.assert_allclose(draw(tf.constant(pairs), shape), expected, rtol=0, atol=tolerance)
        compiled = tf.function(lambda each, draw=draw: draw(each, shape), jit_compile=True)
        np.testing.assert_allclose(compiled(tf.constant(pairs)), expected, rtol=0, atol=tolerance)
        assert draw(tf.zeros([0, 2], tf.int32), shape).shape == (0, *shape)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pgd", "apgd-ce", "apgd-t"])
def test_without_early_stop_the_margins_get_lower(case, name):
    """The attack then goes on after the first wrong prediction, so that its images also fool similar models."""
    model, images, labels = case
    seeds_of_all = image_seeds(0, name, np.arange(len(images)))

    def margins(**settings):
        compiled = CompiledAttacks(model, "l2", settings={name: settings})
        _, logits = compiled.attack(name, images, labels, epsilon=1.0, seeds=seeds_of_all)
        right = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        return right - np.where(np.eye(logits.shape[1])[labels], -np.inf, logits).max(axis=1)

    early, deep = margins(), margins(early_stop=False)
    assert (early < 0).any()
    np.testing.assert_array_equal(deep < 0, early < 0)
    assert deep.mean() < early.mean() - 0.1


def test_settings_replace_the_published_ones(case):
    model, images, labels = case
    sizes = []

    def counting(pixels):
        sizes.append(len(pixels))
        return model(pixels).numpy()  # an array, so that every call is seen

    compiled = CompiledAttacks(counting, "linf", settings={"square": {"queries": 7}})
    compiled.logits(images)
    sizes.clear()
    compiled.attack("square", images[:2], labels[:2], epsilon=0.0, seeds=np.zeros((2, 2), np.int32))
    assert sum(sizes) == 2 * (1 + 1 + 7 + 1)  # the image, the start, the queries, and the result
