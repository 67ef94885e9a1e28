"""Linear probes: the exact optimum where a formula gives it, and the penalty that is best on the validation part."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge

from robust_tf.transfer.probes import PROBES, cross_entropy, logistic_regression, metric_of, ridge_regression


def blobs(count: int, *, num_classes: int = 3, dim: int = 12, seed: int = 0, noise: float = 1.0):
    """Returns Gaussian classes with features of very different scales, one of them constant."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(num_classes, dim))
    labels = rng.permutation(np.arange(count) % num_classes)
    features = centers[labels] + noise * rng.normal(size=(count, dim))
    features = features * np.logspace(-2, 2, dim) + 5.0
    features[:, 3] = 7.0
    return features.astype(np.float32), labels.astype(np.int32)


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("metric", ["accuracy", "mean_per_class_accuracy"])
def test_separable_classes_are_separated(name, num_classes, metric):
    options = {"num_classes": num_classes, "noise": 0.2}
    train, labels = blobs(200, **options)
    validation, validation_labels = blobs(60, **options, seed=1)
    test, test_labels = blobs(300, **options, seed=2)
    head = PROBES[name]([train], labels, validation, validation_labels, num_classes=num_classes, metric=metric)
    logits = test @ head.kernel + head.bias
    assert head.kernel.dtype == head.bias.dtype == np.float32
    assert metric_of(logits.argmax(axis=1), test_labels, "accuracy") > 0.98
    own = metric_of((validation @ head.kernel + head.bias).argmax(axis=1), validation_labels, metric)
    assert head.validation_value == pytest.approx(own)


def test_ridge_regression_equals_scikit_learns(monkeypatch):
    train, labels = blobs(150)
    validation, validation_labels = blobs(50, seed=1)
    penalty = 0.01
    monkeypatch.setattr("robust_tf.transfer.probes._RIDGE_PENALTIES", (penalty,))
    views = [train[:, :], train + 0.1]
    head = ridge_regression(views, labels, validation, validation_labels, num_classes=3, metric="accuracy")
    both = np.concatenate(views).astype(np.float64)
    scale = both.var(axis=0).mean()
    targets = 2.0 * np.eye(3)[np.tile(labels, 2)] - 1.0
    theirs = Ridge(alpha=penalty * scale * len(both)).fit(both, targets)
    factor = (head.kernel * theirs.coef_.T).sum() / (theirs.coef_**2).sum()  # our weights are all scaled by one factor
    np.testing.assert_allclose(head.kernel, factor * theirs.coef_.T, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(head.bias, factor * theirs.intercept_, rtol=1e-3, atol=1e-3)
    logits = validation @ head.kernel + head.bias
    for other in (0.7, 1.4):  # the factor is the best one for the probabilities
        assert cross_entropy(logits, validation_labels) <= cross_entropy(other * logits, validation_labels)


def test_logistic_regression_is_optimal(monkeypatch):
    """The gradient of its objective is zero."""
    train, labels = blobs(200)
    penalty = 0.1
    monkeypatch.setattr("robust_tf.transfer.probes._LOGISTIC_PENALTIES", (penalty,))
    head = logistic_regression([train], labels, *blobs(50, seed=1), num_classes=3, metric="accuracy")
    std = np.where(train.std(axis=0) > 1e-3, train.std(axis=0), 1.0).astype(np.float64)
    standardised = (train - train.mean(axis=0)) / std
    kernel = head.kernel * std[:, None]
    logits = train.astype(np.float64) @ head.kernel + head.bias
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    gradient = standardised.T @ (probabilities - np.eye(3)[labels]) / len(train) + penalty * kernel
    assert np.abs(gradient).max() < 1e-3


@pytest.mark.parametrize("name", PROBES)
def test_the_penalty_is_the_best_one_on_the_validation_part(name, monkeypatch):
    """With many features and few noisy examples the weakest penalty overfits."""
    penalties = f"robust_tf.transfer.probes._{'LOGISTIC' if name == 'lbfgs' else 'RIDGE'}_PENALTIES"
    train, labels = blobs(45, dim=60, noise=3.0)
    others = [blobs(3000, dim=60, noise=3.0, seed=seed) for seed in (1, 2)]
    values = {}
    for choice in [(1.0,), (1e-6,), (1.0, 1e-6)]:
        monkeypatch.setattr(penalties, choice)
        head = PROBES[name]([train], labels, *others[0], num_classes=3, metric="accuracy")
        values[choice] = head.validation_value, head.penalty
    assert values[(1.0,)][0] > values[(1e-6,)][0]
    assert values[(1.0, 1e-6)] == values[(1.0,)]


def test_the_search_ends_when_the_validation_metric_falls(monkeypatch):
    """The search that stops early finds the same head as the search over all penalties."""
    train, labels = blobs(300, dim=40, noise=3.0)
    validation = blobs(1000, dim=40, noise=3.0, seed=1)
    tried: list[int] = []

    def reported(count: int, _text: str) -> None:
        tried.append(count)

    options = {"num_classes": 3, "metric": "accuracy"}
    short = logistic_regression([train], labels, *validation, **options, report=reported)
    monkeypatch.setattr("robust_tf.transfer.probes._PATIENCE", 100)
    whole = logistic_regression([train], labels, *validation, **options)
    assert tried == list(range(len(tried))) and 4 <= len(tried) < 8
    assert short.penalty == whole.penalty
    np.testing.assert_array_equal(short.kernel, whole.kernel)


def test_small_features_are_fitted_with_one_thread(monkeypatch):
    """With more threads BLAS took minutes beside busy processes, because its threads waited for one another."""
    from threadpoolctl import threadpool_info

    seen: list[set[int]] = []
    fit = LogisticRegression.fit

    def watched(self, *arguments):
        seen.append({pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"})
        return fit(self, *arguments)

    monkeypatch.setattr(LogisticRegression, "fit", watched)
    logistic_regression([blobs(60)[0]], blobs(60)[1], *blobs(30, seed=1), num_classes=3, metric="accuracy")
    assert seen and all(threads == {1} for threads in seen)
