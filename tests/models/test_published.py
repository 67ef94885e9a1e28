"""Published models are downloaded completely or not at all. A server on this machine plays the hub."""

import concurrent.futures
import errno
import hashlib
import http.server
import json
import pathlib
import threading
from collections.abc import Callable, Iterator

import huggingface_hub
import keras
import numpy as np
import pytest
from torch_writer import tensors, write_zip

from robust_tf.attacks import pgd
from robust_tf.errors import UserError
from robust_tf.models import build_classifier, load_classifier, to_reference_state
from robust_tf.models import published as published_module
from robust_tf.models.published import PUBLISHED, PublishedModel, fetch_checkpoint, fetch_published, standard_twin
from robust_tf.models.published_results import published_results
from robust_tf.results import MeasuredAttack

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
NAME = "resnet8_l2_eps1"
FILE = f"{NAME}.ckpt"


class Hub(http.server.ThreadingHTTPServer):
    """Serves `content` as the checkpoint.

    Each entry of `faults` is the fault of one request, in order: None for no fault, a status code to answer with, or a
    function that changes the body. With `redirects` the body has another address, as for large files on the real hub.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.content = content
        self.faults: list[int | Callable[[bytes], bytes] | None] = []
        self.requests: list[str] = []
        self.redirects = False
        self.commit: str | None = "0" * 40
        self.endpoint = f"http://127.0.0.1:{self.server_port}"


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        hub = self.server
        first_byte = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-")
        hub.requests.append(f"{self.command} from {first_byte}")
        fault = hub.faults.pop(0) if hub.faults else None
        known = self.path in {f"/madrylab/robust-imagenet-models/resolve/main/{FILE}", "/elsewhere"}
        if isinstance(fault, int) or not known:
            self.send_response(fault if isinstance(fault, int) else 404)
            if not known:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        sha256 = hashlib.sha256(hub.content).hexdigest()
        if hub.redirects and self.path != "/elsewhere":
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{hub.server_port}/elsewhere")
            self.send_header("X-Linked-Etag", f'"{sha256}"')
            self.send_header("X-Linked-Size", str(len(hub.content)))
            self.send_header("X-Repo-Commit", str(hub.commit))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = hub.content[int(first_byte) :]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("ETag", f'"{sha256}"')
        if hub.commit:
            self.send_header("X-Repo-Commit", hub.commit)
        self.send_header("Content-Length", str(len(body)))
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {first_byte}-{len(hub.content) - 1}/{len(hub.content)}")
        self.end_headers()
        if with_body:
            self.wfile.write(body if fault is None else fault(body))
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        """Prints nothing."""


def cut(body: bytes) -> bytes:
    return body[:1000]


def spoil(body: bytes) -> bytes:
    return body[:-1000] + bytes(1000)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, np.ndarray]]:
    """Returns a checkpoint with random weights, and the weights."""
    classifier = build_classifier("resnet8", 10, image_size=32, mean=[0.5] * 3, std=[0.25] * 3)
    rng = np.random.default_rng(0)
    state = {
        key: rng.uniform(0.1, 0.2, values.shape).astype(values.dtype)
        for key, values in to_reference_state(classifier).items()
    }
    path = tmp_path_factory.mktemp("checkpoint") / "x.ckpt"
    return write_zip(path, {"model": tensors(state)}).read_bytes(), state


@pytest.fixture
def hub(monkeypatch, checkpoint) -> Iterator[Hub]:
    row = PublishedModel(architecture="resnet8", norm="l2", epsilon=1.0, dataset="imagenet", filename=FILE)
    monkeypatch.setitem(PUBLISHED, NAME, row)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    # When a connection breaks, the current chunk is lost; by default a chunk has 10 MB.
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100)
    with Hub(checkpoint[0]) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def refusal(function: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        function()
    return str(caught.value)


def visible(folder: pathlib.Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def test_a_model_is_downloaded_converted_and_kept(tmp_path, hub, checkpoint) -> None:
    path = fetch_published(NAME, cache_dir=tmp_path, endpoint=hub.endpoint)
    state = to_reference_state(keras.saving.load_model(path))
    for key, values in checkpoint[1].items():
        if not key.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(state[key], values, err_msg=key)
    assert hub.requests == ["HEAD from 0", "GET from 0"]
    assert visible(tmp_path) == {FILE, f"{FILE}.json", path.name, f"{path.name}.json"}
    content = checkpoint[0]
    record = json.loads((tmp_path / f"{FILE}.json").read_text())
    assert record == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    written = path.stat().st_mtime_ns
    assert fetch_published(NAME, cache_dir=tmp_path, endpoint=hub.endpoint) == path
    assert path.stat().st_mtime_ns == written
    assert len(hub.requests) == 2


def test_a_redirected_large_file_is_downloaded(tmp_path, hub, checkpoint) -> None:
    hub.redirects = True
    path = fetch_checkpoint(NAME, cache_dir=tmp_path, endpoint=hub.endpoint)
    assert path.read_bytes() == checkpoint[0]
    hub.faults = [None, spoil]
    path.unlink()
    assert "SHA-256" in refusal(lambda: fetch_checkpoint(NAME, cache_dir=tmp_path, endpoint=hub.endpoint))


def test_a_download_continues_after_a_broken_connection(tmp_path, hub, checkpoint) -> None:
    hub.faults = [None, cut, None, None]
    path = fetch_checkpoint(NAME, cache_dir=tmp_path, endpoint=hub.endpoint)
    assert path.read_bytes() == checkpoint[0]
    assert hub.requests[1] == "GET from 0"
    assert hub.requests[-1] == "GET from 1000"


def test_a_download_continues_in_the_next_run(tmp_path, hub, checkpoint) -> None:
    hub.faults = [None, cut] + [503] * 50
    message = refusal(lambda: fetch_checkpoint(NAME, cache_dir=tmp_path, endpoint=hub.endpoint))
    assert "503" in message
    assert visible(tmp_path) == set()
    hub.faults, hub.requests = [], []
    path = fetch_checkpoint(NAME, cache_dir=tmp_path, endpoint=hub.endpoint)
    assert path.read_bytes() == checkpoint[0]
    assert hub.requests == ["HEAD from 0", "GET from 1000"]


@pytest.mark.parametrize("faults", [[503], [None, 503], [429, None, 500]])
def test_a_busy_hub_is_asked_again(tmp_path, hub, checkpoint, faults) -> None:
    hub.faults = list(faults)
    path = fetch_checkpoint(NAME, cache_dir=tmp_path, endpoint=hub.endpoint)
    assert path.read_bytes() == checkpoint[0]
    assert len(hub.requests) > 2


def test_a_file_that_is_missing_on_the_hub_is_named(tmp_path, hub) -> None:
    message = refusal(lambda: fetch_published("resnet18_l2_eps3", cache_dir=tmp_path, endpoint=hub.endpoint))
    assert "resnet18_l2_eps3.ckpt" in message and "404" in message
    assert hub.requests == ["HEAD from 0"]  # asking again would not help
    assert visible(tmp_path) == set()


def test_a_damaged_download_is_deleted(tmp_path, hub, checkpoint) -> None:
    hub.faults = [None, spoil]
    expected = hashlib.sha256(checkpoint[0]).hexdigest()
    received = hashlib.sha256(spoil(checkpoint[0])).hexdigest()
    message = refusal(lambda: fetch_checkpoint(NAME, cache_dir=tmp_path, endpoint=hub.endpoint))
    assert expected in message and received in message
    assert visible(tmp_path) == set()
    hub.requests = []
    fetch_checkpoint(NAME, cache_dir=tmp_path, endpoint=hub.endpoint)
    assert hub.requests == ["HEAD from 0", "GET from 0"]


def test_a_published_sha256_is_compared(tmp_path, monkeypatch, hub) -> None:
    row = PublishedModel(
        architecture="resnet8", norm="l2", epsilon=1.0, dataset="imagenet", filename=FILE, sha256="ab" * 32
    )
    monkeypatch.setitem(PUBLISHED, NAME, row)
    assert "ab" * 32 in refusal(lambda: fetch_checkpoint(NAME, cache_dir=tmp_path, endpoint=hub.endpoint))
    assert visible(tmp_path) == set()


def test_a_checkpoint_downloaded_by_hand_needs_no_connection(tmp_path, monkeypatch, hub, checkpoint) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "robust_tf"
    endpoint = "http://127.0.0.1:9"  # no server listens on the discard port
    message = refusal(lambda: fetch_published(NAME, endpoint=endpoint))
    for part in (FILE, "huggingface.co/madrylab/robust-imagenet-models", str(folder)):
        assert part in message
    (folder / FILE).write_bytes(checkpoint[0])
    path = fetch_published(NAME, endpoint=endpoint)
    assert path.parent == folder
    assert keras.saving.load_model(path).name == "resnet8"


def test_a_login_page_is_not_mistaken_for_a_checkpoint(tmp_path, hub) -> None:
    hub.commit = None
    message = refusal(lambda: fetch_published(NAME, cache_dir=tmp_path, endpoint=hub.endpoint))
    assert hub.endpoint in message and "does not come from the hub" in message
    assert visible(tmp_path) == set()


def test_offline_mode_fails_at_once(tmp_path, monkeypatch, hub) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits"))
    assert "offline" in refusal(lambda: fetch_published(NAME, cache_dir=tmp_path, endpoint=hub.endpoint)).lower()
    assert hub.requests == []


@pytest.mark.parametrize("suffix", ["keras", "ckpt"])
def test_changed_files_are_refused(tmp_path, hub, suffix: str) -> None:
    fetch_published(NAME, cache_dir=tmp_path, endpoint=hub.endpoint)
    changed = tmp_path / f"{NAME}.{suffix}"
    changed.write_bytes(changed.read_bytes() + b"!")
    if suffix == "ckpt":
        (tmp_path / f"{NAME}.keras").unlink()
    message = refusal(lambda: fetch_published(NAME, cache_dir=tmp_path, endpoint=hub.endpoint))
    assert str(changed) in message and str(changed.stat().st_size) in message
    for path in (changed, tmp_path / f"{changed.name}.json"):
        path.unlink()
    fetch_published(NAME, cache_dir=tmp_path, endpoint=hub.endpoint)


def test_a_checkpoint_of_another_architecture_leaves_no_classifier(tmp_path, monkeypatch, hub) -> None:
    row = PublishedModel(architecture="resnet20", norm="l2", epsilon=1.0, dataset="imagenet", filename=FILE)
    monkeypatch.setitem(PUBLISHED, NAME, row)
    assert "resnet8" in refusal(lambda: fetch_published(NAME, cache_dir=tmp_path, endpoint=hub.endpoint))
    assert visible(tmp_path) == {FILE, f"{FILE}.json"}


def test_two_processes_download_once(tmp_path, hub) -> None:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        jobs = [pool.submit(fetch_checkpoint, NAME, cache_dir=tmp_path, endpoint=hub.endpoint) for _ in range(2)]
        assert {job.result() for job in jobs} == {tmp_path / FILE}
    assert hub.requests == ["HEAD from 0", "GET from 0"]


def test_an_impossible_cache_folder_gives_a_warning(tmp_path, hub, capsys) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "folder"
    path = fetch_published(NAME, cache_dir=folder, endpoint=hub.endpoint)
    assert f"warning: Cannot write the cache folder {folder}: Not a directory" in capsys.readouterr().err
    assert path.name == f"{NAME}.keras" and path.is_file() and visible(path.parent) >= {path.name, FILE}


def test_a_complete_read_only_cache_is_sufficient(tmp_path, hub, monkeypatch, capsys) -> None:
    for fetch in (fetch_published, fetch_checkpoint):
        fetch(NAME, cache_dir=tmp_path, endpoint=hub.endpoint)

    def read_only(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(published_module, "WeakFileLock", read_only)
    with monkeypatch.context() as nothing_is_written:
        nothing_is_written.setattr("robust_tf.files.replaced_atomically", read_only)
        assert fetch_published(NAME, cache_dir=tmp_path) == tmp_path / f"{NAME}.keras"
        assert fetch_checkpoint(NAME, cache_dir=tmp_path) == tmp_path / FILE
    assert capsys.readouterr().err == ""
    # With the checkpoint only, its classifier is made in a temporary folder.
    (tmp_path / f"{NAME}.keras").unlink()
    path = fetch_published(NAME, cache_dir=tmp_path)
    assert path.is_file() and path.parent != tmp_path
    assert "Read-only file system" in capsys.readouterr().err


def test_the_table_is_complete() -> None:
    hub_models = {name: model for name, model in PUBLISHED.items() if not model.packaged}
    assert len(hub_models) == 67
    assert len({model.filename for model in hub_models.values()}) == 67
    count = {"l2": 4 * 10 + 6 * 2, "linf": 3 * 5}
    for norm, expected in count.items():
        assert sum(model.norm == norm for model in hub_models.values()) == expected
    assert hub_models["resnet50_l2_eps3"].filename == "resnet50_l2_eps3.ckpt"
    assert hub_models["resnet50_l2_eps3"].clean_accuracy == 62.83
    assert hub_models["densenet161_l2_eps0"].filename == "densenet_l2_eps0.ckpt"
    assert hub_models["resnet18_linf_eps0.5"].clean_accuracy == 66.13
    assert hub_models["wide_resnet50_2_linf_eps4.0"].filename == "wide_resnet50_2_linf_eps4.0.ckpt"
    assert hub_models["wide_resnet50_2_linf_eps4.0"].epsilon == pytest.approx(4 / 255)


def test_standard_twins() -> None:
    assert standard_twin("resnet50_linf_eps4.0") == "resnet50_l2_eps0"
    assert standard_twin("vgg16_bn_l2_eps3") == "vgg16_bn_l2_eps0"
    assert standard_twin("resnet20_fashion_mnist_l2_eps1") == "resnet20_fashion_mnist_l2_eps0"
    for name in PUBLISHED:
        assert PUBLISHED[standard_twin(name)].epsilon == 0


def test_an_unknown_name_suggests_the_nearest(tmp_path) -> None:
    message = refusal(lambda: fetch_published("resnet50_l2_eps3.0", cache_dir=tmp_path))
    assert "'resnet50_l2_eps3.0'" in message and "Did you mean 'resnet50_l2_eps3'?" in message


def test_packaged_models_need_no_download(tmp_path, monkeypatch) -> None:
    name = "resnet20_fashion_mnist_l2_eps1"
    monkeypatch.setattr(published_module, "PACKAGED", tmp_path)
    assert str(tmp_path / f"{name}.keras") in refusal(lambda: fetch_published(name))
    (tmp_path / f"{name}.keras").write_bytes(b"")
    assert fetch_published(name) == tmp_path / f"{name}.keras"
    assert name in refusal(lambda: fetch_checkpoint(name))


@pytest.mark.slow
def test_the_packaged_classifiers_have_the_accuracies_of_the_table() -> None:
    """On 100 test images the clean accuracy is near the table's, and only the robust classifier withstands PGD."""
    with np.load(FIXTURES / "fashion_mnist.npz") as fixture:
        images, labels = np.repeat(fixture["images"][..., None] / np.float32(255), 3, axis=-1), fixture["labels"]
    for name, at_least, at_most in (
        ("resnet20_fashion_mnist_l2_eps1", 0.6, 1.0),
        ("resnet20_fashion_mnist_l2_eps0", 0.0, 0.2),
    ):
        path = fetch_published(name)
        assert path.stat().st_size < 1.5e6
        classifier = load_classifier(path)
        clean = np.mean(classifier.predict(images, verbose=0).argmax(axis=-1) == labels)
        # Four standard errors of a share of 100 images.
        assert clean == pytest.approx(PUBLISHED[name].clean_accuracy / 100, abs=0.15)
        images_adv = pgd(classifier, images, labels, norm="l2", epsilon=1.0, step_size=0.25, steps=10)
        robust = np.mean(classifier.predict(images_adv, verbose=0).argmax(axis=-1) == labels)
        assert at_least <= robust <= at_most, name


def test_the_classes_of_published_models_have_the_names_of_their_data_set():
    fashion = published_results("resnet20_fashion_mnist_l2_eps1")
    assert fashion.class_names[::9] == ("T-shirt/top", "Ankle boot")
    assert (fashion.dataset, fashion.robust_accuracy_attack) == ("fashion_mnist", MeasuredAttack(norm="l2", epsilon=1))
    imagenet = published_results("resnet50_l2_eps0")
    assert (imagenet.dataset, imagenet.robust_accuracy_attack) == ("imagenet2012", None)
    # The reference sorts the folders of the classes, which have these names.
    assert len(imagenet.class_names) == 1000 and list(imagenet.class_names) == sorted(imagenet.class_names)
