"""The files of serving/: parsed by what reads them, and the proxy run in front of the embedded server."""

import json
import pathlib
import re
import shutil
import ssl
import subprocess

import grpc
import httpx
import kubernetes_validate
import pytest
import yaml
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from robust_tf.serving.config_files import model_settings, read_batching, read_model_config, read_monitoring
from tests.serving.conftest import LIMIT, accepts_connections, free_port, until

SERVING = pathlib.Path(__file__).parents[2] / "serving"
MANIFESTS = sorted((SERVING / "kubernetes").glob("*.yaml"))


def read_yaml(path):
    return yaml.safe_load((SERVING / path).read_text())


def test_text_protos_are_what_the_server_reads():
    (pets,) = model_settings(read_model_config(SERVING / "config" / "models.config"))
    assert (pets.name, str(pets.base_path), pets.latest) == ("pets", "/models/pets", 2)
    assert pets.labels == {"stable": 1, "canary": 1}
    assert read_batching(SERVING / "config" / "batching.config").max_batch_size == 32
    assert read_monitoring(SERVING / "config" / "monitoring.config") == "/monitoring/prometheus/metrics"


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifests_fit_the_schemas_of_kubernetes(path):
    kubernetes_validate.validate(yaml.safe_load(path.read_text()), "1.30", strict=True)


def test_kustomization_names_every_manifest_and_config():
    kustomization = read_yaml("kustomization.yaml")
    assert sorted(kustomization["resources"]) == [f"kubernetes/{path.name}" for path in MANIFESTS]
    (generator,) = kustomization["configMapGenerator"]
    assert all((SERVING / file).is_file() for file in generator["files"])
    deployment = read_yaml("kubernetes/deployment.yaml")
    volumes = deployment["spec"]["template"]["spec"]["volumes"]
    assert {"name": "config", "configMap": {"name": generator["name"]}} in volumes


def container():
    return read_yaml("kubernetes/deployment.yaml")["spec"]["template"]["spec"]["containers"][0]


def test_the_pod_is_locked_down():
    pod = read_yaml("kubernetes/deployment.yaml")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container()["securityContext"]["readOnlyRootFilesystem"] is True
    assert {"name": "models", "mountPath": "/models", "readOnly": True} in container()["volumeMounts"]
    assert set(container()["resources"]["limits"]) == {"cpu", "memory"}


def test_all_files_run_the_same_pinned_server():
    compose = read_yaml("compose.yaml")["services"]["tensorflow-serving"]
    pinned = re.search(r":-([\d.]+)}", compose["image"])[1]
    assert container()["image"] == f"tensorflow/serving:{pinned}"
    model = read_yaml("kserve/inference_service.yaml")["spec"]["predictor"]["model"]
    assert (model["runtimeVersion"], model["modelFormat"]["name"]) == (pinned, "tensorflow")
    assert compose["command"] == container()["args"]
    assert f"tensorflow/serving:{pinned}" in (SERVING / "README.md").read_text()


def test_compose_mounts_files_that_exist():
    services = read_yaml("compose.yaml")["services"]
    mounted = [volume.split(":")[0] for service in services.values() for volume in service["volumes"]]
    made_by_the_user = {"./nginx/tokens.map", "./nginx/tls"}
    for path in mounted:
        assert path.startswith("${MODELS") or path in made_by_the_user or (SERVING / path).exists(), path
    assert all(":latest" not in service["image"] and ":" in service["image"] for service in services.values())
    assert "ports" not in services["tensorflow-serving"]


def test_the_probe_reads_the_state(embedded):
    """The shell line of the readiness probe, against a server with and without the model."""
    line = container()["readinessProbe"]["exec"]["command"][-1]
    assert line == read_yaml("compose.yaml")["services"]["tensorflow-serving"]["healthcheck"]["test"][-1]
    for model, code in [("digits", 0), ("nobody", 1)]:
        here = line.replace("127.0.0.1/8501", f"127.0.0.1/{embedded.rest_port}").replace(
            "models/pets", f"models/{model}"
        )
        assert subprocess.run(["bash", "-c", here], capture_output=True, timeout=LIMIT, check=False).returncode == code


def test_dashboard_and_alerts_ask_for_metrics_that_exist(embedded):
    embedded.rest.post("/v1/models/half_plus_two:predict", json={"instances": [1.0]})
    text = embedded.rest.get("/monitoring/prometheus/metrics").text
    known = set(re.findall(r"^(:[\w:]+)\{", text, re.MULTILINE))
    dashboard = json.loads((SERVING / "monitoring" / "grafana_dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries.append(dashboard["templating"]["list"][0]["query"])
    queries += [rule["expr"] for rule in read_yaml("monitoring/alerts.yaml")["groups"][0]["rules"]]
    asked = {name for query in queries for name in re.findall(r'__name__="([^"]+)"', query)}
    assert len(asked) >= 4
    assert asked <= known
    # A selector with a label that the metric hasn't would find nothing.
    for query in queries:
        for name, more in re.findall(r'__name__="([^"]+)"(.*?)\}', query):
            series = next(line for line in text.splitlines() if line.startswith(name + "{"))
            for label in re.findall(r"(\w+)(?:=~|!=|=)", more):
                assert f'{label}="' in series, query
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    scrape = read_yaml("monitoring/prometheus.yaml")["scrape_configs"][0]
    assert scrape["metrics_path"] == read_monitoring(SERVING / "config" / "monitoring.config")
    assert any(f'job="{scrape["job_name"]}"' in query for query in queries)


@pytest.fixture(scope="module")
def proxy(embedded, tmp_path_factory):
    """nginx with the shipped configuration, its names and paths replaced by ours."""
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None or shutil.which("openssl") is None:
        pytest.skip("needs nginx and openssl (Debian: nginx-light, openssl)")
    folder = tmp_path_factory.mktemp("nginx")
    key, certificate = folder / "server.key", folder / "server.crt"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        + ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    example = (SERVING / "nginx" / "tokens.example.map").read_text()
    (folder / "tokens.map").write_text(example.replace("replace-this-token", "secret") + '"Bearer busy" 1;\n')
    rest, grpc_port = free_port(), free_port()
    text = (SERVING / "nginx" / "nginx.conf").read_text()
    for old, new in [
        ("/tmp", str(folder)),  # first: the other folders may lie in there too
        ("tensorflow-serving:8501", f"127.0.0.1:{embedded.rest_port}"),
        ("tensorflow-serving:8500", embedded.target),
        ("/etc/nginx/tokens.map", str(folder / "tokens.map")),
        ("/etc/nginx/tls", str(folder)),
        ("listen 8443", f"listen 127.0.0.1:{rest}"),
        ("listen 8444", f"listen 127.0.0.1:{grpc_port}"),
        ("rate=50r/s", "rate=1r/m"),  # so that what a test sends beyond the burst is too much, however slowly it does
        ("/dev/stdout", str(folder / "access.log")),
        ("/dev/stderr", str(folder / "error.log")),
    ]:
        assert old in text
        text = text.replace(old, new)
    (folder / "nginx.conf").write_text(text)
    command = [nginx, "-c", str(folder / "nginx.conf"), "-p", str(folder)]
    check = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stderr
    process = subprocess.Popen([*command, "-g", "daemon off;"])
    context = ssl.create_default_context(cafile=str(certificate))
    try:
        with httpx.Client(base_url=f"https://localhost:{rest}", verify=context, timeout=LIMIT) as client:
            until(lambda: accepts_connections(rest))
            yield client, f"localhost:{grpc_port}", certificate
    finally:
        process.terminate()
        process.wait(10)


TOKEN = {"Authorization": "Bearer secret"}
PREDICT = "/v1/models/half_plus_two:predict"


def test_the_proxy_lets_good_requests_through(proxy):
    client, _, _ = proxy
    reply = client.post(PREDICT, json={"instances": [2.0]}, headers=TOKEN)
    assert (reply.status_code, reply.json()) == (200, {"predictions": [3.0]})
    for path in ("", "/versions/123", "/labels/stable/metadata"):
        assert client.get(f"/v1/models/half_plus_two{path}", headers=TOKEN).status_code == 200
    refused = client.post(PREDICT, json={"instances": []}, headers=TOKEN)
    assert (refused.status_code, refused.json()) == (400, {"error": "No values in 'instances' array"})


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", PREDICT, {}, 401),
        ("POST", PREDICT, {"Authorization": "Bearer replace-this-token"}, 401),
        ("POST", PREDICT, TOKEN | {"Content-Encoding": "gzip"}, 415),
        ("DELETE", PREDICT, TOKEN, 403),
        ("GET", "/monitoring/prometheus/metrics", TOKEN, 404),
        ("GET", "/", TOKEN, 404),
        ("GET", "/v1/models/a/b", TOKEN, 404),
    ],
)
def test_the_proxy_keeps_the_rest_out(proxy, method, path, headers, status):
    client, _, _ = proxy
    assert client.request(method, path, headers=headers, content=b"{}").status_code == status


def test_the_proxy_limits_size_and_rate(proxy):
    client, _, _ = proxy
    large = client.post(PREDICT, content=bytes(48 * 2**20 + 1), headers=TOKEN)
    assert (large.status_code, large.json()) == (413, {"error": "The request is too large"})
    busy = {"Authorization": "Bearer busy"}  # each token has its own rate
    for sent in range(200):
        reply = client.get("/v1/models/half_plus_two", headers=busy)
        if reply.status_code != 200:
            break
    assert sent > 100  # the burst
    assert (reply.status_code, reply.json()) == (429, {"error": "Too many requests"})


def test_the_proxy_carries_grpc_but_no_reload(proxy):
    _, target, certificate = proxy
    credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
    with grpc.secure_channel(target, credentials) as channel:
        request = predict_pb2.PredictRequest()
        request.model_spec.name = "half_plus_two"
        request.inputs["x"].dtype = 1
        request.inputs["x"].float_val.append(2.0)
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        metadata = [("authorization", "Bearer secret")]
        reply = stub.Predict(request, metadata=metadata, timeout=LIMIT)
        assert list(reply.outputs["y"].float_val) == [3.0]
        with pytest.raises(grpc.RpcError) as raised:
            stub.Predict(request, timeout=LIMIT)
        assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.RpcError) as raised:
            model_service_pb2_grpc.ModelServiceStub(channel).GetModelStatus(
                get_model_status_pb2.GetModelStatusRequest(), metadata=metadata, timeout=LIMIT
            )
        assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_the_readmes_curl_lines_work(embedded, tmp_path):
    """Every curl line of serving/README.md, sent to the embedded server."""
    text = (SERVING / "README.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [block for block in blocks if "curl" in block]
    assert len(lines) >= 3
    shutil.copy(pathlib.Path(__file__).parent / "images" / "d.jpg", tmp_path / "cat.jpg")
    for line in lines:
        here = line.replace("http://localhost:8501", embedded.url).replace("pets", "digits")
        result = subprocess.run(["bash", "-c", here], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert "error" not in json.loads(result.stdout), result.stdout
