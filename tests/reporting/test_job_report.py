"""The report of a finished job says what results.json says, and loads nothing from elsewhere."""

import html.parser
import json
import pathlib
import re
import shlex

import numpy as np
import pytest
import yaml
from made_up_jobs import CLASS_NAMES, HISTORY, outcomes, results_of, write_job
from PIL import Image

from robust_tf.errors import UserError
from robust_tf.evaluation.outcomes import compare_outcomes
from robust_tf.reporting import write_history, write_report
from robust_tf.reporting.facts import changed_flags, commands
from robust_tf.reporting.job_files import read_finished_job
from robust_tf.results import JobResults

_VOID = {"meta", "link", "img", "br"}


class Page(html.parser.HTMLParser):
    """Parses a page into its elements with their attributes, and its text. Unclosed elements are an error."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text, self._open = "", []
        self.feed(path.read_text())
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    """A job with a baseline and everything else, in a folder whose name a shell would split."""
    folder = tmp_path_factory.mktemp("report") / "my run #1"
    theirs = outcomes(1, share=0.4)
    compared = compare_outcomes(outcomes(0), theirs, metric="accuracy")
    write_job(folder, baseline=results_of(theirs), comparison=compared)
    write_report(folder)
    return folder


def test_the_figures_of_the_page_are_those_of_the_results(workdir):
    results = json.loads((workdir / "results.json").read_text())
    page = Page(workdir / "report.html")
    shown = {each["id"]: float(each["value"]) for each in page.all("data")}
    assert shown == {name: results[name] for name in ("clean_accuracy", "robust_accuracy", "num_test_images")}
    for name in ("clean_accuracy", "robust_accuracy"):
        low, high = results[f"{name}_interval"]
        assert f"{results[name]:.1%}95 % interval {low:.1%} to {high:.1%}" in page.text
    assert "accuracy under PGD-20 (highest-loss iterate), l2 0.5" in page.text
    lines = JobResults.read(workdir / "results.json").comparison_in_words()
    assert len(lines) == 2
    for line in lines:
        assert line in page.text and " points (95 % " in line
    for text in (*CLASS_NAMES, *results["alarms"], *results["skipped_images"], "keras3.15.0", "--epsilon0.50.0"):
        assert text in page.text, text
    assert "--learning_rate" not in page.text  # has its default


def test_the_page_loads_nothing_from_elsewhere_and_every_picture_has_a_text(workdir):
    page = Page(workdir / "report.html")
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "data", "action", "style"):
            value = attributes.get(name) or ""
            assert "//" not in value or value.startswith("data:"), (tag, name, value)
        assert tag not in ("script", "iframe", "object", "embed"), tag
    assert "@import" not in page.text and "url(http" not in (workdir / "report.html").read_text()
    pictures = [*page.all("img"), *page.all("svg")]
    assert len(page.all("img")) == 3 and len(page.all("svg")) == 3
    for each in pictures:
        assert len(each.get("alt") or each.get("aria-label") or "") > 20
    identifiers = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(identifiers) == len(set(identifiers))


def test_the_pictures_are_saved_beside_the_page(workdir):
    for name in ("curves", "confusion", "classes"):
        with Image.open(workdir / "figures" / f"{name}.png") as picture:
            assert min(picture.size) > 200
    strips = sorted((workdir / "figures" / "examples").glob("*.png"))
    assert [strip.stem for strip in strips] == ["01_resists", "02_falls", "03_wrong"]
    with Image.open(strips[0]) as picture:  # the image, the adversarial one and the perturbation, 12 times as large
        assert picture.size == (3 * 96 + 2 * 4, 96)


def test_a_report_that_is_made_again_is_the_same(workdir):
    before = {name: (workdir / name).read_bytes() for name in ("report.html", "README.md", "figures/curves.png")}
    write_report(workdir)
    assert {name: (workdir / name).read_bytes() for name in before} == before


def test_commands_are_quoted_and_only_changed_flags_are_listed(workdir):
    job = read_finished_job(workdir)
    for _, command in commands(job, workdir=workdir):
        words = shlex.split(command)
        assert words[0] in ("python", "tensorboard") and "#1" not in words
    assert f"--classifier={workdir / 'classifier.keras'}" in shlex.split(
        dict(commands(job, workdir=workdir))["Export it for serving"]
    )
    changed = {name: (value, default) for name, value, default in changed_flags(job.config)}
    assert changed.pop("--workdir") == (str(workdir), "none")
    assert changed == {
        "--dataset": ("folder:/pictures", "digits"),
        "--epsilon": ("0.5", "0.0"),
        "--batch_size": ("32", "128"),
    }


def test_the_model_card_has_front_matter_and_the_same_figures(workdir):
    results = json.loads((workdir / "results.json").read_text())
    text = (workdir / "README.md").read_text()
    _, front, body = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)
    fields = yaml.safe_load(front)
    assert (fields["library_name"], fields["pipeline_tag"]) == ("keras", "image-classification")
    (entry,) = fields["model-index"]
    values = {metric["name"]: metric["value"] for metric in entry["results"][0]["metrics"]}
    assert values["clean accuracy"] == results["clean_accuracy"]
    assert values["accuracy under PGD-20 (highest-loss iterate), l2 0.5"] == results["robust_accuracy"]
    low, high = results["robust_accuracy_interval"]
    assert f"{results['robust_accuracy']:.1%} ({low:.1%} to {high:.1%})" in body
    for heading in ("Results", "Data", "Intended use", "Limitations", "How to use it", "Versions"):
        assert f"\n## {heading}\n" in body
    assert str(workdir) not in text  # it can be handed on as it is
    assert "<b>" not in body


def test_the_report_of_a_job_without_epochs_attack_or_pictures_leaves_them_out(tmp_path):
    write_job(tmp_path / "job", attacked=False, history=False, examples=False, best_epoch=0, alarms=())
    write_report(tmp_path / "job")
    page = Page(tmp_path / "job" / "report.html")
    assert not (tmp_path / "job" / "figures" / "curves.png").exists()
    assert len(page.all("svg")) == 2 and not page.all("img")
    assert [each["id"] for each in page.all("data")] == ["clean_accuracy", "num_test_images"]
    assert "under attack" not in page.text and "Warnings" not in page.text
    assert "No attack was run" in page.text


def test_a_schedule_that_ends_the_only_epoch_at_0_is_drawn(tmp_path):
    write_job(tmp_path / "job")
    write_history(tmp_path / "job", [{**HISTORY[0], "learning_rate": 0.0}])
    write_report(tmp_path / "job")
    assert (tmp_path / "job" / "figures" / "curves.png").exists()


def test_an_example_without_an_attack_is_one_picture(tmp_path):
    write_job(tmp_path / "job", attacked=False)
    (strip,) = (tmp_path / "job" / "figures" / "examples").glob("*.png")
    with Image.open(strip) as picture:
        assert picture.size == (96, 96)


def test_the_history_is_read_as_it_was_written(workdir):
    assert [dict(logs) for logs in read_finished_job(workdir).history] == HISTORY


def test_a_job_of_an_older_version_gets_no_report(tmp_path):
    write_job(tmp_path / "job")
    (tmp_path / "job" / "predictions.csv").unlink()
    write_report(tmp_path / "job")
    assert not (tmp_path / "job" / "report.html").exists()


def test_results_without_the_figures_of_a_finished_job_are_refused(tmp_path):
    write_job(tmp_path / "job", num_test_images=None, seed=None)
    with pytest.raises(UserError, match=r"Received: .*results\.json without num_test_images, seed\. "):
        write_report(tmp_path / "job")


def test_the_mean_per_class_is_shown_where_it_is_the_metric(tmp_path):
    results = write_job(tmp_path / "job", metric="mean_per_class_accuracy")
    write_report(tmp_path / "job")
    shown = {each["id"]: float(each["value"]) for each in Page(tmp_path / "job" / "report.html").all("data")}
    assert shown["mean_per_class_accuracy"] == results.mean_per_class_accuracy
    assert f"{results.mean_per_class_accuracy:.1%} |" in (tmp_path / "job" / "README.md").read_text()


def test_many_classes_are_drawn_in_a_figure_of_bounded_size(tmp_path):
    names = tuple(f"class number {number}" for number in range(200))
    write_job(tmp_path / "job", class_names=names)
    made = outcomes(0)
    rng = np.random.default_rng(0)
    labels = rng.integers(200, size=200)
    type(made)(made.ids, labels, labels, (labels + 1) % 200).write(tmp_path / "job")
    write_report(tmp_path / "job")
    for name in ("confusion", "classes"):
        with Image.open(tmp_path / "job" / "figures" / f"{name}.png") as picture:
            assert max(picture.size) < 2_000
    page = Page(tmp_path / "job" / "report.html")
    assert f"{len(set(labels))} classes" in page.text and "open" not in page.all("details")[0]


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_page_without_complaints(workdir, browser, width):
    browser.get((workdir / "report.html").as_uri())
    size = {"width": width, "height": 1400, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert browser.execute_script("return innerWidth") == width
    assert browser.title == "resnet8 on folder:/pictures"
    overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.execute_script(overflow) <= 0
    broken = "return [...document.images].filter(image => !image.naturalWidth).length"
    assert browser.execute_script(broken) == 0
    assert browser.get_log("browser") == []
