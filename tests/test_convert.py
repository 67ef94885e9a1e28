"""The convert program writes correct classifiers for all kinds of checkpoints, and no file after any failure."""

import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from torch_writer import Call, Global, tensor, tensors, write_legacy, write_zip

from robust_tf import convert
from robust_tf.errors import UserError
from robust_tf.models import build_classifier, to_reference_state
from robust_tf.models.published import PUBLISHED, PublishedModel

MEAN = np.array([0.1, 0.2, 0.3], np.float32)
STD = np.array([0.5, 0.6, 0.7], np.float32)
FIXTURES = pathlib.Path(__file__).parent / "fixtures"

State = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def classifier() -> keras.Model:
    """A resnet8 with no weight or statistic at its initial value."""
    keras.utils.set_random_seed(0)
    classifier = build_classifier("resnet8", 7, image_size=32, mean=MEAN.tolist(), std=STD.tolist())
    rng = np.random.default_rng(0)
    for variable in classifier.variables:
        if not variable.path.startswith("normalization"):
            variable.assign(variable.value + rng.uniform(0.1, 0.3, variable.shape))
    return classifier


@pytest.fixture(scope="module")
def state(classifier) -> State:
    return to_reference_state(classifier)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(1).random((2, 32, 32, 3), np.float32)


def wrapped(state: State, network: str = "module.model.") -> dict[str, Any]:
    """Returns a state dict as the reference saves it: inside an attacker, with a second copy of everything."""
    shared = {key: tensor(values) for key, values in state.items()}
    mean, std = tensor(MEAN.reshape(3, 1, 1)), tensor(STD.reshape(3, 1, 1))
    return {
        "module.normalizer.new_mean": mean,
        "module.normalizer.new_std": std,
        **{network + key: value for key, value in shared.items()},
        "module.attacker.normalize.new_mean": mean,
        "module.attacker.normalize.new_std": std,
        **{network.replace("module.", "module.attacker.") + key: value for key, value in shared.items()},
    }


def run(*flags: str) -> None:
    convert.main(["convert", *flags])


def convert_checkpoint(path: pathlib.Path, architecture: str = "resnet8", image_size: int = 32) -> keras.Model:
    output = path.with_suffix(".keras")
    run(f"--checkpoint={path}", f"--architecture={architecture}", f"--image_size={image_size}", f"--output={output}")
    return keras.saving.load_model(output)


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize("network", ["module.model.", "module.model.model."])
def test_the_classifier_equals_that_of_the_checkpoint(
    tmp_path, capsys, classifier, state, images, write, network
) -> None:
    content = {
        "model": wrapped(state, network),
        "optimizer": {"state": {0: {"momentum_buffer": tensor(np.ones(3, np.float32))}}},
        "epoch": 41,
        "nat_prec1": tensor(np.array(62.5, np.float32)),
        "adv_prec1": 35.25,
    }
    path = write(tmp_path / "x.ckpt", content)
    converted = convert_checkpoint(path)
    np.testing.assert_allclose(converted(images), classifier(images), atol=1e-6)
    printed = capsys.readouterr().out
    parameters = sum(np.prod(variable.shape) for variable in classifier.trainable_variables)
    for part in (
        subprocess.check_output(["sha256sum", path], text=True).split()[0],
        f"resnet8, 7 classes, {parameters:,} parameters",
        "epoch        41",
        "nat_prec1 62.50 %, adv_prec1 35.25 %",
        "mean         0.1000 0.2000 0.3000\n",
        "std          0.5000 0.6000 0.7000\n",
    ):
        assert part in printed


def test_a_plain_state_dict_gets_the_normalization_of_imagenet(tmp_path, capsys, classifier, state, images) -> None:
    converted = convert_checkpoint(write_zip(tmp_path / "x.pth", tensors(state)))
    imagenet = (images - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(converted.get_layer("normalization")(images), imagenet, atol=1e-5)
    printed = capsys.readouterr().out
    assert printed.count("not stored; ImageNet's") == 2
    assert "epoch        not stored" in printed


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision_is_converted(tmp_path, classifier, state, kind) -> None:
    halved = {key: half_precision(values, kind) for key, values in state.items()}
    path = write_legacy(tmp_path / "x.pth", {"state_dict": wrapped(halved)})
    converted = to_reference_state(convert_checkpoint(path))
    for key, values in state.items():
        assert converted[key].dtype == values.dtype
        np.testing.assert_allclose(converted[key], values, rtol=2**-7 if kind == "bfloat16" else 2**-10, atol=1e-7)
    assert any((converted[key] != values).any() for key, values in state.items())


def test_verbose_shows_the_module_of_each_layer(tmp_path, capsys, classifier, state) -> None:
    path = write_zip(tmp_path / "x.pth", tensors(state))
    run(f"--checkpoint={path}", "--architecture=resnet8", f"--output={tmp_path / 'y.keras'}", "--verbose")
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    assert ["stem_conv", "conv1", "(None,", "224,", "224,", "16)", "432"] in rows
    with_weights = [layer.name for layer in classifier.layers if layer.weights and layer.name != "normalization"]
    assert [row[0] for row in rows if row and row[0] in with_weights] == with_weights


def test_a_classifier_is_converted_to_pytorch_and_back(tmp_path, capsys, classifier, state) -> None:
    classifier.save(tmp_path / "x.keras")
    run(f"--classifier={tmp_path / 'x.keras'}", f"--to_reference={tmp_path / 'x.npz'}")
    with np.load(tmp_path / "x.npz", allow_pickle=False) as written:
        assert set(written.files) == set(state)
        for key, values in state.items():
            np.testing.assert_array_equal(written[key], values, err_msg=key)
        assert written["linear.weight"].shape == (7, 64)
        again = to_reference_state(convert_checkpoint(write_zip(tmp_path / "y.pth", tensors(dict(written)))))
    for key, values in state.items():
        np.testing.assert_array_equal(again[key], values, err_msg=key)
    printed = capsys.readouterr().out
    assert "mean 0.1000 0.2000 0.3000" in printed and "deviation 0.5000 0.6000 0.7000" in printed


def test_a_published_model_is_converted_by_name(tmp_path, monkeypatch, classifier, state, images) -> None:
    row = PublishedModel(architecture="resnet8", norm="l2", epsilon=3.0, dataset="imagenet", filename="resnet8.ckpt")
    monkeypatch.setitem(PUBLISHED, "resnet8_l2_eps3", row)
    write_zip(tmp_path / "resnet8.ckpt", {"model": wrapped(state)})
    output = tmp_path / "x.keras"
    run("--source=resnet8_l2_eps3", f"--cache_dir={tmp_path}", "--image_size=32", f"--output={output}")
    np.testing.assert_allclose(keras.saving.load_model(output)(images), classifier(images), atol=1e-6)


def test_list_shows_the_published_models(capsys) -> None:
    run("--list")
    rows = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 1 + len(PUBLISHED)
    assert ["resnet50_l2_eps3", "imagenet", "l2", "3", "62.83 %"] in rows
    assert ["resnet18_linf_eps8.0", "imagenet", "linf", "8/255", "42.11 %"] in rows


def test_help_needs_no_tensorflow() -> None:
    code = (
        "import contextlib, sys; from robust_tf import convert\n"
        "with contextlib.suppress(SystemExit): convert.main(['convert', '--help'])\n"
        "assert not {'tensorflow', 'keras'} & set(sys.modules)"
    )
    assert "--checkpoint" in subprocess.check_output([sys.executable, "-c", code], text=True)


def without(state: State, key: str) -> State:
    return {name: values for name, values in state.items() if name != key}


BAD_CHECKPOINTS: dict[str, tuple[Callable[[State], Any], str]] = {
    "missing key": (lambda state: wrapped(without(state, "layer2.0.conv1.weight")), "1 missing: layer2.0.conv1.weight"),
    "left-over key": (lambda state: wrapped(state | {"layer9.weight": np.ones(2, np.float32)}), "layer9.weight"),
    "wrong shape": (lambda state: wrapped(state | {"bn1.weight": np.ones(5, np.float32)}), "bn1.weight (5,)"),
    "no head": (lambda state: wrapped(without(state, "linear.weight")), "linear.weight"),
    "integers": (lambda state: wrapped(state | {"bn1.weight": np.ones(16, np.int64)}), "bn1.weight (int64)"),
    "no weights": (lambda state: {"epoch": 3}, "epoch"),
    "code": (lambda state: wrapped(state) | {"x": Call(Global("os", "system"), ("touch marker",))}, "os.system"),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_bad_checkpoints_leave_no_file(tmp_path, state, name: str) -> None:
    make, said = BAD_CHECKPOINTS[name]
    path = write_zip(tmp_path / "x.ckpt", {"model": make(state)} if name != "no weights" else make(state))
    with pytest.raises(UserError, match=re.escape(said)):
        convert_checkpoint(path)
    assert {file.name for file in tmp_path.iterdir()} == {"x.ckpt"}


def test_another_architecture_is_named_and_the_old_file_is_kept(tmp_path, state) -> None:
    path = write_zip(tmp_path / "x.ckpt", {"model": wrapped(state)})
    path.with_suffix(".keras").write_text("old")
    with pytest.raises(UserError, match="It fits .*resnet8.*7"):
        convert_checkpoint(path, architecture="resnet20")
    with pytest.raises(UserError, match="Did you mean 'resnet18'"):
        convert_checkpoint(path, architecture="resnet-18")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged or truncated"):
        convert_checkpoint(path)
    with pytest.raises(UserError, match="No other architecture fits"):
        (tmp_path / "x.ckpt").write_bytes((FIXTURES / "tiny_smallbn_zip.pt").read_bytes())
        convert_checkpoint(path)
    assert {file.name for file in tmp_path.iterdir()} == {"x.ckpt", "x.keras"}
    assert path.with_suffix(".keras").read_text() == "old"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "Received: none"),
        (["--list", "--source=resnet18_l2_eps3"], "--source, --list"),
        (["--checkpoint=x.pt", "--output=y.keras"], "--checkpoint=x.pt alone"),
        (["--checkpoint=x.pt", "--architecture=resnet8", "--output=y.h5"], "--output=y.h5"),
        (["--source=resnet18_l2_eps3"], "--output="),
        (["--source=resnet18_l2", "--output=y.keras"], "'resnet18_l2'"),
        (
            ["--source=resnet20_fashion_mnist_l2_eps1", "--output=y.keras"],
            "Only the ImageNet models have a PyTorch checkpoint",
        ),
        (["--checkpoint=missing.pt", "--architecture=resnet8", "--output=y.keras"], "missing.pt"),
        (["--classifier=missing.keras", "--to_reference=y.npz"], "missing.keras"),
        (["--classifier=x.keras", "--to_reference=y.pt"], "y.pt"),
        (["--list", "x.pt"], "'x.pt'"),
        (["--chekpoint=x.pt"], "checkpoint"),
    ],
)
def test_wrong_flags_are_refused(tmp_path, monkeypatch, flags: list[str], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(said)):
        run(*flags)
    assert list(tmp_path.iterdir()) == []


def test_classifiers_without_a_reference_are_refused(tmp_path) -> None:
    (tmp_path / "damaged.keras").write_bytes(b"PK\x03\x04 and then nothing")
    inputs = keras.Input((4, 4, 3))
    outputs = keras.layers.Dense(2)(keras.layers.Flatten()(inputs))
    keras.Model(inputs, outputs, name="mine").save(tmp_path / "mine.keras")
    for name, said in (("damaged", "damaged.keras"), ("mine", "'mine'")):
        with pytest.raises(UserError, match=said):
            run(f"--classifier={tmp_path / name}.keras", f"--to_reference={tmp_path / name}.npz")
    assert not list(tmp_path.glob("*.npz"))


def test_an_output_that_cannot_be_written_is_refused(tmp_path, state) -> None:
    path = write_zip(tmp_path / "x.pth", tensors(state))
    output = path / "y.keras"
    with pytest.raises(UserError, match=f"^--output needs a folder.*{re.escape(str(path))}"):
        run(f"--checkpoint={path}", "--architecture=resnet8", f"--output={output}")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_the_program_prints_one_line_and_exits_with_2(tmp_path) -> None:
    path = write_zip(tmp_path / "x.ckpt", {"model": Call(Global("os", "system"), (f"touch {tmp_path / 'marker'}",))})
    command = [sys.executable, "-m", "robust_tf.convert", f"--checkpoint={path}", "--architecture=resnet8"]
    done = subprocess.run([*command, f"--output={tmp_path / 'y.keras'}"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and "os.system" in done.stderr
    assert "Traceback" not in done.stderr
    assert {file.name for file in tmp_path.iterdir()} == {"x.ckpt"}


def half_precision(values: np.ndarray, kind: str) -> np.ndarray:
    """Converts for `torch_writer`: to NumPy's float16, or to the bits of bfloat16 as uint16."""
    if values.dtype != np.float32 or kind == "float32":
        return values
    return values.astype(np.float16) if kind == "float16" else (values.view(np.uint32) >> 16).astype(np.uint16)


PEAK = """
import sys
from robust_tf import convert
convert.main(["convert", "--list"])  # as in the program, before TensorFlow is imported
from robust_tf.models import build_classifier
from tests.bench.timing import peak_memory
build_classifier("resnet8", 2, image_size=32, mean=[0.5] * 3, std=[0.5] * 3).save(sys.argv[1] + ".warm.keras")
before = peak_memory()
convert.main(["convert", "--architecture=" + sys.argv[3], "--checkpoint=" + sys.argv[1], "--output=" + sys.argv[2]])
print("PEAK", (peak_memory() - before) * 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("resnet50", "float32"),
        ("wide_resnet50_2", "float16"),
        ("wide_resnet50_2", "bfloat16"),
        ("vgg16_bn", "float16"),  # one kernel makes up four fifths of it
    ],
)
def test_memory_stays_under_three_times_the_checkpoint(tmp_path, architecture, kind) -> None:
    """These are the worst files: weights without an optimizer, which makes up half of most checkpoints.

    With half precision the classifier alone has twice the size of the checkpoint.
    """
    classifier = build_classifier(architecture, 1000, image_size=224, mean=[0.5] * 3, std=[0.25] * 3)
    state = {key: half_precision(values, kind) for key, values in to_reference_state(classifier).items()}
    path = write_zip(tmp_path / "x.pth", tensors(state))
    output = tmp_path / "y.keras"
    command = [sys.executable, "-c", PEAK, path, output, architecture]
    # As in a shell. The setting of the tests turns oneDNN on, whose allocator never releases memory.
    environment = {name: value for name, value in os.environ.items() if name != "TF_ENABLE_ONEDNN_OPTS"}
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, env=environment)
    size = path.stat().st_size
    assert size > 100e6
    assert size < float(done.stdout.split()[-1]) < 3 * size
    assert output.stat().st_size > 100e6
