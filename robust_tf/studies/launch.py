"""Array jobs for Slurm and Kubernetes: first the sources, then the cells, then the report."""

import json
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any, Literal

from robust_tf.console import console
from robust_tf.files import check_output_folder, replaced_atomically
from robust_tf.studies.grid import Grid

# Flags that only the launching command needs.
_NOT_PASSED_ON = ("launcher", "workers", "dry_run", "workdir", "only")


def write_array_job(
    launcher: Literal["slurm", "kubernetes"], grid: Grid, arguments: Sequence[str], workdir: pathlib.Path
) -> None:
    """Writes the files of an array job into the folder of the study, and prints how to submit them.

    Args:
        launcher: System that runs the jobs.
        grid: Jobs of the study.
        arguments: Flags of the study. Every element of the array gets them.
        workdir: Folder of the study, on a disk that all machines see.

    Raises:
        UserError: The folder cannot be written to.
    """
    check_output_folder(workdir, "--workdir")
    command = ["python", "-m", "robust_tf.study", *_passed_on(arguments), f"--workdir={workdir}"]
    stages = [("sources", "source", len(grid.sources)), ("cells", "cell", len(grid.cells)), ("report", "report", 1)]
    stages = [stage for stage in stages if stage[2]]
    write = {"slurm": _write_slurm, "kubernetes": _write_kubernetes}[launcher]
    for line in write(stages, command, workdir):
        console.print(line, soft_wrap=True, markup=False)


def _passed_on(arguments: Sequence[str]) -> list[str]:
    kept, skips_next = [], False
    for argument in arguments:
        name, equals, _ = argument.lstrip("-").partition("=")
        if skips_next:
            skips_next = False
        elif name.removeprefix("no") in _NOT_PASSED_ON or name in _NOT_PASSED_ON:
            skips_next = not equals and name in ("launcher", "workers", "workdir", "only")
        else:
            kept.append(argument)
    return kept


def _write_slurm(stages: Sequence[tuple[str, str, int]], command: list[str], workdir: pathlib.Path) -> list[str]:
    submit = [
        "#!/usr/bin/env bash",
        "# Submits the study: each stage starts when the one before it has ended.",
        "set -euo pipefail",
    ]
    submit += ['cd "$(dirname "$0")"', "after="]
    for name, kind, count in stages:
        only = "report" if kind == "report" else f"{kind}:$SLURM_ARRAY_TASK_ID"
        lines = [
            "#!/usr/bin/env bash",
            f"#SBATCH --job-name={name}",
            "#SBATCH --ntasks=1",
            "#SBATCH --cpus-per-task=4",
            "#SBATCH --gres=gpu:1",
            "#SBATCH --time=24:00:00",
            "#SBATCH --output=%x-%a.log",
            *([] if kind == "report" else [f"#SBATCH --array=0-{count - 1}"]),
            "# A job that is cancelled or preempted continues when it is submitted again.",
            "set -euo pipefail",
            f"cd {shlex.quote(str(pathlib.Path.cwd()))}",
            f'exec {shlex.join(command)} --only="{only}"',
        ]
        _write(workdir / f"{name}.sbatch", lines)
        submit.append(f"after=$(sbatch --parsable ${{after:+--dependency=afterany:$after}} {name}.sbatch)")
    _write(workdir / "submit.sh", submit)
    return [f"Wrote {workdir}/submit.sh. Check the resources in {workdir}/*.sbatch, then: bash {workdir}/submit.sh"]


def _write_kubernetes(stages: Sequence[tuple[str, str, int]], command: list[str], workdir: pathlib.Path) -> list[str]:
    files = []
    for number, (name, kind, count) in enumerate(stages):
        only = "report" if kind == "report" else f"{kind}:$(JOB_COMPLETION_INDEX)"
        _write(
            workdir / f"{number}-{name}.json",
            [json.dumps(_indexed_job(name, count, [*command, f"--only={only}"]), indent=2)],
        )
        files.append(f"{workdir}/{number}-{name}.json")
    lines = [
        "Wrote the jobs of the study. Check the image, the volume and the resources, then run one after the other:"
    ]
    for path, (name, _, _) in zip(files, stages, strict=True):
        lines.append(
            f"  kubectl apply -f {path} && kubectl wait --for=condition=complete --timeout=-1s job/study-{name}"
        )
    return lines


def _indexed_job(name: str, count: int, command: list[str]) -> dict[str, Any]:
    container = {
        "name": "study",
        "image": "robust-tf:latest",
        "command": command,
        "resources": {"limits": {"nvidia.com/gpu": 1}},
        "volumeMounts": [{"name": "study", "mountPath": str(pathlib.Path.cwd())}],
        "workingDir": str(pathlib.Path.cwd()),
        "env": [
            {
                "name": "JOB_COMPLETION_INDEX",
                "valueFrom": {
                    "fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
                },
            }
        ],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": f"study-{name}"},
        "spec": {
            "completionMode": "Indexed",
            "completions": count,
            "parallelism": min(count, 8),
            "backoffLimitPerIndex": 3,
            "template": {
                "spec": {
                    "restartPolicy": "Never",
                    "containers": [container],
                    "volumes": [{"name": "study", "persistentVolumeClaim": {"claimName": "study"}}],
                }
            },
        },
    }


def _write(path: pathlib.Path, lines: Sequence[str]) -> None:
    with replaced_atomically(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
