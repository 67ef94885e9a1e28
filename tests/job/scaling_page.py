"""Brings the plans in configs/SCALING.md up to date, for example after a new measurement in `calibration.py`.

    python tests/job/scaling_page.py

It runs each command of the page with `--dry_run`, and replaces the plans below it and the table of all plans. A test
compares the page with the commands' output.
"""

import os
import pathlib
import re
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "configs" / "SCALING.md"
# The columns of the table of all plans: the row of a plan, and what to take from it.
COLUMNS = {
    "XLA": r"(yes|no)",
    "time of a step": r"= ([\d.,]+ \w+), ",
    "time of an epoch": r"= ([\d.,]+ \w+)$",
    "time of the run": r"= ([\d.,]+ \w+)$",
    "device-hours": r"= ([\d.,]+) h$",
    "memory": r"= ([\d.,]+ \w+) a device$",
    "input": r"= ([\d.,]+) images/s to decode",
}
_COMMAND = re.compile(r"^    (python -m robust_tf\.train .*?--dry_run(?:.*\\\n)*.*)$", re.MULTILINE)
_PLAN = re.compile(r"```text\n(Plan on .*?)\n```", re.DOTALL)
_ROW = re.compile(r"^\| `(\S+)`(.*?) \|.*\|$", re.MULTILINE)


def current_page(page: str) -> str:
    """Returns the page with the output that its commands have now.

    Args:
        page: Text of the page.
    """
    parts = _COMMAND.split(page)  # text, command, text, command, ..., text
    plans = [_plans(command) for command in parts[1::2]]
    for index, own in enumerate(plans):
        parts[2 * index + 2] = _PLAN.sub(
            lambda found, own=own: f"```text\n{own[_name(found[1])]}\n```", parts[2 * index + 2]
        )
    for index in range(1, len(parts), 2):
        parts[index] = f"    {parts[index]}"

    def row(found: re.Match[str]) -> str:
        name, note = found.groups()
        commands = zip(plans, parts[1::2], strict=True)
        holder = next(own for own, command in commands if name in own and _flag(note) in command)
        return f"| `{name}`{note} | {' | '.join(_figures(holder[name]))} |"

    return _ROW.sub(row, "".join(parts))


def _flag(note: str) -> str:
    """Returns the flag that the name of a row gives in addition to the devices; empty if there is none."""
    flag = re.search(r"--\w+", note)
    return flag[0] if flag else ""


def _plans(command: str) -> dict[str, str]:
    """Runs a command, and returns its plans by the names of the devices."""
    arguments = shlex.split(command.replace("\\\n", " "))
    environment = os.environ | {"COLUMNS": "120", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, *arguments[1:]], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    texts = re.split(r"(?=^Plan on )", result.stdout, flags=re.MULTILINE)[1:]
    return {_name(text): "\n".join(line.rstrip() for line in text.strip().splitlines()) for text in texts}


def _name(plan: str) -> str:
    return plan.removeprefix("Plan on ").split(":")[0]


def _figures(plan: str) -> list[str]:
    """Returns the cells of COLUMNS from a plan, whose rows may take several lines."""
    rows: dict[str, str] = {}
    name = ""
    for line in plan.splitlines():
        cells = [cell.strip() for cell in line.split("│")]
        if len(cells) == 4:
            name = cells[1] or name
            rows[name] = f"{rows.get(name, '')} {cells[2]}".strip()
    figures = []
    for name, pattern in COLUMNS.items():
        found = re.search(pattern, rows[name])
        assert found is not None, (name, rows[name])
        figures.append(found[1])
    return figures


if __name__ == "__main__":
    PAGE.write_text(current_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
