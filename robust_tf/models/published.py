"""The table of published robust models, and their download.

The ImageNet models are PyTorch checkpoints by the authors of the paper. Each checkpoint is downloaded, verified and
converted once. The small Fashion-MNIST models are part of this package.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
import time
from collections.abc import Iterator
from typing import Literal

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock

from robust_tf.config.attack import Norm
from robust_tf.errors import UserError, unknown_name, warn_user
from robust_tf.files import cache_folder, temporary_cache, write_json
from robust_tf.models.architectures import ARCHITECTURES
from robust_tf.models.classifier_file import save_classifier
from robust_tf.models.conversion import classifier_from_checkpoint
from robust_tf.models.reference_checkpoint import read_reference_checkpoint

REPOSITORY = "madrylab/robust-imagenet-models"
PACKAGED = pathlib.Path(__file__).parent / "weights"
# Seconds to wait before each further attempt at a download that failed for a temporary reason.
_PAUSES = (1, 2, 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """A published model.

    Attributes:
        architecture: Name in `ARCHITECTURES`.
        norm: Norm of the perturbations in training.
        epsilon: Radius of the perturbations in training, in [0, 1] pixel units; 0 for standard training.
        dataset: Data set of the training.
        filename: Name of the checkpoint on the Hugging Face hub, or of the classifier in this package.
        clean_accuracy: Published top-1 accuracy on unperturbed test images, in percent.
        sha256: SHA-256 of the checkpoint, if its authors have published it.

    Example:
        >>> PUBLISHED["resnet50_l2_eps3"].clean_accuracy
        62.83
    """

    architecture: str
    norm: Norm
    epsilon: float
    dataset: Literal["imagenet", "fashion_mnist"]
    filename: str
    clean_accuracy: float | None = None
    sha256: str | None = None

    @property
    def packaged(self) -> bool:
        """Whether the classifier is part of this package."""
        return self.filename.endswith(".keras")


# ImageNet top-1 accuracies by norm, epsilon and architecture. Epsilon is written as in the file names, which means in
# units of 1/255 for linf. Source: Salman et al. 2020 (arXiv 2007.08489) and the tables of the code published with it.
_IMAGENET: tuple[tuple[Norm, tuple[str, ...], dict[str, tuple[float, ...]]], ...] = (
    (
        "l2",
        ("0", "0.01", "0.03", "0.05", "0.1", "0.25", "0.5", "1", "3", "5"),
        {
            "resnet18": (69.79, 69.90, 69.24, 69.15, 68.77, 67.43, 65.49, 62.32, 53.12, 45.59),
            "resnet50": (75.80, 75.68, 75.76, 75.59, 74.78, 74.14, 73.16, 70.43, 62.83, 56.13),
            "wide_resnet50_2": (76.97, 77.25, 77.26, 77.17, 76.74, 76.21, 75.11, 73.41, 66.90, 60.94),
            "wide_resnet50_4": (77.91, 78.02, 77.87, 77.77, 77.64, 77.10, 76.52, 75.51, 69.67, 65.20),
        },
    ),
    (
        "l2",
        ("0", "3"),
        {
            "densenet161": (77.37, 66.98),
            "mnasnet1_0": (60.97, 41.83),
            "mobilenet_v2": (65.26, 50.40),
            "resnext50_32x4d": (77.38, 66.25),
            "shufflenet_v2_x1_0": (64.25, 43.32),
            "vgg16_bn": (73.66, 57.19),
        },
    ),
    (
        "linf",
        ("0.5", "1.0", "2.0", "4.0", "8.0"),
        {
            "resnet18": (66.13, 63.46, 59.63, 52.49, 42.11),
            "resnet50": (73.73, 72.05, 69.10, 63.86, 54.53),
            "wide_resnet50_2": (75.82, 74.65, 72.35, 68.41, 60.82),
        },
    ),
)

PUBLISHED: dict[str, PublishedModel] = {
    f"{architecture}_{norm}_eps{epsilon}": PublishedModel(
        architecture=architecture,
        norm=norm,
        epsilon=float(epsilon) / (255 if norm == "linf" else 1),
        dataset="imagenet",
        # The file names use the reference's names of the architectures, such as densenet for densenet161.
        filename=f"{ARCHITECTURES[architecture].reference_name}_{norm}_eps{epsilon}.ckpt",
        clean_accuracy=accuracy,
    )
    for norm, epsilons, architectures in _IMAGENET
    for architecture, accuracies in architectures.items()
    for epsilon, accuracy in zip(epsilons, accuracies, strict=True)
} | {
    name: PublishedModel(
        architecture="resnet20",
        norm="l2",
        epsilon=epsilon,
        dataset="fashion_mnist",
        filename=f"{name}.keras",
        clean_accuracy=accuracy,
    )
    # Trained with configs/fashion_mnist_standard.cfg and configs/fashion_mnist_l2.cfg, whose headers list all results.
    for name, epsilon, accuracy in (
        ("resnet20_fashion_mnist_l2_eps0", 0.0, 93.25),
        ("resnet20_fashion_mnist_l2_eps1", 1.0, 88.55),
    )
}


def published_model(name: str) -> PublishedModel:
    """Returns the entry of a name in `PUBLISHED`.

    Args:
        name: Name of the model.

    Raises:
        UserError: The name is unknown. The message suggests the nearest name.
    """
    if name not in PUBLISHED:
        raise unknown_name("published model", name, PUBLISHED)
    return PUBLISHED[name]


def standard_twin(name: str) -> str:
    """Returns the name of the model that has the same architecture and data set, but was trained without an attack.

    Args:
        name: Name in `PUBLISHED`.

    Example:
        >>> standard_twin("resnet50_l2_eps3")
        'resnet50_l2_eps0'
    """
    model = published_model(name)
    return next(
        twin
        for twin, other in PUBLISHED.items()
        if (other.architecture, other.dataset, other.epsilon) == (model.architecture, model.dataset, 0)
    )


def fetch_published(
    name: str, *, cache_dir: str | pathlib.Path | None = None, endpoint: str | None = None
) -> pathlib.Path:
    """Returns the path of a published classifier. The first call downloads and converts it.

    A checkpoint that you have downloaded into the cache folder by hand is used. The first call records the size and
    SHA-256 of each file, and every later call compares the file with the record.

    Args:
        name: Name in `PUBLISHED`.
        cache_dir: Folder for checkpoints and classifiers, by default `robust_tf` in the user's cache folder.
        endpoint: Address of the Hugging Face hub, by default the one in HF_ENDPOINT, or the public hub.

    Returns:
        The path of a `.keras` file.

    Raises:
        UserError: The name is unknown, the download failed, there is not enough space, or a file has changed.

    Example:
        >>> fetch_published("resnet20_fashion_mnist_l2_eps1").name
        'resnet20_fashion_mnist_l2_eps1.keras'
    """
    model = published_model(name)
    if model.packaged:
        classifier_path = PACKAGED / model.filename
        if not classifier_path.exists():
            raise UserError(
                f"The classifier {name} is part of the package robust_tf. Missing file: {classifier_path}. "
                "Install the package again, or train the classifier with the flag file in configs/."
            )
        return classifier_path

    classifier_path = cache_folder(cache_dir) / f"{name}.keras"
    if not classifier_path.exists():
        with _exclusive(cache_folder(cache_dir), name) as folder:
            checkpoint_path = _checkpoint_in(folder, model, endpoint, there=cache_folder(cache_dir))
            classifier_path = folder / classifier_path.name
            if not classifier_path.exists():  # unless another process made it while this one waited for the lock
                classifier = classifier_from_checkpoint(read_reference_checkpoint(checkpoint_path), model.architecture)
                _record_path(classifier_path).unlink(missing_ok=True)
                save_classifier(classifier, classifier_path)
    _check_or_record(classifier_path)
    return classifier_path


def fetch_checkpoint(
    name: str, *, cache_dir: str | pathlib.Path | None = None, endpoint: str | None = None
) -> pathlib.Path:
    """Returns the path of the checkpoint of a published ImageNet model. The first call downloads it.

    Args:
        name: Name in `PUBLISHED`.
        cache_dir: Folder for checkpoints and classifiers, by default `robust_tf` in the user's cache folder.
        endpoint: Address of the Hugging Face hub, by default the one in HF_ENDPOINT, or the public hub.

    Raises:
        UserError: The name is unknown or belongs to a model without a checkpoint, the download failed, there is not
            enough space, or the file has changed.
    """
    model = published_model(name)
    if model.packaged:
        raise UserError(
            f"Only the ImageNet models have a PyTorch checkpoint. Received: {name}, a classifier that is part of the "
            f"package: {PACKAGED / model.filename}."
        )
    there = cache_folder(cache_dir)
    if (there / model.filename).exists():
        _check_or_record(there / model.filename)
        return there / model.filename
    with _exclusive(there, name) as folder:
        return _checkpoint_in(folder, model, endpoint, there=there)


@contextlib.contextmanager
def _exclusive(folder: pathlib.Path, name: str) -> Iterator[pathlib.Path]:
    """Returns a context that only one process at a time can enter for a model. Other processes wait.

    Yields:
        The folder to write to. If the cache folder is not writable, this is a temporary folder, and a warning is
        printed.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(WeakFileLock(folder / f".{name}.lock"))
        except OSError as error:
            folder = temporary_cache(error, folder)
        yield folder


def _checkpoint_in(
    folder: pathlib.Path, model: PublishedModel, endpoint: str | None, *, there: pathlib.Path
) -> pathlib.Path:
    """Returns the checkpoint in the cache folder `there`, which may be read-only, or downloads it into `folder`."""
    path = there / model.filename
    if not path.exists():
        path = folder / model.filename
        _download(path, model, endpoint)
    _check_or_record(path)
    return path


# Download --------------------------------------------------------------------------------------------------------


def _download(path: pathlib.Path, model: PublishedModel, endpoint: str | None) -> None:
    """Downloads a checkpoint. A download that was interrupted continues where it stopped, even in a later run.

    `huggingface_hub.hf_hub_download` deletes a partial file when its process ends, which wastes a lot of time for files
    of up to 1.8 GB. This function therefore fetches the metadata and the content separately and keeps the partial file.
    """
    url = huggingface_hub.hf_hub_url(REPOSITORY, path.name, endpoint=endpoint)
    by_hand = (
        f"Run the command again to continue the download, or download {path.name} by hand from "
        f"huggingface.co/{REPOSITORY} and put it into {path.parent}."
    )
    for pause in (*_PAUSES, None):
        try:
            metadata = huggingface_hub.get_hf_file_metadata(url, endpoint=endpoint)
            if metadata.etag is None or metadata.commit_hash is None:
                raise UserError(
                    f"The answer from {url} does not come from the hub, but perhaps from a login page of your network. "
                    f"{by_hand}"
                )
            version = re.sub("[^0-9a-zA-Z]", "", metadata.etag)
            part = path.with_name(f".{path.name}.{version}.part")
            with part.open("ab") as file:
                http_get(
                    metadata.location,
                    file,
                    resume_size=file.tell(),
                    expected_size=metadata.size,
                    headers={"Accept-Encoding": "identity"},  # compressed content would not have the expected size
                    displayed_filename=path.name,
                )
            break
        except (HTTPError, OSError) as error:
            if pause is None or not _may_pass(error):
                reason = str(error).partition("\n")[0] or type(error).__name__
                raise UserError(f"Cannot download {path.name} from {url}: {reason}. {by_hand}") from error
            time.sleep(pause)

    sha256 = _sha256(part)
    hub_sha256 = version if re.fullmatch("[0-9a-f]{64}", version) else None  # for large files the etag is the SHA-256
    for expected in filter(None, (hub_sha256, model.sha256)):
        if sha256 != expected:
            part.unlink()
            raise UserError(
                f"The download of {path.name} is damaged and was deleted: its SHA-256 must be {expected}. "
                f"Received: {sha256}. {by_hand}"
            )
    part.replace(path)


def _may_pass(error: Exception) -> bool:
    """Returns whether trying again may help. It does not for a missing file, a full disk, or the hub's offline mode."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in {408, 429, 500, 502, 503, 504}
    return not isinstance(error, OfflineModeIsEnabled) and getattr(error, "errno", None) is None


# Checksums -------------------------------------------------------------------------------------------------------


def _record_path(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.json")


def _check_or_record(path: pathlib.Path) -> None:
    """Compares the size and SHA-256 of a file with the record, or writes the record if there is none."""
    found = {"size": path.stat().st_size, "sha256": _sha256(path)}
    record = _record_path(path)
    if not record.exists():
        try:
            write_json(record, found)
        except UserError as error:
            warn_user(f"{error} Later changes of {path.name} will not be noticed.")
        return
    try:
        expected = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        expected = "an unreadable record"
    if found != expected:
        raise UserError(
            f"{path} has changed since it was downloaded: {record.name} says {expected}. Received: {found}. Delete "
            "both files to download it again."
        )


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
