"""The adversarial training step equals the PyTorch reference, and the trainer behaves like a Keras model."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from smallbn import MOMENTUM, PYTORCH_NAMES, WEIGHT_DECAY, build_smallbn, golden, golden_batches, keras_layout

from robust_tf.attacks import AttackConfig, pgd
from robust_tf.errors import UserError
from robust_tf.training import AdversarialTrainer
from robust_tf.training.objectives import Recipe
from robust_tf.training.optimizers import build_optimizer
from robust_tf.training.schedules import Schedule

CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
ATTACKS = {
    "standard": AttackConfig(norm="l2", epsilon=0.0, step_size=0.0, steps=0),
    "adversarial": AttackConfig(norm="l2", epsilon=0.5, step_size=1 / 3, steps=3),
}


def small_classifier() -> keras.Model:
    """A classifier of images (8, 8, 3) with BatchNorm and 3 logits."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3, name="conv"),
            keras.layers.BatchNormalization(name="bn"),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3, dtype="float32", name="logits"),
        ]
    )


def small_data(count: int = 32) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.random((count, 8, 8, 3)).astype(np.float32), rng.integers(0, 3, count)


@pytest.mark.parametrize("how", ["graph", "eager", "xla"])
@pytest.mark.parametrize("mode", ATTACKS)
def test_equals_the_reference_over_a_learning_rate_drop(mode, how):
    classifier = build_smallbn()
    trainer = AdversarialTrainer(classifier, ATTACKS[mode])
    schedule = Schedule("step", learning_rate=0.1, steps_per_epoch=3, epochs=2, step_epochs=1, decay=0.1)
    optimizer = build_optimizer("sgd", learning_rate=schedule, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    trainer.compile(optimizer, CROSSENTROPY, run_eagerly=how == "eager", jit_compile=how == "xla")
    assert trainer.jit_compile == (how == "xla")
    images, labels = golden_batches()
    arrays = golden()
    for epoch in range(2):
        for batch in zip(images[epoch], labels[epoch], strict=True):
            trainer.train_on_batch(*batch)
        # Weights and BatchNorm's statistics: one update per step on adversarial images, with unbiased variances.
        for weight in classifier.weights:
            expected = arrays[f"{mode}/epoch{epoch}/{PYTORCH_NAMES[weight.path]}"]
            np.testing.assert_allclose(
                weight.numpy(), keras_layout(expected), rtol=0, atol=1e-5, err_msg=f"{weight.path} epoch {epoch}"
            )
        # In the second epoch of the adversarial run one activation is 0 up to rounding errors. The order of additions
        # decides whether its gradient passes the ReLU. The momentum shows it, but the weights do not yet at this rate.
        tolerance = 1e-3 if mode == "adversarial" and epoch == 1 else 1e-5
        buffers = {variable.name: variable.numpy() for variable in optimizer.variables}
        for weight in classifier.trainable_weights:
            expected = arrays[f"{mode}/epoch{epoch}/momentum/{PYTORCH_NAMES[weight.path]}"]
            buffer = buffers[weight.path.replace("/", "_") + "_momentum"]
            np.testing.assert_allclose(buffer, keras_layout(expected), rtol=0, atol=tolerance, err_msg=weight.path)


def test_training_without_an_attack_equals_keras_training():
    # Up to rounding, because BatchNorm is computed by another operation than in Keras. Not with Adam: it divides the
    # gradient of the bias before BatchNorm, which is nothing but rounding, by its own size.
    images, labels = small_data()
    weights = []
    for wrap in (lambda model: AdversarialTrainer(model, ATTACKS["standard"], unbiased_batchnorm=False), lambda m: m):
        keras.utils.set_random_seed(1)
        classifier = small_classifier()
        model = wrap(classifier)
        model.compile("sgd", CROSSENTROPY, metrics=["accuracy"])
        model.fit(images, labels, batch_size=8, epochs=2, shuffle=False, verbose=0)
        weights.append(classifier.get_weights())
    for ours, theirs in zip(*weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_fit_learns_the_robust_feature():
    """On data with a robust and a fragile feature, only adversarial training chooses the robust one."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 256)
    images = np.full((256, 8, 8, 3), 0.5, np.float32)
    images[:, :4, :, 0] += np.where(labels == 1, 0.2, -0.2)[:, None, None]  # larger than epsilon
    images[:, 4:, :, 1:] += np.where(labels == 1, 0.02, -0.02)[:, None, None, None]  # smaller than epsilon
    attack = AttackConfig(norm="linf", epsilon=0.1, step_size=0.05, steps=5)
    robust = {}
    for name, training_attack in (("adversarial", attack), ("standard", ATTACKS["standard"])):
        keras.utils.set_random_seed(0)
        classifier = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(2)])
        # Initially both features have the same weight per unit of signal.
        kernel = np.zeros((8, 8, 3, 2), np.float32)
        kernel[4:, :, 1:, 1] = 1.0
        classifier.layers[-1].set_weights([kernel.reshape(192, 2), np.array([0.0, -32.0], np.float32)])
        trainer = AdversarialTrainer(classifier, training_attack)
        trainer.compile(keras.optimizers.SGD(0.5), CROSSENTROPY, metrics=["accuracy"])
        trainer.fit(images, labels, batch_size=32, epochs=10, verbose=0)
        judge = AdversarialTrainer(classifier, attack)
        judge.compile(loss=CROSSENTROPY, metrics=["accuracy"])
        robust[name] = judge.evaluate(images, labels, verbose=0, return_dict=True)
    assert robust["adversarial"]["accuracy"] > 0.99
    assert robust["standard"]["accuracy"] < 0.6
    assert robust["standard"]["clean_accuracy"] > 0.9


def test_the_first_step_is_traced_once(monkeypatch):
    traced = []
    train_step = AdversarialTrainer.train_step
    monkeypatch.setattr(AdversarialTrainer, "train_step", lambda self, data: traced.append(1) or train_step(self, data))
    trainer = AdversarialTrainer(small_classifier(), ATTACKS["adversarial"])
    trainer.compile(build_optimizer("sgd", learning_rate=0.1, momentum=0.9), CROSSENTROPY, metrics=["accuracy"])
    images, labels = small_data()
    first = trainer.train_on_batch(images, labels, return_dict=True)
    assert len(traced) == 1 and 0 < first["accuracy"] < 1
    trainer.train_on_batch(images[:7], labels[:7])  # the last batch of an epoch
    assert len(traced) <= 2


def test_evaluate_reports_clean_and_adversarial_metrics():
    images, labels = small_data()
    classifier = small_classifier()
    attack = AttackConfig(norm="l2", epsilon=1.0, step_size=0.5, steps=3)
    trainer = AdversarialTrainer(classifier, attack)
    trainer.compile(loss=CROSSENTROPY, metrics=["accuracy"])
    figures = trainer.evaluate(images, labels, batch_size=10, verbose=0, return_dict=True)
    images_adv = pgd(classifier, images, labels, norm="l2", epsilon=1.0, step_size=0.5, steps=3)
    for prefix, inputs in (("clean_", images), ("", images_adv)):
        logits = classifier(inputs)
        np.testing.assert_allclose(figures[f"{prefix}loss"], CROSSENTROPY(labels, logits), rtol=1e-4)
        accuracy = np.mean(np.argmax(logits, axis=1) == labels)
        np.testing.assert_allclose(figures[f"{prefix}accuracy"], accuracy, rtol=1e-5)


@pytest.mark.parametrize("random_start", [False, True])
def test_clean_metrics_in_training_are_measured_on_the_clean_images(random_start):
    images, labels = small_data(8)
    classifier = small_classifier()
    expected = CROSSENTROPY(labels, classifier(images))
    attack = AttackConfig(norm="l2", epsilon=1.0, step_size=0.5, steps=2, random_start=random_start)
    trainer = AdversarialTrainer(classifier, attack)
    trainer.compile("sgd", CROSSENTROPY)
    logs = trainer.train_on_batch(images, labels, return_dict=True)
    np.testing.assert_allclose(logs["clean_loss"], expected, rtol=1e-5)
    assert logs["loss"] > logs["clean_loss"]


def test_random_start_depends_only_on_seed_and_step():
    """The same seed repeats a run; another seed gives another run."""
    images, labels = small_data(8)
    attack = AttackConfig(norm="linf", epsilon=0.1, step_size=0.01, steps=1, random_start=True)

    def trained(seed):
        keras.utils.set_random_seed(0)
        classifier = small_classifier()
        trainer = AdversarialTrainer(classifier, attack, seed=seed)
        trainer.compile(keras.optimizers.SGD(0.1), CROSSENTROPY)
        tf.random.set_seed(np.random.randint(100_000))  # the global generator must not have an effect
        trainer.fit(images, labels, batch_size=8, epochs=2, verbose=0)
        return classifier.get_weights()[0]

    np.testing.assert_array_equal(trained(1), trained(1))
    assert np.abs(trained(1) - trained(2)).max() > 1e-5


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_gives_about_the_same_weights_as_float32(policy):
    images, labels = small_data()
    start, moved = None, {}
    for name in ("float32", policy):
        keras.config.set_dtype_policy(name)
        classifier = small_classifier()
        start = start or classifier.get_weights()
        classifier.set_weights(start)
        trainer = AdversarialTrainer(classifier, AttackConfig(norm="l2", epsilon=0.5, step_size=0.2, steps=3))
        trainer.compile(build_optimizer("sgd", learning_rate=0.1), CROSSENTROPY)
        trainer.fit(images, labels, batch_size=8, epochs=5, shuffle=False, verbose=0)
        moved[name] = classifier.get_weights()[0] - start[0]
    difference = np.linalg.norm(moved[policy] - moved["float32"]) / np.linalg.norm(moved["float32"])
    assert difference < 0.25


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_images_stay_float32_in_mixed_precision(policy):
    """Rounding to bfloat16 changes a pixel by up to 0.002, as much as some perturbations."""
    keras.config.set_dtype_policy(policy)
    classifier = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(dtype="float32")])
    images, _ = small_data(4)
    trainer = AdversarialTrainer(classifier, ATTACKS["standard"])
    np.testing.assert_array_equal(trainer(images), images.reshape(4, -1))


@pytest.mark.parametrize(("policy", "scaled"), [("mixed_float16", True), ("mixed_bfloat16", False)])
def test_loss_scaling_follows_the_classifier_not_the_global_policy(tmp_path, policy, scaled):
    keras.config.set_dtype_policy(policy)
    small_classifier().save(tmp_path / "low.keras")
    keras.config.set_dtype_policy("float32")
    trainer = AdversarialTrainer(keras.saving.load_model(tmp_path / "low.keras"), ATTACKS["adversarial"])
    trainer.compile("sgd", CROSSENTROPY)
    assert isinstance(trainer.optimizer, keras.optimizers.LossScaleOptimizer) == scaled


def test_labels_may_be_a_column():
    """keras.datasets.cifar10 has such labels."""
    images, labels = small_data(8)
    figures = []
    for shape in ((8,), (8, 1)):
        keras.utils.set_random_seed(0)
        trainer = AdversarialTrainer(small_classifier(), ATTACKS["adversarial"])
        trainer.compile("sgd", CROSSENTROPY, metrics=["accuracy"])
        figures.append(trainer.train_on_batch(images, labels.reshape(shape), return_dict=True))
    assert figures[0] == pytest.approx(figures[1])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((8, 8, 8, 3), np.float32), np.eye(3)[[0, 1, 2, 0, 1, 2, 0, 1]], r"labels of shape \(8, 3\)"),
        (np.full((8, 8, 8, 3), 200, np.uint8), np.zeros(8, int), "images of type uint8"),
        (np.full((8, 8, 8, 3), 200, np.float32), np.zeros(8, int), "values from 200 to 200"),
        (np.full((8, 8, 8, 3), np.nan, np.float32), np.zeros(8, int), "values from nan to nan"),
        (np.zeros((8, 8, 8, 3), np.float32), np.arange(8), "Labels must be in 0..2.*Received: labels from 0 to 7"),
        (np.zeros((8, 8, 8, 3), np.float32), np.full(8, -1), "Received: labels from -1 to -1"),
    ],
)
@pytest.mark.parametrize("recipe", [Recipe(), Recipe(trades_beta=1.0), Recipe(free_replays=1, free_batch_size=8)])
def test_invalid_images_and_labels_are_refused(images, labels, message, recipe):
    """For all objectives, eagerly and in a graph, in training and in evaluation; the weights do not change."""
    for eagerly in (False, True):
        classifier = small_classifier()
        before = classifier.get_weights()
        trainer = AdversarialTrainer(classifier, ATTACKS["adversarial"], recipe=recipe)
        trainer.compile("sgd", CROSSENTROPY, run_eagerly=eagerly)
        for run in (trainer.train_on_batch, trainer.test_on_batch):
            with pytest.raises(UserError, match=message):
                run(images, labels)
        for ours, theirs in zip(classifier.get_weights(), before, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_the_first_batch_is_also_checked_with_xla():
    """XLA drops the checks inside the step, so the data is checked before."""
    images, labels = small_data(8)
    trainer = AdversarialTrainer(small_classifier(), ATTACKS["adversarial"])
    trainer.compile("sgd", CROSSENTROPY, jit_compile=True)
    for data in [(255 * images, labels), (tf.data.Dataset.from_tensor_slices((255 * images, labels)).batch(4), None)]:
        with pytest.raises(UserError, match="Images must be in .0, 1.. Received: values from"):
            trainer.fit(*data, shuffle=False, verbose=0)
    with pytest.raises(UserError, match="Received: labels from"):
        trainer.fit(images, labels + 1, verbose=0)
    assert trainer.fit(tf.data.Dataset.from_tensor_slices((images, labels)).batch(4), shuffle=False, verbose=0).history[
        "loss"
    ]


@pytest.mark.parametrize("static", [True, False])
def test_a_batch_larger_than_the_perturbation_is_refused(static):
    images, labels = small_data(8)
    trainer = AdversarialTrainer(
        small_classifier(), ATTACKS["adversarial"], recipe=Recipe(free_replays=1, free_batch_size=4)
    )
    trainer.compile("sgd", CROSSENTROPY)
    dataset = tf.data.Dataset.from_tensor_slices((images, labels)).batch(8, drop_remainder=static)
    with pytest.raises(UserError, match="free_batch_size=4"):
        trainer.fit(dataset, shuffle=False, verbose=0)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [([(8, 8)], r"\(None, 8, 8\)"), ([(8, 8, 3), (8, 8, 1)], r"\(None, 8, 8, 3\), \(None, 8, 8, 1\)")],
)
def test_a_classifier_without_exactly_one_image_input_is_refused(shapes, message):
    inputs = [keras.Input(shape) for shape in shapes]
    flat = [keras.layers.Flatten()(each) for each in inputs]
    classifier = keras.Model(inputs, keras.layers.Dense(3)(flat[0]))
    with pytest.raises(UserError, match=message):
        AdversarialTrainer(classifier, ATTACKS["adversarial"])


def test_keras_callbacks_work(tmp_path):
    """ModelCheckpoint writes the classifier; BackupAndRestore continues where a run stopped."""
    images, labels = small_data()

    def new_trainer():
        keras.utils.set_random_seed(0)
        trainer = AdversarialTrainer(small_classifier(), ATTACKS["adversarial"])
        trainer.compile(keras.optimizers.SGD(0.1, momentum=0.9), CROSSENTROPY, metrics=["accuracy"])
        return trainer

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    settings = {"epochs": 3, "shuffle": False, "verbose": 0}
    best = keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", monitor="val_loss", save_best_only=True)
    whole = new_trainer()
    early = keras.callbacks.EarlyStopping(restore_best_weights=True, patience=5)
    whole.fit(images, labels, validation_data=(images, labels), callbacks=[best, early], **settings)
    loaded = keras.saving.load_model(tmp_path / "best.keras")
    assert [layer.name for layer in loaded.layers] == [layer.name for layer in whole.classifier.layers]

    whole = new_trainer()
    whole.fit(images, labels, **settings)
    backup = tmp_path / "backup"
    with pytest.raises(KeyboardInterrupt):
        new_trainer().fit(images, labels, callbacks=[keras.callbacks.BackupAndRestore(backup), Stop()], **settings)
    resumed = new_trainer()
    resumed.fit(images, labels, callbacks=[keras.callbacks.BackupAndRestore(backup)], **settings)
    assert int(resumed.state_variables[0].numpy()) == 3
    for ours, theirs in zip(resumed.classifier.get_weights(), whole.classifier.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_saving_and_exporting_the_trainer_writes_the_classifier(tmp_path):
    images, labels = small_data()
    trainer = AdversarialTrainer(small_classifier(), ATTACKS["adversarial"])
    trainer.compile("sgd", CROSSENTROPY)
    trainer.fit(images, labels, verbose=0)
    trainer.save(tmp_path / "classifier.keras")
    loaded = keras.saving.load_model(tmp_path / "classifier.keras")
    np.testing.assert_array_equal(loaded(images), trainer.classifier(images))
    trainer.export(tmp_path / "exported", verbose=False)
    exported = tf.saved_model.load(tmp_path / "exported")
    np.testing.assert_allclose(exported.serve(images), trainer.classifier(images), atol=1e-5)
    trainer.save_weights(tmp_path / "trainer.weights.h5")
    other = AdversarialTrainer(small_classifier(), ATTACKS["adversarial"])
    other.compile("sgd", CROSSENTROPY)
    other.load_weights(tmp_path / "trainer.weights.h5")
    np.testing.assert_array_equal(other(images), trainer(images))


def test_a_model_for_any_image_size_trains_with_biased_variances():
    """Where the input size of BatchNorm is unknown, the statistics are those of Keras."""
    classifier = keras.Sequential(
        [
            keras.Input((None, None, 3)),
            keras.layers.BatchNormalization(momentum=0.0),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3),
        ]
    )
    images, labels = small_data(8)
    trainer = AdversarialTrainer(classifier, ATTACKS["standard"])
    trainer.compile("sgd", CROSSENTROPY)
    trainer.train_on_batch(images, labels)
    np.testing.assert_allclose(classifier.layers[0].moving_variance, images.var(axis=(0, 1, 2)), rtol=1e-4)


def test_frozen_batchnorm_keeps_its_statistics():
    images, labels = small_data(8)
    classifier = small_classifier()
    classifier.get_layer("bn").trainable = False
    before = classifier.get_layer("bn").get_weights()
    trainer = AdversarialTrainer(classifier, ATTACKS["adversarial"])
    trainer.compile("sgd", CROSSENTROPY)
    trainer.train_on_batch(images, labels)
    for ours, theirs in zip(classifier.get_layer("bn").get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_function_in_place_of_a_model_is_refused():
    with pytest.raises(UserError, match="Received: function"):
        AdversarialTrainer(lambda images: images, ATTACKS["standard"])


MIRRORED = """
import contextlib, json, sys
import keras, numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from robust_tf.training import AdversarialTrainer, AttackConfig
rng = np.random.default_rng(0)
images, labels = rng.random((32, 8, 8, 3)).astype(np.float32), rng.integers(0, 3, 32)
for strategy in (tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), None):
    keras.utils.set_random_seed(0)
    with strategy.scope() if strategy else contextlib.nullcontext():
        layers = [keras.layers.Conv2D(4, 3, activation="tanh"), keras.layers.Flatten(), keras.layers.Dense(3)]
        classifier = keras.Sequential([keras.Input((8, 8, 3)), *layers])
        trainer = AdversarialTrainer(classifier, AttackConfig(norm="l2", epsilon=0.5, step_size=0.2, steps=3))
        trainer.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    before = trainer.evaluate(images, labels, batch_size=16, verbose=0, return_dict=True)
    trainer.fit(images, labels, batch_size=16, shuffle=False, verbose=0)
    print(json.dumps([before, trainer.evaluate(images, labels, batch_size=16, verbose=0, return_dict=True)]))
"""


@pytest.mark.slow
def test_fit_and_evaluate_work_in_the_scope_of_a_strategy():
    """Metrics given by name have variables that a replica cannot create. The results equal those of one device."""
    out = subprocess.run([sys.executable, "-c", MIRRORED], check=True, capture_output=True, text=True).stdout
    mirrored, single = (json.loads(line) for line in out.splitlines()[-2:])
    for ours, theirs in zip(mirrored, single, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert single[0]["loss"] != pytest.approx(single[1]["loss"], abs=1e-4)


def live_operations(function) -> list[str]:
    """Types of the operations in a function of a graph on which its results depend. TensorFlow prunes the others."""
    nodes = {node.name: node for node in function.node_def}
    names, found = [*function.ret.values(), *function.control_ret.values()], set()
    while names:
        name = names.pop().lstrip("^").split(":")[0]
        if name in nodes and name not in found:
            found.add(name)
            names += nodes[name].input
    return [nodes[name].op for name in found]


def test_the_attack_computes_no_gradients_of_weights_and_runs_no_batchnorm():
    images, labels = small_data()
    trainer = AdversarialTrainer(small_classifier(), ATTACKS["adversarial"])
    trainer.compile("sgd", CROSSENTROPY)
    trainer.optimizer.build(trainer.trainable_variables)
    step = tf.function(lambda images, labels: trainer.train_step((images, labels)), autograph=False)
    graph = step.get_concrete_function(tf.constant(images), tf.constant(labels)).graph.as_graph_def()
    functions = [live_operations(function) for function in graph.library.function]
    (attack,) = (kinds for kinds in functions if "Conv2DBackpropInput" in kinds)
    assert (attack.count("Conv2D"), attack.count("Conv2DBackpropInput")) == (1, 1)
    assert attack.count("Conv2DBackpropFilter") == 0 and not any("BatchNorm" in kind for kind in attack)
    whole = [node.op for node in graph.node]
    assert whole.count("Conv2DBackpropFilter") == whole.count("FusedBatchNormGradV3") == 1
