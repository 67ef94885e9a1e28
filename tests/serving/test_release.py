"""Tests a release on the embedded server: three versions, labels that move on and back, and no request lost."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2

from tests.serving.conftest import LIMIT, running_server, until
from tests.serving.models import model_entry, save_half_plus_two

ANSWERS = {1: 11.0, 2: 21.0, 3: 31.0}  # 0.5 x 2 + 10 * version


class Clients:
    """Clients that ask for labels over REST and gRPC without a pause, and record failures and wrong answers."""

    def __init__(self, running, labels):
        self.allowed = {label: {ANSWERS[version]} for label, version in labels.items()}
        self.last = {}
        self.failures, self.counts = [], Counter()
        self._running = running
        self._stopping = threading.Event()
        self._asks = [(ask, label) for label in labels for ask in (self._rest, self._grpc)]

    def __enter__(self):
        self._threads = ThreadPoolExecutor(len(self._asks))
        for ask, label in self._asks:
            self._threads.submit(self._loop, ask, label)
        return self

    def __exit__(self, *_):
        self._stopping.set()
        self._threads.shutdown()

    def see(self, label, version):
        """Also allows the answers of another version, and waits until both transports have given one."""
        self.allowed[label].add(ANSWERS[version])
        until(lambda: all(self.last.get((ask.__name__, label)) == ANSWERS[version] for ask in (self._rest, self._grpc)))

    def settle(self, label, version):
        """Allows the answers of this version only."""
        self.allowed[label] = {ANSWERS[version]}

    def _loop(self, ask, label):
        while not self._stopping.is_set():
            try:
                answer = ask(label)
            except (AssertionError, grpc.RpcError) as error:
                self.failures.append(f"{ask.__name__} {label}: {error}")
                continue
            self.counts[ask.__name__, label] += 1
            self.last[ask.__name__, label] = answer
            if answer not in self.allowed[label]:
                self.failures.append(f"{ask.__name__} {label}: {answer}")

    def _rest(self, label):
        reply = self._running.rest.post(f"/v1/models/m/labels/{label}:predict", json={"instances": [2.0]})
        assert reply.status_code == 200, reply.text
        return reply.json()["predictions"][0]

    def _grpc(self, label):
        request = predict_pb2.PredictRequest()
        request.model_spec.name, request.model_spec.version_label = "m", label
        request.inputs["x"].CopyFrom(tf.make_tensor_proto(np.float32([2.0])))
        return self._running.predict.Predict(request, timeout=LIMIT).outputs["y"].float_val[0]


@pytest.mark.parametrize("batching", [False, True])
def test_labels_move_through_three_exports_and_back_without_a_lost_request(tmp_path, batching):
    base, path = tmp_path / "m", tmp_path / "models.config"

    def export(version):
        save_half_plus_two(base / f".new-{version}", addend=10.0 * version)
        (base / f".new-{version}").rename(base / str(version))

    def configure(*numbers, stable, canary):
        policy = "model_version_policy { specific { " + " ".join(f"versions: {n}" for n in numbers) + " } }"
        labels = "".join(
            f'version_labels {{ key: "{label}" value: {number} }}'
            for label, number in (("stable", stable), ("canary", canary))
        )
        (tmp_path / "new").write_text("model_config_list {" + model_entry("m", base, f"{policy} {labels}") + "}")
        (tmp_path / "new").rename(path)

    def available():
        entries = running.rest.get("/v1/models/m").json()["model_version_status"]
        return {int(entry["version"]) for entry in entries if entry["state"] == "AVAILABLE"}

    export(1)
    configure(1, stable=1, canary=1)
    flags = {"model_config_file_poll_wait_seconds": 0.05, "file_system_poll_wait_seconds": 0.05}
    with running_server(model_config_file=str(path), enable_batching=batching, **flags) as running:
        labels = {"stable": 1, "canary": 1}
        with Clients(running, labels) as clients:
            clients.see("stable", 1)
            clients.see("canary", 1)

            def move(label, version):
                clients.allowed[label].add(ANSWERS[version])
                configure(*sorted({*available(), version}), **{**labels, label: version})
                labels[label] = version
                clients.see(label, version)
                clients.settle(label, version)

            export(2)
            move("canary", 2)  # loads version 2 and moves the label in one step
            export(3)
            move("canary", 3)
            clients.allowed["stable"].add(ANSWERS[3])
            # In one step, the label moves and the versions that it leaves are unloaded.
            configure(3, stable=3, canary=3)
            clients.see("stable", 3)
            clients.settle("stable", 3)
            until(lambda: available() == {3})
            # Rollback: in one step, version 1 is loaded again and both labels move to it.
            for label in labels:
                clients.allowed[label].add(ANSWERS[1])
            configure(1, stable=1, canary=1)
            for label in labels:
                clients.see(label, 1)
                clients.settle(label, 1)
            until(lambda: available() == {1})
            answered = clients.counts.copy()
            until(lambda: all(clients.counts[key] > count + 3 for key, count in answered.items()))
    assert clients.failures == []
    assert len(clients.counts) == 4
