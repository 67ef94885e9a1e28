"""The published accuracies: complete, and in agreement with what the paper's code says about them."""

from robust_tf.data import DATASETS
from robust_tf.studies.published import PUBLISHED_TRANSFERS, published_source_accuracy, published_transfer


def test_all_cells_of_the_table_are_there():
    assert len(PUBLISHED_TRANSFERS) == 96 and {cell.dataset for cell in PUBLISHED_TRANSFERS} <= set(DATASETS)
    assert len({(cell.dataset, cell.transfer_mode, cell.architecture) for cell in PUBLISHED_TRANSFERS}) == 96


def test_robust_sources_are_the_best_as_often_as_published():
    robust = [cell.transfer_mode for cell in PUBLISHED_TRANSFERS if cell.epsilon > 0]
    assert robust.count("fixed_feature") == 40 and robust.count("full_network") == 34


def test_larger_networks_are_better_nearly_everywhere():
    """A number that is typed wrongly would usually break the order of the architectures."""
    small = {(c.dataset, c.transfer_mode): c.accuracy for c in PUBLISHED_TRANSFERS if c.architecture == "resnet18"}
    for cell in PUBLISHED_TRANSFERS:
        if cell.architecture == "wide_resnet50_4":
            assert 0 < cell.accuracy - small[cell.dataset, cell.transfer_mode] < 0.11


def test_a_published_accuracy_is_found_by_its_place():
    assert published_transfer("pets", "full_network", "resnet18").accuracy == 0.9205
    assert published_transfer("digits", "full_network", "resnet18") is None
    assert published_source_accuracy("resnet18", "linf", 4 / 255) == 0.5249
    assert (
        published_source_accuracy("resnet18", "linf", 0.0) == published_source_accuracy("resnet18", "l2", 0.0) == 0.6979
    )
    assert published_source_accuracy("resnet18", "linf", 3.0) is None
    assert published_source_accuracy("resnet20", "l2", 0.0) is None
