"""The settings of one model: its folder, the versions to serve, and their labels."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import NamedTuple


class LabelFinding(NamedTuple):
    """A label whose version is missing, or will be unloaded.

    Attributes:
        label: The label.
        text: What is wrong, and what to do.
        due: Whether requests with the label already fail, or will fail after the next export. False if they will fail
            only after several exports.
        absent: Whether the folder lacks the version.
    """

    label: str
    text: str
    due: bool
    absent: bool = False


@dataclasses.dataclass(frozen=True)
class RequestLogging:
    """Which requests to a model are logged, and where.

    Attributes:
        filename_prefix: Beginning of the paths of the files.
        sampling_rate: Share of the requests to log, from 0 to 1.
    """

    filename_prefix: str
    sampling_rate: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The settings of one model.

    Attributes:
        name: Name of the model in requests.
        base_path: Folder that holds the versions.
        latest: Number of versions to serve, namely those with the highest numbers. 0 serves all.
        specific: Numbers of the versions to serve, instead of the latest ones. Empty to use `latest`.
        labels: Number of the version that each label points to.
        logging: Which requests are logged, or None for none.
    """

    name: str
    base_path: pathlib.Path
    latest: int = 1
    specific: tuple[int, ...] = ()
    labels: Mapping[str, int] = dataclasses.field(default_factory=dict)
    logging: RequestLogging | None = None

    @property
    def policy(self) -> str:
        """The version policy as it is written in a config file, e.g. "latest {num_versions: 2}"."""
        if self.specific:
            return "specific {" + " ".join(f"versions: {number}" for number in self.specific) + "}"
        return f"latest {{num_versions: {self.latest}}}" if self.latest else "all {}"

    def wanted(self, present: Mapping[int, pathlib.Path]) -> dict[int, pathlib.Path]:
        """Returns the versions to serve.

        Args:
            present: Folders of the versions that are there, by number.
        """
        if self.specific:
            return {number: present[number] for number in self.specific if number in present}
        highest = sorted(present, reverse=True)
        return {number: present[number] for number in (highest[: self.latest] if self.latest else highest)}

    def label_findings(self, present: Mapping[int, pathlib.Path]) -> list[LabelFinding]:
        """Returns a finding for each label whose version is missing or will be unloaded.

        Args:
            present: Folders of the versions that are there, by number.
        """
        return [
            finding for label, number in self.labels.items() if (finding := self._label_finding(label, number, present))
        ]

    def _label_finding(self, label: str, number: int, present: Mapping[int, pathlib.Path]) -> LabelFinding | None:
        points = f"Model {self.name}: label {label} points to version {number}, which"
        if number not in present:
            there = ", ".join(map(str, sorted(present))) or "none"
            return LabelFinding(
                label, f"{points} is not in {self.base_path}. Versions there: {there}.", due=True, absent=True
            )
        pinned = " ".join(f"versions: {version}" for version in sorted(set(self.labels.values())))
        way_out = f"Keep it with model_version_policy {{ specific {{ {pinned} }} }}."
        if number not in self.wanted(present):
            return LabelFinding(label, f"{points} the policy {self.policy} does not keep. {way_out}", due=True)
        if self.specific or not self.latest:
            return None
        newer = sum(other > number for other in present)
        exports = self.latest - newer
        when = "at the next export" if exports == 1 else f"in {exports} exports from now"
        return LabelFinding(label, f"{points} the policy {self.policy} will unload {when}. {way_out}", due=exports == 1)
