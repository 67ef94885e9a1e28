"""Writes what people read about a finished training job: report.html with its plots, and a model card."""

from robust_tf.reporting.job_files import write_examples, write_history
from robust_tf.reporting.job_report import REPORT, write_report

__all__ = ["REPORT", "write_examples", "write_history", "write_report"]
