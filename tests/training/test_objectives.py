"""TRADES, AWP, free adversarial training and the rising epsilon compared with plain versions of the papers' code."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_tf.attacks import AttackConfig
from robust_tf.attacks.threat_models import l2_norm, linf_norm
from robust_tf.config.job import JobConfig
from robust_tf.errors import UserError
from robust_tf.job.building import job_recipe, optimizer_steps_per_epoch
from robust_tf.training import AdversarialTrainer, objectives
from robust_tf.training.objectives import (
    Recipe,
    ascend_divergence,
    divergence,
    moved_perturbation,
    perturbed_weights,
    weight_perturbation,
)
from robust_tf.training.optimizers import build_optimizer
from robust_tf.training.schedules import build_schedule

CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
LINF = AttackConfig(norm="linf", epsilon=0.1, step_size=0.03, steps=4, use_best=False)
L2 = AttackConfig(norm="l2", epsilon=0.5, step_size=0.2, steps=4, use_best=False)
NO_ATTACK = AttackConfig(norm="l2", epsilon=0.0, step_size=0.0, steps=0)
HOW = ["graph", "eager", "xla"]
LEARNING_RATE = 0.1
START = 0.05  # standard deviation of TRADES' initial noise in the comparisons
SEED = 3


def new_classifier() -> keras.Model:
    """A classifier of images (8, 8, 3) with BatchNorm and without random layers."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(6, 3, name="conv"),
            keras.layers.BatchNormalization(momentum=0.9, name="bn"),
            keras.layers.Activation("tanh"),  # smooth, so that rounding errors stay small
            keras.layers.Flatten(),
            keras.layers.Dense(3, dtype="float32", name="logits"),
        ]
    )


def data(count: int = 24) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    images = rng.random((count, 8, 8, 3)).astype(np.float32)
    images[:, 0], images[:, 1] = 0.0, 1.0  # both ends of the range, as in real images
    return images, rng.integers(0, 3, count)


def batches(size: int = 8) -> list[tuple[np.ndarray, np.ndarray]]:
    images, labels = data()
    return [(images[start : start + size], labels[start : start + size]) for start in range(0, len(images), size)]


def new_trainer(classifier, attack, how="graph", optimizer=None, **options) -> AdversarialTrainer:
    options = {"seed": SEED, "unbiased_batchnorm": False, **options}
    trainer = AdversarialTrainer(classifier, attack, **options)
    optimizer = optimizer or keras.optimizers.SGD(LEARNING_RATE)
    trainer.compile(optimizer, CROSSENTROPY, metrics=["accuracy"], run_eagerly=how == "eager", jit_compile=how == "xla")
    return trainer


def assert_same_weights(ours: keras.Model, theirs: keras.Model, *, atol: float = 0.0) -> None:
    for our_weight, their_weight in zip(ours.weights, theirs.weights, strict=True):
        np.testing.assert_allclose(our_weight.numpy(), their_weight.numpy(), rtol=0, atol=atol, err_msg=our_weight.path)


# The algorithms of the papers, in the order of the authors' code.


def kl(logits, clean_logits):
    p = tf.nn.softmax(clean_logits)
    return tf.reduce_sum(p * (tf.math.log(p) - tf.nn.log_softmax(logits)), axis=1)


def noise_of(images, step):
    """The noise that the trainer draws in this step. XLA draws other numbers."""
    return tf.random.stateless_normal(images.shape, tf.constant([SEED, step], tf.int64), stddev=START)


def into_ball(perturbation, attack):
    if attack.norm == "linf":
        return tf.clip_by_value(perturbation, -attack.epsilon, attack.epsilon)
    return tf.clip_by_norm(perturbation, attack.epsilon, axes=[1, 2, 3])


def steepest(gradient, attack):
    if attack.norm == "linf":
        return tf.sign(gradient)
    return gradient / tf.norm(tf.reshape(gradient, (len(gradient), -1)), axis=1)[:, None, None, None]


def climbed(loss_of, images, start, attack):
    """PGD: gradient ascent, with each point projected onto the ball and onto [0, 1]."""
    images_adv = tf.clip_by_value(images + into_ball(start - images, attack), 0, 1)
    for _ in range(attack.steps):
        with tf.GradientTape() as tape:
            tape.watch(images_adv)
            loss = tf.reduce_sum(loss_of(images_adv))
        moved = images_adv + attack.step_size * steepest(tape.gradient(loss, images_adv), attack)
        images_adv = tf.clip_by_value(images + into_ball(moved - images, attack), 0, 1)
    return images_adv


def loss_of_batch(model, images, images_adv, labels, beta, sample_weight=None):
    """Madry's loss if `beta` is None, otherwise the loss of TRADES, in training mode."""
    if beta is None:
        return CROSSENTROPY(labels, model(images_adv, training=True), sample_weight)
    clean_logits = model(images, training=True)
    of_divergence = kl(model(images_adv, training=True), clean_logits)
    weights = np.ones(len(images), np.float32) if sample_weight is None else sample_weight
    return CROSSENTROPY(labels, clean_logits, sample_weight) + beta * tf.reduce_mean(weights * of_divergence)


def papers_step(model, images, labels, attack, noise, *, beta=None, gamma=None, sample_weight=None) -> float:
    """Takes one step of TRADES, AWP, or both; returns the loss."""
    images = tf.constant(images)
    if beta is None:
        images_adv = climbed(lambda x: -tf.math.log(_of_label(model(x), labels)), images, images, attack)
    else:
        clean_logits = model(images)
        start = images + noise
        images_adv = climbed(lambda x: kl(model(x), clean_logits), images, start, attack)
    perturbations = {}
    if gamma is not None:
        proxy = keras.models.clone_model(model)
        proxy.set_weights(model.get_weights())
        with tf.GradientTape() as tape:
            loss = -loss_of_batch(proxy, images, images_adv, labels, beta, sample_weight)
        gradients = tape.gradient(loss, proxy.trainable_weights)
        for weight, gradient in zip(model.trainable_weights, gradients, strict=True):
            if weight.name == "kernel":
                difference = -0.01 * gradient  # a step of gradient descent of the proxy network
                perturbations[weight.path] = gamma * tf.norm(weight) / tf.norm(difference) * difference
    before = {weight.path: weight.numpy() for weight in model.trainable_weights}
    for weight in model.trainable_weights:
        weight.assign_add(perturbations.get(weight.path, tf.zeros_like(weight)))
    with tf.GradientTape() as tape:
        loss = loss_of_batch(model, images, images_adv, labels, beta, sample_weight)
    for weight, gradient in zip(model.trainable_weights, tape.gradient(loss, model.trainable_weights), strict=True):
        weight.assign(before[weight.path] - LEARNING_RATE * gradient)
    return float(loss)


def _of_label(logits, labels):
    return tf.gather(tf.nn.softmax(logits), labels, batch_dims=1)


@pytest.mark.parametrize(
    ("recipe", "attack", "how"),
    [
        ({"trades_beta": 6.0}, LINF, "graph"),
        ({"trades_beta": 6.0}, L2, "graph"),
        ({"awp_gamma": 0.05}, LINF, "graph"),
        ({"awp_gamma": 0.05}, L2, "graph"),
        ({"trades_beta": 2.0, "awp_gamma": 0.05}, L2, "graph"),
        ({"trades_beta": 2.0, "awp_gamma": 0.05}, L2, "eager"),
        ({"trades_beta": 2.0, "awp_gamma": 0.05}, L2, "xla"),
    ],
    ids=lambda value: value.norm if isinstance(value, AttackConfig) else None,
)
def test_steps_equal_those_of_the_papers(recipe, attack, how, monkeypatch):
    """Compares weights, BatchNorm statistics and the loss after three steps with sample weights."""
    # With the noise of the paper the divergence is almost 0 at the start, and rounding would decide the direction.
    monkeypatch.setattr(objectives.trades, "_TRADES_START", START)
    ours, theirs = new_classifier(), new_classifier()
    trainer = new_trainer(ours, attack, how, recipe=Recipe(**recipe))
    beta, gamma = recipe.get("trades_beta"), recipe.get("awp_gamma")
    for step, (images, labels) in enumerate(batches()):
        weights = np.linspace(0.5, 2, len(images)).astype(np.float32)
        trainer.reset_metrics()
        logs = trainer.train_on_batch(images, labels, sample_weight=weights, return_dict=True)
        noise = tf.function(noise_of, jit_compile=how == "xla")(images, step)
        loss = papers_step(theirs, images, labels, attack, noise, beta=beta, gamma=gamma, sample_weight=weights)
        np.testing.assert_allclose(logs["loss"], loss, rtol=1e-4)
        assert_same_weights(ours, theirs, atol=2e-5)


def test_divergence_by_hand():
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    expected = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    found = divergence(np.log(p)[None].astype(np.float32) + 7, np.log(q)[None].astype(np.float32) - 3)
    np.testing.assert_allclose(found, [expected], rtol=1e-5)
    assert divergence(tf.constant([[1e4, -1e4]]), tf.constant([[-1e4, 1e4]])).numpy() == pytest.approx([2e4])


@pytest.mark.parametrize("use_best", [False, True])
@pytest.mark.parametrize("attack", [LINF, L2], ids=lambda attack: attack.norm)
def test_the_attack_of_trades_increases_the_divergence_within_the_ball(attack, use_best):
    images, labels = data()
    classifier = new_classifier()
    attack = AttackConfig(**{**vars(attack), "use_best": use_best})
    seed = tf.constant([0, 1])
    images_adv, logits = ascend_divergence(classifier, images, attack=attack, seed=seed)
    np.testing.assert_allclose(logits, classifier(images), atol=1e-5)
    assert divergence(logits, classifier(images_adv)).numpy().min() > 0.01
    length = {"linf": linf_norm, "l2": l2_norm}[attack.norm](images_adv - images)
    assert length.numpy().max() <= attack.epsilon + 1e-6
    assert images_adv.numpy().min() >= 0 and images_adv.numpy().max() <= 1
    # Pixels at the ends of the range change, too, because no starting point is outside the range.
    assert (np.abs(images_adv - images)[:, :2].max(axis=(1, 2, 3)) > 0).all()


def test_the_attack_of_trades_starts_with_small_gaussian_noise():
    images = np.full((4, 32, 32, 3), 0.5, np.float32)
    classifier = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Flatten(), keras.layers.Dense(3)])
    still = AttackConfig(norm="linf", epsilon=0.1, step_size=1e-9, steps=1, use_best=False)
    starts = [
        ascend_divergence(classifier, images, attack=still, seed=tf.constant([0, step]))[0] - images
        for step in range(2)
    ]
    np.testing.assert_allclose(np.std(starts), 0.001, rtol=0.03)
    assert abs(np.mean(starts)) < 5e-5 and np.abs(starts).max() > 0.003
    assert np.abs(starts[0] - starts[1]).max() > 1e-3


def test_trades_without_divergence_is_training_on_clean_images():
    trained = []
    for attack, recipe in ((L2, Recipe(trades_beta=0.0)), (NO_ATTACK, Recipe())):
        classifier = new_classifier()
        trainer = new_trainer(classifier, attack, recipe=recipe)
        for images, labels in batches():
            trainer.train_on_batch(images, labels)
        trained.append([weight.numpy() for weight in classifier.trainable_weights])
    for ours, theirs in zip(*trained, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_trades_reports_clean_and_adversarial_metrics():
    images, labels = data()
    classifier = new_classifier()
    before = classifier(images)
    trainer = new_trainer(classifier, L2, recipe=Recipe(trades_beta=6.0))
    logs = trainer.train_on_batch(images, labels, return_dict=True)
    np.testing.assert_allclose(logs["clean_loss"], CROSSENTROPY(labels, before), rtol=1e-5)
    np.testing.assert_allclose(logs["clean_accuracy"], np.mean(np.argmax(before, axis=1) == labels), rtol=1e-5)
    figures = [trainer.evaluate(images, labels, verbose=0, return_dict=True)]
    judge = new_trainer(classifier, L2)
    figures.append(judge.evaluate(images, labels, verbose=0, return_dict=True))
    assert figures[0] == pytest.approx(figures[1])  # evaluation does not depend on the objective


def test_moving_variances_are_unbiased_after_two_passes():
    """The contributions of both passes are n / (n - 1) times as large as in Keras; the old value is not scaled."""
    before, variances = 3.0, []
    for unbiased in (False, True):
        classifier = new_classifier()
        classifier.get_layer("bn").momentum = 0.5
        classifier.get_layer("bn").moving_variance.assign(np.full(6, before))
        trainer = new_trainer(classifier, L2, recipe=Recipe(trades_beta=1.0), unbiased_batchnorm=unbiased)
        trainer.train_on_batch(*batches()[0])
        variances.append(classifier.get_layer("bn").moving_variance.numpy())
    count = 8 * 6 * 6
    kept = 0.5**2 * before
    np.testing.assert_allclose(variances[1] - kept, (variances[0] - kept) * count / (count - 1), rtol=1e-4)


def test_weight_perturbation_has_the_given_relative_size_and_the_direction_of_the_gradient():
    rng = np.random.default_rng(0)
    weight, gradient = (rng.normal(size=(3, 3, 4, 5)).astype(np.float32) for _ in range(2))
    found = weight_perturbation(weight, 1e-12 * gradient, 5e-3).numpy()
    np.testing.assert_allclose(np.linalg.norm(found), 5e-3 * np.linalg.norm(weight), rtol=1e-5)
    cosine = np.sum(found * gradient) / np.linalg.norm(found) / np.linalg.norm(gradient)
    assert cosine == pytest.approx(1, abs=1e-6)
    gradient[0, 0, 0, 0] = np.inf
    for none in (gradient, np.zeros_like(gradient)):
        np.testing.assert_array_equal(weight_perturbation(weight, none, 5e-3), np.zeros_like(weight))


def test_only_trainable_kernels_are_perturbed():
    classifier = new_classifier()
    conv, logits = classifier.get_layer("conv"), classifier.get_layer("logits")
    assert [id(weight) for weight in perturbed_weights(classifier)] == [id(conv.kernel), id(logits.kernel)]
    conv.trainable = False
    assert [id(weight) for weight in perturbed_weights(classifier)] == [id(logits.kernel)]


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_awp_with_size_zero_equals_the_plain_step(how):
    """All weights and statistics are bit-equal."""
    classifiers = []
    for recipe in (Recipe(awp_gamma=0.0), Recipe()):
        classifiers.append(new_classifier())
        trainer = new_trainer(classifiers[-1], LINF, how, recipe=recipe, unbiased_batchnorm=True)
        for images, labels in batches():
            trainer.train_on_batch(images, labels)
    assert_same_weights(*classifiers)


def test_awp_starts_its_step_at_the_unperturbed_weights():
    """With learning rate 0 only the statistics change, however large the perturbation is."""
    classifier = new_classifier()
    before = [weight.numpy() for weight in classifier.trainable_weights]
    trainer = new_trainer(classifier, LINF, optimizer=keras.optimizers.SGD(0.0), recipe=Recipe(awp_gamma=0.5))
    trainer.train_on_batch(*batches()[0])
    for weight, old in zip(classifier.trainable_weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), old)
    assert np.abs(classifier.get_layer("bn").moving_mean.numpy()).max() > 0


def test_awp_waits_for_the_end_of_its_warmup():
    ours, plain = new_classifier(), new_classifier()
    trainers = [
        new_trainer(ours, LINF, recipe=Recipe(awp_gamma=0.05, awp_warmup_steps=2.0)),
        new_trainer(plain, LINF),
    ]
    differences = []
    for images, labels in batches():
        for trainer in trainers:
            trainer.train_on_batch(images, labels)
        differences.append(np.abs(ours.get_weights()[0] - plain.get_weights()[0]).max())
    assert differences[:2] == [0, 0] and differences[2] > 1e-5


def free_training(model, attack, replays, size) -> np.ndarray:
    """Runs algorithm 1 of Shafahi et al. on all `batches` of `size` images; returns the perturbation."""
    kept = np.zeros((size, 8, 8, 3), np.float32)
    for images, labels in batches(size):
        for _ in range(replays):
            perturbation = tf.constant(kept[: len(images)])
            with tf.GradientTape() as tape:
                tape.watch(perturbation)
                loss = CROSSENTROPY(labels, model(tf.clip_by_value(images + perturbation, 0, 1), training=True))
            *gradients, slope = tape.gradient(loss, [*model.trainable_weights, perturbation])
            for weight, gradient in zip(model.trainable_weights, gradients, strict=True):
                weight.assign_sub(LEARNING_RATE * gradient)
            moved = perturbation + attack.step_size * steepest(slope, attack)
            kept[: len(images)] = into_ball(moved, attack)
    return kept


FREE = {
    "linf": AttackConfig(norm="linf", epsilon=0.1, step_size=0.1, steps=1, use_best=False),
    "l2": AttackConfig(norm="l2", epsilon=0.5, step_size=0.5, steps=1, use_best=False),
}


@pytest.mark.parametrize(("norm", "how"), [("linf", "graph"), ("l2", "graph"), ("l2", "eager"), ("l2", "xla")])
def test_free_training_equals_the_algorithm_of_the_paper(norm, how):
    """The last batch is smaller and must leave the rest of the perturbation as it is."""
    attack = FREE[norm]
    ours, theirs = new_classifier(), new_classifier()
    trainer = new_trainer(ours, attack, how, recipe=Recipe(free_replays=3, free_batch_size=10))
    for images, labels in batches(10):
        trainer.train_on_batch(images, labels)
    expected = free_training(theirs, attack, replays=3, size=10)
    assert int(trainer.optimizer.iterations) == 3 * 3
    _, perturbation = trainer.state_variables
    # The sign of a gradient near zero may differ.
    assert np.mean(np.abs(perturbation.numpy() - expected) > 1e-4) < 0.001
    assert_same_weights(ours, theirs, atol=1e-4)
    length = {"linf": linf_norm, "l2": l2_norm}[norm](perturbation.value).numpy()
    assert 0.9 * attack.epsilon < length.max() <= attack.epsilon + 1e-6


def test_free_training_counts_every_step():
    """The loss is the mean over all replays; clean metrics are reported unless they are turned off."""
    images, labels = data(8)
    losses = []
    for replays in (1, 2):
        trainer = new_trainer(new_classifier(), FREE["linf"], recipe=Recipe(free_replays=replays, free_batch_size=8))
        logs = trainer.train_on_batch(images, labels, return_dict=True)
        losses.append(float(logs["loss"]))
        assert {"clean_loss", "clean_accuracy"} <= set(logs)
    other = new_trainer(
        new_classifier(), FREE["linf"], recipe=Recipe(free_replays=1, free_batch_size=8), clean_figures=False
    )
    first = other.fit(images, labels, batch_size=8, verbose=0).history
    second = other.fit(images, labels, batch_size=8, verbose=0).history
    assert set(first) == {"loss", "accuracy"}
    np.testing.assert_allclose(losses[0], CROSSENTROPY(labels, new_classifier()(images, training=True)), rtol=1e-5)
    np.testing.assert_allclose(losses, [first["loss"][0], (first["loss"][0] + second["loss"][0]) / 2], rtol=1e-4)
    assert {"clean_loss", "clean_accuracy"} <= set(other.evaluate(images, labels, verbose=0, return_dict=True))


def test_free_training_continues_exactly_from_its_variables():
    def trainer_of(classifier):
        trainer = new_trainer(
            classifier,
            FREE["linf"],
            recipe=Recipe(free_replays=2, free_batch_size=8),
            optimizer=build_optimizer("sgd", learning_rate=0.1),
        )
        trainer.optimizer.build(classifier.trainable_variables)
        return trainer

    def state_of(trainer):
        return [*trainer.classifier.variables, *trainer.optimizer.variables, *trainer.state_variables]

    whole = trainer_of(new_classifier())
    first, *rest = batches()
    whole.train_on_batch(*first)
    saved = [variable.numpy() for variable in state_of(whole)]
    for batch in rest:
        whole.train_on_batch(*batch)
    ends = {}
    for kind in ("all", "without the perturbation"):
        resumed = trainer_of(new_classifier())
        for variable, value in zip(state_of(resumed), saved, strict=True):
            variable.assign(value)
        if kind != "all":
            resumed.state_variables[1].assign(np.zeros((8, 8, 8, 3)))
        for batch in rest:
            resumed.train_on_batch(*batch)
        ends[kind] = [variable.numpy() for variable in state_of(resumed)]
    expected = [variable.numpy() for variable in state_of(whole)]
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(ends["all"], expected, strict=True))
    assert not np.array_equal(ends["without the perturbation"][0], expected[0])


def test_other_objectives_keep_only_the_number_of_steps():
    trainer = new_trainer(new_classifier(), L2, recipe=Recipe(trades_beta=1.0, awp_gamma=0.1))
    trainer.train_on_batch(*data(8))
    assert [int(variable.numpy()) for variable in trainer.state_variables] == [1]


def test_a_gradient_that_is_not_finite_does_not_change_its_perturbation():
    perturbation = tf.fill([2, 2, 2, 1], 0.05)
    gradient = np.ones((2, 2, 2, 1), np.float32)
    gradient[0, 0, 0, 0] = np.nan
    moved = moved_perturbation(perturbation, gradient, FREE["linf"]).numpy()
    np.testing.assert_allclose(moved[0], 0.05)
    np.testing.assert_allclose(moved[1], 0.1)


@pytest.mark.parametrize(("norm", "mode"), [("linf", "training"), ("l2", "training"), ("linf", "inference")])
def test_the_fgsm_preset_takes_the_steps_of_the_paper(norm, mode):
    """Algorithm 3 of Wong et al.: uniform start, a step of 1.25 epsilon, projection onto the ball.

    As in their code, the attack runs in training mode, so both forward passes update BatchNorm's statistics.
    """
    epsilon = {"linf": 0.1, "l2": 0.5}[norm]
    options = {} if mode == "training" else {"attack_mode": mode}
    job = JobConfig.from_flags(fast="fgsm", norm=norm, epsilon=epsilon, **options)
    attack, recipe = job.adversarial.training_attack, recipe_of(job, 3)
    assert recipe.attack_mode == mode
    ours, theirs = new_classifier(), new_classifier()
    trainer = new_trainer(ours, attack, recipe=recipe)
    for step, (images, labels) in enumerate(batches()):
        trainer.train_on_batch(images, labels)
        seed = tf.constant([SEED, step], tf.int64)
        if norm == "linf":
            noise = epsilon * tf.random.stateless_uniform(images.shape, seed, -1, 1)
        else:
            noise = epsilon * steepest(tf.random.stateless_normal(images.shape, seed), attack)
        delta = tf.clip_by_value(images + noise, 0, 1) - images
        with tf.GradientTape() as tape:
            tape.watch(delta)
            loss = CROSSENTROPY(labels, theirs(images + delta, training=mode == "training"))
        delta = into_ball(delta + 1.25 * epsilon * steepest(tape.gradient(loss, delta), attack), attack)
        delta = tf.clip_by_value(images + delta, 0, 1) - images
        with tf.GradientTape() as tape:
            loss = CROSSENTROPY(labels, theirs(images + delta, training=True))
        for weight, gradient in zip(
            theirs.trainable_weights, tape.gradient(loss, theirs.trainable_weights), strict=True
        ):
            weight.assign_sub(LEARNING_RATE * gradient)
    assert_same_weights(ours, theirs, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "attack"), [({}, L2), ({"trades_beta": 6.0}, LINF)], ids=["l2", "linf"])
def test_epsilon_rises_in_training_and_not_in_evaluation(attack, recipe):
    images, labels = data(8)
    classifier = new_classifier()
    trainer = new_trainer(classifier, attack, recipe=Recipe(**recipe, epsilon_warmup_steps=2.0))
    for step, share in enumerate([0.0, 0.5, 1.0, 1.0]):
        assert trainer.epsilon == pytest.approx(share * attack.epsilon)
        twin = new_classifier()
        twin.set_weights(classifier.get_weights())
        scaled = AttackConfig(
            **{**vars(attack), "epsilon": share * attack.epsilon, "step_size": share * attack.step_size}
        )
        # With epsilon 0 both batches of TRADES are the same, and the divergence is 0.
        options = {} if not share else {"recipe": Recipe(**recipe)}
        other = new_trainer(twin, scaled, **options)
        other.optimizer.build(twin.trainable_variables)
        other.optimizer.iterations.assign(step)
        other.state_variables[0].assign(step)  # which seeds the noise of TRADES
        for each in (trainer, other):
            each.train_on_batch(images, labels)
        for ours, theirs in zip(classifier.trainable_weights, twin.trainable_weights, strict=True):
            np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=0, atol=1e-6)
    fresh = new_trainer(classifier, attack, recipe=Recipe(epsilon_warmup_steps=2.0))  # at step 0
    judge = new_trainer(classifier, attack)
    figures = [each.evaluate(images, labels, verbose=0, return_dict=True) for each in (fresh, judge)]
    assert figures[0] == pytest.approx(figures[1])
    assert figures[0]["loss"] > figures[0]["clean_loss"] + 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["trades_awp", "free"])
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_moves_the_weights_as_float32_does(policy, recipe, monkeypatch):
    """If the loss scaling were missing, the weights would hardly change."""
    monkeypatch.setattr(objectives.trades, "_TRADES_START", START)
    recipes = {
        "trades_awp": (L2, Recipe(trades_beta=1.0, awp_gamma=0.01)),
        "free": (FREE["l2"], Recipe(free_replays=2, free_batch_size=8)),
    }
    attack, recipe = recipes[recipe]
    moved = {}
    for name in ("float32", policy):
        keras.config.set_dtype_policy(name)
        classifier = new_classifier()
        start = classifier.get_weights()[0]
        trainer = new_trainer(classifier, attack, recipe=recipe)
        for _ in range(3):
            for images, labels in batches():
                trainer.train_on_batch(images, labels)
        moved[name] = classifier.get_weights()[0] - start
        keras.config.set_dtype_policy("float32")
    difference = np.linalg.norm(moved[policy] - moved["float32"]) / np.linalg.norm(moved["float32"])
    assert difference < 0.3


def test_mixed_precision_does_not_round_the_images():
    """Near 1, bfloat16 has steps of 1/256, so rounding would erase the perturbations."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    layers = [keras.layers.Flatten(dtype="float32"), keras.layers.Dense(1, dtype="float32", kernel_initializer="ones")]
    classifier = keras.Sequential([keras.Input((8, 8, 3)), *layers])
    images = tf.fill([1, 8, 8, 3], 1 - 1 / 1024)
    trainer = AdversarialTrainer(classifier, NO_ATTACK)
    np.testing.assert_allclose(trainer(images), [[192 * (1 - 1 / 1024)]], rtol=1e-5)


@pytest.mark.parametrize("recipe", ["trades_awp", "free"])
def test_features_of_the_optimizer_keep_working(recipe):
    """Accumulation updates only in every second step, averages are kept, and clipping limits the length of a step."""
    attack, recipe = {
        "trades_awp": (L2, Recipe(trades_beta=6.0, awp_gamma=0.01)),
        "free": (FREE["l2"], Recipe(free_replays=1, free_batch_size=8)),
    }[recipe]
    classifier = new_classifier()
    optimizer = keras.optimizers.SGD(1.0, gradient_accumulation_steps=2, global_clipnorm=1e-3, use_ema=True)
    trainer = new_trainer(classifier, attack, optimizer=optimizer, recipe=recipe)
    points = [[weight.numpy() for weight in classifier.trainable_weights]]
    for images, labels in [*batches(), batches()[0]]:
        trainer.train_on_batch(images, labels)
        points.append([weight.numpy() for weight in classifier.trainable_weights])

    def distance(first, second):
        return np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(points[first], points[second], strict=True)))

    assert distance(0, 1) == 0 and distance(2, 3) == 0
    assert distance(0, 2) == pytest.approx(1e-3, rel=1e-2) and distance(2, 4) == pytest.approx(1e-3, rel=1e-2)
    averages = [variable for variable in optimizer.variables if "average" in variable.path]
    assert len(averages) == len(classifier.trainable_weights)


def steps_of(job: JobConfig, batches: int) -> float:
    return optimizer_steps_per_epoch(job.optimization, replays=job.adversarial.replays, batches=batches)


def recipe_of(job: JobConfig, batches: int) -> Recipe:
    return job_recipe(job.adversarial, job.optimization, steps_of(job, batches))


def test_recipes_of_jobs_count_optimizer_steps():
    common = {"epsilon": 0.5, "epochs": 10, "batch_size": 32}
    assert recipe_of(JobConfig.from_flags(**common), 100) == Recipe()
    config = JobConfig.from_flags(
        **common, objective="trades_awp", trades_beta=3.0, awp_gamma=0.01, awp_warmup_epochs=1.5
    )
    assert recipe_of(config, 100) == Recipe(trades_beta=3.0, awp_gamma=0.01, awp_warmup_steps=150)
    config = JobConfig.from_flags(**common, fast="epsilon_warmup", epsilon_warmup_epochs=2.5)
    assert recipe_of(config, 100) == Recipe(epsilon_warmup_steps=250)
    config = JobConfig.from_flags(**common, fast="free", free_replays=5)
    assert recipe_of(config, 100) == Recipe(free_replays=5, free_batch_size=32)


@pytest.mark.parametrize("epochs", [12, 10, 1])
def test_the_schedule_of_free_training_ends_with_its_steps(epochs):
    """12 epochs with 4 replays are 3 passes. Other numbers are rounded up, and the schedule is stretched."""
    config = JobConfig.from_flags(epsilon=0.5, epochs=epochs, fast="free", lr_schedule="cyclic", learning_rate=1.0)
    steps = config.data_epochs * 100 * 4
    schedule = build_schedule(config.optimization, steps_of(config, 100))
    assert config.data_epochs == {12: 3, 10: 3, 1: 1}[epochs]
    assert float(schedule(steps * 4 / 15)) == pytest.approx(1.0)
    assert 0 < float(schedule(steps - 1)) < 0.01 and float(schedule(steps)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trades_beta": -1.0}, "trades_beta=-1.0"),
        ({"awp_gamma": float("nan")}, "awp_gamma=nan"),
        ({"free_replays": 2}, "free_replays=2, free_batch_size=0"),
        ({"free_replays": -1, "free_batch_size": 8}, "free_replays=-1"),
        ({"free_replays": 2, "free_batch_size": 8, "trades_beta": 1.0}, "trades_beta=1.0"),
        ({"attack_mode": "train"}, "train.*training"),
        ({"attack_mode": "training", "trades_beta": 1.0}, "attack_mode='training'"),
    ],
)
def test_inconsistent_recipes_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Recipe(**arguments)


def test_inconsistent_trainers_are_refused():
    with pytest.raises(UserError, match=r"epsilon=0.0.*trades_beta=1.0"):
        AdversarialTrainer(new_classifier(), NO_ATTACK, recipe=Recipe(trades_beta=1.0))
    with pytest.raises(UserError, match="validation_attack=.*epsilon=0.5"):
        AdversarialTrainer(new_classifier(), NO_ATTACK, validation_attack=L2)
    free = Recipe(free_replays=2, free_batch_size=8)
    any_size = keras.Sequential(
        [keras.Input((None, None, 3)), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3)]
    )
    with pytest.raises(UserError, match="None, None, 3"):
        AdversarialTrainer(any_size, FREE["l2"], recipe=free)
