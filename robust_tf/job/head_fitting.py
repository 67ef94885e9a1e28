"""Training of the head alone, on stored features of the frozen backbone."""

import dataclasses
import math
import pathlib
import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from robust_tf.config.job import JobConfig
from robust_tf.console import console, meter, track
from robust_tf.data import TaskData
from robust_tf.errors import UserError
from robust_tf.evaluation.outcomes import Outcomes
from robust_tf.files import cache_folder
from robust_tf.flags import to_flag_file
from robust_tf.job.building import job_loss, job_optimizer, optimizer_steps_per_epoch
from robust_tf.job.patience import patience_of
from robust_tf.job.testing import Evaluation
from robust_tf.models import features_of, weights_sha256
from robust_tf.sharing import MOST_TRAINERS, shared
from robust_tf.training.checkpoint import TrainingProgress
from robust_tf.training.metrics import CrossEntropy
from robust_tf.training.tensorboard import write_config, write_history
from robust_tf.transfer.features import Features, stored_features, test_features
from robust_tf.transfer.probes import PENALTIES, PROBES, metric_of

# Bytes of features that an epoch holds in memory at once.
_CHUNK_BYTES = 256 * 1024**2
_METRICS = ("accuracy", "mean_per_class_accuracy")


@dataclasses.dataclass(frozen=True)
class HeadFit:
    """The result of fitting a head on stored features.

    Attributes:
        progress: Progress of the training; `epochs_done` is 0 for a probe, which is not trained in epochs.
        cache_hits: Number of rows of features that were already stored.
        cache_misses: Number of rows of features that had to be computed.
        feature_seconds: Seconds that it took to load and compute all features.
        penalty: Regularization that a probe chose. None for SGD.
    """

    progress: TrainingProgress
    cache_hits: int
    cache_misses: int
    feature_seconds: float
    penalty: float | None


def fit_head(job: JobConfig, classifier: keras.Model, task: TaskData, workdir: pathlib.Path) -> HeadFit:
    """Fits the head of a classifier to the features of its backbone. The backbone does not change.

    Args:
        job: Job to run.
        classifier: Classifier whose head is fitted in place.
        task: Data of the job.
        workdir: Folder of the job.

    Raises:
        UserError: The features can't be stored, or the loss is no longer finite.
    """
    transfer = job.transfer
    start = time.perf_counter()
    features = stored_features(
        classifier,
        task,
        views=transfer.views,
        cache_dir=cache_folder(job.data.cache_dir or None),
        features_cache_size_gb=transfer.features_cache_size_gb,
        track=track,
    )
    feature_seconds = time.perf_counter() - start
    console.print(f"Features: {features.computed} computed, {features.hits} found stored, in {feature_seconds:.1f} s.")
    penalty = None
    if transfer.head == "sgd":
        progress = _train(job, classifier, features, task)
        if job.run.outputs == "all":
            write_config(workdir / "tensorboard", to_flag_file(job.resolved()))
            write_history(workdir / "tensorboard", progress.history)
    else:
        with meter("head", total=PENALTIES[transfer.head], unit="penalties") as bar:
            probe = PROBES[transfer.head](
                features.train,
                features.train_labels,
                features.validation,
                features.validation_labels,
                num_classes=len(task.class_names),
                metric=task.metric,
                report=bar.update,
            )
        classifier.get_layer("logits").set_weights([probe.kernel, probe.bias])
        progress, penalty = TrainingProgress(best_value=probe.validation_value), probe.penalty
    progress.seconds = time.perf_counter() - start
    console.print(
        f"Head: {transfer.head}, in {progress.seconds - feature_seconds:.1f} s, {task.metric} "
        f"{progress.best_value:.1%} on the validation part{f', penalty {penalty:.2g}' if penalty is not None else ''}."
    )
    return HeadFit(progress, features.hits, features.computed, feature_seconds, penalty)


def can_test_features(job: JobConfig) -> bool:
    """Returns whether the test of a job needs nothing but features: no attack, and no pictures of examples."""
    return job.transfer.cached and job.run.outputs == "results" and not job.adversarial.evaluation_attack.active


def evaluate_features(classifier: keras.Model, task: TaskData) -> Evaluation:
    """Measures the clean accuracy as `evaluate_classifier` does, from the features of the test images.

    Args:
        classifier: Classifier whose head has been fitted.
        task: Data of the job.
    """
    logits = np.asarray(_copy_of_head(classifier)(test_features(classifier, task), training=False))
    labels = task.test_examples.labels().astype(np.int64)
    return Evaluation(Outcomes(task.test_ids(), labels, logits.argmax(axis=1), None), logits.shape[-1])


def classifier_to_attack(job: JobConfig, classifier: keras.Model) -> keras.Model:
    """Returns a classifier that computes what the given one computes, and that other jobs of this process share.

    Jobs that differ in their heads only can then use one traced attack, which takes longer to trace than to run. A
    later call may change the weights of the head, so use the classifier at once, and for the test only.

    Args:
        job: Job with `--features=cached`, whose backbone nothing has changed.
        classifier: Classifier whose head has been fitted.
    """
    backbone = features_of(classifier, name="backbone")
    key = (weights_sha256(backbone), backbone.to_json(), job.transfer.hidden_layers, classifier.output_shape[-1])
    same = shared(("classifier to attack", *key), lambda: classifier, most=MOST_TRAINERS)
    for layer, fitted in zip(_head_layers(same), _head_layers(classifier), strict=True):
        layer.set_weights(fitted.get_weights())
    return same


def _train(job: JobConfig, classifier: keras.Model, features: Features, task: TaskData) -> TrainingProgress:
    """Trains the head by gradient descent. Each epoch sees every image once, in a view that is drawn at random."""
    optimization, patience = job.optimization, patience_of(job)
    head = _copy_of_head(classifier)
    optimizer = job_optimizer(
        optimization, optimizer_steps_per_epoch(optimization, replays=1, batches=task.steps_per_epoch)
    )
    optimizer.build(head.trainable_variables)
    loss = job_loss(optimization.class_weight, task)
    train_rows, predict = _steps(head, optimizer, loss, task.batch_size)
    progress = TrainingProgress()
    best_weights = head.get_weights()
    for epoch in range(optimization.epochs):
        logs = _mean_logs(
            [train_rows(*chunk).numpy() for chunk in _epoch_chunks(features, task, job.run.seed, epoch)],
            task.num_train,
        )
        if not math.isfinite(logs["loss"]):
            raise UserError(
                f"The loss is no longer a finite number. Received: loss={logs['loss']} in epoch {epoch + 1}. Try a "
                "lower --learning_rate or --warmup_epochs=1, in a new --workdir. The stored features are kept."
            )
        logits = np.concatenate([predict(chunk).numpy() for chunk in _chunks_in_order(features.validation)])
        logs["val_loss"] = float(loss(features.validation_labels, logits))
        for metric in _METRICS:
            logs[f"val_{metric}"] = metric_of(logits.argmax(axis=1), features.validation_labels, metric)
        logs["learning_rate"] = float(optimizer.learning_rate)
        value = {"last": float(epoch), "accuracy": logs["val_accuracy"]}.get(
            optimization.select_by, logs[f"val_{task.metric}"]
        )
        if (value, -logs["val_loss"]) > (progress.best_value, -progress.best_loss):
            progress.best_epoch, progress.best_value, progress.best_loss = epoch, value, logs["val_loss"]
            best_weights = head.get_weights()
        progress.epochs_done = epoch + 1
        progress.history.append(logs)
        if patience.is_exhausted(progress):
            console.print(patience.explanation(progress))
            break
    for layer, source in zip(_head_layers(classifier), _split_weights(head, best_weights), strict=True):
        layer.set_weights(source)
    return progress


def _steps(
    head: keras.Model, optimizer: keras.optimizers.Optimizer, loss: CrossEntropy, batch_size: int
) -> tuple[Any, Any]:
    """Returns two functions of rows of features, each a tf.function: one for training and one for prediction.

    The first trains on the rows batch by batch and returns the sum of the losses and the number of hits. The second
    returns the logits.
    """
    dim = head.input_shape[-1]
    rows = tf.TensorSpec([None, dim], tf.float32)

    @tf.function(input_signature=[rows, tf.TensorSpec([None], tf.int32)])
    def train_rows(features: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        sums = tf.zeros([2])
        for start in tf.range(0, tf.shape(labels)[0], batch_size):
            batch, batch_labels = features[start : start + batch_size], labels[start : start + batch_size]
            with tf.GradientTape() as tape:
                logits = head(batch, training=True)
                losses = loss.call(batch_labels, logits)
                mean_loss = tf.reduce_mean(losses)
            variables = head.trainable_variables
            optimizer.apply(tape.gradient(mean_loss, variables), variables)
            hits = tf.cast(tf.argmax(logits, axis=-1, output_type=tf.int32) == batch_labels, tf.float32)
            sums += tf.stack([tf.reduce_sum(losses), tf.reduce_sum(hits)])
        return sums

    @tf.function(input_signature=[rows])
    def predict(features: tf.Tensor) -> tf.Tensor:
        return head(features, training=False)

    return train_rows, predict


def _epoch_chunks(features: Features, task: TaskData, seed: int, epoch: int) -> Any:
    """Yields the rows of an epoch with their labels, in the order of the epoch, in chunks of whole batches."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(features.train_labels))
    view_of = rng.integers(len(features.train), size=len(order))
    dim = features.validation.shape[1]
    size = max(1, _CHUNK_BYTES // (4 * dim * task.batch_size)) * task.batch_size
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        chunk = np.empty((len(rows), dim), np.float32)
        for view, stored in enumerate(features.train):
            here = view_of[rows] == view
            chunk[here] = stored[rows[here]]
        yield chunk, features.train_labels[rows]


def _chunks_in_order(rows: np.ndarray) -> Any:
    size = max(1, _CHUNK_BYTES // (4 * rows.shape[1]))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _mean_logs(sums: list[np.ndarray], count: int) -> dict[str, float]:
    means = (np.stack(sums).astype(np.float64).sum(axis=0) / count).tolist()
    return {"loss": means[0], "accuracy": means[1]}


def _head_layers(classifier: keras.Model) -> list[keras.layers.Layer]:
    names = [layer.name for layer in classifier.layers]
    return list(classifier.layers[names.index("features") + 1 :])


def _copy_of_head(classifier: keras.Model) -> keras.Model:
    """Returns a model with copies of the layers after "features". A layer shared by two models has no single input."""
    outputs = inputs = keras.Input(classifier.get_layer("features").output.shape[1:], name="features")
    for layer in _head_layers(classifier):
        copy = type(layer).from_config(layer.get_config())
        outputs = copy(outputs)
        copy.set_weights(layer.get_weights())
    return keras.Model(inputs, outputs, name="head")


def _split_weights(head: keras.Model, weights: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Groups the weights of a head by layer."""
    remaining = iter(weights)
    return [[next(remaining) for _ in layer.weights] for layer in head.layers[1:]]
