"""The cascade of attacks: its order, interruptions, batches, wrong arguments, AutoAttack and the warnings."""

import json
import math

import numpy as np
import pytest
import tensorflow as tf
from small_models import assert_in_ball, small_batch, small_network, without_gradients

from robust_tf.attacks import ATTACKS, CascadeState, CompiledAttacks, attacks_of_version, autoattack, cascade
from robust_tf.attacks import compiled as compiled_module
from robust_tf.attacks import warning_flags as flags
from robust_tf.attacks.losses import with_classes
from robust_tf.attacks.seeds import image_seeds
from robust_tf.errors import UserError

ARGUMENTS = {"attacks": ["fgsm", "pgd", "apgd-ce"], "norm": "l2", "epsilon": 0.35, "batch_size": 10, "seed": 3}


@pytest.fixture(scope="module")
def case():
    """A compiled model, 24 images and their labels, two of which are wrong."""
    model = small_network()
    images, labels = small_batch(model)
    labels[[3, 11]] = (labels[[3, 11]] + 1) % 5
    return CompiledAttacks(model, "l2"), images, labels


def last(states):
    *_, state = states
    return state


def verdict(state):
    return state.felled_by, state.predictions, state.warnings


def test_each_image_falls_to_the_first_attack_that_succeeds(case):
    compiled, images, labels = case
    states = list(cascade(compiled, images, labels, keep=range(24), **ARGUMENTS))
    state = states[-1]
    assert state.done and not any(before.done for before in states[:-1])
    assert [index for index, name in enumerate(state.felled_by) if name == "clean"] == [3, 11]
    accuracies = [state.accuracy_after(name) for name in ("clean", *ARGUMENTS["attacks"])]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] == 22 / 24 and 0 < accuracies[-1] < accuracies[1] < accuracies[0]
    assert state.robust_accuracy == accuracies[-1] == np.mean(state.robust)
    # Only images that resist are given to the next attack.
    given = {before.attack: before.images_to_do for before in states}
    assert [given[position] for position in range(4)] == [24, *(round(share * 24) for share in accuracies[:3])]
    images_adv = np.stack([state.kept[number] for number in range(24)])
    assert_in_ball(images_adv, images, "l2", 0.35)
    predictions = compiled.model(images_adv).numpy().argmax(axis=1)
    np.testing.assert_array_equal(predictions == labels, state.robust)
    np.testing.assert_array_equal(predictions, state.predictions)


def test_an_interrupted_run_ends_with_the_same_result(case):
    compiled, images, labels = case
    states = list(cascade(compiled, images, labels, keep=[0, 5], **ARGUMENTS))
    for stop in range(len(states)):
        stored = CascadeState.from_json(json.loads(json.dumps(states[stop].to_json())))
        resumed = last(cascade(compiled, images, labels, keep=[0, 5], state=stored, **ARGUMENTS))
        assert verdict(resumed) == verdict(states[-1])
        for number in (0, 5):
            np.testing.assert_array_equal(resumed.kept[number], states[-1].kept[number])


def test_the_result_of_an_image_does_not_depend_on_its_batch(case):
    compiled, images, labels = case
    arguments = {**ARGUMENTS, "attacks": ["apgd-ce", "square"], "epsilon": 0.3}
    together = last(cascade(compiled, images, labels, **arguments))
    other = last(cascade(compiled, images, labels, **{**arguments, "batch_size": 7}))
    assert other.felled_by == together.felled_by
    half = np.arange(1, 24, 2)
    part = last(cascade(compiled, images[half], labels[half], image_ids=half, **arguments))
    assert part.felled_by == tuple(together.felled_by[i] for i in half)


def test_a_long_attack_gets_fewer_images_at_once(case, monkeypatch):
    compiled, images, labels = case
    arguments = {**ARGUMENTS, "attacks": ["pgd", "square"], "epsilon": 0.1, "batch_size": 20}
    whole = list(cascade(compiled, images, labels, **arguments))
    assert compiled.images_at_once("square", (28, 28, 3), batch_size=128) == 51
    assert compiled.images_at_once("square", (224, 224, 3), batch_size=128) == 8
    assert compiled.images_at_once("square", (224, 224, 3), batch_size=5) == 5
    assert compiled.images_at_once("pgd", (28, 28, 3), batch_size=128) == 128
    with_xla = CompiledAttacks(compiled.model, "l2", jit_compile=True)
    assert with_xla.images_at_once("square", (224, 224, 3), batch_size=128) == 128
    # As many as PGD may take 17 of. Square makes 83 times as many passes, so it gets the least, 8.
    monkeypatch.setattr(compiled_module, "_PASSES_TIMES_PIXELS", 17 * 60 * 8 * 8)
    parts = list(cascade(compiled, images, labels, **arguments))
    assert [state.images_done for state in parts if state.running == "pgd"][:2] == [0, 17]
    assert [state.images_done for state in parts if state.running == "square"][:2] == [0, 8]
    assert len(parts) > len(whole) and verdict(parts[-1]) == verdict(whole[-1])


@pytest.mark.slow
def test_a_second_run_traces_no_attack_again(case):
    _, images, labels = case
    traces = []

    def counted(x):
        traces.append(None)
        return network(x)

    network = small_network()
    compiled = CompiledAttacks(counted, "l2")
    arguments = {**ARGUMENTS, "attacks": ["pgd", "square"]}
    list(cascade(compiled, images, labels, **arguments))
    before = len(traces)
    # With another radius, batch size and number of images, only the small graph of the warnings is new.
    calls_of_flags = 2
    list(cascade(compiled, images[:17], labels[:17], **{**arguments, "epsilon": 0.1, "batch_size": 6}))
    assert len(traces) <= before + calls_of_flags


def test_a_run_in_which_every_clean_prediction_is_wrong_ends_at_once(case):
    compiled, images, labels = case
    wrong = (compiled.model(images).numpy().argmax(axis=1) + 1) % 5
    state = last(cascade(compiled, images, wrong, **ARGUMENTS))
    assert state.done and set(state.felled_by) == {"clean"} and state.robust_accuracy == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attacks": ["pdg"]}, "'pdg'. Did you mean 'pgd'"),
        ({"attacks": ["pgd", "pgd"]}, "once. Received: pgd, pgd"),
        ({"norm": "l1"}, "'l1'"),
        ({"norm": "linf"}, "compiled for norm 'l2'"),
        ({"epsilon": math.nan}, "epsilon=nan"),
        ({"epsilon": -0.1}, "epsilon=-0.1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"image_ids": [1] * 24}, "24 different integers"),
    ],
)
def test_wrong_arguments_are_refused_by_value(case, change, message):
    compiled, images, labels = case
    with pytest.raises(UserError, match=message):
        list(cascade(compiled, images, labels, **{**ARGUMENTS, **change}))


def test_wrong_images_and_labels_are_refused_by_value(case):
    compiled, images, labels = case
    for changed, message in (
        ((images * 255, labels), "values from .* to 25.*Divide 0-255"),
        ((images - 0.5, labels), "values from -0"),
        ((np.full_like(images, math.nan), labels), "nan"),
        ((images[0], labels), r"shape \(8, 8, 1\)"),
        ((images[:0], labels[:0]), "nothing to attack"),
        ((images, labels + 3), r"0\.\.4"),
        ((images, labels[:5]), r"shape \(5,\)"),
    ):
        with pytest.raises(UserError, match=message):
            list(cascade(compiled, *changed, **ARGUMENTS))


def test_nan_logits_are_refused_with_the_number_of_the_image(case):
    _, images, labels = case
    network = small_network()

    def sick(x):
        return tf.where(
            tf.reduce_all(x[:, :1, :1, 0] == images[7, 0, 0, 0], axis=(1, 2))[:, None], math.nan, network(x)
        )

    with pytest.raises(UserError, match="NaN for 1 of 4 images; the first is image 107"):
        list(cascade(sick, images, labels, image_ids=np.arange(100, 124), **{**ARGUMENTS, "batch_size": 4}))


def test_the_state_of_another_run_is_refused(case):
    compiled, images, labels = case
    state = next(iter(cascade(compiled, images, labels, **ARGUMENTS)))
    for change, message in (
        ({"epsilon": 0.5}, "epsilon: 0.35 -> 0.5"),
        ({"seed": 4}, "seed: 3 -> 4"),
        ({"attacks": ["pgd"]}, "attacks"),
    ):
        with pytest.raises(UserError, match=message):
            list(cascade(compiled, images, labels, state=state, **{**ARGUMENTS, **change}))
    with pytest.raises(UserError, match="digest"):
        list(cascade(compiled, images[::-1], labels, state=state, **ARGUMENTS))


@pytest.mark.parametrize("part", [{"predictions": [0]}, {"felled_by": ["pgd"]}, {"attack": -1}, {"images_done": "3"}])
def test_a_state_whose_parts_do_not_fit_is_refused(case, part):
    compiled, images, labels = case
    content = next(iter(cascade(compiled, images, labels, **ARGUMENTS))).to_json()
    with pytest.raises(UserError, match="its parts do not fit together"):
        CascadeState.from_json({**content, **part})


@pytest.mark.parametrize("content", [None, [], {}, {"run": {}}, {"felled_by": 3, "kept": {}}, "clean"])
def test_content_that_is_not_a_state_is_refused(content):
    with pytest.raises(UserError, match="not the state of a cascade"):
        CascadeState.from_json(content)


# --- AutoAttack ---


def test_the_versions_have_the_published_attacks():
    assert attacks_of_version("standard") == ("apgd-ce", "apgd-t", "fab-t", "square")
    assert set(attacks_of_version("plus")) <= set(ATTACKS) and set(attacks_of_version("rand")) <= set(ATTACKS)
    assert attacks_of_version("custom", ["pgd"]) == ("pgd",)
    for arguments, message in (
        (("standart",), "'standart'. Did you mean 'standard'"),
        (("custom",), "none"),
        (("standard", ["pgd"]), "version='standard'"),
    ):
        with pytest.raises(UserError, match=message):
            attacks_of_version(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_makes_the_forward_passes_that_the_table_says(name):
    """The passes are counted on a model that resists every attack; a pass with its gradient counts as three."""
    forward = [0]

    def count() -> None:
        forward[0] += 1

    def model(images: tf.Tensor) -> tf.Tensor:
        with tf.control_dependencies([tf.py_function(count, [], [])]):
            flat = tf.reshape(images, [-1, 12])
        return tf.one_hot(tf.zeros_like(flat[:, 0], tf.int32), 10) * 100.0 + flat[:, :10]

    compiled = CompiledAttacks(with_classes(model, 10), "l2")
    images, labels = np.full((1, 2, 2, 3), 0.5, np.float32), np.zeros(1, np.int32)
    _, logits = compiled.attack(name, images, labels, epsilon=0.1, seeds=image_seeds(0, name, np.arange(1)))
    assert logits.argmax() == 0
    assert forward[0] * 0.95 <= ATTACKS[name].forward_passes <= forward[0] * 3


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_autoattack_is_at_least_as_strong_as_restarted_pgd(norm):
    model = small_network()
    images, labels = small_batch(model)
    epsilon = {"linf": 0.05, "l2": 0.3, "l1": 1.5}[norm]
    result = autoattack(model, images, labels, norm=norm, epsilon=epsilon)
    assert_in_ball(result.images_adv, images, norm, epsilon)
    right = model(result.images_adv).numpy().argmax(axis=1) == labels
    np.testing.assert_array_equal(right, result.robust)
    assert 0 < result.robust.mean() < 1
    assert result.warnings == {}
    if norm != "l1":
        attack = {"attacks": ["pgd-100x10"], "version": "custom"}
        pgd = autoattack(model, images, labels, norm=norm, epsilon=epsilon, **attack)
        assert result.robust.mean() <= pgd.robust.mean()


@pytest.mark.slow
@pytest.mark.parametrize("version", ["plus", "rand"])
def test_the_versions_plus_and_rand_run(version):
    model = small_network()
    images, labels = small_batch(model, count=6)
    result = autoattack(model, images, labels, norm="linf", epsilon=0.05, version=version)
    assert 0 < result.robust.mean() < 1
    assert_in_ball(result.images_adv, images, "linf", 0.05)


# --- warnings ---


def warnings_of(model, attacks=("apgd-ce", "apgd-t")):
    images = np.random.default_rng(0).random((16, 8, 8, 1)).astype(np.float32)
    losses = {ATTACKS[name].loss for name in attacks} - {None}
    return set(flags.find_warnings(model, images, np.zeros(16, np.int32), losses=losses))


def test_a_sound_model_raises_no_flag():
    assert warnings_of(small_network()) == set()


@pytest.mark.filterwarnings("ignore:The model has no gradient:robust_tf.errors.AttackWarning")
def test_each_fault_raises_its_flag():
    network = small_network()
    assert warnings_of(small_network(3)) == {"few_classes"}
    assert warnings_of(small_network(3), attacks=("apgd-ce", "square")) == set()
    assert warnings_of(lambda x: tf.nn.softmax(network(x))) == {"probabilities"}
    assert warnings_of(without_gradients(network)) == {"zero_gradients"}
    assert warnings_of(lambda x: tf.stop_gradient(network(x))) == {"zero_gradients"}
    assert warnings_of(lambda x: network(x + tf.random.normal(tf.shape(x), stddev=0.1))) == {"randomness"}


def test_the_share_of_zero_gradients_is_counted():
    network = small_network()

    def half(x):
        return tf.where((tf.range(tf.shape(x)[0]) % 4 == 0)[:, None], tf.stop_gradient(network(x)), network(x))

    images, labels = small_batch(network, count=8)
    assert flags.zero_gradient_share(half, tf.constant(images), tf.constant(labels)) == 0.25


def test_square_beating_the_attacks_before_it_is_flagged_and_stored():
    model = without_gradients(small_network())
    images, labels = small_batch(model)
    states = cascade(model, images, labels, attacks=["pgd", "square"], norm="linf", epsilon=0.1, batch_size=24)
    state = last(states)
    assert {"zero_gradients", "square_beats_gradients"} == set(state.warnings)
    assert CascadeState.from_json(state.to_json()).warnings == state.warnings
    assert flags.square_beats_the_others(["clean", "pgd", "", ""] * 200 + ["square"]) == {}


def test_square_alone_beats_no_attack():
    model = small_network()
    images, labels = small_batch(model)
    state = last(cascade(model, images, labels, attacks=["square"], norm="linf", epsilon=0.1))
    assert "square" in state.felled_by and state.warnings == {}


def test_autoattack_issues_its_flags_as_warnings():
    network = small_network()
    images, labels = small_batch(network)
    attack = {"norm": "linf", "epsilon": 0.05, "version": "custom", "attacks": ["fgsm"]}
    with pytest.warns(UserWarning, match="look like probabilities") as issued:
        result = autoattack(lambda x: tf.nn.softmax(network(x)), images, labels, **attack)
    assert [str(warning.message) for warning in issued] == list(result.warnings.values())
