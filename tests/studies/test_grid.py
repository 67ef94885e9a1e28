"""The axes of a study, its cells and sources, its stale cells and the files for clusters. Nothing is trained."""

import pathlib
import re
import subprocess

import numpy as np
import pytest
import yaml

from robust_tf.config.run import PlanConfig
from robust_tf.config.study import parse_axis, parse_study
from robust_tf.errors import UserError
from robust_tf.flags import flat_values, parse_values, to_flag_file
from robust_tf.job.planning.devices import parse_clusters
from robust_tf.job.planning.plan import planned_job, planned_task
from robust_tf.job.planning.roofline import estimate, job_work
from robust_tf.studies.device_hours import device_hours
from robust_tf.studies.dry_run import print_study_plan
from robust_tf.studies.grid import plan_study
from robust_tf.studies.launch import write_launch_files
from robust_tf.studies.states import settle_stale, sources_to_run

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
NO_SOURCES = ["paper_fixed", "paper_full", "architectures", "downscale", "low_data", "texture"]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.cfg"
    path.write_text(
        "--dataset=digits\n--classes=0,1\n--architecture=resnet8\n--image_size=8\n--epsilon=1\n--attack_steps=2\n"
    )
    return path


def arguments(tmp_path, source, *flags):
    return ["study", f"--workdir={tmp_path / 'w'}", f"--source={source}", "--dataset=digits", "--epsilon=0", *flags]


def plan(tmp_path, source, *flags):
    return plan_study(parse_study(arguments(tmp_path, source, *flags)))


def test_every_place_of_the_grid_is_one_cell_and_every_source_occurs_once(tmp_path, source):
    found = plan(
        tmp_path,
        source,
        "--vary=source.epsilon=0 1",
        "--vary=source.seed=0 1 2",
        "--vary=seed=0 1",
        "--vary=classes=5,6 7,8",
    )
    assert (len(found.sources), len(found.cells), found.merged) == (6, 24, 0)
    assert len({cell.name for cell in found.cells}) == 24
    places = {(cell.source.name, cell.job.run.seed, cell.job.data.classes) for cell in found.cells}
    assert len(places) == 24
    assert {cell.job.transfer.source for cell in found.cells} == {
        str(each.workdir / "classifier.keras") for each in found.sources
    }


def test_a_standard_source_is_shared_between_the_norms(tmp_path, source):
    found = plan(tmp_path, source, "--vary=source.norm=l2 linf", "--vary=source.epsilon=0 1/255")
    assert [each.name for each in found.sources] == [
        "resnet8_eps0_digits_seed0",
        "resnet8_l2_eps0.003922_digits_seed0",
        "resnet8_linf_eps0.003922_digits_seed0",
    ]
    assert (len(found.cells), found.merged) == (3, 1)


def test_cells_that_are_the_same_job_are_refused(tmp_path, source):
    # The number of steps between two points of a chart does not make another job.
    with pytest.raises(UserError, match="log_every_steps=5 and log_every_steps=10"):
        plan(tmp_path, source, "--vary=log_every_steps=5 10")


def test_further_grids_belong_to_the_same_study(tmp_path, source):
    also = tmp_path / "full.cfg"
    also.write_text(
        f"--source={source}\n--dataset=digits\n--epsilon=0\n--transfer_mode=full_network\n--epochs=2\n--vary=seed=0 1\n"
    )
    found = plan(tmp_path, source, f"--also={also}", "--vary=seed=0 1 2", "--deterministic")
    assert [cell.job.transfer.transfer_mode for cell in found.cells] == ["fixed_feature"] * 3 + ["full_network"] * 2
    assert len(found.sources) == 1


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("sed=0 1", r"Received: 'sed'\. Did you mean 'seed'"),
        ("source.epsilom=0 1", r"Received: 'epsilom'\. Did you mean 'epsilon'"),
        ("epochs=1 two", "two"),
        ("seed=0 0", "Received twice: 0"),
        ("seed", "Received: --vary='seed'"),
        ("workdir=a b", "--workdir cannot be an axis"),
    ],
)
def test_a_wrong_axis_is_refused(axis, message):
    with pytest.raises(UserError, match=message):
        parse_axis(axis)


def test_a_flag_has_one_value_or_one_axis(tmp_path, source):
    with pytest.raises(UserError, match="Received twice in the command: seed"):
        plan(tmp_path, source, "--seed=1", "--vary=seed=0 1")


def test_source_flags_need_a_flag_file(tmp_path):
    with pytest.raises(UserError, match=r"--source=a\.keras with source\.seed"):
        plan(tmp_path, "a.keras", "--vary=source.seed=0 1")


def test_plans_for_other_devices_are_for_a_dry_run(tmp_path, source):
    with pytest.raises(UserError, match=r"--plan_devices is for --dry_run\. Received: --plan_devices=8xA100"):
        parse_study(arguments(tmp_path, source, "--plan_devices=8xA100", "--vary=seed=0 1"))
    planned = parse_study(arguments(tmp_path, source, "--plan_devices=8xA100", "--vary=seed=0 1", "--dry_run"))
    assert planned.plan.plan_devices == ("8xA100",)
    assert plan_study(planned) == plan(tmp_path, source, "--vary=seed=0 1")  # the cells are the same


@pytest.mark.parametrize(
    "flags",
    [
        ("--baseline",),
        ("--task_type=detection",),
        ("--draws=5", "--features=cached", "--examples_per_class=5"),
        ("--outputs=all", "--export_dir=exports"),
    ],
)
def test_what_a_cell_would_leave_out_is_refused(tmp_path, source, flags):
    named = next(flag for flag in flags if flag.startswith(("--baseline", "--task_type", "--draws", "--export_dir")))
    with pytest.raises(UserError, match=f"Received: {named}[. ]"):
        plan(tmp_path, source, *flags, "--vary=seed=0 1")


def test_a_source_has_to_keep_its_classifier(tmp_path, source):
    source.write_text(source.read_text() + "--outputs=results\n")
    with pytest.raises(UserError, match="Received: --outputs=results for a source"):
        plan(tmp_path, source, "--vary=seed=0 1")


def test_repeated_flags_keep_their_commas():
    parsed = parse_study(["study", "--source=a.keras", "--vary=classes=1,2 3,4", "--vary=seed=0 1"])
    assert parsed.config.vary == ("classes=1,2 3,4", "seed=0 1")
    text = to_flag_file(parsed.config)
    again = parse_values(type(parsed.config), ["study", *text.splitlines()])
    assert again.values == flat_values(parsed.config)


def claim(run, job):
    run.workdir.mkdir(parents=True)
    (run.workdir / "flags.cfg").write_text(to_flag_file(job.resolved()))
    (run.workdir / "results.json").write_text("{}")


def test_stale_cells_are_named_deleted_or_kept(tmp_path, source):
    found = plan(tmp_path, source, "--vary=seed=0 1")
    first, second = found.cells
    claim(first, first.job.with_flags(epochs=77))
    claim(second, second.job)
    with pytest.raises(UserError, match=rf"{first.name} \(--epochs: 77 -> .*--stale=rerun") as caught:
        settle_stale(found, "refuse")
    assert second.name not in str(caught.value)
    assert settle_stale(found, "keep") == 0
    assert first.workdir.exists()
    assert settle_stale(found, "rerun") == 1
    assert not first.workdir.exists()
    assert second.workdir.exists()
    assert [each.name for each in sources_to_run(found)] == [first.source.name]


@pytest.mark.parametrize("name", [*NO_SOURCES, "digits", "fashion"])
def test_the_flag_files_describe_studies(name, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    found = plan_study(parse_study(["study", f"--flagfile=configs/study_{name}.cfg", "--workdir=w"]))
    expected = {"paper_fixed": 12 * 10 * 4 * 2, "paper_full": 12 * 10 * 4 * 2, "digits": 2 * 6 * 5 * 4 * 5 + 3 * 5 * 2}
    assert len(found.cells) == expected.get(name, len(found.cells)) > 0
    assert (name in NO_SOURCES) == (not found.sources)


@pytest.mark.slow
def test_device_hours_are_the_sum_over_the_jobs(tmp_path, source):
    found = plan(tmp_path, source, "--vary=seed=0 1", "--vary=source.epsilon=0 1")
    devices = PlanConfig(dry_run=True, plan_devices=("H100", "8xH100"), plan_utilization=0.5)
    one, eight = device_hours(devices, found.sources, found.cells)
    jobs = [(each.job, None) for each in found.sources] + [(each.job, each.source.job) for each in found.cells]
    (cluster,) = parse_clusters(["H100"])
    seconds = []
    for job, origin in jobs:
        task = planned_task(job, image_size=8)
        classifier, _ = planned_job(job, origin, task=task)
        seconds.append(estimate(job, task, job_work(job, classifier, task), cluster, utilization=0.5).run)
    np.testing.assert_allclose([one.sources, one.cells], [sum(seconds[:2]) / 3600, sum(seconds[2:]) / 3600], rtol=1e-9)
    assert (eight.sources, eight.cells, eight.devices) == (one.sources, one.cells, 8)
    assert "8 devices, one job on each" in eight.in_words
    assert seconds[1] > 3 * seconds[0]  # the attack of the second source


@pytest.mark.slow
def test_the_plan_of_a_large_study_needs_no_data_and_names_what_it_does_not_know(tmp_path, capsys, data_dir):
    flags = ["--source=resnet18_l2_eps1", "--vary=dataset=cifar10 pets birdsnap folder:missing", "--vary=seed=0 1"]
    study = parse_study(["study", f"--workdir={tmp_path}", *flags, "--dry_run", "--plan_devices=4xH100"])
    print_study_plan(study, plan_study(study))
    output = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert re.search(r"on 4xH100 .* [0-9.]+ device-hours; / 4 devices", output)
    assert "unknown for 2 jobs" in output and "missing" in output
    assert "unknown for 2 jobs: The size of birdsnap is not in the table of data sets, and it is not prepared" in output
    assert not list(tmp_path.iterdir())


def launched(tmp_path, source, launcher):
    argv = arguments(tmp_path, source, "--vary=seed=0 1 2", f"--launcher={launcher}", "--vary=source.seed=0 1")
    study = parse_study(argv)
    return write_launch_files(study.config, plan_study(study), argv)


def test_slurm_files_are_arrays_with_one_element_for_each_cell(tmp_path, source):
    paths = {path.name: path for path in launched(tmp_path, source, "slurm")}
    assert list(paths) == ["sources.sbatch", "cells.sbatch", "collect.sbatch", "submit.sh"]
    for path in paths.values():
        subprocess.run(["bash", "-n", path], check=True)
    cells = paths["cells.sbatch"].read_text()
    assert "#SBATCH --array=0-5%" in cells
    assert '--only_cell="$SLURM_ARRAY_TASK_ID"' in cells
    assert "--launcher=slurm" not in cells
    assert "'--vary=seed=0 1 2'" in cells
    assert paths["submit.sh"].read_text().count("afterany") == 2


def test_kubernetes_files_are_indexed_jobs(tmp_path, source):
    paths = {path.name: path for path in launched(tmp_path, source, "kubernetes")}
    subprocess.run(["bash", "-n", paths["submit.sh"]], check=True)
    for name, count in {"sources": 2, "cells": 6, "collect": 1}.items():
        job = yaml.safe_load(paths[f"{name}.yaml"].read_text())
        assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
        assert len(job["metadata"]["name"]) <= 63
        spec = job["spec"]
        assert (spec["completionMode"], spec["completions"]) == ("Indexed", count)
        pod = spec["template"]["spec"]
        assert pod["restartPolicy"] == "Never"  # the schema asks for it with backoffLimitPerIndex
        (container,) = pod["containers"]
        assert container["image"] == "registry.example/robust_tf:latest"
        assert ("JOB_COMPLETION_INDEX" in container["args"][0]) == (name != "collect")
        assert {mount["name"] for mount in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
