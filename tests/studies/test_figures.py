"""The figures of a study: drawn where the study has what they show, and complete."""

import re

import pytest
from made_up_study import study
from matplotlib import pyplot

from robust_tf.studies.analysis import analyze
from robust_tf.studies.figures import study_figures, write_figures

FEW = {"epsilons": (0, 0.5, 3), "seeds": range(2), "draws": range(2)}
IMAGENET = {"source_dataset": ("imagenet",), "source_classes": ("",), "classes": ("",), "examples_per_class": (None,)}


def names(cells):
    return [figure.name for figure in study_figures(analyze(cells))]


def test_the_smallest_study_has_the_figures_that_every_study_has():
    assert names(study(**FEW)) == [
        "robust_beside_standard_sources",
        "accuracy_against_epsilon",
        "robust_accuracy_against_epsilon",
        "source_accuracy_against_transfer_accuracy",
    ]


@pytest.mark.parametrize(
    ("axes", "name"),
    [
        ({"examples_per_class": (5, 20)}, "accuracy_against_labels_per_class"),
        (
            {"source_architecture": ("resnet18", "resnet50", "wide_resnet50_2")},
            "accuracy_against_epsilon_by_width_of_resnet_50",
        ),
        ({"downscale": ("", "32"), "examples_per_class": (5, 20)}, "accuracy_against_epsilon_by_downscale"),
        ({"source_dataset": ("imagenet", "stylized_imagenet")}, "accuracy_against_epsilon_by_pretraining_data"),
        ({"source_norm": ("l2", "linf")}, "accuracy_against_epsilon_linf_beside_l2"),
    ],
)
def test_a_further_axis_has_its_figure(axes, name):
    found = names(study(**FEW, **axes))
    assert name in found and name not in names(study(**FEW))
    # The plain figure is left out where it would be the same.
    assert ("accuracy_against_epsilon" in found) == (len(axes) > 1 or "resnet18" in str(axes) or "labels" in name)


def test_each_data_set_and_mode_has_its_figure():
    found = names(
        study(**FEW, dataset=("pets", "food"), classes=("",), transfer_mode=("fixed_feature", "full_network"))
    )
    for place in ("pets_fixed_features", "pets_full_network", "food_fixed_features", "food_full_network"):
        assert f"accuracy_against_epsilon_{place}" in found
    assert len(found) == len(set(found))


def test_nothing_is_drawn_that_the_study_does_not_hold():
    assert names([]) == []
    assert names(study(epsilons=(1.0,), seeds=(0,), draws=(0,))) == []


def test_lines_bands_and_published_values_are_where_the_numbers_say():
    groups = analyze(study(**FEW, **IMAGENET, dataset=("cifar10",), source_architecture=("resnet50",)))
    (figure,) = (each for each in study_figures(groups) if each.name == "accuracy_against_epsilon")
    drawn = figure.draw()
    (axis,) = drawn.axes
    line, star = axis.lines
    places = groups[0].places
    assert list(line.get_ydata()) == [100 * place.measures["accuracy"].estimate.mean for place in places]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["0", "0.5", "3"]
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([2], [pytest.approx(94.81)])
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["resnet50", "published, best epsilon"]
    pyplot.close(drawn)


@pytest.mark.parametrize("changes", [{"downscale": ("32",)}, {"examples_per_class": (20,)}, {"source_norm": ("linf",)}])
def test_published_values_are_not_drawn_beside_other_transfers(changes):
    axes = {**IMAGENET, "dataset": ("cifar10",), "source_architecture": ("resnet50",), **changes}
    for figure in study_figures(analyze(study(**FEW, **axes))):
        drawn = figure.draw()
        texts = [text.get_text() for legend in drawn.legends for text in legend.get_texts()]
        pyplot.close(drawn)
        assert not any("published" in text for text in texts)


def test_no_two_texts_of_a_figure_overlap():
    cells = study(
        epsilons=(0, 0.01, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 3, 5),
        seeds=(None,),
        draws=range(2),
        **{**IMAGENET, "examples_per_class": (5, 20, None)},
        dataset=("caltech101",),
        source_architecture=("resnet18", "wide_resnet50_4"),
    )
    for figure in study_figures(analyze(cells)):
        with pyplot.rc_context({"font.size": 11}):
            drawn = figure.draw()
            drawn.canvas.draw()
        for axis in drawn.axes:
            if axis.get_visible():
                drawn_labels = [axis.title] if axis.get_title() else []
                for one in (axis.xaxis, axis.yaxis):
                    low, high = sorted(one.get_view_interval())
                    ticks = [tick for tick in one.get_major_ticks() if low <= tick.get_loc() <= high]
                    drawn_labels += [tick.label1 for tick in ticks if not tick.label1.get_rotation()]
                boxes = [label.get_window_extent() for label in drawn_labels]
                assert sum(box.count_overlaps(boxes) - 1 for box in boxes) == 0, figure.name
        pyplot.close(drawn)


def test_files_are_written_as_svg_and_png_and_equal_studies_give_equal_files(tmp_path):
    groups = analyze(study(**FEW))
    for folder in ("a", "b"):
        elements = write_figures(tmp_path / folder, study_figures(groups))
    files = sorted(path.name for path in (tmp_path / "a" / "figures").iterdir())
    assert files == sorted(f"{name}.{kind}" for name in elements for kind in ("png", "svg"))
    for name in files:
        assert (tmp_path / "a/figures" / name).read_bytes() == (tmp_path / "b/figures" / name).read_bytes()
    ids = [each for svg in elements.values() for each in re.findall(r' id="([^"]+)"', svg)]
    assert len(ids) == len(set(ids))
    assert pyplot.get_fignums() == []
