"""The table cells.csv: what is written is read back, and damaged tables are refused."""

import dataclasses

import pytest

from robust_tf.errors import UserError
from robust_tf.studies.records import Cell, read_cells, write_cells

CELL = Cell(
    cell="l2_eps1-seed0",
    source="sources/l2_eps1",
    source_architecture="resnet20",
    source_norm="l2",
    source_epsilon=1 / 3,
    source_dataset="digits",
    source_classes="0,1,2,3,4",
    source_seed=3,
    dataset='folder:photos, of "mine"',
    classes="5,6",
    transfer_mode="fixed_feature",
    examples_per_class=20,
    seed=4,
    varied={"learning_rate": "0.1", "source_width": "0.5"},
    chosen=False,
    accuracy=0.1 + 0.2,
    robust_accuracy=0.25,
    num_test_images=600,
    seconds=1.25,
)


def test_what_is_written_is_read_back_in_the_order_of_the_names(tmp_path):
    bare = Cell(cell="a", source="resnet18_l2_eps0", dataset="digits", transfer_mode="full_network", seed=0, accuracy=0)
    path = tmp_path / "cells.csv"
    write_cells(path, [CELL, bare])
    assert read_cells(path) == [bare, CELL]
    head = path.read_text().splitlines()[0].split(",")
    assert head[:2] == ["cell", "source"]
    assert head[head.index("seed") + 1 : head.index("chosen")] == ["learning_rate", "source_width"]
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_cells_give_the_same_bytes_in_any_order(tmp_path):
    cells = [dataclasses.replace(CELL, cell=f"cell{number}") for number in range(5)]
    write_cells(tmp_path / "a.csv", cells)
    write_cells(tmp_path / "b.csv", cells[::-1])
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_two_cells_of_one_name_are_refused_and_the_file_stays(tmp_path):
    write_cells(tmp_path / "cells.csv", [CELL])
    with pytest.raises(UserError, match="l2_eps1-seed0"):
        write_cells(tmp_path / "cells.csv", [CELL, CELL])
    assert read_cells(tmp_path / "cells.csv") == [CELL]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (",4,0.1", ",four,0.1", "seed in line 2 .* type int. Received: 'four'"),
        (",20,4,", ",20,,", "seed in line 2 .* type int. Received: ''"),
        ("false", "maybe", "chosen in line 2 .* Received: 'maybe'"),
        (",600", ",600,1", "Line 2 .* as many values"),
        ("cell,source,", "cell,sauce,", "no column 'source'"),
        (",0.25,", ",much,", "robust_accuracy in line 2 .* Received: 'much'"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, before, after, message):
    path = tmp_path / "cells.csv"
    write_cells(path, [CELL])
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after, 1))
    with pytest.raises(UserError, match=message):
        read_cells(path)


def test_a_missing_table_is_refused_with_its_name(tmp_path):
    with pytest.raises(UserError, match=r"Received: .*none\.csv"):
        read_cells(tmp_path / "none.csv")
