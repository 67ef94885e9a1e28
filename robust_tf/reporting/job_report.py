"""Writes the report of a finished job, from the files in its workdir: report.html, its plots, and README.md."""

import pathlib
import warnings

from robust_tf.evaluation.figures import pyplot, save, svg_of
from robust_tf.files import replaced_atomically
from robust_tf.reporting.job_figures import job_figures
from robust_tf.reporting.job_files import FIGURES, read_finished_job
from robust_tf.reporting.job_page import job_page
from robust_tf.reporting.readme import readme

REPORT = "report.html"


def write_report(workdir: pathlib.Path) -> None:
    """Writes the report of a finished job.

    A job without predictions.csv, which older versions did not write, gets no report.

    Args:
        workdir: Folder of the job.

    Raises:
        UserError: A file of the job is missing or damaged, or a file of the report cannot be written.
        OSError: A file of the job cannot be read.
        ValueError: A table of the job is damaged.
    """
    job = read_finished_job(workdir)
    if job is None:
        return
    drawn = {}
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing"
        )  # the tables on the page show these letters correctly
        with pyplot.rc_context({"font.size": 10}):
            for name, (figure, text) in job_figures(job).items():
                drawn[name] = (svg_of(figure, name), text)
                figure.set_layout_engine("none")  # the layout is computed once, not for each of the two files
                save(workdir / FIGURES / f"{name}.png", figure)
    for path, content in ((workdir / REPORT, job_page(job, drawn)), (workdir / "README.md", readme(job))):
        with replaced_atomically(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
