"""tests/bench/gpu_step.py with stand-ins for the frameworks: its table, failures, the deadline, the largest batch."""

import json
import sys

import pytest

from tests.bench import gpu_step, step_process
from tests.bench.step_process import StepFailure, StepProcess, StepSettings

# Steps of 20 ms with "torch" in bfloat16, 10 ms otherwise. Batches above 8 do not fit.
STAND_IN = """
import sys, time
from tests.bench.step_process import serve

class StandIn:
    def __init__(self, settings):
        print("a message on stdout")
        self.settings, self.compiled = settings, False
        self.seconds = 0.02 if "torch" in sys.argv and not settings.compiled else 0.01

    def run(self):
        if self.settings.batch_size > 8:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        if self.settings.num_classes == 1000:
            time.sleep(60)
        time.sleep(self.seconds if self.compiled else 10 * self.seconds)
        self.compiled = True

    def peak_gib(self):
        return 1.25

serve(StandIn)
"""


@pytest.fixture
def stand_ins(monkeypatch):
    processes = []

    def process(command, **options):
        processes.append(
            StepProcess([sys.executable, "-c", STAND_IN, "torch" if "torch_step" in command[-1] else "ours"])
        )
        return processes[-1]

    for module in (gpu_step, step_process):
        monkeypatch.setattr(module, "StepProcess", process)
    yield processes
    assert processes and all(started._process.poll() is not None for started in processes)  # nothing is left running


def run(monkeypatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_step", *flags])
    gpu_step.main()


def test_the_table_has_ratios_memory_and_first_calls(stand_ins, monkeypatch, capsys, tmp_path):
    path = tmp_path / "figures.jsonl"
    run(monkeypatch, "--shape=tiny", "--batches=4", "--precisions=bfloat16", "--kinds=adversarial", f"--json={path}")
    out = capsys.readouterr().out
    assert "tiny, batch 4, PGD-2 step on one GPU" in out
    rows = {row["program"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert list(rows) == ["xla bfloat16", "graph bfloat16", "torch bfloat16", "torch_compile bfloat16"]
    for name, row in rows.items():
        seconds = 0.02 if name == "torch bfloat16" else 0.01
        assert row["s_per_step"] >= seconds and row["first_call_s"] >= 10 * seconds
        assert row["images_per_s"] == pytest.approx(4 / row["s_per_step"], rel=1e-3)
        cells = next(line for line in out.splitlines() if line.startswith(f"| {name} |")).split(" | ")
        # The figures of the file are rounded, so a ratio of them may round to another last digit than the table's.
        for cell, other in zip(cells[2:4], ("torch bfloat16", "torch_compile bfloat16"), strict=True):
            assert float(cell) == pytest.approx(row["images_per_s"] / rows[other]["images_per_s"], abs=0.006)
        assert float(cells[1].replace(",", "")) == pytest.approx(row["images_per_s"], abs=0.6)
        assert cells[-2] == "1.2" and float(cells[-1].rstrip(" |")) == pytest.approx(row["first_call_s"], abs=0.06)
    assert len(stand_ins) == 4


def test_a_batch_that_does_not_fit_is_reported_and_the_others_go_on(stand_ins, monkeypatch, capsys):
    run(monkeypatch, "--shape=tiny", "--batches=16,8", "--programs=xla", "--precisions=float32", "--kinds=standard")
    out = capsys.readouterr().out
    assert "| xla float32 | out of memory |" in out.split("batch 8")[0]
    assert "out of memory" not in out.split("batch 8")[1] and "standard step" in out


def test_the_largest_batch_is_found_by_doubling(stand_ins, monkeypatch, capsys):
    run(monkeypatch, "--shape=tiny", "--batches=2", "--kinds=standard", "--programs=graph", "--largest=torch bfloat16")
    assert "torch bfloat16: 8 images fit; at 16: out of memory" in capsys.readouterr().out


def test_everything_stops_at_the_deadline(stand_ins, monkeypatch, capsys):
    run(monkeypatch, "--shape=resnet50_224", "--batches=4,8", "--programs=xla", "--seconds=1")
    assert capsys.readouterr().out.count("out of time") == 8  # 2 batches, 2 kinds and 2 precisions


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--programs=jax", "Received: 'jax'"),
        ("--batches=0", "Received: 0"),
        ("--largest=xla", "Received: 'xla'"),
    ],
)
def test_wrong_arguments_are_refused(monkeypatch, capsys, flag, message):
    with pytest.raises(SystemExit):
        run(monkeypatch, flag)
    assert message in capsys.readouterr().err


def test_a_process_that_does_not_start_says_why():
    settings = StepSettings(
        architecture="a", num_classes=2, image_size=8, batch_size=1, steps=0, epsilon=0.0, step_size=0.0,
        precision="float32", compiled=False, device="CPU",
    )  # fmt: skip
    process = StepProcess([sys.executable, "-c", "raise SystemExit('no such framework')"])
    with pytest.raises(StepFailure, match="ended with code 1. no such framework"):
        process.build("step", settings)
    process.close()
