"""The code, the commands and the paths in README.md work."""

import dataclasses
import pathlib
import re
import shlex

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_tf.attacks import pgd
from robust_tf.config.evaluation import EvaluateConfig
from robust_tf.config.job import JobConfig
from robust_tf.config.study import parse_study
from robust_tf.config.visualization import VisualizeConfig
from robust_tf.convert import ConvertConfig
from robust_tf.data.__main__ import DataFlags
from robust_tf.export import ExportConfig
from robust_tf.flags import parse_flags
from robust_tf.predict import PredictConfig
from robust_tf.serving.server.serve_config import ServeConfig
from robust_tf.studies.grid import plan_study
from tests.test_structure import LEVEL

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


# Keras 3.15 gives this warning whenever `fit` receives a tf.data.Dataset.
@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed:UserWarning")
def test_the_example_with_your_own_model_runs(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    my_classifier = keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3), keras.layers.Flatten(), keras.layers.Dense(3)]
    )
    rng = np.random.default_rng(0)
    images, labels = rng.random((32, 8, 8, 3)).astype(np.float32), rng.integers(0, 3, 32)
    dataset = tf.data.Dataset.from_tensor_slices((images, labels)).batch(16)
    monkeypatch.chdir(tmp_path)
    names = {"my_classifier": my_classifier, "train_dataset": dataset, "validation_dataset": dataset}
    exec(code.replace("epochs=30", "epochs=1"), names)
    assert {"loss", "accuracy", "clean_loss", "clean_accuracy"} <= set(names["trainer"].get_metrics_result())
    restored = keras.saving.load_model(tmp_path / "robust.keras")
    np.testing.assert_allclose(restored(images), my_classifier(images), rtol=1e-5)


def test_the_attack_of_the_readme_runs():
    call = re.search(r"`robust_tf\.attacks\.(pgd\(.*?\))`", README)[1]
    model = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Flatten(), keras.layers.Dense(3)])
    images = np.full((2, 4, 4, 3), 0.5, np.float32)
    names = {"pgd": pgd, "model": model, "images": images, "labels": np.array([0, 1])}
    assert eval(call, names).shape == images.shape


ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = {
    "train": JobConfig,
    "evaluate": EvaluateConfig,
    "visualize": VisualizeConfig,
    "convert": ConvertConfig,
    "export": ExportConfig,
    "serve": ServeConfig,
    "predict": PredictConfig,
    "data": DataFlags,
}


def test_every_program_and_file_that_is_named_exists():
    programs = set(re.findall(r"python -m robust_tf\.(\w+)", README))
    assert set(CONFIGS) | {"study"} == programs
    package = ROOT / "robust_tf"
    assert all((package / f"{name}.py").exists() or (package / name / "__main__.py").exists() for name in programs)
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert len(links) > 10
    assert [path for path in links if not (ROOT / path).exists()] == []
    assert [path for path in re.findall(r"configs/\w+\.cfg", README) if not (ROOT / path).exists()] == []


def test_the_commands_of_the_readme_have_flags_that_exist(monkeypatch):
    monkeypatch.chdir(ROOT)  # --flagfile is relative
    text = README.replace("\\\n", "")
    commands = re.findall(r"^(?:.* && )?python -m robust_tf\.(\w+) (--.*?)(?:\s+#.*)?$", text, re.MULTILINE)
    assert {program for program, _ in commands} == {*CONFIGS, "study"}
    for program, arguments in commands:
        argv = [program, *shlex.split(arguments)]
        if program == "study":
            assert plan_study(dataclasses.replace(parse_study(argv), workdir="runs/study")).cells
        else:
            parse_flags(CONFIGS[program], argv)


def test_the_rooms_of_the_readme_are_those_of_the_package():
    """They are in the order in which they may import each other."""
    table = README.partition("## How it is built")[2].partition("\n## ")[0]
    rows = [re.findall(r"`([\w/]+?)(?:/|\.py|)`", line) for line in table.splitlines() if line.startswith("| `")]
    first = [row[0].partition("/")[0] for row in rows]
    levels = [LEVEL[name] for name in first]
    assert levels == sorted(levels)
    named = {name for row in rows for name in row}
    assert [name for name in LEVEL if name not in named] == []
