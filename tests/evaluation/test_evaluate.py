"""The program `robust_tf.evaluate` from flags to files, with a small network on the real digits."""

import contextlib
import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import time
import types
from typing import cast

import keras
import numpy as np
import pytest
from small_jobs import small_classifier, write_job

from robust_tf import evaluate
from robust_tf.attacks import ATTACKS, CascadeState, pgd
from robust_tf.config.evaluation import EvaluateConfig
from robust_tf.errors import UserError
from robust_tf.evaluation import robustness, run
from robust_tf.flags import parse_flags
from robust_tf.models import load_classifier
from robust_tf.statistics import in_words, paired_difference, wilson_interval
from tests.tasks import make_task

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def flags(jobs, data_dir, tmp_path):
    """Makes the arguments of a small evaluation. `name` is the name of its output folder."""

    def make(name: str = "evaluation", *, classifier: str = "good", **changes) -> list[str]:
        values = {
            "classifier": jobs[classifier].classifier if classifier in jobs else classifier,
            "output": tmp_path / name,
            "data_dir": data_dir,
            "num_images": 60,
            "num_examples": 0,
            "attack": "fgsm",
            **changes,
        }
        return ["evaluate", *(f"--{name}={value}" for name, value in values.items())]

    return make


def results_of(arguments: list[str]) -> dict:
    folder = next(argument for argument in arguments if argument.startswith("--output=")).partition("=")[2]
    return json.loads((pathlib.Path(folder) / "evaluation.json").read_text())


def fallen(entry: dict) -> set[int]:
    return {number for by in entry["fell"].values() for numbers in by.values() for number in numbers}


def test_two_attacks_give_curves_and_all_files(flags, tmp_path, capsys):
    arguments = flags(attack="fgsm,pgd", epsilon="1,0,1/4", num_examples=3)
    evaluate.main(arguments)
    assert {path.name for path in (tmp_path / "evaluation").iterdir()} == {
        "evaluation.json",
        "state.json",
        "curve.png",
        "reliability.png",
        "examples.png",
    }
    (entry,) = results_of(arguments)["classifiers"]
    ids = entry["image_ids"]
    assert len(set(ids)) == 60 and ids == sorted(ids)
    attacks = entry["attacks"]
    assert [(row["attack"], row["norm"], row["epsilon"]) for row in attacks] == [
        (name, "l2", epsilon) for name in ("fgsm", "pgd") for epsilon in (0.0, 0.25, 1.0)
    ]
    for row in attacks:
        assert fallen(row) <= set(ids)
        assert row["accuracy"] == pytest.approx(1 - len(fallen(row)) / 60)
        assert row["interval"] == pytest.approx(wilson_interval(60 - len(fallen(row)), 60))
        assert set(row["per_class"]) == set("01234")
        per_class = row["per_class"].values()
        assert sum(one["num_images"] for one in per_class) == 60
        assert sum(one["accuracy"] * one["num_images"] for one in per_class) == pytest.approx(60 * row["accuracy"])
    for weaker, stronger in ((attacks[0], attacks[1]), (attacks[1], attacks[2]), (attacks[4], attacks[5])):
        assert fallen(weaker) <= fallen(stronger)
    assert attacks[2]["accuracy"] < attacks[0]["accuracy"] == entry["clean"]["accuracy"]
    assert attacks[0]["fell"].get("0", {}).get("clean", []) == entry["clean"]["wrong"]
    assert len(attacks[5]["fell"]["1"]["pgd"]) > 0
    bins = entry["calibration"]["bins"]
    assert sum(row["num_images"] for row in bins) == 60
    out = capsys.readouterr().out
    assert (
        "PGD-20 (any wrong iterate), l2 0.25" in out
        and "l2 0 " not in out
        and f"({attacks[4]['interval'][0]:.1%} to " in out
    )


def test_the_robust_accuracy_is_the_one_of_pgd_called_directly(flags, jobs):
    """The images and the parameters of the attack are the same."""
    arguments = flags(attack="pgd", epsilon="1")
    evaluate.main(arguments)
    (entry,) = results_of(arguments)["classifiers"]
    config, _ = parse_flags(EvaluateConfig, arguments)
    subject = run.load(config, jobs["good"].classifier)
    images = run.draw_images(subject.task, count=60, seed=0)
    assert images.ids.tolist() == entry["image_ids"]
    images_adv = pgd(
        subject.classifier, images.pixels, images.labels, norm="l2", epsilon=1.0, step_size=0.125, steps=20
    )
    right = np.argmax(subject.classifier(images_adv), axis=-1) == images.labels
    right &= np.argmax(subject.classifier(images.pixels), axis=-1) == images.labels
    assert entry["attacks"][0]["accuracy"] == pytest.approx(right.mean())


def test_defaults_come_from_the_job_next_to_the_classifier(flags, jobs):
    arguments = flags()
    evaluate.main(arguments)
    (entry,) = results_of(arguments)["classifiers"]
    assert (entry["dataset"], entry["classes"], entry["image_size"]) == ("digits", [0, 1, 2, 3, 4], 8)
    assert [(row["norm"], row["epsilon"]) for row in entry["attacks"]] == [("l2", 0.0), ("l2", 0.5)]
    assert EvaluateConfig(classifier=jobs["good"].classifier).folder == jobs["good"].folder / "evaluation"


@pytest.mark.slow
def test_two_classifiers_are_compared_with_corruptions(flags, jobs, tmp_path, capsys):
    arguments = flags(compare=jobs["poor"].classifier, corruptions="true", num_images=30, num_examples=2)
    evaluate.main(arguments)
    good, poor = results_of(arguments)["classifiers"]
    assert good["image_ids"] == poor["image_ids"]
    assert good["clean"]["accuracy"] > poor["clean"]["accuracy"]
    assert good["weights_sha256"] != poor["weights_sha256"]
    for entry in (good, poor):
        corruptions = entry["corruptions"]
        assert corruptions["source"] == "computed" and corruptions["baseline"] == jobs["poor"].classifier
        assert len(corruptions["errors"]) == 15
        errors = np.array(list(corruptions["errors"].values()))
        assert errors.shape == (15, 5) and corruptions["mean_corruption_error"] == pytest.approx(errors.mean())
    assert poor["corruptions"]["relative_mean_corruption_error"] == pytest.approx(1.0)
    assert good["corruptions"]["relative_mean_corruption_error"] < 1.0
    assert (tmp_path / "evaluation" / "examples_compare.png").exists()
    out = capsys.readouterr().out
    assert "mCE relative to the second" in out
    assert (good["attacks"][1]["epsilon"], len(good["attacks"])) == (0.5, 2)
    evaluation = results_of(arguments)
    right = [~np.isin(entry["image_ids"], entry["clean"]["wrong"]) for entry in (good, poor)]
    robust = [~np.isin(entry["image_ids"], list(fallen(entry["attacks"][1]))) for entry in (good, poor)]
    expected = {name: paired_difference(*pair) for name, pair in (("clean", right), ("robust", robust))}
    clean, (attacked,) = evaluation["comparison"]["clean_accuracy"], evaluation["comparison"]["attacks"]
    for row, pair in ((clean, expected["clean"]), (attacked, expected["robust"])):
        assert (row["difference"], *row["interval"], row["p_value"]) == pytest.approx(
            (pair.difference, *pair.interval, pair.p_value)
        )
    assert clean["difference"] == pytest.approx(good["clean"]["accuracy"] - poor["clean"]["accuracy"])
    assert f"clean accuracy, good minus poor: {in_words(expected['clean'])}" in out
    assert f"fgsm, l2 0.5, good minus poor: {in_words(expected['robust'])}" in out


def test_classifiers_before_and_after_transfer_are_measured_on_their_tasks(flags, jobs, capsys):
    arguments = flags(compare=jobs["other"].classifier, epsilon="0.5")
    evaluate.main(arguments)
    before, after = results_of(arguments)["classifiers"]
    assert before["class_names"] == ["0", "1", "2", "3", "4"] and after["class_names"] == ["5", "6", "7", "8", "9"]
    assert after["clean"]["accuracy"] > 0.6
    assert not set(before["image_ids"]) & set(after["image_ids"])
    assert results_of(arguments)["comparison"] is None
    assert "No paired differences: the two classifiers were not measured on the same images." in capsys.readouterr().out


@pytest.mark.slow
def test_finished_parts_are_not_run_again_and_others_can_be_added(flags, tmp_path, monkeypatch):
    evaluate.main(flags("both", epsilon="0.25,0.5", num_images=20))
    evaluate.main(flags("added", epsilon="0.25", num_images=20))
    evaluate.main(flags("added", epsilon="0.25,0.5", num_images=20))
    both, added = ((tmp_path / name / "evaluation.json").read_text() for name in ("both", "added"))
    assert both == added
    monkeypatch.setattr(robustness, "cascade", None)  # would fail when called
    evaluate.main(flags("added", epsilon="0.25,0.5", num_images=20))
    assert (tmp_path / "added" / "evaluation.json").read_text() == added


def test_the_progress_increases_until_the_end(flags, monkeypatch):
    seen = []

    @contextlib.contextmanager
    def record(name, *, total, unit="images"):
        yield types.SimpleNamespace(update=lambda done, figures="", *, total: seen.append((done, total, figures)))

    monkeypatch.setattr(run, "meter", record)
    evaluate.main(flags(attack="fgsm+pgd", epsilon="0.25,1", batch_size=24))
    dones = [done for done, _, _ in seen]
    assert dones == sorted(dones) and dones[0] == 0
    assert all(done <= total for done, total, _ in seen) and seen[-1][0] == seen[-1][1]
    assert len(set(dones)) > 6
    assert all(figures.startswith("robust so far ") for _, _, figures in seen)
    assert {figures.rpartition("now ")[2] for _, _, figures in seen} >= {"fgsm", "pgd"}


def test_later_attacks_are_expected_to_run_on_the_images_that_resist():
    """Of 1,000 images, 100 are wrong. FGSM succeeds on a third of the first 300, so 600 are expected for PGD."""
    fallen = ("clean",) * 100 + ("fgsm",) * 100 + ("",) * 800
    state = CascadeState(run={"attacks": ["fgsm", "pgd"]}, felled_by=fallen, attack=1, images_done=300)
    done, ahead = robustness.passes_of(state, epsilons_left=2)
    fgsm, pgd = (ATTACKS[name].forward_passes for name in ("fgsm", "pgd"))
    assert done == 300 * fgsm
    assert ahead == 600 * fgsm + 600 * pgd + 2 * 600 * (fgsm + pgd)
    start = dataclasses.replace(state, felled_by=("",) * 1000, attack=0, images_done=0)
    assert robustness.passes_of(start) == (0, 1000 * (fgsm + pgd))
    finished = dataclasses.replace(state, felled_by=fallen[:200] + ("pgd",) * 800, attack=3, images_done=0)
    assert robustness.passes_of(finished, epsilons_left=1) == (900 * fgsm + 800 * pgd, 0)


@pytest.mark.slow
def test_xla_gives_the_same_verdicts_and_says_that_it_compiles(flags, capsys):
    settings = {"attack": "pgd", "epsilon": "0.25,1", "batch_size": 24}
    plain, compiled = (flags(name, jit_compile=name, **settings) for name in ("false", "true"))
    evaluate.main(plain)
    assert "XLA" not in capsys.readouterr().out
    evaluate.main(compiled)
    out = capsys.readouterr().out
    # Once for both radii and the partial batches.
    assert out.count("XLA compiles pgd for batches of 24 images.\n") == out.count("XLA has compiled pgd in ") == 1
    rows, rows_compiled = (results_of(each)["classifiers"][0]["attacks"] for each in (plain, compiled))
    assert rows_compiled == rows
    assert 0 < rows[1]["accuracy"] < rows[0]["accuracy"]


def test_an_evaluation_that_began_elsewhere_keeps_its_batch_size(flags, monkeypatch):
    """The default is larger on a GPU, but an evaluation that began on a CPU can be continued there, and vice versa."""
    arguments = flags("begun", epsilon="0.25", batch_size=24)
    evaluate.main(arguments)
    defaults = flags("begun", epsilon="0.25,0.5")
    evaluate.main(defaults)
    assert "--batch_size=24" in results_of(defaults)["flags"]
    config, _ = parse_flags(EvaluateConfig, flags("new"))
    small, large = (
        cast(run.Subject, types.SimpleNamespace(task=types.SimpleNamespace(image_size=size))) for size in (64, 65)
    )
    assert run.with_batch_size(config, [small]).batch_size == 128
    monkeypatch.setattr(run.tf.config, "list_logical_devices", lambda kind: ["a GPU"] if kind == "GPU" else [])
    assert run.with_batch_size(config, [small]).batch_size == 512
    assert run.with_batch_size(config, [small, large]).batch_size == 128
    begun, _ = parse_flags(EvaluateConfig, defaults)
    assert run.with_batch_size(begun, [small]).batch_size == 24


@pytest.mark.slow
def test_an_interrupted_evaluation_is_resumed(flags, tmp_path, monkeypatch, capsys):
    settings = {"attack": "fgsm+pgd", "epsilon": "0.25,1", "batch_size": 24, "corruptions": "true"}
    evaluate.main(flags("whole", **settings))
    keep = robustness.StateFile.keep
    for stop_after in (1, 5):
        left = [stop_after]

        def keep_and_stop(self, key, progress, left=left):
            keep(self, key, progress)
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

        monkeypatch.setattr(robustness.StateFile, "keep", keep_and_stop)
        with pytest.raises(SystemExit):
            evaluate.main(flags("parts", **settings))
        monkeypatch.undo()
        assert "Interrupted. The state is saved" in capsys.readouterr().out
    evaluate.main(flags("parts", **settings))
    whole, parts = ((tmp_path / name / "evaluation.json").read_text() for name in ("whole", "parts"))
    assert whole == parts


@pytest.mark.slow
def test_an_evaluation_that_was_killed_is_resumed_with_the_same_result(flags, tmp_path):
    settings = {"attack": "autoattack", "epsilon": "0.25,0.5", "batch_size": 8, "num_images": 32, "corruptions": "true"}
    evaluate.main(flags("whole", **settings))
    command = [sys.executable, "-m", "robust_tf.evaluate", *flags("killed", **settings)[1:]]
    state = tmp_path / "killed" / "state.json"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (state.exists() and '"attack": 2' in state.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "evaluation.json").exists()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    whole, killed = ((tmp_path / name / "evaluation.json").read_text() for name in ("whole", "killed"))
    assert whole == killed
    (entry,) = json.loads(whole)["classifiers"]
    assert entry["attacks"][1]["attack"] == "autoattack"
    assert not {path.name for path in (tmp_path / "killed").iterdir() if path.name.startswith(".")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classifier": "nowhere.keras"}, r"There is no classifier nowhere\.keras"),
        ({"classifier": "resnet20_fashion_mnist_l2_eps2"}, "Did you mean 'resnet20_fashion_mnist_l2_eps"),
        ({"epsilon": "0.5,x"}, r"--epsilon takes numbers or fractions.*Received: 0\.5,x"),
        ({"epsilon": "0.5,-1"}, r"0 or more.*Received: --epsilon=0\.5,-1"),
        ({"epsilon": "nan"}, "Received: --epsilon=nan"),
        ({"epsilon": "0.5,1/2"}, r"only once.*0\.5,0\.5"),
        ({"epsilon": "8", "norm": "linf"}, "Did you mean 8/255"),
        ({"epsilon": "8/0"}, "Received: 8/0"),
        ({"attack": "none,pgd"}, "none alone. Received: none,pgd"),
        ({"attack": "pgdd"}, "Received: 'pgdd'. Did you mean 'pgd'"),
        ({"attack": "pgd+apgd"}, "Received: 'apgd'"),
        ({"norm": "l3"}, "l3"),
        ({"norm": "linf"}, "another norm. Received: --norm=linf. Add --epsilon"),
        ({"num_images": "1000"}, r"Received: 1000; there are \d+"),
        ({"batch_size": "0"}, "--batch_size must be 1 or more. Received: 0"),
        ({"jit_compile": "maybe"}, "'maybe'"),
        ({"dataset": "digits"}, "with 5 logits for 10 classes"),
        ({"dataset": "digit"}, "Did you mean 'digits'"),
        ({"corruption_source": "tfd"}, "Did you mean 'tfds'"),
        ({"corruptions": "true", "corruption_source": "tfds"}, "Received: digits"),
    ],
)
def test_wrong_flags_are_refused_with_their_value(flags, changes, message):
    with pytest.raises(UserError, match=message):
        evaluate.main(flags(**changes))


def test_a_classifier_without_a_job_needs_its_data_and_threat_model(flags, tmp_path):
    path = tmp_path / "alone.keras"
    small_classifier(seed=0).save(path)
    with pytest.raises(UserError, match="no --dataset"):
        evaluate.main(flags(classifier=str(path)))
    with pytest.raises(UserError, match="Name both"):
        evaluate.main(flags(classifier=str(path), dataset="digits", classes="0,1,2,3,4"))
    evaluate.main(flags(classifier=str(path), dataset="digits", classes="0,1,2,3,4", attack="none"))


def test_nan_logits_are_an_error(flags, tmp_path):
    classifier = small_classifier(seed=0)
    classifier.set_weights([np.full_like(weight, np.nan) for weight in classifier.get_weights()])
    job = write_job(tmp_path / "nan", classifier)
    with pytest.raises(UserError, match="NaN or infinity for 60 of 60 images"):
        evaluate.main(flags(classifier=job.classifier))


def test_the_state_of_another_run_is_refused(flags, jobs, tmp_path):
    evaluate.main(flags(attack="fgsm"))
    before = (tmp_path / "evaluation" / "evaluation.json").read_text()
    for changes, message in (
        ({"seed": "1"}, "--seed: 0 -> 1"),
        ({"num_images": "50"}, r"--num_images: \[60\] -> \[50\]"),
        ({"classifier": "poor"}, "weights of --classifier"),
        ({"compare": jobs["poor"].classifier}, "weights of --compare: null ->"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.main(flags(**{"attack": "fgsm", **changes}))
    assert (tmp_path / "evaluation" / "evaluation.json").read_text() == before


def test_images_that_have_changed_are_refused(flags, monkeypatch):
    evaluate.main(flags())
    draw_images = run.draw_images

    def changed(*args, **kwargs):
        drawn = draw_images(*args, **kwargs)
        drawn.pixels[0, 0, 0] = 0.5
        return drawn

    monkeypatch.setattr(run, "draw_images", changed)
    with pytest.raises(UserError, match="images of --classifier: "):
        evaluate.main(flags())


def test_a_wrong_results_json_is_an_error(flags, tmp_path):
    job = write_job(tmp_path / "broken", small_classifier(seed=0))
    (job.folder / "results.json").write_text("[]")
    with pytest.raises(UserError, match=r"results\.json is not what a training job writes"):
        evaluate.main(flags(classifier=job.classifier))


def test_the_former_name_of_a_flag_still_works(capsys):
    config, _ = parse_flags(EvaluateConfig, ["evaluate", "--classifier=x.keras", "--output_dir=there"])
    assert config.output == "there"
    assert capsys.readouterr().err == "--output_dir is now called --output; the old name still works.\n"
    parse_flags(EvaluateConfig, ["evaluate", "--classifier=x.keras", "--output=there"])
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="now called --output. Received: both"):
        parse_flags(EvaluateConfig, ["evaluate", "--classifier=x.keras", "--output_dir=a", "--output=b"])


def changed_copy(job, folder: pathlib.Path, change):
    """Writes a job whose classifier is `change(classifier)`."""
    return write_job(folder, change(keras.saving.load_model(job.classifier)))


def test_large_logits_do_not_make_a_classifier_look_robust(flags, jobs, tmp_path):
    def make_sure(classifier):
        last = classifier.get_layer("logits")
        last.set_weights([1000 * weight for weight in last.get_weights()])
        return classifier

    sure = changed_copy(jobs["good"], tmp_path / "sure", make_sure)
    rows = []
    for name, classifier in (("one", "good"), ("other", sure.classifier)):
        arguments = flags(name, classifier=classifier, attack="pgd", epsilon="1.5")
        evaluate.main(arguments)
        rows += results_of(arguments)["classifiers"][0]["attacks"]
    assert rows[0]["title"] == "PGD-20 (any wrong iterate)"
    assert rows[1]["warnings"] == {}
    assert rows[1]["accuracy"] == pytest.approx(rows[0]["accuracy"], abs=0.07)


def test_a_classifier_without_gradients_is_flagged_in_results_and_output(flags, jobs, tmp_path, capsys):
    def rounded(classifier):
        images = keras.Input((8, 8, 3))
        return keras.Model(images, classifier(keras.ops.round(images * 8.0) / 8.0))

    opaque = changed_copy(jobs["good"], tmp_path / "opaque", rounded)
    arguments = flags(classifier=opaque.classifier, num_images=20)
    evaluate.main(arguments)
    row = results_of(arguments)["classifiers"][0]["attacks"][-1]
    assert set(row["warnings"]) == {"zero_gradients"}
    out = " ".join(capsys.readouterr().out.split())
    assert "(!)" in out and "The gradient is zero at" in out


def test_probabilities_have_the_calibration_error_of_their_logits(flags, jobs, tmp_path):
    def with_softmax(classifier):
        return keras.Model(classifier.input, keras.layers.Softmax()(classifier.output))

    softmax = changed_copy(jobs["good"], tmp_path / "softmax", with_softmax)
    errors = []
    for name, classifier in (("one", "good"), ("other", softmax.classifier)):
        arguments = flags(name, classifier=classifier, attack="none")
        evaluate.main(arguments)
        errors.append(results_of(arguments)["classifiers"][0]["calibration"]["expected_calibration_error"])
    assert errors[1] == pytest.approx(errors[0], abs=1e-4)


def test_a_classifier_of_reduced_images_is_measured_on_reduced_images(jobs, data_dir, tmp_path, flags, capsys):
    """The accuracy equals the one that a training job reports, because both reduce the test images."""
    job = write_job(tmp_path / "reduced", keras.saving.load_model(jobs["good"].classifier))
    (job.folder / "results.json").write_text(
        json.dumps({"dataset": "digits", "classes": [0, 1, 2, 3, 4], "downscale": 4})
    )
    task = make_task("digits", classes=(0, 1, 2, 3, 4), image_size=8, batch_size=32, downscale=4, data_dir=data_dir)
    images, labels = (np.concatenate(part) for part in zip(*task.test.as_numpy_iterator(), strict=True))
    expected = float(np.mean(np.argmax(load_classifier(job.folder / "classifier.keras")(images), axis=1) == labels))
    arguments = flags(classifier=job.classifier, attack="none", num_images=0)
    evaluate.main(arguments)
    (entry,) = results_of(arguments)["classifiers"]
    whole = flags("whole", classifier="good", attack="none", num_images=0)
    evaluate.main(whole)
    assert entry["clean"]["accuracy"] == pytest.approx(expected)
    assert entry["clean"]["accuracy"] < results_of(whole)["classifiers"][0]["clean"]["accuracy"]


def test_probabilities_as_outputs_give_a_warning(flags, tmp_path, capsys):
    images = keras.Input((8, 8, 3))
    x = keras.layers.Dense(5, activation="softmax")(keras.layers.Flatten()(images))
    job = write_job(tmp_path / "probabilities", keras.Model(images, keras.layers.Reshape((5,))(x)))
    evaluate.main(flags(classifier=job.classifier, attack="none"))
    assert "its outputs look like probabilities" in " ".join(capsys.readouterr().out.split())


def test_a_first_layer_for_pixels_up_to_255_gives_a_warning(flags, tmp_path, capsys):
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.Rescaling(1 / 255), keras.layers.Flatten(), keras.layers.Dense(5)]
    )
    job = write_job(tmp_path / "rescaled", model)
    evaluate.main(flags(classifier=job.classifier, attack="none"))
    assert "The layer 'rescaling' after the input" in " ".join(capsys.readouterr().out.split())
