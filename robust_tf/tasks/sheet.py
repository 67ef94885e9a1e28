"""The sheet of examples of a network for detection or segmentation."""

import pathlib
from collections.abc import Sequence

from robust_tf.tasks.base import DenseTask, TaskExample
from robust_tf.tasks.drawing import save_task_sheet


def save_examples(
    path: pathlib.Path,
    dense: DenseTask,
    examples: Sequence[TaskExample],
    class_names: Sequence[str],
    *,
    attack: str,
    title: str,
) -> None:
    """Writes a sheet with a column for each image: its annotation, and its predictions without and with the attack.

    Args:
        path: PNG file to write.
        dense: Task type.
        examples: Images to show. Without any, no file is written.
        class_names: Names of the classes.
        attack: Name of the attack, such as "PGD-20, l2 0.5". Empty if there was none.
        title: Title of the sheet.
    """
    if not examples:
        return
    rows = dense.rows(examples, class_names, attack=attack)
    captions = [f"image {number}" for number in range(1, len(examples) + 1)]
    save_task_sheet(path, list(rows.values()), list(rows), captions, title, class_names=class_names)
