"""Draws of the labeled images: which jobs they are, what the comparison over them says, and what is refused."""

import json
import pathlib

import keras
import numpy as np
import pytest

from robust_tf import train
from robust_tf.config.job import JobConfig
from robust_tf.errors import UserError
from robust_tf.evaluation.outcomes import Outcomes, compare_draws, compare_outcomes
from robust_tf.job import sources
from robust_tf.job.draws import draw_jobs
from robust_tf.models import build_classifier
from robust_tf.results import DRAWS_NOTE, JobResults

FLAGS = {
    "task": "transfer",
    "classes": (0, 1, 2),
    "examples_per_class": 10,
    "features": "cached",
    "head": "lbfgs",
    "augmentation": "none",
    "epsilon": 0.0,
    "eval_epsilon": 0.1,
    "eval_steps": 2,
}


@pytest.fixture
def job(tmp_path, data_dir, monkeypatch):
    """Returns a function that makes transfer jobs from one of two untrained sources, each the other's counterpart."""
    paths = [tmp_path / f"{name}.keras" for name in ("robust", "standard")]
    for seed, path in enumerate(paths):
        keras.utils.set_random_seed(seed)
        build_classifier("resnet8", 10, image_size=8, mean=(0.3,) * 3, std=(0.4,) * 3).save(path)
    monkeypatch.setattr(sources.sources, "published_twin", lambda source: str(paths[1]))

    def make(name: str, **changes) -> JobConfig:
        folders = {"data_dir": str(data_dir), "cache_dir": str(tmp_path / "cache")}
        return JobConfig.from_flags(
            workdir=str(tmp_path / name), source=str(paths[0]), **folders, **{**FLAGS, **changes}
        )

    return make


def results_of(workdir: str | pathlib.Path) -> dict:
    return json.loads((pathlib.Path(workdir) / "results.json").read_text())


def outcomes(seed: int, share: float, ids: int = 0, *, attacked: bool = True) -> Outcomes:
    """Returns predictions for 60 images of three classes, the given share of which are right."""
    rng = np.random.default_rng(seed)
    labels = np.arange(60) % 3
    predictions = np.where(rng.random(60) < share, labels, (labels + 1) % 3)
    return Outcomes(np.arange(60) + ids, labels, predictions, predictions if attacked else None)


def test_draws_are_jobs_with_the_seeds_that_follow(job):
    draws = draw_jobs(job("w", seed=7, draws=3, export_dir="exports", baseline=True, claims=("clean_accuracy",)))
    assert [draw.run.seed for draw in draws] == [8, 9]
    assert {pathlib.Path(draw.run.workdir).parent.name for draw in draws} == {"draws"}
    for draw in draws:
        assert (draw.run.outputs, draw.transfer.draws, draw.run.export_dir, draw.transfer.baseline) == (
            "results",
            1,
            "",
            False,
        )
    assert draw_jobs(job("w")) == []


def test_a_draw_of_a_flag_file_takes_the_source_beside_the_workdir_of_the_job(tmp_path, job):
    (tmp_path / "source.cfg").write_text("--dataset=digits\n--architecture=resnet8\n")
    (draw,) = draw_jobs(job("w", draws=2).with_flags(source=str(tmp_path / "source.cfg")))
    assert draw.transfer.source == str(tmp_path / "source" / "classifier.keras")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draws": 0}, "--draws must be 1 or more. Received: 0"),
        ({"examples_per_class": None, "draws": 4}, "needs --examples_per_class. Received: --draws=4"),
        ({"features": "live", "head": "sgd", "draws": 2}, "--draws is for --features=cached. Received: --draws=2"),
        ({"seed": 2**32 - 2, "draws": 3}, r"below 2\*\*32. Received: --seed=4294967294 --draws=3"),
        ({"claims": ("clean_accuracy",)}, "--claims is for --baseline. Received: --claims=clean_accuracy"),
        ({"baseline": True, "claims": ("clean",)}, "'clean'"),
        (
            {"baseline": True, "claims": ("robust_accuracy",), "eval_epsilon": 0.0},
            "--claims=robust_accuracy needs an attack in the test. Received: --eval_epsilon=0",
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused(job, changes, message):
    with pytest.raises(UserError, match=message):
        job("w", **changes)


def test_the_comparison_is_the_mean_over_the_draws():
    ours, theirs = [outcomes(seed, 0.9) for seed in range(4)], [outcomes(seed + 9, 0.6) for seed in range(4)]
    compared = compare_draws(ours, theirs, metric="mean_per_class_accuracy")
    single = [compare_outcomes(*pair, metric="mean_per_class_accuracy") for pair in zip(ours, theirs, strict=True)]
    for name in ("clean_accuracy", "robust_accuracy", "mean_per_class_accuracy"):
        found = getattr(compared, name)
        assert found.difference == pytest.approx(np.mean([getattr(each, name).difference for each in single]))
        assert found.interval.low < found.difference < found.interval.high
        assert (found.draws, found.claimed) == (4, False)
    assert compared.with_claims(["robust_accuracy"]).robust_accuracy.claimed
    assert not compared.with_claims(["robust_accuracy"]).clean_accuracy.claimed


def test_draws_that_cannot_be_paired_are_not_compared():
    ours, theirs = [outcomes(seed, 0.9) for seed in range(2)], [outcomes(seed, 0.6) for seed in range(2)]
    assert compare_draws([ours[0], None], theirs, metric="accuracy") is None
    assert compare_draws([ours[0], outcomes(1, 0.9, ids=1)], theirs, metric="accuracy") is None
    clean = [outcomes(seed, 0.9, attacked=False) for seed in range(2)]
    assert compare_draws(clean, theirs, metric="accuracy").robust_accuracy is None


@pytest.mark.slow
def test_a_claim_holds_for_a_single_draw_too(job, tmp_path):
    train.run(job("w", baseline=True, claims=("robust_accuracy",), eval_steps=1))
    comparison = results_of(tmp_path / "w")["comparison"]
    assert {name: comparison[name]["claimed"] for name in ("clean_accuracy", "robust_accuracy")} == {
        "clean_accuracy": False,
        "robust_accuracy": True,
    }
    assert comparison["clean_accuracy"]["draws"] == 1 and results_of(tmp_path / "w")["draw_means"] is None


@pytest.mark.slow
def test_draws_are_the_jobs_of_their_seeds_and_are_reported(job, tmp_path, capsys):
    train.run(job("w", draws=3, baseline=True, claims=("robust_accuracy",)))
    printed = capsys.readouterr().out
    results = results_of(tmp_path / "w")
    for side, source in (("", "robust"), ("baseline", "standard")):
        alone = []
        for seed in range(3):  # without anything shared, in any order
            config = job(f"{source}{seed}", seed=seed).with_flags(source=str(tmp_path / f"{source}.keras"))
            train.run(config)
            alone.append(results_of(config.run.workdir))
            folder = tmp_path / "w" / side / (f"draws/seed{seed}" if seed else "")
            for name in ("clean_accuracy", "robust_accuracy", "weights_sha256"):
                assert results_of(folder)[name] == alone[-1][name]
        means = (results["baseline"] if side else results)["draw_means"]
        assert means["draws"] == 3
        for name in ("clean_accuracy", "robust_accuracy"):
            assert means[name] == pytest.approx(np.mean([each[name] for each in alone]))
    for name in ("clean_accuracy", "robust_accuracy"):
        compared = results["comparison"][name]
        difference = results["draw_means"][name] - results["baseline"]["draw_means"][name]
        assert compared["difference"] == pytest.approx(difference)
        assert compared["interval"][0] <= compared["difference"] <= compared["interval"][1]
        assert compared["claimed"] == (name == "robust_accuracy")
    for text in (
        printed.replace("\n", " "),
        *((tmp_path / "w" / name).read_text() for name in ("README.md", "report.html")),
    ):
        assert "mean of 3 draws" in text and DRAWS_NOTE in text
    before = (tmp_path / "w" / "results.json").stat().st_mtime_ns
    train.run(job("w", draws=3, baseline=True, claims=("robust_accuracy",)))  # finished already
    assert (tmp_path / "w" / "results.json").stat().st_mtime_ns == before
    train.run(job("w", draws=4, baseline=True))  # one more
    assert results_of(tmp_path / "w")["draw_means"]["draws"] == 4


@pytest.mark.slow
def test_draws_without_a_baseline_give_means(job, tmp_path):
    train.run(job("w", draws=2, eval_epsilon=0.0))
    results = JobResults.read(tmp_path / "w" / "results.json")
    draw = results_of(tmp_path / "w" / "draws" / "seed1")
    assert results.draw_means.clean_accuracy == pytest.approx((results.clean_accuracy + draw["clean_accuracy"]) / 2)
    assert results.draw_means.robust_accuracy is None and results.comparison is None
    assert "mean of 2 draws" in (tmp_path / "w" / "README.md").read_text()
