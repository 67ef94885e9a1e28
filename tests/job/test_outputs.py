"""Jobs that keep their results only, and jobs of one process that share objects, compute what other jobs compute."""

import collections
import json
import pathlib

import keras
import pytest

from robust_tf import train
from robust_tf.config.job import JobConfig
from robust_tf.errors import UserError
from robust_tf.job import sources
from robust_tf.models import build_classifier
from robust_tf.sharing import is_sharing, shared, sharing

SAME = ("clean_accuracy", "clean_accuracy_interval", "validation_value", "head_penalty", "weights_sha256", "seed")


@pytest.fixture
def job(tmp_path, data_dir):
    """Returns a function that makes transfer jobs from one of two untrained sources to three digits."""
    for seed, name in enumerate(("one", "other")):
        keras.utils.set_random_seed(seed)
        model = build_classifier("resnet8", 10, image_size=8, mean=(0.3,) * 3, std=(0.4,) * 3)
        model.save(tmp_path / f"{name}.keras")

    def make(name: str, source: str = "one", **changes) -> JobConfig:
        settings = {
            "task": "transfer",
            "source": source if source.endswith(".cfg") else str(tmp_path / f"{source}.keras"),
            "classes": (0, 1, 2),
            "examples_per_class": 10,
            "features": "cached",
            "head": "lbfgs",
            "augmentation": "none",
            "epsilon": 0.0,
            "outputs": "results",
            "cache_dir": str(tmp_path / "cache"),
        }
        return JobConfig.from_flags(workdir=str(tmp_path / name), data_dir=str(data_dir), **{**settings, **changes})

    return make


def run(config: JobConfig) -> tuple[dict, str]:
    """Returns the results that a job must repeat, and its predictions.csv."""
    train.run(config)
    workdir = pathlib.Path(config.run.workdir)
    results = json.loads((workdir / "results.json").read_text())
    return {name: results[name] for name in SAME}, (workdir / "predictions.csv").read_text()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"head": "sgd", "epochs": 2, "hidden_layers": 1}, marks=pytest.mark.slow),
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"eval_epsilon": 0.1}, marks=pytest.mark.slow),
    ],
)
def test_a_job_that_keeps_its_results_only_has_the_results_of_one_that_keeps_all(job, changes):
    few, all_files = job("few", **changes), job("all", outputs="all", **changes)
    assert run(few) == run(all_files)
    kept = {path.name for path in pathlib.Path(few.run.workdir).iterdir()}
    assert kept == {"results.json", "predictions.csv", "flags.cfg"} | (
        {"history.csv"} if "epochs" in changes else set()
    )


@pytest.mark.slow
def test_a_trained_network_leaves_its_results_only(job):
    live = {"features": "live", "head": "sgd", "transfer_mode": "full_network", "epochs": 2, "learning_rate": 0.01}
    few, all_files = job("few", **live), job("all", outputs="all", **live)
    assert run(few) == run(all_files)
    kept = {path.name for path in pathlib.Path(few.run.workdir).iterdir()}
    assert kept == {"results.json", "predictions.csv", "flags.cfg", "history.csv"}


@pytest.mark.slow
def test_jobs_that_share_objects_compute_what_single_jobs_compute(job, monkeypatch):
    kinds = [("one", 0), ("one", 1), ("other", 0), ("one", 0)]
    alone = [run(job(f"alone{n}", source, seed=seed)) for n, (source, seed) in enumerate(kinds)]
    loaded = []
    original = sources.sources.load_source
    monkeypatch.setattr(sources.sources, "load_source", lambda *a, **k: loaded.append(a) or original(*a, **k))
    with sharing():
        together = [run(job(f"shared{n}", source, seed=seed)) for n, (source, seed) in enumerate(kinds)]
    assert together == alone
    assert alone[0] != alone[1] != alone[2]
    assert len(loaded) == 2


@pytest.mark.slow
def test_a_source_that_was_replaced_is_loaded_again(job, tmp_path):
    with sharing():
        first = run(job("first"))
        (tmp_path / "one.keras").write_bytes((tmp_path / "other.keras").read_bytes())
        assert run(job("second")) != first
        assert run(job("third", "other")) == run(job("fourth"))


def test_a_source_that_would_not_keep_its_classifier_is_refused_before_it_is_trained(job, tmp_path):
    flags = tmp_path / "source.cfg"
    flags.write_text("--dataset=digits\n--architecture=resnet8\n--epochs=1\n--outputs=results\n")
    with pytest.raises(UserError, match=r"Received: --outputs=results in .*source\.cfg"):
        train.run(job("transfer", source=str(flags)))
    assert not (tmp_path / "source").exists()
    assert not (tmp_path / "transfer" / "flags.cfg").exists()


@pytest.mark.slow
def test_a_baseline_is_compared_without_a_report(job, tmp_path):
    flags = tmp_path / "source.cfg"
    flags.write_text(
        "--dataset=digits\n--classes=3,4\n--architecture=resnet8\n--image_size=8\n--epochs=1\n--subset=100\n"
        "--norm=l2\n--epsilon=0.5\n--attack_steps=1\n"
    )
    compared = job("compared", source=str(flags), baseline=True)
    train.run(compared)
    workdir = pathlib.Path(compared.run.workdir)
    assert json.loads((workdir / "results.json").read_text())["baseline"] is not None
    assert {path.name for path in workdir.iterdir()} == {"results.json", "predictions.csv", "flags.cfg", "baseline"}
    assert {path.name for path in (workdir / "baseline").iterdir()} == {"results.json", "predictions.csv", "flags.cfg"}
    assert (tmp_path / "source" / "classifier.keras").exists()


def test_contexts_may_keep_their_objects_for_later_ones():
    objects: collections.OrderedDict = collections.OrderedDict()
    made: list[str] = []
    for _ in range(2):
        with sharing(objects=objects):
            shared(("a",), lambda: made.append("a"))
        assert not is_sharing()
    assert made == ["a"]


def test_shared_objects_are_dropped_after_a_while_and_with_the_context():
    made: list[str] = []

    def make(name: str) -> str:
        made.append(name)
        return name

    with sharing(most=2):
        for name in ("a", "b", "a", "c", "a", "b"):
            assert shared((name,), lambda name=name: make(name)) == name
        assert made == ["a", "b", "c", "b"]  # "b" was the least recently used when "c" came
    shared(("a",), lambda: make("a"))
    assert made[-1] == "a" and len(made) == 5


def test_a_kind_of_object_may_have_a_limit_of_its_own():
    made: list[str] = []
    with sharing():
        shared(("other",), lambda: made.append("other"))
        for name in ("a", "b", "a", "c", "a", "b"):
            shared(("kind", name), lambda name=name: made.append(name), most=2)
        shared(("other",), lambda: made.append("other"))
    assert made == ["other", "a", "b", "c", "b"]


def test_results_alone_cannot_be_exported_or_completed_later(job):
    with pytest.raises(UserError, match=r"Received: --outputs=results --export_dir=exports\."):
        job("few", export_dir="exports")
    with pytest.raises(UserError, match=r"Received: --outputs=results --profile_steps=1,2\."):
        job("few", profile_steps=(1, 2))
    run(job("few"))
    with pytest.raises(UserError, match="only its results were kept"):
        train.run(job("few", outputs="all"))
    train.run(job("few"))  # finished already
