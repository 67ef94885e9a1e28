"""Finds the TFDS builder of a data set, prepares its data on the disk, and says what to do if that fails."""

import contextlib
import difflib
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import socket
import tarfile
import tempfile
import types
import urllib.parse
import zipfile
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import dataset_info as tfds_dataset_info

from robust_tf.data.builders import OWN_BUILDERS
from robust_tf.data.datasets import TFDS_PREFIX, dataset_info, is_row
from robust_tf.errors import UserError

_CATALOG = "https://www.tensorflow.org/datasets/catalog/overview"
# Errors of TFDS for files that are missing, damaged or not the expected ones.
_FAILURES = (
    OSError,  # network, disk or permission
    AssertionError,  # a file is missing that the user has to fetch
    ValueError,  # this version of TFDS cannot prepare this version of the data set
    RuntimeError,  # files contradict each other, for example if a list names an unknown class
    tfds.download.DownloadError,
    tfds.download.download_manager.NonMatchingChecksumError,
    tfds.download.extractor.ExtractError,
    tarfile.TarError,
    zipfile.BadZipFile,
)


@contextlib.contextmanager
def no_folders_left_behind() -> Iterator[None]:
    """Removes the temporary folders that TFDS makes within the block.

    For every builder whose data set is not prepared, TFDS makes a temporary folder and never removes it. The folder is
    meant for information from a bucket that TFDS no longer reads.
    """
    folders: list[str] = []

    def mkdtemp(*args: Any, **options: Any) -> str:
        folders.append(tempfile.mkdtemp(*args, **options))
        return folders[-1]

    # Only the name in the module of TFDS is replaced, so other threads keep their temporary folders.
    tfds_dataset_info.tempfile = types.SimpleNamespace(mkdtemp=mkdtemp)
    try:
        yield
    finally:
        tfds_dataset_info.tempfile = tempfile
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def builder_of(name: str, data_dir: epath.Path | pathlib.Path | None = None) -> tfds.core.DatasetBuilder:
    """Returns the TFDS builder of a data set, whether or not the data set is prepared.

    Args:
        name: Key of `DATASETS`, or `tfds:NAME[/config][:version]`.
        data_dir: Folder of TFDS. None uses TFDS's default.

    Raises:
        UserError: If TFDS has no data set, config or version of this name.
    """
    reference = dataset_info(name).builder
    match = re.fullmatch(r"(\w+)(?:/([\w.-]+))?(?::(\d+\.\d+\.\d+))?", reference)
    if match is None:
        raise UserError(f"A TFDS data set is named {TFDS_PREFIX}NAME[/config][:version]. Received: {name!r}.")
    own_builder = OWN_BUILDERS.get(match[1])
    try:
        with no_folders_left_behind():
            if own_builder:
                return own_builder(config=match[2], version=match[3], data_dir=data_dir)
            return tfds.builder(reference, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        known = [*OWN_BUILDERS, *tfds.list_builders(with_community_datasets=False)]
        nearest = difflib.get_close_matches(match[1], known, n=1, cutoff=0.5)
        suggestion = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise UserError(
            f"TFDS has no data set of this name. Received: {match[1]!r}.{suggestion} List of all data sets: {_CATALOG}."
        ) from None
    except (ValueError, AssertionError) as error:  # its message lists the valid configs or versions
        raise UserError(f"TFDS has no such data set. Received: {name!r}: {error}") from None


def prepared_builder(name: str, data_dir: epath.Path | pathlib.Path | None = None) -> tfds.core.DatasetBuilder:
    """Returns the TFDS builder of a data set after downloading and preparing the data set if necessary.

    TFDS shows progress bars while it works.

    Args:
        name: Key of `DATASETS`, or `tfds:NAME[/config][:version]`.
        data_dir: Folder of TFDS. None uses TFDS's default.

    Raises:
        UserError: If the data set cannot be downloaded or prepared. The message has the command, the size of the
            download, and the way to fetch the files by hand.
    """
    builder = builder_of(name, data_dir)
    if builder.is_prepared():
        return builder
    _fail_at_once_without_internet(builder)
    try:
        if name == "digits":  # takes a second and downloads nothing, so TFDS's output would only be confusing
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                builder.download_and_prepare()
        else:
            builder.download_and_prepare()
    except UserError:
        raise
    except _FAILURES as error:
        raise UserError(_failure(name, builder, f"{type(error).__name__}: {error}")) from error
    return builder


def _fail_at_once_without_internet(builder: tfds.core.DatasetBuilder) -> None:
    """Makes `download_and_prepare` fail at once without internet. TFDS alone would retry for minutes.

    The check runs when TFDS is about to download, so builders of `tfds.testing.mock_data` need no internet.
    """
    make_download_manager = builder._make_download_manager

    def make_if_online(**options: Any) -> tfds.download.DownloadManager:
        hosts = {urllib.parse.urlparse(url).hostname or "" for url in _missing_downloads(builder)}
        if hosts and _offline(hosts):
            raise ConnectionError(f"no internet connection: cannot find {', '.join(sorted(hosts))}")
        return make_download_manager(**options)

    builder._make_download_manager = make_if_online


def root_of(builder: tfds.core.DatasetBuilder) -> epath.Path:
    """Returns the TFDS folder of a builder, which contains <name>/[<config>/]<version>."""
    return epath.Path(builder.data_path).parents[builder.info.full_name.count("/")]


def ways_to_prepare(name: str, builder: tfds.core.DatasetBuilder) -> tuple[str, ...]:
    """Returns sentences that say how to prepare a data set: the command, the size, and the way without internet.

    Args:
        name: Name of the data set.
        builder: Builder of the data set.
    """
    root, by_hand = root_of(builder), _by_hand(builder)
    command = shlex.join(["python", "-m", "robust_tf.data", f"--prepare={name}", f"--data_dir={root}"])
    copy = f"Or copy {root / builder.name} from a machine on which the data set is prepared."
    if _needs_hands(name, builder):
        return f"{by_hand}{_size(name, builder)}", f"Then run {command}.", copy
    first = f"{'With internet access, run' if _urls(builder) else 'Run'} {command}{_size(name, builder)}."
    return first, *([f"Without internet access, do this first: {by_hand}"] if by_hand else []), copy


def _failure(name: str, builder: tfds.core.DatasetBuilder, reason: str) -> str:
    return (
        f"The data set {name!r} is not prepared in {root_of(builder)}, and preparing it failed. Received: "
        f"{' '.join(reason.split())}. {' '.join(ways_to_prepare(name, builder))} If the data set is in another folder, "
        "name it with data_dir (--data_dir)."
    )


def _manual_folder(builder: tfds.core.DatasetBuilder) -> epath.Path:
    return root_of(builder) / "downloads" / "manual"


def _needs_hands(name: str, builder: tfds.core.DatasetBuilder) -> bool:
    """Returns whether the user has to fetch files that no program can download."""
    if is_row(name):
        return dataset_info(name).by_hand
    return bool(builder.MANUAL_DOWNLOAD_INSTRUCTIONS) and not getattr(builder, "URLS", ())


def _urls(builder: tfds.core.DatasetBuilder) -> list[str]:
    return list(getattr(builder, "URLS", None) or builder.url_infos or ())


def _size(name: str, builder: tfds.core.DatasetBuilder) -> str:
    known = sum(info.size for info in (builder.url_infos or {}).values())
    at_most = "at most " if len(builder.BUILDER_CONFIGS) > 1 else ""  # TFDS lists the files of all configs
    size = dataset_info(name).download_size or (f"{at_most}{known / 2**20:,.0f} MiB" if known else "")
    return f" (download: {size})" if size else ""


def _by_hand(builder: tfds.core.DatasetBuilder) -> str:
    """Returns sentences that say how to fetch the files by hand. Empty if TFDS would not find them."""
    folder = _manual_folder(builder)
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        return f"{' '.join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())} The manual folder (manual_dir) is {folder}."
    files = {info.filename: url for url, info in (builder.url_infos or {}).items()}
    if not files or None in files or len(files) > 5:
        return ""
    listed = " and ".join(f"{name} ({url})" for name, url in files.items())
    if len(builder.BUILDER_CONFIGS) > 1:
        return f"put those of {listed} that the config needs into {folder}."
    return f"put {listed} into {folder}."


def _missing_downloads(builder: tfds.core.DatasetBuilder) -> list[str]:
    """Returns the addresses of the files that are neither downloaded nor in the manual folder."""
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS and builder.name not in OWN_BUILDERS:
        return []
    downloads, brought = root_of(builder) / "downloads", _manual_folder(builder)
    notes = [json.loads(path.read_text()) for pattern in ("*.INFO", "*/*.INFO") for path in downloads.glob(pattern)]
    downloaded = {url for note in notes for url in note.get("urls", ())}
    infos = builder.url_infos or {}

    def is_brought(url: str) -> bool:
        name = infos[url].filename if url in infos else pathlib.PurePosixPath(urllib.parse.urlparse(url).path).name
        return name is not None and (brought / name).exists()

    there = [url for url in _urls(builder) if url in downloaded or is_brought(url)]
    if there and len(builder.BUILDER_CONFIGS) > 1:
        return []  # the files that are there may be all that this config needs
    return [url for url in _urls(builder) if url not in there]


def _offline(hosts: set[str]) -> bool:
    """Returns whether none of the hosts can be found. Returns False if there is a proxy, which may find them."""
    if any(name.lower() in ("http_proxy", "https_proxy", "all_proxy") for name in os.environ):
        return False
    for host in hosts:
        with contextlib.suppress(OSError):
            socket.getaddrinfo(host, None)
            return False
    return True
