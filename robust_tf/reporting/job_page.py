"""The page report.html: one file without scripts that needs no network, for screens, phones, paper and dark mode."""

import base64
from collections.abc import Sequence
from html import escape
from typing import Any

from robust_tf.reporting.facts import BASELINE_NOTE, changed_flags, commands, limitations_of, title_of, training_of
from robust_tf.reporting.job_figures import class_accuracies
from robust_tf.reporting.job_files import ExamplePicture, FinishedJob
from robust_tf.reporting.page import bullets, page, table
from robust_tf.results import JobResults
from robust_tf.statistics import Interval, wilson_interval

_OPEN_CLASSES = 12  # with more classes, the table is collapsed and the confusion matrix is wide
# Text between the ends of an interval. Its spaces do not break, so the interval stays on one line in a narrow cell.
_TO = "\u00a0to\u00a0"
_KINDS = {
    "resists": "Classified correctly, even under the attack",
    "falls": "Classified correctly, but not under the attack",
    "wrong": "Misclassified even without an attack",
}
_KINDS_WITHOUT_ATTACK = {"resists": "Classified correctly", "wrong": "Misclassified"}


def job_page(job: FinishedJob, figures: dict[str, tuple[str, str]]) -> str:
    """Returns the page as HTML.

    Args:
        job: The finished job.
        figures: SVG element of each plot by its name, with a text for readers who cannot see it.
    """
    results = job.results
    sections = [
        ("Accuracy on the test images", _tiles(job)),
        ("Comparison with the standard source", _comparison(results)),
        ("Warnings", bullets(results.alarms, "alarm")),
        ("Training, mistakes and classes", _figures(figures, len(results.class_names))),
        ("Examples of test images", _examples(job)),
        ("Accuracy of each class", _classes(job)),
        ("Data", _data(results)),
        ("Limitations", bullets(limitations_of(job))),
        ("Flags that differ from their defaults", table(("flag", "value", "default"), changed_flags(job.config))),
        ("Training run", table((), _training_facts(results))),
        ("Next steps", _commands(job)),
        ("Versions", table((), results.versions.items())),
    ]
    return page(title_of(job), f'<p class="soft">{escape(training_of(job))}</p>', sections)


def _tiles(job: FinishedJob) -> str:
    results = job.results
    tiles = [
        f'<div class="tile">{escape(figure.title)}'
        f'<data id="{figure.name}" value="{figure.value}">{_percent(figure.value)}</data>'
        f'<span class="soft">{_interval(figure.interval)}</span></div>'
        for figure in results.figures()
    ]
    tiles.append(
        f'<div class="tile">test images<data id="num_test_images" value="{results.num_test_images}">'
        f'{results.num_test_images:,}</data><span class="soft">in {len(results.class_names)} classes, used only '
        "once, after the training</span></div>"
    )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _comparison(results: JobResults) -> str:
    if results.baseline is None:
        return ""
    figures = results.figures()
    rows = [[title, *(cell.replace(" to ", _TO) for cell in cells)] for title, cells in results.rows(alone="")]
    head = ["", *(figure.short_title for figure in figures)]
    note = f'<p class="soft">{BASELINE_NOTE}</p>'
    return note + table(head, rows, numbers=True) + bullets(results.comparison_in_words())


def _figures(figures: dict[str, tuple[str, str]], num_classes: int) -> str:
    parts = []
    for name, (svg, text) in figures.items():
        labelled = svg.replace("<svg", f'<svg role="img" aria-label="{escape(text)}"', 1)
        wide = ' class="wide"' if name == "confusion" and num_classes > _OPEN_CLASSES else ""
        parts.append(f'<figure id="{name}"{wide}>{labelled}<figcaption>{escape(text)}</figcaption></figure>')
    return f'<div class="figures">{"".join(parts)}</div>'


def _examples(job: FinishedJob) -> str:
    if not job.examples:
        return ""
    names = job.results.class_names
    parts = []
    if attack := job.results.robust_accuracy_attack:
        parts.append(
            f'<p class="soft">Each row shows an image, the same image under {escape(attack.in_words)}, and the '
            "perturbation, magnified around gray. The examples were chosen to show many classes and many kinds of "
            "mistakes, not to show how frequent each kind is.</p>"
        )
    for kind, title in _KINDS.items():
        chosen = [each for each in job.examples if each.kind == kind]
        if chosen:
            title = title if job.attacked else _KINDS_WITHOUT_ATTACK.get(kind, title)
            pictures = "".join(_example(each, names, attacked=job.attacked) for each in chosen)
            parts.append(f'<h3>{title}</h3><div class="examples">{pictures}</div>')
    return "".join(parts)


def _example(each: ExamplePicture, names: Sequence[str], *, attacked: bool) -> str:
    text = f"{names[each.label]}: predicted {names[each.prediction]}"
    if attacked:
        text += f", under attack {names[each.prediction_adv]}"
    if each.factor:
        text += f"; perturbation x {each.factor:g}"
    picture = base64.b64encode(each.path.read_bytes()).decode("ascii")
    return (
        f'<figure><img alt="Test image, {escape(text)}" src="data:image/png;base64,{picture}">'
        f"<figcaption>{escape(text)}</figcaption></figure>"
    )


def _classes(job: FinishedJob) -> str:
    head = ["class", "test images", "clean accuracy", *(["under attack"] if job.attacked else [])]
    rows = []
    for name, right, robust, total in class_accuracies(job):
        shares = [(right, total), (robust, total)][: 2 if job.attacked else 1]
        rows.append(
            [name, total, *(f"{_percent(hits / of)} {_within(wilson_interval(hits, of))}" for hits, of in shares)]
        )
    opened = " open" if len(rows) <= _OPEN_CLASSES else ""
    return f"<details{opened}><summary>{len(rows)} classes</summary>{table(head, rows, numbers=True)}</details>"


def _data(results: JobResults) -> str:
    rows = [
        ("data set", results.dataset),
        ("training images", f"{results.num_train_images:,}"),
        ("validation images", f"{results.num_validation_images:,}"),
        ("test images", f"{results.num_test_images:,}"),
        ("image size", f"{results.image_size} x {results.image_size}"),
    ]
    skipped = results.skipped_images
    left_out = (
        f"<p>Images that were left out because they cannot be decoded: {len(skipped)}</p>{bullets(skipped)}"
        if skipped
        else ""
    )
    return table((), rows) + left_out


def _training_facts(results: JobResults) -> list[tuple[str, Any]]:
    trained = results.best_epoch > 0
    facts: list[tuple[str, Any]] = [
        ("parameters", f"{results.total_parameters:,}, of which {results.trainable_parameters:,} were trained"),
        ("epochs", f"{results.epochs}; epoch {results.best_epoch} was kept" if trained else "none"),
        ("validation figure of the kept epoch", _percent(results.validation_value)),
        ("time for training", f"{results.seconds:,} s"),
        ("seed", results.seed),
    ]
    if results.images_per_second:
        facts.append(("training images per second", results.images_per_second))
    return facts


def _commands(job: FinishedJob) -> str:
    return "".join(
        f"{escape(what)}<pre>{escape(command)}</pre>" for what, command in commands(job, workdir=job.workdir)
    )


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{share:.1%}"


def _interval(interval: Interval | None) -> str:
    return f"95 % interval {interval.in_words}" if interval else ""


def _within(interval: Interval) -> str:
    return f"({interval.in_words.replace(' to ', _TO)})"
