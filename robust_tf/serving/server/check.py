"""`robust_tf.serve --check`: checks files, folders, versions and labels without loading a model."""

import pathlib
from collections.abc import Callable
from typing import Any

from robust_tf.errors import UserError
from robust_tf.serving.model.folders import complete_versions, why_no_version
from robust_tf.serving.model.status import ServingError
from robust_tf.serving.server import config_files
from robust_tf.serving.server.model_settings import ModelSettings
from robust_tf.serving.server.serve_config import ServeConfig


class Report:
    """The findings of a check.

    Attributes:
        lines: One line for each thing that was checked, and for each fault.
        failed: Whether there is a fault.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.failed = False

    def note(self, line: str) -> None:
        """Adds a line about something that is in order."""
        self.lines.append(line)

    def fault(self, line: str) -> None:
        """Adds a line about something that is wrong."""
        self.lines.append(f"error: {line}")
        self.failed = True


def check(config: ServeConfig) -> Report:
    """Checks everything that the flags name. No model is loaded and no port is opened."""
    report = Report()
    for warning in config.warnings():
        report.note(f"note: {warning}")
    for flag_name, read in (
        ("batching_parameters_file", config_files.read_batching),
        ("monitoring_config_file", config_files.read_monitoring),
        ("ssl_config_file", config_files.read_tls),
        ("tensorflow_session_config_file", config_files.read_session),
    ):
        _check_file(report, flag_name, getattr(config, flag_name), read)
    try:
        models = config_files.models_to_serve(config)
    except UserError as error:
        report.fault(str(error))
        return report
    if config.model_config_file:
        report.note(f"--model_config_file={config.model_config_file}: models {', '.join(m.name for m in models)}")
    for model in models:
        _check_model(report, model, config)
    return report


def _check_file(report: Report, flag_name: str, path: str, read: Callable[[pathlib.Path], Any]) -> None:
    if not path:
        return
    try:
        read(pathlib.Path(path))
    except UserError as error:
        report.fault(str(error))
    else:
        report.note(f"--{flag_name}={path}: can be used")


def _check_model(report: Report, model: ModelSettings, config: ServeConfig) -> None:
    absence = why_no_version(model.base_path)
    if absence is not None:
        report.fault(f"Model {model.name} has no version. Received: {model.base_path}. {absence.reason}")
        return
    present = complete_versions(model.base_path)
    wanted = model.wanted(present)
    report.note(
        f"Model {model.name} in {model.base_path}: versions {_numbers(present)}; the policy {model.policy} serves "
        f"{_numbers(wanted)}"
    )
    if config.enable_batching and config.enable_per_model_batching_parameters:
        for path in wanted.values():
            _check_batching(report, path)
    missing = [number for number in model.specific if number not in present]
    if missing:
        report.fault(
            f"Model {model.name}: the policy {model.policy} names versions that are not there: "
            f"{', '.join(map(str, missing))}."
        )
    faulty = set()
    for finding in model.label_findings(present):
        faulty.add(finding.label)
        if finding.due and not (config.allow_version_labels_for_unavailable_models and finding.absent):
            report.fault(finding.text)
        else:
            report.note(f"note: {finding.text}")
    for label, number in model.labels.items():
        if label not in faulty:
            report.note(f"Model {model.name}: label {label} points to version {number}")


def _check_batching(report: Report, version: pathlib.Path) -> None:
    try:
        batching = config_files.batching_of_version(version, config_files.Batching())
    except ServingError as error:
        report.fault(error.message)
    else:
        report.note(f"{version}: {'requests are batched' if batching else 'no batching'}")


def _numbers(versions: Any) -> str:
    return ", ".join(map(str, sorted(versions))) or "none"
