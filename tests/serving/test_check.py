"""Tests of `robust_tf.serve --check`: what it prints, and its exit code."""

import json
import shutil
import subprocess

import pytest

from robust_tf import serve
from robust_tf.serving.model.session import LoadedModel
from tests.serving.models import model_entry


@pytest.fixture(autouse=True)
def _no_model_may_be_loaded(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(LoadedModel, "__init__", refuse)


@pytest.fixture
def models(tmp_path):
    for number in (1, 2):
        (tmp_path / "pets" / str(number)).mkdir(parents=True)
        (tmp_path / "pets" / str(number) / "saved_model.pb").touch()
    return tmp_path


def check(capsys, *flags):
    code = serve.main(["serve", "--check", *flags])
    return code, capsys.readouterr().out.splitlines()


def config(folder, policy, **labels):
    texts = [f'version_labels {{ key: "{label}" value: {number} }}' for label, number in labels.items()]
    entry = model_entry("pets", folder / "pets", f"model_version_policy {{ {policy} }} {' '.join(texts)}")
    (folder / "models.config").write_text(f"model_config_list {{ {entry} }}")
    return f"--model_config_file={folder / 'models.config'}"


def test_valid_configuration_exits_with_0(models, capsys):
    (models / "batching.config").write_text("max_batch_size { value: 8 }")
    (models / "monitoring.config").write_text("prometheus_config { enable: true }")
    flags = ["--enable_batching", f"--batching_parameters_file={models / 'batching.config'}"]
    flags += [f"--monitoring_config_file={models / 'monitoring.config'}"]
    code, lines = check(capsys, config(models, "specific { versions: 1 versions: 2 }", stable=1), *flags)
    assert code == 0
    assert lines == [
        f"--batching_parameters_file={models}/batching.config: can be used",
        f"--monitoring_config_file={models}/monitoring.config: can be used",
        f"--model_config_file={models}/models.config: models pets",
        f"Model pets in {models}/pets: versions 1, 2; the policy specific {{versions: 1 versions: 2}} serves 1, 2",
        "Model pets: label stable points to version 1",
    ]
    assert check(capsys, f"--model_base_path={models}/pets")[0] == 0


def test_label_whose_version_the_next_export_unloads_is_a_fault(models, capsys):
    code, lines = check(capsys, config(models, "latest { num_versions: 2 }", stable=1, canary=2))
    assert code == 1
    assert (
        "error: Model pets: label stable points to version 1, which the policy latest {num_versions: 2} will unload at "
        "the next export. Keep it with model_version_policy { specific { versions: 1 versions: 2 } }." in lines
    )
    assert any(line.startswith("note: Model pets: label canary") and "in 2 exports" in line for line in lines)


def test_labels_and_policies_that_name_missing_versions_are_faults(models, capsys):
    flag = config(models, "specific { versions: 1 versions: 7 }", stable=7)
    code, lines = check(capsys, flag)
    assert code == 1
    assert any("error: Model pets: label stable points to version 7, which is not in" in line for line in lines)
    assert any("names versions that are not there: 7" in line for line in lines)
    flag = config(models, "all {}", stable=7)
    assert check(capsys, flag)[0] == 1
    assert check(capsys, flag, "--allow_version_labels_for_unavailable_models")[0] == 0


def test_every_fault_is_listed(models, capsys):
    for name in ("batching", "monitoring", "ssl"):
        (models / f"{name}.config").write_text("nonsense")
    code, lines = check(
        capsys,
        f"--model_base_path={models}/pets/1",
        "--enable_batching",
        f"--batching_parameters_file={models}/batching.config",
        f"--monitoring_config_file={models}/monitoring.config",
        f"--ssl_config_file={models}/ssl.config",
    )
    assert code == 1
    assert [line.split()[0] for line in lines] == ["error:"] * 4
    assert [name in line for name, line in zip(("Batching", "Monitoring", "SSL"), lines, strict=False)] == [True] * 3
    assert f"The model is the folder that holds the versions: {models}/pets" in lines[3]
    (models / "models.config").write_text("nonsense")
    assert check(capsys, f"--model_config_file={models}/models.config")[0] == 1


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_tls_key_must_belong_to_the_certificate(models, capsys):
    parts = {}
    for name in ("a", "b"):
        key, certificate = models / f"{name}.key", models / f"{name}.crt"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
            + ["-days", "2", "-subj", "/CN=localhost", "-keyout", str(key), "-out", str(certificate)],
            check=True,
            capture_output=True,
        )
        parts[name] = key.read_text(), certificate.read_text()
    flags = [f"--model_base_path={models}/pets", f"--ssl_config_file={models}/ssl.config"]
    for key, certificate, code in [("a", "a", 0), ("a", "b", 1)]:
        texts = {"server_key": parts[key][0], "server_cert": parts[certificate][1]}
        (models / "ssl.config").write_text("\n".join(f"{name}: {json.dumps(text)}" for name, text in texts.items()))
        assert check(capsys, *flags)[0] == code
    (models / "ssl.config").write_text('server_key: "k" server_cert: "c"')
    code, lines = check(capsys, *flags)
    assert (code, "TLS needs PEM texts, and a key that belongs to the certificate" in lines[0]) == (1, True)
