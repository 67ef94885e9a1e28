"""Files that run a study on a cluster: array jobs of Slurm or Indexed Jobs of Kubernetes, one cell an element."""

import json
import pathlib
import re
import shlex
from collections.abc import Sequence

from robust_tf.config.study import StudyConfig
from robust_tf.console import console
from robust_tf.files import replaced_atomically
from robust_tf.studies.grid import StudyPlan

LAUNCH = "launch"
# Elements that run at the same time, unless the user edits the files.
_PARALLEL = 32

_SLURM = """\
#!/bin/bash
# {title}
#   {command}
#SBATCH --job-name={name}
{array}#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --gpus-per-task={gpus}
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
set -eu

exec srun {program}
"""

_SLURM_SUBMIT = """\
#!/bin/bash
# Submits the study to Slurm: the sources, then the cells, then the step that writes cells.csv and the report.
# Run it in the folder from which the study's command was given. A step starts when the one before it has ended, whether
# or not every element succeeded; submit again to continue.
set -eu

here=$(dirname "$0")
"""

_KUBERNETES_JOB = """\
# {title}
#   kubectl apply -f {file}
apiVersion: batch/v1
kind: Job
metadata:
  name: {name}
spec:
  completionMode: Indexed
  completions: {count}
  parallelism: {parallel}
  backoffLimitPerIndex: 2 # a cell that always fails must not end the others
  maxFailedIndexes: {count}
  template:
    spec:
      restartPolicy: Never # backoffLimitPerIndex asks for it
      terminationGracePeriodSeconds: 120 # SIGTERM saves a checkpoint
      shareProcessNamespace: true # SIGTERM has no default action in process 1, which the program would be otherwise
      automountServiceAccountToken: false
      containers:
        - name: study
          image: {image}
          workingDir: /study
          command: [bash, -ceu]
          args:
            - {arguments}
          resources:
            requests: {{cpu: "4", memory: 16Gi}}
            limits: {{memory: 16Gi{gpus}}}
          volumeMounts:
            - {{name: study, mountPath: /study}}
      volumes:
        - name: study
          persistentVolumeClaim: {{claimName: study}}
"""

_KUBERNETES_SUBMIT = """\
#!/bin/bash
# Runs the study on Kubernetes: the sources, then the cells, then the step that writes cells.csv and the report.
# You need a ReadWriteMany volume claim named `study`. It must hold the flag files and data; the workdir is also written
# there.
set -eu

here=$(dirname "$0")
# Waits until a Job has ended, whether or not every element succeeded.
ended() {
  until kubectl get job "$1" -o jsonpath='{.status.conditions[*].type}' | grep -qE 'Complete|Failed'; do sleep 30; done
}
"""


def write_launch_files(config: StudyConfig, plan: StudyPlan, argv: Sequence[str]) -> list[pathlib.Path]:
    """Writes the files of an array job into launch/ of the study's folder, and prints the command that submits them.

    Args:
        config: Names the cluster's system.
        plan: The study.
        argv: Name of the program and its arguments, which each element of the array repeats.

    Returns:
        The files; the last one submits the others.

    Raises:
        UserError: A file cannot be written.
    """
    slurm = config.launcher == "slurm"
    files = _slurm_files(plan, argv) if slurm else _kubernetes_files(plan, argv, config.launcher_image)
    folder = plan.workdir / LAUNCH
    paths = []
    for name, content in files.items():
        with replaced_atomically(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
        paths.append(folder / name)
    console.print(
        f"{len(plan.sources)} sources and {len(plan.cells)} cells. Look through the files in {folder} (time, memory "
        f"and devices of an element), and submit them: bash {paths[-1]}"
    )
    return paths


def _steps(plan: StudyPlan) -> list[tuple[str, str, int]]:
    """Returns the name, the last flag (with %s for the index) and the number of elements of each step."""
    steps = [("sources", "--only_source=%s", len(plan.sources)), ("cells", "--only_cell=%s", len(plan.cells))]
    return [*(step for step in steps if step[2]), ("collect", "--collect", 1)]


def _command(plan: StudyPlan, argv: Sequence[str]) -> str:
    """Returns the command of the study, without the flags that choose the launcher."""
    kept, skip = [], False
    for argument in argv[1:]:
        name, equals, _ = argument.lstrip("-").partition("=")
        is_launcher = argument.startswith("-") and name in ("launcher", "launcher_image")
        if not (is_launcher or skip):
            kept.append(argument)
        skip = is_launcher and not equals
    # Last, so that it wins over a launcher in a flag file, and so that the folder does not depend on its name.
    kept += ["--launcher=none", f"--workdir={plan.workdir}"]
    return " ".join(map(shlex.quote, ["python", "-m", "robust_tf.study", *kept]))


def _slurm_files(plan: StudyPlan, argv: Sequence[str]) -> dict[str, str]:
    files, submit, before = {}, _SLURM_SUBMIT, ""
    for step, flag, count in _steps(plan):
        is_array = "%s" in flag
        files[f"{step}.sbatch"] = _SLURM.format(
            title=f"The step {step} of the study {plan.workdir.name}: {count} element{'s' * (count != 1)}.",
            command="submit.sh submits it after the steps before it.",
            name=_name(plan, step),
            array=f"#SBATCH --array=0-{count - 1}%{_PARALLEL}\n" if is_array else "",
            gpus=int(is_array),
            program=f"{_command(plan, argv)} " + (flag % '"$SLURM_ARRAY_TASK_ID"' if is_array else flag),
        )
        depends = f'--dependency="afterany:${before}" ' if before else ""
        submit += f'{step}=$(sbatch --parsable {depends}"$here/{step}.sbatch")\n'
        before = step
    return {**files, "submit.sh": submit + 'echo "The last step is job $collect."\n'}


def _kubernetes_files(plan: StudyPlan, argv: Sequence[str], image: str) -> dict[str, str]:
    files, submit = {}, _KUBERNETES_SUBMIT
    for step, flag, count in _steps(plan):
        is_array = "%s" in flag
        program = f"{_command(plan, argv)} " + (flag % '"$JOB_COMPLETION_INDEX"' if is_array else flag)
        files[f"{step}.yaml"] = _KUBERNETES_JOB.format(
            title=f"The step {step} of the study {plan.workdir.name}.",
            file=f"{step}.yaml",
            name=_name(plan, step),
            count=count,
            parallel=min(count, _PARALLEL),
            image=json.dumps(image),
            arguments=json.dumps(program),  # a JSON string is a YAML string
            gpus=', nvidia.com/gpu: "1"' if is_array else "",
        )
        submit += f'kubectl apply -f "$here/{step}.yaml"\nended {_name(plan, step)}\n'
    return {**files, "submit.sh": submit}


def _name(plan: StudyPlan, step: str) -> str:
    """Returns a name that Kubernetes accepts: lower-case letters, digits and hyphens, at most 63 characters."""
    study = re.sub(r"[^a-z0-9]+", "-", plan.workdir.name.lower()).strip("-") or "study"
    return f"{study[:40].rstrip('-')}-{step}"
