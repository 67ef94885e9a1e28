"""Several devices and processes give the same result as one device, even when a process is lost on the way."""

import faulthandler
import json
import os
import pathlib
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_tf import train
from robust_tf.config.job import JobConfig
from robust_tf.errors import UserError
from robust_tf.evaluation.outcomes import read_outcomes
from robust_tf.models import load_classifier
from robust_tf.training.distribution import _multi_worker_strategy, restart_process, start_distribution
from robust_tf.training.interruption import signals_raise
from tests.tasks import make_task
from tests.training.workers import free_ports, job, job_on_two_cpus, start_worker, wait_for_line, wait_until

# Few steps, because a difference in the last bit grows a thousandfold where it decides the gradient of a ReLU.
EPOCHS = 2


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> pathlib.Path:
    """The job on one device, to compare with."""
    workdir = tmp_path_factory.mktemp("distribution") / "single"
    finish(job(workdir, f"--epochs={EPOCHS}"))
    return workdir


def finish(process) -> str:
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    return out


def assert_equal_jobs(one: pathlib.Path, other: pathlib.Path) -> None:
    """Compares the weights within 1e-5, and all figures that are counts."""
    ours, theirs = (load_classifier(workdir / "classifier.keras") for workdir in (one, other))
    for weight, expected in zip(ours.weights, theirs.weights, strict=True):
        np.testing.assert_allclose(weight, expected, rtol=0, atol=1e-5, err_msg=weight.path)
    ours, theirs = (json.loads((workdir / "results.json").read_text()) for workdir in (one, other))
    for name in ("clean_accuracy", "robust_accuracy", "best_epoch", "num_test_images", "total_parameters"):
        assert ours[name] == theirs[name], name
    assert ours["validation_value"] == pytest.approx(theirs["validation_value"], abs=1e-6)
    ours, theirs = (read_outcomes(workdir) for workdir in (one, other))
    np.testing.assert_array_equal(ours.ids, theirs.ids)
    np.testing.assert_array_equal(ours.labels, theirs.labels)
    np.testing.assert_array_equal(ours.predictions, theirs.predictions)
    assert all((workdir / "report.html").exists() for workdir in (one, other))
    ours, theirs = (history_of(workdir) for workdir in (one, other))
    for epoch, expected in zip(ours, theirs, strict=True):
        for name, value in expected.items():
            assert epoch[name] == pytest.approx(value, abs=1e-4), name


def history_of(workdir: pathlib.Path) -> list[dict[str, float]]:
    path = workdir / "checkpoints" / f"epoch{EPOCHS:04d}_step0000000.npz"
    with np.load(path) as archive:
        return json.loads(str(archive["progress"]))["history"]


@pytest.mark.slow
def test_two_devices_in_one_process_give_the_same_weights_as_one(single):
    workdir = single.with_name("mirrored")
    finish(job_on_two_cpus(workdir, f"--epochs={EPOCHS}"))
    assert_equal_jobs(single, workdir)


@pytest.mark.slow
def test_two_devices_use_the_same_weight_perturbation(tmp_path):
    """AWP perturbs the weights by the gradient of the whole batch, not of a device's share."""
    flags = ("--objective=awp", "--awp_gamma=0.05", "--subset=32", f"--epochs={EPOCHS}")
    finish(job(tmp_path / "single", *flags))
    finish(job_on_two_cpus(tmp_path / "mirrored", *flags))
    assert_equal_jobs(tmp_path / "single", tmp_path / "mirrored")


@pytest.mark.slow
def test_two_workers_give_the_same_weights_as_one_even_if_each_is_killed_once(single):
    """First the worker is killed, then the chief. The other one restarts by itself, and waits for the killed one.

    While the chief waits, it can be stopped, and a chief that is started alone gives up.
    """
    workdir, ports = single.with_name("workers"), free_ports(2)
    epochs = f"--epochs={EPOCHS}"
    workers = [start_worker(index, ports, workdir, epochs) for index in (0, 1)]

    def waits_for(victim: int) -> None:
        printed = wait_for_line(workers[1 - victim], f"Waiting for worker {victim} (127.0.0.1:{ports[victim]}: ")
        assert "Restarting (restart 1 of at most 3)" in printed
        assert "gives up after 600 s (--worker_timeout)" in printed

    def newest() -> str:
        return max((path.stem for path in (workdir / "checkpoints").glob("epoch*.npz")), default="")

    try:
        wait_until(lambda: newest() >= "epoch0001")
        workers[1].kill()
        workers[1].communicate()
        waits_for(1)
        workers[0].terminate()
        assert workers[0].wait(timeout=30) == 143
        workers[0].communicate()
        workers[0] = start_worker(0, ports, workdir, "--worker_timeout=0.1", epochs)
        out, _ = workers[0].communicate(timeout=120)
        assert workers[0].returncode == 2 and f"Received: no worker 1 (127.0.0.1:{ports[1]}: " in out

        before = newest()
        workers = [start_worker(index, ports, workdir, epochs) for index in (0, 1)]
        wait_until(lambda: newest() > before)
        workers[0].kill()
        workers[0].communicate()
        waits_for(0)
        workers[0] = start_worker(0, ports, workdir, epochs)
        out = [finish(worker) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    assert all(f"Worker {index}: all 2 workers are there." in out[index] for index in (0, 1))
    assert "Continuing after" in out[0]
    assert_equal_jobs(single, workdir)
    assert "clean accuracy" in out[0] and "clean accuracy" not in out[1]  # only the chief prints the table


@pytest.mark.slow
def test_a_worker_whose_peer_hangs_in_the_middle_of_training_obeys_sigterm(tmp_path):
    """The main thread is in a collective operation that does not return, so Python's signal handlers do not run."""
    ports = free_ports(2)
    workers = [start_worker(index, ports, tmp_path / "w", "--epochs=100") for index in (0, 1)]
    try:
        wait_until(lambda: any((tmp_path / "w" / "checkpoints").glob("epoch0000*")))
        workers[1].send_signal(signal.SIGSTOP)
        workers[0].terminate()
        out, _ = workers[0].communicate(timeout=60)
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    assert workers[0].returncode == 143
    # TensorFlow and the watch each need about ten seconds to notice it, so either may come first.
    lost = (
        "Interrupted. Another worker was lost.",
        f"Interrupted. There is no answer from worker 1 (127.0.0.1:{ports[1]}).",
    )
    assert any(text in out for text in lost)
    assert not list((tmp_path / "w").rglob("*.tmp*"))


@pytest.mark.parametrize("kind", ["validation", "test"])
def test_shares_count_every_image_once(data_dir, kind):
    """Two workers with two replicas each get equally many batches, weighted so that the means are exact."""
    options = {"batch_size": 8, "image_size": 8, "data_dir": data_dir}
    whole = make_task("digits", **options)
    images, labels = (np.concatenate(part) for part in zip(*getattr(whole, kind).as_numpy_iterator(), strict=True))
    shares = []
    for worker in (0, 1):
        task = make_task("digits", worker=worker, num_workers=2, **options)
        shares.append(list(getattr(task, f"{kind}_share")(replicas=2).as_numpy_iterator()))
    assert len(shares[0]) == len(shares[1]) and len(shares[0]) % 2 == 0
    batches = [batch for share in shares for batch in share]
    assert len({batch[0].shape for batch in batches}) == 1
    seen_images, seen_labels, weights = (np.concatenate(part) for part in zip(*batches, strict=True))
    real = weights > 0
    assert real.sum() == len(labels)
    np.testing.assert_allclose(weights[real], len(weights) / len(labels), rtol=1e-6)
    order, expected = (np.lexsort(part.reshape(len(part), -1).T) for part in (seen_images[real], images))
    np.testing.assert_array_equal(seen_images[real][order], images[expected])
    assert np.mean(weights * seen_labels) == pytest.approx(labels.mean(), rel=1e-6)


@pytest.mark.parametrize(("workers", "replicas"), [(1, 2), (2, 1), (2, 2), (3, 1)])
def test_the_ids_are_in_the_order_of_the_results(data_dir, workers, replicas):
    """As in `strategy.gather`: step by step, the batches of all replicas, starting with those of the first worker."""
    options = {"batch_size": 12, "image_size": 8, "classes": (0, 1, 2), "data_dir": data_dir, "num_workers": workers}
    tasks = [make_task("digits", worker=worker, **options) for worker in range(workers)]
    shares = [iter(task.test_share(replicas=replicas).as_numpy_iterator()) for task in tasks]
    labels = []
    for step in iter(lambda: [next(share, None) for share in shares for _ in range(replicas)], None):
        if step[0] is None:
            break
        labels += [batch[1][batch[2] > 0] for batch in step]
    ids = tasks[0].test_ids(replicas=replicas)
    assert sorted(ids) == tasks[0].test_ids().tolist()
    label_of = dict(zip(tasks[0].test_ids().tolist(), tasks[0].test_examples.labels().tolist(), strict=True))
    assert np.concatenate(labels).tolist() == [label_of[number] for number in ids.tolist()]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distribution": "mirored"}, "Did you mean 'mirrored'"),
        ({"distribution": "mirrored", "precision": "mixed_float16"}, "--precision=mixed_bfloat16 on several"),
        (
            {"distribution": "mirrored", "epsilon": 0.5, "attack_mode": "training", "attack_steps": 3},
            "works on one device only. Received: --attack_mode=training --attack_steps=3",
        ),
        ({"distribution": "tpu", "jit_compile": "true"}, "leave out --jit_compile. Received: --jit_compile=true"),
        ({"distribution": "tpu", "accumulate_steps": 2}, "--accumulate_steps works on one device only"),
    ],
)
def test_unsupported_settings_with_several_devices_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        JobConfig.from_flags(**settings)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        '{"cluster": {"worker": ["localhost:1"]}, "task": {"type": "worker", "index": 3}}',
        '{"cluster": {"chief": ["localhost:1"], "worker": ["localhost:2"]}, "task": {"type": "worker", "index": 0}}',
    ],
)
def test_the_error_for_a_wrong_tf_config_shows_a_correct_one(monkeypatch, text):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(UserError, match=r"needs TF_CONFIG .*\"index\": 0.*Received: TF_CONFIG="):
        start_distribution("multi_worker")


def test_the_batch_size_must_be_a_multiple_of_the_number_of_replicas(monkeypatch):
    distribution = start_distribution("none")
    distribution.check_batch_size(7)
    monkeypatch.setattr(type(distribution), "num_replicas", 4)
    with pytest.raises(UserError, match="batch_size=6. Use a multiple of 4"):
        distribution.check_batch_size(6)


def test_a_job_gives_up_when_another_worker_does_not_start(monkeypatch, tmp_path):
    ports = free_ports(2)
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": {"type": "worker", "index": 1}}))
    config = JobConfig.from_flags(distribution="multi_worker", worker_timeout=0.5, workdir=str(tmp_path / "w"))
    with pytest.raises(UserError, match=rf"no worker 0 \(127.0.0.1:{ports[0]}: .*within --worker_timeout=0.5 seconds"):
        train.run(config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("timeout", [0.0, 7.0])
def test_while_tensorflow_connects_the_workers_signals_and_time_end_the_process(monkeypatch, timeout):
    """Only what works without Python can end the process there, since TensorFlow holds Python's lock."""
    limits: list[float] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, exit: limits.append(seconds * exit))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: limits.append(-1))
    monkeypatch.setattr(
        tf.distribute, "MultiWorkerMirroredStrategy", lambda: [*limits, *map(signal.getsignal, numbers)]
    )
    with signals_raise():
        before = list(map(signal.getsignal, numbers))
        within = _multi_worker_strategy(timeout)
        assert list(map(signal.getsignal, numbers)) == before
    assert within == [timeout, signal.SIG_DFL, signal.SIG_DFL][0 if timeout else 1 :]
    assert limits == ([timeout, -1] if timeout else [])


def test_the_timeout_must_not_be_negative():
    with pytest.raises(UserError, match="--worker_timeout must be 0 or more. Received: -1"):
        JobConfig.from_flags(worker_timeout=-1.0)


def test_after_a_signal_a_process_ends_instead_of_restarting(monkeypatch, capsys):
    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("restarted"))
    with pytest.raises(SystemExit, match="143"):
        restart_process(RuntimeError("peer lost"), most=2, signal_number=signal.SIGTERM)
    assert "Interrupted. Another worker was lost. " in capsys.readouterr().err


def test_the_number_of_restarts_is_limited(monkeypatch):
    monkeypatch.setenv("ROBUST_TF_RESTARTS", "2")
    with pytest.raises(UserError, match=r"already been restarted 2 times \(restarts=2\). Received: peer lost"):
        restart_process(RuntimeError("peer lost"), most=2)


def test_the_learning_rate_is_scaled_only_if_asked_for():
    settings = {"batch_size": 512, "learning_rate": 0.1, "lr_schedule": "constant"}
    assert JobConfig.from_flags(**settings, distribution="mirrored").optimization.peak_learning_rate == pytest.approx(
        0.1
    )
    assert JobConfig.from_flags(**settings, base_batch_size=256).optimization.peak_learning_rate == pytest.approx(0.2)


@pytest.mark.slow
def test_saved_classifiers_have_no_synchronized_batchnorm(tmp_path, data_dir):
    flags = {"architecture": "resnet8", "image_size": 8, "classes": (0, 1), "examples_per_class": 8, "epochs": 1}
    config = JobConfig.from_flags(workdir=str(tmp_path / "w"), data_dir=str(data_dir), sync_batchnorm=True, **flags)
    train.run(config)
    classifier = load_classifier(tmp_path / "w" / "classifier.keras")
    norms = [layer for layer in classifier.layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert norms and not any(layer.synchronized for layer in norms)
