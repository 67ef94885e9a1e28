"""Files in configs/distributed/: the manifest fits the schemas of Kubernetes; its script and the Slurm script run."""

import json
import os
import pathlib
import subprocess

import kubernetes_validate
import pytest
import yaml

FOLDER = pathlib.Path(__file__).parents[2] / "configs" / "distributed"
SERVICE, JOB = yaml.safe_load_all((FOLDER / "imagenet_job.yaml").read_text())
POD = JOB["spec"]["template"]["spec"]


@pytest.mark.parametrize("manifest", [SERVICE, JOB], ids=lambda manifest: manifest["kind"])
def test_manifests_fit_the_schemas_of_kubernetes(manifest):
    kubernetes_validate.validate(manifest, "1.30", strict=True)


def test_pods_are_found_by_the_names_in_tf_config():
    assert SERVICE["spec"]["clusterIP"] == "None"
    assert SERVICE["metadata"]["name"] == POD["subdomain"]
    assert SERVICE["spec"]["selector"].items() <= JOB["spec"]["template"]["metadata"]["labels"].items()
    assert JOB["spec"]["completions"] == JOB["spec"]["parallelism"] == int(POD["containers"][0]["env"][0]["value"])


@pytest.fixture
def environment(tmp_path):
    """Stand-ins for programs: `python` prints its environment and arguments, `srun` acts as task 2 of 4."""
    scripts = {
        "python": 'echo "$TF_CONFIG" > "$OUT/tf_config.json"; printf "%s\\n" "$@" > "$OUT/arguments"',
        "scontrol": "printf 'a1\\na2\\na3\\na4\\n'",
        "srun": 'while [[ $1 == --* ]]; do shift; done; SLURM_PROCID=2 exec "$@"',
    }
    for name, text in scripts.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path)}


def started(environment: dict[str, str]) -> tuple[dict, list[str]]:
    folder = pathlib.Path(environment["OUT"])
    return json.loads((folder / "tf_config.json").read_text()), (folder / "arguments").read_text().splitlines()


def test_pod_starts_its_worker(environment):
    container = POD["containers"][0]
    (workers,) = container["env"]
    variables = environment | {workers["name"]: workers["value"], "JOB_COMPLETION_INDEX": "3"}
    subprocess.run([*container["command"], *container["args"]], env=variables, check=True)
    config, arguments = started(environment)
    assert config["task"] == {"type": "worker", "index": 3}
    port = container["ports"][0]["containerPort"]
    assert config["cluster"]["worker"] == [f"imagenet-{i}.imagenet:{port}" for i in range(4)]
    assert arguments[:2] == ["-m", "robust_tf.train"] and "--distribution=multi_worker" in arguments
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert "--data_dir=/data" in arguments and {"/data", "/runs"} < mounted


def test_slurm_starts_its_workers(environment):
    variables = environment | {"SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "a[1-4]", "DATA": "/d a", "RUNS": "/r"}
    subprocess.run(["bash", str(FOLDER / "imagenet.sbatch")], env=variables, check=True)
    config, arguments = started(environment)
    assert config == {
        "cluster": {"worker": [f"a{i}:21234" for i in (1, 2, 3, 4)]},
        "task": {"type": "worker", "index": 2},
    }
    assert "--data_dir=/d a" in arguments and "--workdir=/r/imagenet" in arguments
