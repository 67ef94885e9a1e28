"""Tests of version policies and of labels whose versions a policy does not keep."""

import pathlib

import pytest

from robust_tf.serving.server.model_settings import ModelSettings


def present(*numbers):
    return {number: pathlib.Path(str(number)) for number in numbers}


@pytest.mark.parametrize(
    ("policy", "numbers", "said", "due"),
    [
        ({"latest": 2}, (1, 2), "which the policy latest {num_versions: 2} will unload at the next export", True),
        ({"latest": 1}, (1,), "which the policy latest {num_versions: 1} will unload at the next export", True),
        ({"latest": 2}, (1,), "which the policy latest {num_versions: 2} will unload in 2 exports from now", False),
        ({"latest": 2}, (1, 2, 3), "which the policy latest {num_versions: 2} does not keep", True),
        ({"specific": (2, 3)}, (1, 2, 3), "which the policy specific {versions: 2 versions: 3} does not keep", True),
        ({"specific": (1, 3)}, (3,), "which is not in base. Versions there: 3", True),
        ({"latest": 0}, (), "which is not in base. Versions there: none", True),
    ],
)
def test_label_that_loses_its_version_is_found(policy, numbers, said, due):
    settings = ModelSettings(name="pets", base_path=pathlib.Path("base"), labels={"stable": 1}, **policy)
    (finding,) = settings.label_findings(present(*numbers))
    assert finding.text.startswith("Model pets: label stable points to version 1, which ")
    assert said in finding.text
    assert finding.due is due
    assert ("Keep it with model_version_policy { specific { versions: 1 } }." in finding.text) is not finding.absent


@pytest.mark.parametrize("policy", [{"latest": 0}, {"specific": (1, 2)}])
def test_label_that_keeps_its_version_is_not_reported(policy):
    settings = ModelSettings(name="pets", base_path=pathlib.Path("base"), labels={"stable": 1}, **policy)
    assert settings.label_findings(present(1, 2, 3)) == []
