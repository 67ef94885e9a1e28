"""Puts load on a server while its versions change. The short test and the long run both use this.

    python -m tests.serving.load --seconds=600 --clients=16 --swap_every=20

This starts `python -m robust_tf.serve` on a model whose versions answer with their own number, replaces the versions
one after another, and checks that each answer is right for its version. The server logs every request, and has to have
logged exactly those that it answered. A health check asks every second whether it is serving. With --batching, each
version brings its own batching parameters. The program prints figures as JSON, and exits with 1 if anything failed.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter

import grpc
import httpx
import numpy as np
import tensorflow as tf
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2, prediction_service_pb2_grpc

from tests.serving.conftest import LIMIT, free_port, until
from tests.serving.models import logging_entry, model_entry

_BATCHING = "max_batch_size { value: 64 } batch_timeout_micros { value: 1000 } allowed_batch_sizes: [16, 32, 64]"


def save_version(base: pathlib.Path, number: int) -> None:
    """Publishes a version that answers y = x + number, with one rename. It holds some megabytes of weights."""
    module = tf.Module()
    module.number = tf.Variable(float(number))
    module.ballast = tf.Variable(tf.random.uniform([1 << 20]))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
    def serve(x: tf.Tensor) -> dict[str, tf.Tensor]:
        version = tf.fill([tf.size(x)], module.number + 0.0 * module.ballast[0])
        return {"y": x + module.number, "version": version}

    hidden = base / f".new-{number}"
    tf.saved_model.save(module, str(hidden), signatures={"serving_default": serve})
    (hidden / "batching_params.pbtxt").write_text(_BATCHING)
    hidden.rename(base / str(number))


class Load:
    """Clients that send requests without a pause, and a record of the answers."""

    def __init__(self, rest_port: int, grpc_port: int) -> None:
        self.url = f"http://127.0.0.1:{rest_port}/v1/models/m:predict"
        self.target = f"127.0.0.1:{grpc_port}"
        self.seen: Counter[int] = Counter()
        self.failures: list[str] = []
        self.health_checks = 0
        self.stopping = threading.Event()
        self._lock = threading.Lock()

    def run_client(self, seed: int) -> None:
        """Runs one client, over gRPC if the seed is odd, over REST if it is even."""
        rng = np.random.default_rng(seed)
        ask = self._ask_grpc() if seed % 2 else self._ask_rest()
        while not self.stopping.is_set():
            sent = np.float32(rng.integers(0, 1000, rng.integers(1, 5)))
            try:
                answer, version = ask(sent)
                # All rows of an answer must come from one version, and be right for it.
                good = len(set(version)) == 1 and np.array_equal(answer, sent + version[0])
                failure = "" if good else f"wrong answer {answer} of version {version} to {sent}"
            except (httpx.HTTPError, grpc.RpcError, KeyError) as error:
                failure = repr(error)
            with self._lock:
                if failure:
                    self.failures.append(failure)
                else:
                    self.seen[int(version[0])] += 1

    def watch_health(self) -> None:
        """Asks the server every second whether it is serving, until the load stops."""
        with grpc.insecure_channel(self.target) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            while not self.stopping.wait(1.0):
                try:
                    status = health.Check(health_pb2.HealthCheckRequest(), timeout=LIMIT).status
                    failure = "" if status == health_pb2.HealthCheckResponse.SERVING else f"health status {status}"
                except grpc.RpcError as error:
                    failure = repr(error)
                with self._lock:
                    self.health_checks += 1
                    self.failures += [failure] if failure else []

    def _ask_rest(self):
        client = httpx.Client(timeout=LIMIT)

        def ask(sent):
            reply = client.post(self.url, json={"inputs": sent.tolist()}).json()["outputs"]
            return np.float32(reply["y"]), np.float32(reply["version"])

        return ask

    def _ask_grpc(self):
        stub = prediction_service_pb2_grpc.PredictionServiceStub(grpc.insecure_channel(self.target))

        def ask(sent):
            request = predict_pb2.PredictRequest()
            request.model_spec.name = "m"
            request.inputs["x"].CopyFrom(tf.make_tensor_proto(sent))
            reply = stub.Predict(request, timeout=LIMIT)
            return tf.make_ndarray(reply.outputs["y"]), tf.make_ndarray(reply.outputs["version"])

        return ask


def resident_megabytes(pid: int) -> float:
    """Returns the memory of a process (Linux)."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"no VmRSS for {pid}")


def count_logged(folder: pathlib.Path) -> int:
    """Returns the number of requests in the log files of a folder. Each must be a whole message with its reply."""
    count = 0
    for record in tf.data.TFRecordDataset([str(path) for path in folder.glob("*.tfrecord")]).as_numpy_iterator():
        log = prediction_log_pb2.PredictionLog.FromString(record).predict_log
        count += set(log.response.outputs) == {"y", "version"} and list(log.request.inputs) == ["x"]
    return count


def run(*, swaps: int, clients: int, swap_every: float, batching: bool) -> dict:
    """Runs the load over a number of version changes, and returns figures.

    Args:
        swaps: Number of changes.
        clients: Number of clients.
        swap_every: Seconds from the first answer of a version to the next change.
        batching: Whether the server batches requests.
    """
    with tempfile.TemporaryDirectory() as folder:
        base = pathlib.Path(folder) / "m"
        base.mkdir()
        save_version(base, 1)
        logs = pathlib.Path(folder) / "logs"
        logs.mkdir()
        config = pathlib.Path(folder) / "models.config"
        config.write_text("model_config_list {" + model_entry("m", base, logging_entry(logs / "m")) + "}")
        rest_port, grpc_port = free_port(), free_port()
        command = [sys.executable, "-m", "robust_tf.serve", f"--model_config_file={config}"]
        command += [f"--rest_api_port={rest_port}", f"--port={grpc_port}", "--file_system_poll_wait_seconds=0.2"]
        command += ["--enable_grpc_healthcheck_service"]
        command += ["--enable_batching", "--enable_per_model_batching_parameters"] if batching else []
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            if not server.stdout.readline().startswith("Ready"):
                raise RuntimeError("the server did not start")
            load = Load(rest_port, grpc_port)
            threads = [threading.Thread(target=load.run_client, args=(seed,)) for seed in range(clients)]
            threads.append(threading.Thread(target=load.watch_health))
            for thread in threads:
                thread.start()
            memory, newest, start = [], 1, time.monotonic()
            try:
                until(lambda: load.seen[newest] > 0)
                for newest in range(2, swaps + 2):
                    time.sleep(swap_every)
                    memory.append(round(resident_megabytes(server.pid), 1))
                    save_version(base, newest)
                    (base / str(newest - 1)).rename(base / f"{newest - 1}.withdrawn")
                    until(lambda: load.seen[newest] > 0)  # noqa: B023  # it is called within this pass of the loop
            finally:
                load.stopping.set()
                for thread in threads:
                    thread.join()
            elapsed = time.monotonic() - start
            server.terminate()
            code = server.wait(LIMIT)
        finally:
            server.kill()
        logged = count_logged(logs)
    requests = sum(load.seen.values())
    if logged != requests:
        load.failures.append(f"{logged} requests are in the logs, but {requests} were answered")
    return {
        "seconds": round(elapsed, 1),
        "clients": clients,
        "batching": batching,
        "requests": requests,
        "requests_per_second": round(requests / elapsed, 1),
        "logged": logged,
        "health_checks": load.health_checks,
        "failures": len(load.failures),
        "first_failures": load.failures[:5],
        "versions_published": newest,
        "versions_seen": len(load.seen),
        "memory_megabytes": memory,
        "exit_code": code,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--swap_every", type=float, default=20)
    parser.add_argument("--batching", action="store_true")
    arguments = parser.parse_args()
    figures = run(
        swaps=max(1, int(arguments.seconds / arguments.swap_every)),
        clients=arguments.clients,
        swap_every=arguments.swap_every,
        batching=arguments.batching,
    )
    print(json.dumps(figures, indent=2))
    return int(figures["failures"] > 0 or figures["exit_code"] != 0)


if __name__ == "__main__":
    sys.exit(main())
