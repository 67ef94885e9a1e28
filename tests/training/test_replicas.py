"""With XLA, several replicas give the same results as without it. They compile once, and leave no threads behind.

Most tests run in a process of two devices, because TensorFlow creates its logical devices only once.
"""

import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_tf.console import console
from robust_tf.errors import UserError
from robust_tf.training import AdversarialTrainer, AttackConfig
from robust_tf.training.distribution import Distribution
from robust_tf.training.objectives import Recipe
from robust_tf.training.replicas import Scope
from tests.training.workers import free_ports

L2 = AttackConfig(norm="l2", epsilon=0.5, step_size=0.2, steps=3)
FGSM = AttackConfig(norm="linf", epsilon=0.1, step_size=0.1, steps=1, use_best=False)
CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
CASES: dict[str, dict[str, Any]] = {
    "madry": {},
    "rising epsilon, two outputs": {"recipe": Recipe(epsilon_warmup_steps=3), "outputs": 2},
    "trades and awp": {"recipe": Recipe(trades_beta=6.0, awp_gamma=0.01, awp_warmup_steps=2)},
    "fgsm in training mode": {"recipe": Recipe(attack_mode="training"), "attack": FGSM},
    "no attack": {"attack": AttackConfig(norm="l2", epsilon=0.0, step_size=0.0, steps=0)},
    "synchronized": {"synchronized": True},
    "synchronized, fgsm": {"synchronized": True, "recipe": Recipe(attack_mode="training"), "attack": FGSM},
    "float16": {"policy": "mixed_float16"},
}
# XLA keeps more digits between the operations of a half-precision network.
TOLERANCE = dict.fromkeys(CASES, 1e-5) | {"float16": 5e-3}


def in_a_process_of_two_devices(what: str, *arguments: str, **environment: str) -> list[Any]:
    """Runs this file and returns the JSON lines that it prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""} | environment
    done = subprocess.run(
        [sys.executable, __file__, what, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_xla_gives_the_same_weights_statistics_and_metrics():
    results = {result.pop("case"): result for result in in_a_process_of_two_devices("compare")}
    assert set(results) == set(CASES)
    for case, result in results.items():
        assert result["moved"] > 0.01, case
        assert result["difference"] < TOLERANCE[case], (case, result)
        assert result["difference_of_metrics"] < 10 * TOLERANCE[case], (case, result)
    compiled = {case: result["compiled"] for case, result in results.items()}
    # What is compiled in training and in evaluation, once for each of the two replicas.
    assert compiled.pop("synchronized, fgsm") == [0, 2]
    assert compiled.pop("trades and awp") == [4, 2]
    assert set(map(tuple, compiled.values())) == {(2, 2)}
    said = {case: result["said"] for case, result in results.items() if result["said"]}
    end = "because BatchNorm is synchronized between the devices."
    assert said == {
        "synchronized": f"XLA compiles only the attack, {end}\n",
        "synchronized, fgsm": f"XLA compiles none of the training step, {end}\n",
    }


@pytest.mark.slow
def test_two_hundred_steps_compile_nothing_and_leave_no_threads_or_memory(tmp_path):
    environment = {"XLA_FLAGS": f"--xla_dump_to={tmp_path}"}
    early, late = in_a_process_of_two_devices("steady", str(tmp_path), **environment)
    assert late["steps"] - early["steps"] == 200
    assert early["modules"] == late["modules"] == 4  # training and evaluation on two replicas
    # The last thread of a pool may start late. A leak would be of one or more in each step.
    assert late["threads"] - early["threads"] <= 3
    assert late["megabytes"] - early["megabytes"] < 20


@pytest.mark.slow
def test_xla_gives_the_same_results_with_two_workers():
    ports = free_ports(2)
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    configs = [json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}}) for index in (0, 1)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        outputs = pool.map(lambda config: in_a_process_of_two_devices("worker", TF_CONFIG=config), configs)
    for (result,) in outputs:
        assert result["moved"] > 0.01
        assert result["difference"] < 1e-5 and result["difference_of_metrics"] < 1e-5
        assert result["compiled"] == [1, 1]  # in training and in evaluation


def test_scopes_can_be_nested():
    one, two = keras.Variable(1.0), keras.Variable(2.0)
    with Scope([(one, tf.constant(10.0))]) as outer:
        with Scope([(two, tf.constant(20.0))]) as inner:
            assert float(one) == 10.0 and float(two) == 20.0
            one.assign(11.0)
        assert float(one) == 10.0 and float(two) == 2.0
    assert float(inner.get_current_value(one)) == 11.0
    assert outer.get_current_value(two) is None
    assert float(one) == 1.0 and float(two) == 2.0


def test_an_attack_of_several_steps_in_training_mode_is_refused(monkeypatch):
    strategy = tf.distribute.get_strategy()
    monkeypatch.setattr(type(strategy.extended), "_num_replicas_in_sync", 2)
    assert strategy.num_replicas_in_sync == 2
    build(jit_compile=False, attack=FGSM, recipe=Recipe(attack_mode="training"))
    with pytest.raises(UserError, match="attack_mode='training' and 3 steps on 2 replicas. Use one step"):
        build(jit_compile=False, recipe=Recipe(attack_mode="training"))


def test_one_replica_compiles_no_parts():
    trainer, _ = build(jit_compile=True)
    assert not trainer.compiles_parts
    marker = object()
    assert trainer.alone(lambda: marker) is marker


def build(
    *,
    jit_compile: bool,
    attack: AttackConfig = L2,
    recipe: Recipe | None = None,
    outputs: int = 1,
    synchronized: bool = False,
    policy: str = "float32",
) -> tuple[AdversarialTrainer, keras.Model]:
    """Builds a small classifier and its trainer, with the same weights each time."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, dtype=policy)(x)
    x = layers.BatchNormalization(momentum=0.9, synchronized=synchronized, dtype=policy)(x)
    x = layers.Activation("tanh", dtype=policy)(x)  # smooth, so that rounding errors stay small
    # Dropout has a state, the seed. It drops nothing here, because XLA draws other numbers.
    x = layers.Dropout(1e-9, dtype=policy)(layers.Flatten()(x))
    scores = [layers.Dense(3, dtype="float32", name=f"scores{index}")(x) for index in range(outputs)]
    classifier = keras.Model(inputs, scores if outputs > 1 else scores[0])
    trainer = AdversarialTrainer(classifier, attack, recipe=recipe)
    trainer.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        [CROSSENTROPY] * outputs if outputs > 1 else CROSSENTROPY,
        weighted_metrics=None if outputs > 1 else ["accuracy"],
        jit_compile=jit_compile,
    )
    trainer.build_metrics()
    return trainer, classifier


def batches(outputs: int = 1) -> tf.data.Dataset:
    """Three batches of 16 images. The last image of each replica only fills up the batch."""
    rng = np.random.default_rng(1)
    images, labels = rng.random((48, 8, 8, 3)).astype(np.float32), rng.integers(0, 3, 48)
    weights = np.where(np.arange(48) % 8 == 7, 0.0, 8 / 7).astype(np.float32)
    data = (images, (labels,) * outputs if outputs > 1 else labels, *([] if outputs > 1 else [weights]))
    return tf.data.Dataset.from_tensor_slices(data).batch(16, drop_remainder=True)


def compiled_modules(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("*before_optimizations.txt"))


def two_devices() -> Distribution:
    device = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(device, [tf.config.LogicalDeviceConfiguration()] * 2)
    return Distribution(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]))


def parts_counted() -> list[bool]:
    """Returns a list that grows with each `tf.function`, by whether it is a part of a step that XLA compiles."""
    made, function = [], tf.function

    def counting(*arguments: Any, **options: Any) -> Any:
        made.append(options == {"jit_compile": True, "autograph": False})  # Keras makes others for convolutions
        return function(*arguments, **options)

    tf.function = counting
    return made


def shared(distribution: Distribution, outputs: int = 1) -> Any:
    """Returns `batches`, divided among the replicas of all workers, without an end."""
    shares = batches(outputs).rebatch(8).shard(distribution.num_workers, distribution.worker).repeat()
    return distribution.strategy.distribute_datasets_from_function(lambda _: shares)


def compare() -> None:
    """Prints for each case how far the results with XLA are from those without it, on two devices."""
    # XLA draws other random numbers, so that the start of the attack of TRADES would differ. It also starts farther
    # away, because the gradient close to the clean image consists of rounding errors.
    tf.random.stateless_normal = lambda shape, seed, stddev: (
        0.05 * tf.sin(tf.reshape(tf.range(tf.cast(tf.reduce_prod(shape), tf.float32)), shape))
    )
    compare_cases(two_devices(), CASES)


def worker() -> None:
    """Prints how far the results with XLA are from those without it, as one of two workers."""
    config = json.loads(os.environ["TF_CONFIG"])
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    distribution = Distribution(strategy, worker=config["task"]["index"], addresses=config["cluster"]["worker"])
    compare_cases(distribution, {"madry": {}})


def compare_cases(distribution: Distribution, cases: dict[str, dict[str, Any]]) -> None:
    parts = parts_counted()
    for case, options in cases.items():
        states, metrics, compiled, start, end, said = [], [], [], [], [], ""
        for jit_compile in (False, True):
            with distribution.scope():
                trainer, classifier = build(jit_compile=jit_compile, **options)
            start = [weight.numpy() for weight in classifier.trainable_weights]
            data = shared(distribution, options.get("outputs", 1))
            parts.clear()
            with console.capture() as printed:
                history = trainer.fit(data, shuffle=False, verbose=0, epochs=2, steps_per_epoch=3).history
            in_training = sum(parts)
            metric_ids = {id(variable) for variable in trainer.metrics_variables}
            states.append([variable.numpy() for variable in trainer.state if id(variable) not in metric_ids])
            end = [weight.numpy() for weight in classifier.trainable_weights]
            evaluated = trainer.evaluate(data, steps=3, verbose=0, return_dict=True)
            compiled = [in_training, sum(parts) - in_training]
            metrics.append(np.concatenate([np.atleast_1d(value) for value in (*history.values(), *evaluated.values())]))
            said = printed.get()
            assert jit_compile or compiled == [0, 0]
        differences = [np.abs(one - other).max() for one, other in zip(*states, strict=True) if one.size]
        result = {
            "case": case,
            "difference": float(max(differences)),
            "moved": float(max(np.abs(one - other).max() for one, other in zip(start, end, strict=True))),
            "difference_of_metrics": float(np.abs(metrics[0] - metrics[1]).max()),
            "compiled": compiled,
            "said": said,
        }
        print(json.dumps(result), flush=True)


def steady(dump: pathlib.Path) -> None:
    """Prints the threads, the memory and the number of compiled modules early and 200 steps later."""
    distribution = two_devices()
    with distribution.scope():
        trainer, _ = build(jit_compile=True)
    data = batches().repeat()
    for steps in (30, 200):
        for _ in range(2):
            trainer.fit(
                data, steps_per_epoch=steps // 2, validation_data=data, validation_steps=2, shuffle=False, verbose=0
            )
        status = dict(
            line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines() if ":" in line
        )
        figures = {
            "steps": int(trainer.optimizer.iterations.numpy()),
            "modules": len(compiled_modules(dump)),
            "threads": int(status["Threads"]),
            "megabytes": int(status["VmRSS"].split()[0]) / 1024,
        }
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    {"compare": compare, "steady": steady, "worker": worker}[sys.argv[1]](*map(pathlib.Path, sys.argv[2:]))
