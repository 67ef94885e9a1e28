"""The report of a study: its first sentence, its tables, failures and gaps, and how it looks in a browser."""

import dataclasses

import pytest
from made_up_study import cell, study

from robust_tf.errors import UserError
from robust_tf.studies.analysis import analyze
from robust_tf.studies.records import write_cells
from robust_tf.studies.report import failures, first_sentence, gaps, write_report

SMALL = {"epsilons": (0, 2.0), "seeds": range(4), "draws": range(3)}


def text(groups):
    return first_sentence(groups).replace("\u00a0", " ")


def shifted(*shifts):
    """Returns cells whose difference between epsilon 0 and 2 is known, one source seed for each shift."""
    cells = [cell(0.0, seed, 0, 0.7) for seed in range(len(shifts))]
    return cells + [cell(2.0, seed, 0, 0.7 + shift) for seed, shift in enumerate(shifts)]


def test_the_first_sentence_says_what_is_better_with_its_interval():
    found = text(analyze(shifted(0.04, 0.05, 0.06, 0.05)))
    assert found.startswith("With fixed features, robust sources (L2 epsilon 2) transfer better than standard ones")
    assert "5.0 points higher (95 % interval +3.7 to +6.3, over 4 source seeds and 1 draw of the labels" in found
    assert "transfer worse than standard ones: the accuracy is 5.0 points lower" in text(
        analyze(shifted(-0.04, -0.05, -0.06, -0.05))
    )


def test_the_first_sentence_never_says_more_than_the_runs_decide():
    found = text(analyze(shifted(0.05, -0.02, 0.03, 0.02)))
    assert "does not decide whether" in found and "+2.0 points (95 % interval -2.7 to +6.7" in found
    assert "source seeds would probably decide it" in found
    assert "a single run cannot tell" in text(analyze(shifted(0.05)))
    assert text(analyze(shifted(0.05)[:1])).startswith("This study has no pair")
    assert "even 1000 source seeds" in text(analyze(shifted(0.05, -0.05, 0.0)))


def test_it_says_that_draws_alone_do_not_cover_other_sources():
    groups = analyze(study(epsilons=(0, 2.0), seeds=(None,), draws=range(4)))
    assert "it says nothing about other sources" in text(groups)


def test_the_report_holds_the_answer_the_tables_and_the_figures(tmp_path):
    cells = study(**SMALL, examples_per_class=(5, 20))
    write_cells(tmp_path / "cells.csv", cells)
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert first_sentence(analyze(cells)).split(":")[0] in page
    assert "://" not in page.replace("http://www.w3.org", "")  # needs no network
    for name in ("accuracy_against_epsilon", "accuracy_against_labels_per_class"):
        assert f'<figure id="{name}">' in page and (tmp_path / "figures" / f"{name}.png").is_file()
    assert "2.21.0" in page and "Failures" not in page and "Missing runs" not in page
    written = {"cells.csv", "figures", "report.html", "summary.csv", "tensorboard"}
    assert {path.name for path in tmp_path.iterdir()} == written


def test_failures_and_gaps_are_shown(tmp_path):
    cells = [each for each in study(**SMALL) if (each.source_epsilon, each.source_seed) != (2.0, 1)]
    write_cells(tmp_path / "cells.csv", cells)
    for name, finished in (("cells/a", False), ("cells/b", True), ("sources/c", False)):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "error.txt").write_text("Traceback\nUserError: <b>disk full</b>\n")
        if finished:
            (tmp_path / name / "results.json").write_text("{}")
    assert [failure.name for failure in failures(tmp_path)] == ["sources/c", "cells/a"]
    (gap,) = gaps(analyze(cells))
    assert gap.place.epsilon == 2.0 and gap.runs == [(1, 0), (1, 1), (1, 2)]
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "UserError: &lt;b&gt;disk full" in page and "<b>disk" not in page
    assert "failed: 2" in page and "seed 1, draw 2" in page


def test_cells_of_different_versions_are_pointed_out(tmp_path):
    cells = study(**SMALL)
    cells[0] = dataclasses.replace(cells[0], tensorflow="2.20.0")
    write_cells(tmp_path / "cells.csv", cells)
    write_report(tmp_path)
    assert "different versions of tensorflow: 2.20.0, 2.21.0" in (tmp_path / "report.html").read_text()


def test_published_accuracies_stand_beside_ours(tmp_path):
    axes = {"dataset": ("cifar10",), "classes": ("",), "source_dataset": ("imagenet",), "source_classes": ("",)}
    axes |= {"examples_per_class": (None,), "source_architecture": ("resnet50",)}
    write_cells(tmp_path / "cells.csv", study(epsilons=(0, 3.0), seeds=(None,), draws=range(2), **axes))
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "94.8 %" in page and "arXiv 2007.08489" in page


def test_a_study_without_cells_has_a_report_and_one_without_a_table_an_error(tmp_path):
    write_cells(tmp_path / "cells.csv", [])
    write_report(tmp_path)
    assert "no pair of a robust and a standard source" in (tmp_path / "report.html").read_text()
    with pytest.raises(UserError, match=r"cells\.csv"):
        write_report(tmp_path / "nowhere")


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_browser_every_figure_is_visible_and_nothing_is_too_wide(tmp_path, browser, width):
    cells = study(**SMALL, examples_per_class=(5, 20), source_norm=("l2", "linf"), transfer_mode=("full_network",))
    write_cells(tmp_path / "cells.csv", cells)
    write_report(tmp_path)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get_log("browser")
    browser.get((tmp_path / "report.html").as_uri())
    figures = browser.find_elements("tag name", "figure")
    assert len(figures) == len(list((tmp_path / "figures").glob("*.svg"))) > 3
    for figure in figures:
        (picture,) = figure.find_elements("tag name", "svg")
        assert picture.is_displayed() and picture.size["width"] > 300 and picture.size["height"] > 100
        assert picture.rect["x"] >= 0 and picture.rect["x"] + picture.size["width"] <= width
        assert figure.find_element("tag name", "figcaption").is_displayed()
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.find_element("id", "answer").rect["y"] < 200
    assert [entry["message"] for entry in browser.get_log("browser")] == []
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.slow
def test_on_paper_the_tables_are_open(tmp_path, browser):
    write_cells(tmp_path / "cells.csv", study(**SMALL, examples_per_class=range(1, 9)))
    write_report(tmp_path)
    page = (tmp_path / "report.html").as_uri()
    browser.get(page)
    closed = browser.execute_script("return document.body.scrollHeight")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    opened = browser.execute_script("return document.body.scrollHeight")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert browser.find_elements("css selector", "details:not([open])")
    assert opened > closed + 8 * 100
