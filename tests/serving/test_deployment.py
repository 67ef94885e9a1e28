"""Tests that the files in serving/ are valid for the programs that read them, and agree with each other."""

import json
import os
import pathlib
import re
import subprocess

import kubernetes_validate
import pytest
import yaml

from robust_tf.serving.server.config_files import model_settings, read_batching, read_model_config, read_monitoring
from tests.serving.conftest import LIMIT
from tests.serving.proxy import SERVING, tool

MANIFESTS = sorted((SERVING / "kubernetes").glob("*.yaml"))


def read_yaml(path):
    return yaml.safe_load((SERVING / path).read_text())


def test_server_reads_the_config_files():
    (pets,) = model_settings(read_model_config(SERVING / "config" / "models.config"))
    assert (pets.name, str(pets.base_path)) == ("pets", "/models/pets")
    assert pets.labels == {"stable": 1, "canary": 1}
    assert set(pets.labels.values()) <= set(pets.specific)  # any other policy would unload them sooner or later
    assert read_batching(SERVING / "config" / "batching.config").max_batch_size == 32
    assert read_monitoring(SERVING / "config" / "monitoring.config") == "/monitoring/prometheus/metrics"


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifests_match_the_schemas_of_kubernetes(path):
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


def test_pod_is_locked_down():
    pod = read_yaml("kubernetes/deployment.yaml")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container()["securityContext"]["readOnlyRootFilesystem"] is True
    assert {"name": "models", "mountPath": "/models", "readOnly": True} in container()["volumeMounts"]
    assert set(container()["resources"]["limits"]) == {"cpu", "memory"}


def test_all_files_pin_the_same_server_version():
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


def test_readiness_probe_reads_the_state(embedded):
    """Runs the shell line of the probe against a server, for a model that it has and for one that it lacks."""
    line = container()["readinessProbe"]["exec"]["command"][-1]
    assert line == read_yaml("compose.yaml")["services"]["tensorflow-serving"]["healthcheck"]["test"][-1].replace(
        "$$", "$"
    )
    for model, code in [("digits", 0), ("nobody", 1)]:
        here = line.replace("127.0.0.1/8501", f"127.0.0.1/{embedded.rest_port}")
        environment = os.environ | {"MODEL_NAME": model}
        run = subprocess.run(["bash", "-c", here], env=environment, capture_output=True, timeout=LIMIT, check=False)
        assert run.returncode == code


def test_dashboard_and_alerts_use_metrics_that_exist(embedded):
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
    # A selector with a label that the metric does not have would match nothing.
    for query in queries:
        for name, more in re.findall(r'__name__="([^"]+)"(.*?)\}', query):
            series = next(line for line in text.splitlines() if line.startswith(name + "{"))
            for label in re.findall(r"(\w+)(?:=~|!=|=)", more):
                assert f'{label}="' in series, query
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    scrape = read_yaml("monitoring/prometheus.yaml")["scrape_configs"][0]
    assert scrape["metrics_path"] == read_monitoring(SERVING / "config" / "monitoring.config")
    assert scrape["job_name"] == "tensorflow_serving"  # the name in tests/serving/alerts.test.yaml


def test_readme_names_the_versions_that_were_tried_together():
    pinned = container()["image"].split(":")[1]
    setup = (SERVING.parent / "setup.py").read_text()
    exporter = re.search(r'"tensorflow>=([\d.]+)"', setup)[1]
    readme = " ".join((SERVING / "README.md").read_text().split())
    assert set(re.findall(r"TensorFlow Serving ([\d.]+\d)", readme)) == {pinned}
    assert set(re.findall(r"tensorflow/serving:([\d.]+)", readme)) == {pinned}
    assert f"This server loads exports from TensorFlow {exporter} and answers" in readme


@pytest.mark.parametrize("name", ["tensorflow-serving", "nginx", "prometheus", "grafana"])
def test_compose_services_are_locked_down(name):
    service = read_yaml("compose.yaml")["services"][name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "mem_limit" in service


def test_compose_waits_as_long_as_kubernetes():
    startup = container()["startupProbe"]
    check = read_yaml("compose.yaml")["services"]["tensorflow-serving"]["healthcheck"]
    assert int(check["start_period"].rstrip("s")) >= startup["periodSeconds"] * startup["failureThreshold"] == 300


def compose_config(**environment):
    command = [tool("docker-compose"), "-f", str(SERVING / "compose.yaml"), "config"]
    environment = {"PATH": os.environ["PATH"]} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)


def test_compose_takes_model_and_password_from_the_environment():
    found = compose_config(MODELS="/exports", MODEL_NAME="cars", GRAFANA_PASSWORD="p")
    assert found.returncode == 0, found.stderr
    services = yaml.safe_load(found.stdout)["services"]
    assert services["tensorflow-serving"]["environment"]["MODEL_NAME"] == "cars"
    assert services["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"] == "p"
    refused = compose_config(MODELS="/exports")
    assert refused.returncode != 0
    assert "GRAFANA_PASSWORD" in refused.stderr


def test_only_the_autoscaler_sets_the_number_of_pods():
    assert read_yaml("kubernetes/autoscaler.yaml")["spec"]["scaleTargetRef"]["kind"] == "Deployment"
    assert "replicas" not in read_yaml("kubernetes/deployment.yaml")["spec"]


def test_moving_a_label_restarts_no_pod():
    """Kustomize renders a fixed name for the config map, so that a change of models.config leaves the pods alone."""
    rendered = subprocess.run([tool("kubectl"), "kustomize", str(SERVING)], capture_output=True, text=True, check=True)
    manifests = list(yaml.safe_load_all(rendered.stdout))
    config = next(manifest for manifest in manifests if manifest["kind"] == "ConfigMap")
    assert config["metadata"]["name"] == "tensorflow-serving-config"  # without a hash of its content
    assert config["data"]["models.config"] == (SERVING / "config" / "models.config").read_text()


def test_network_policy_admits_clients_and_prometheus():
    clients, prometheus = read_yaml("kubernetes/network_policy.yaml")["spec"]["ingress"]
    (label,) = clients["from"][0]["podSelector"]["matchLabels"].items()
    readme = (SERVING / "README.md").read_text()
    assert '{}: "{}"'.format(*label) in readme
    (peer,) = prometheus["from"]
    assert peer["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "monitoring"}
    assert [port["port"] for port in prometheus["ports"]] == [8501]  # port 8500 can reload the models


def test_namespace_admits_the_pod_of_kserve():
    labels = read_yaml("kubernetes/namespace.yaml")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    service = read_yaml("kserve/inference_service.yaml")
    assert service["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "Standard"
    predictor = service["spec"]["predictor"]
    assert predictor["securityContext"]["runAsNonRoot"] is True
    for context in (predictor["securityContext"], predictor["model"]["securityContext"]):
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert predictor["model"]["securityContext"]["allowPrivilegeEscalation"] is False
    assert predictor["model"]["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize(
    "command",
    [
        ["test", "rules", str(pathlib.Path(__file__).with_name("alerts.test.yaml"))],
        ["check", "config", str(SERVING / "monitoring" / "prometheus.yaml")],
    ],
    ids=["alerts", "config"],
)
def test_promtool_accepts_alerts_and_config(command):
    run = subprocess.run([tool("promtool"), *command], capture_output=True, text=True, timeout=LIMIT, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
