"""Compares requests to the local server with direct calls of the model: latency, and throughput with many clients.

    python -m tests.bench.serving [--quick]

The server runs in another process. The latency is measured with one request at a time and batches of 1; the kinds
of requests take turns. The throughput is measured with 32 clients in threads, with and without batching.
"""

from robust_tf.environment import set_tensorflow_defaults

set_tensorflow_defaults()

import argparse  # noqa: E402
import contextlib  # noqa: E402
import json  # noqa: E402
import pathlib  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from robust_tf.models import build_classifier  # noqa: E402
from robust_tf.serving.client import connect  # noqa: E402
from robust_tf.serving.model.session import LoadedModel  # noqa: E402
from robust_tf.serving.publish.export import export_classifier  # noqa: E402
from tests.bench.timing import interleaved  # noqa: E402
from tests.serving.conftest import free_port  # noqa: E402

MODELS = {"resnet20": 32, "resnet18": 224}
CLIENTS = 32
BATCHING = "max_batch_size { value: 32 } max_enqueued_batches { value: 100 } num_batch_threads { value: 2 }"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="Use small images and few requests, only to see that it runs."
    )
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--requests", type=int, default=640)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repeats, arguments.requests = 5, 64
    with tempfile.TemporaryDirectory() as folder:
        for architecture, image_size in MODELS.items():
            image_size = 32 if arguments.quick else image_size
            classifier = build_classifier(architecture, 10, image_size=image_size, mean=[0.5] * 3, std=[0.25] * 3)
            version = export_classifier(classifier, folder, architecture, model_card={})
            print(f"\n{architecture}, {image_size}x{image_size}, batch 1, {arguments.repeats} requests each, in ms")
            _latency(version, image_size, arguments.repeats)
            print(f"{architecture}, {CLIENTS} clients, {arguments.requests} requests, gRPC pixels, requests/s")
            _throughput(version, image_size, arguments.requests, pathlib.Path(folder))


@contextlib.contextmanager
def _server(version: pathlib.Path, *flags: str) -> Iterator[tuple[str, str]]:
    """Runs a server in another process. Yields its addresses for REST and gRPC."""
    rest, grpc = free_port(), free_port()
    command = [sys.executable, "-m", "robust_tf.serve", "--model_name=m", f"--model_base_path={version.parent}"]
    command += [f"--rest_api_port={rest}", f"--port={grpc}", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        process.stdout.readline()
        yield f"http://127.0.0.1:{rest}", f"grpc://127.0.0.1:{grpc}"
    finally:
        process.terminate()
        process.wait(60)


def _latency(version: pathlib.Path, image_size: int, repeats: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (image_size, image_size, 3), np.uint8)
    jpeg = tf.io.encode_jpeg(image).numpy()
    pixels = (image[None] / np.float32(255)).astype(np.float32)
    session = LoadedModel(version)
    with (
        _server(version) as (rest_url, grpc_url),
        connect(rest_url, model_name="m") as rest,
        connect(grpc_url, model_name="m") as grpc,
    ):
        cases: dict[str, Callable[[], object]] = {
            "Session, bytes": _call(session.run, "serving_default", {"image_bytes": np.array([jpeg], object)}),
            "REST, bytes": _call(rest.predict, {"image_bytes": [jpeg]}),
            "gRPC, bytes": _call(grpc.predict, {"image_bytes": [jpeg]}),
            "Session, pixels": _call(session.run, "predict_pixels", {"images": pixels}),
            "REST, pixels as JSON": _call(rest.predict, {"images": pixels}, signature_name="predict_pixels"),
            "gRPC, pixels": _call(grpc.predict, {"images": pixels}, signature_name="predict_pixels"),
        }
        timings = interleaved(cases, repeats=repeats, warmup=5)
    print(f"{'':24}{'p50':>8}{'p99':>8}{'over Session p50':>20}")
    for name, timing in timings.items():
        bare = timings["Session, bytes" if "bytes" in name else "Session, pixels"]
        p99 = float(np.percentile(timing.repeats, 99))
        print(f"{name:24}{1e3 * timing.median:8.2f}{1e3 * p99:8.2f}{1e3 * (timing.median - bare.median):20.2f}")


def _call(function: Callable[..., object], *arguments: object, **options: object) -> Callable[..., object]:
    """Returns a function that calls `function` with these arguments and ignores its own."""
    return lambda *_: function(*arguments, **options)


def _throughput(version: pathlib.Path, image_size: int, requests: int, folder: pathlib.Path) -> None:
    pixels = np.random.default_rng(0).random((1, image_size, image_size, 3), np.float32)
    batching = folder / "batching.config"
    batching.write_text(BATCHING)
    speeds = {}
    for name, flags in [
        ("unbatched", []),
        ("batched", ["--enable_batching", f"--batching_parameters_file={batching}"]),
    ]:
        with _server(version, *flags) as (_, grpc_url), connect(grpc_url, model_name="m") as client:
            ask = _call(client.predict, {"images": pixels}, signature_name="predict_pixels")
            with ThreadPoolExecutor(CLIENTS) as threads:
                list(threads.map(ask, range(CLIENTS)))
                start = time.perf_counter()
                list(threads.map(ask, range(requests)))
                speeds[name] = round(requests / (time.perf_counter() - start), 1)
    print(json.dumps(speeds))


if __name__ == "__main__":
    main()
