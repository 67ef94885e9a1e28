"""Linear heads that are not trained in epochs: logistic regression and ridge regression on stored features.

Both try several amounts of regularization, choose the one that does best on the validation part, and return weights
for a Dense layer.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# Penalties relative to the scale of the features. Strong ones come first, and each solution is the starting point for
# the next penalty.
_LOGISTIC_PENALTIES = tuple(10.0**exponent for exponent in range(1, -7, -1))
_RIDGE_PENALTIES = tuple(10.0 ** (exponent / 2) for exponent in range(4, -13, -1))
_MAX_ITERATIONS = 1000
# The search ends when the solutions for this many penalties in a row are no better on the validation part.
_PATIENCE = 2
# Number of multiplications in one pass over the features above which BLAS gains from more than one thread. Below it,
# threads wait for one another longer than they compute, especially if other processes are busy.
_THREADED_PASS = 10**9
# Number of rows that are read into memory at a time by functions that do not need all rows together.
_ROWS = 8192
# Logit of a class without training examples, so that it is never predicted.
_NEVER = -100.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearHead:
    """Weights of a linear classifier on features.

    Attributes:
        kernel: Kernel, (feature_dim, num_classes) float32.
        bias: Bias, (num_classes,) float32.
        penalty: Regularization that was chosen.
        validation_value: Value of the metric on the validation part, in [0, 1].
    """

    kernel: np.ndarray
    bias: np.ndarray
    penalty: float
    validation_value: float


def _no_report(*_: Any) -> None:
    """Reports nothing."""


def logistic_regression(
    train: Sequence[np.ndarray],
    train_labels: np.ndarray,
    validation: np.ndarray,
    validation_labels: np.ndarray,
    *,
    num_classes: int,
    metric: str,
    report: Callable[[int, str], None] = _no_report,
) -> LinearHead:
    """Fits a multinomial logistic regression: the mean cross-entropy plus penalty / 2 * |kernel|^2, by L-BFGS.

    The features are standardized. Strong penalties come first, and each solution is the starting point for the next
    penalty. The search ends when two solutions in a row are no better on the validation part than an earlier one.
    Weaker penalties, which take most of the iterations, would only fit the training part more closely.

    Args:
        train: Features of the training images in each view, (num_train, feature_dim). All views are examples.
        train_labels: Labels of the training images, (num_train,) int.
        validation: Features of the validation images, (num_validation, feature_dim).
        validation_labels: Labels of the validation images, (num_validation,) int.
        num_classes: Number of classes.
        metric: "accuracy" or "mean_per_class_accuracy", by which the penalty is chosen. The cross-entropy decides ties.
        report: Function of the number of penalties that have been tried and a text about the search so far.

    Returns:
        The solution that is best on the validation part.

    Source: The protocol is from Kornblith et al. 2019, arXiv 1805.08974, section 4.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression  # slow to import

    mean, std = _moments(train)
    features = (np.concatenate(list(train)).astype(np.float64) - mean) / std
    labels = np.tile(train_labels, len(train))
    solver = LogisticRegression(max_iter=_MAX_ITERATIONS, tol=1e-5, warm_start=True)
    best: tuple[tuple[float, float], LinearHead] | None = None
    worse = 0
    report(0, "")
    with _threads_for(features.size * num_classes):
        for tried, penalty in enumerate(_LOGISTIC_PENALTIES, 1):
            solver.set_params(C=1.0 / (penalty * len(labels)))
            with warnings.catch_warnings():
                # With a weak penalty the optimum is far away. The solution that was reached is still a candidate.
                warnings.simplefilter("ignore", ConvergenceWarning)
                solver.fit(features, labels)
            kernel, bias = _softmax_weights(solver.coef_, solver.intercept_, solver.classes_, num_classes)
            kernel = kernel / std[:, None]
            bias = bias - mean @ kernel
            before, best = best, _better(best, kernel, bias, penalty, validation, validation_labels, metric)
            worse = worse + 1 if best is before else 0
            report(tried, f"penalty {penalty:.0e}, {metric} {best[1].validation_value:.1%} so far")
            if worse == _PATIENCE:
                break
    if best is None:
        raise AssertionError("The list of penalties is empty.")
    return best[1]


def _threads_for(multiplications: int) -> contextlib.AbstractContextManager[object]:
    """Returns a context that limits BLAS to one thread if a pass over the features is small."""
    from threadpoolctl import threadpool_limits  # a dependency of scikit-learn

    return threadpool_limits(limits=1) if multiplications < _THREADED_PASS else contextlib.nullcontext()


def ridge_regression(
    train: Sequence[np.ndarray],
    train_labels: np.ndarray,
    validation: np.ndarray,
    validation_labels: np.ndarray,
    *,
    num_classes: int,
    metric: str,
    report: Callable[[int, str], None] = _no_report,
) -> LinearHead:
    """Fits a ridge regression exactly: the mean of (score - target)^2 plus penalty * |kernel|^2, with targets +-1.

    The penalty is relative to the mean variance of the features, and one eigendecomposition serves all penalties.
    Because targets of +-1 say nothing about probabilities, the scores are then multiplied by the factor that makes
    their softmax fit the validation labels best. This changes no prediction.

    Args:
        train: Features of the training images in each view, (num_train, feature_dim). All views are examples.
        train_labels: Labels of the training images, (num_train,) int.
        validation: Features of the validation images, (num_validation, feature_dim).
        validation_labels: Labels of the validation images, (num_validation,) int.
        num_classes: Number of classes.
        metric: "accuracy" or "mean_per_class_accuracy", by which the penalty is chosen. The cross-entropy decides ties.
        report: Function of the number of penalties that have been tried and a text about the search so far.

    Returns:
        The solution that is best on the validation part.
    """
    mean, _ = _moments(train)
    dim, count = len(mean), len(train) * len(train_labels)
    share = np.bincount(train_labels, minlength=num_classes) / len(train_labels)
    mean_target = 2.0 * share - 1.0
    gram, product = np.zeros((dim, dim)), np.zeros((dim, num_classes))
    for view in train:
        for start in range(0, len(view), _ROWS):
            rows = view[start : start + _ROWS].astype(np.float64) - mean
            targets = np.full((len(rows), num_classes), -1.0)
            targets[np.arange(len(rows)), train_labels[start : start + _ROWS]] = 1.0
            gram += rows.T @ rows / count
            product += rows.T @ (targets - mean_target) / count
    eigenvalues, eigenvectors = np.linalg.eigh(gram)
    eigenvalues = np.maximum(eigenvalues, 0.0)
    scale = max(float(eigenvalues.mean()), np.finfo(np.float64).tiny)
    rotated = eigenvectors.T @ product
    best: tuple[tuple[float, float], LinearHead] | None = None
    for tried, penalty in enumerate(_RIDGE_PENALTIES, 1):
        kernel = eigenvectors @ (rotated / (eigenvalues + penalty * scale)[:, None])
        bias = mean_target - mean @ kernel
        factor = _best_factor(validation @ kernel + bias, validation_labels)
        best = _better(best, factor * kernel, factor * bias, penalty, validation, validation_labels, metric)
        report(tried, f"penalty {penalty:.0e}, {metric} {best[1].validation_value:.1%} so far")
    if best is None:
        raise AssertionError("The list of penalties is empty.")
    return best[1]


PROBES = {"lbfgs": logistic_regression, "ridge": ridge_regression}
# Largest number of penalties that each probe tries.
PENALTIES = {"lbfgs": len(_LOGISTIC_PENALTIES), "ridge": len(_RIDGE_PENALTIES)}


def metric_of(predictions: np.ndarray, labels: np.ndarray, metric: str) -> float:
    """Returns the accuracy, or its mean over the classes that occur, in [0, 1].

    Args:
        predictions: Predicted classes, (num_images,) int.
        labels: Labels, (num_images,) int.
        metric: "accuracy" or "mean_per_class_accuracy".
    """
    hits = predictions == labels
    if metric == "accuracy":
        return float(hits.mean())
    return float(np.mean([hits[labels == label].mean() for label in np.unique(labels)]))


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean cross-entropy over the rows, in nats."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return float((np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]).mean())


def _better(
    best: tuple[tuple[float, float], LinearHead] | None,
    kernel: np.ndarray,
    bias: np.ndarray,
    penalty: float,
    validation: np.ndarray,
    labels: np.ndarray,
    metric: str,
) -> tuple[tuple[float, float], LinearHead]:
    """Returns the better of the best solution so far and a new one; in a tie, the more regularized one."""
    logits = validation @ kernel + bias
    value = metric_of(logits.argmax(axis=1), labels, metric)
    rank = (value, -cross_entropy(logits, labels))
    if best is not None and best[0] >= rank:
        return best
    return rank, LinearHead(
        kernel=kernel.astype(np.float32), bias=bias.astype(np.float32), penalty=penalty, validation_value=value
    )


def _moments(train: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation over all views, (feature_dim,) float64 each; 1 for a constant feature."""
    count = sum(len(view) for view in train)
    mean = sum(view.sum(axis=0, dtype=np.float64) for view in train) / count
    variance = np.zeros_like(mean)
    for view in train:
        for start in range(0, len(view), _ROWS):
            variance += ((view[start : start + _ROWS] - mean) ** 2).sum(axis=0) / count
    std = np.sqrt(variance)
    return mean, np.where(std > 1e-6 * std.max(), std, 1.0)


def _softmax_weights(
    coefficients: np.ndarray, intercepts: np.ndarray, classes: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns scikit-learn's weights with one column for each class.

    For two classes scikit-learn has a single column, for the log-odds of the second class.
    """
    if len(classes) == 2:
        coefficients = np.concatenate([-coefficients, coefficients]) / 2.0
        intercepts = np.concatenate([-intercepts, intercepts]) / 2.0
    kernel, bias = np.zeros((coefficients.shape[1], num_classes)), np.full(num_classes, _NEVER)
    kernel[:, classes], bias[classes] = coefficients.T, intercepts
    return kernel, bias


def _best_factor(scores: np.ndarray, labels: np.ndarray) -> float:
    """Returns the factor that minimizes the cross-entropy (temperature scaling, Guo et al. 2017, arXiv 1706.04599)."""
    return float(min(np.logspace(-1, 3, 41), key=lambda factor: cross_entropy(factor * scores, labels)))
