"""tests/bench/kernels.py with lines that oneDNN prints: what is counted, and the table."""

import sys

import pytest

from tests.bench import kernels
from tests.bench.step_process import StepProcess, StepSettings

_LINE = "onednn_verbose,v1,primitive,exec,cpu,{},src:bf16::blocked:acdb::f0 dst:bf16::blocked:acdb::f0,attr,alg,mb32,{}"
_LINES = [
    "onednn_verbose,v1,info,oneDNN v3.7.1",
    _LINE.replace("exec", "create:cache_hit").format("convolution,brg_conv_fwd:avx512_core_bf16,forward_training", 9),
    _LINE.format("convolution,brg_conv_fwd:avx512_core_bf16,forward_training", 1.5),
    _LINE.format("convolution,brgconv:avx512_core_bf16,forward_inference", 0.5),
    _LINE.format("convolution,brg_conv_bwd_w:avx512_core_bf16,backward_weights", 4),
    _LINE.format("reorder,jit:uni,undef", 0.25),
    "some other line, exec",
]


def test_kernels_are_counted_by_primitive_and_pass():
    found = kernels.kernels_of(_LINES, seconds=0.01)
    assert found.calls == {"convolution, forward": 2, "convolution, gradient of the weights": 1, "reorder": 1}
    assert found.milliseconds == {
        "convolution, forward": 2.0,
        "convolution, gradient of the weights": 4.0,
        "reorder": 0.25,
    }
    with pytest.raises(ValueError, match="printed nothing"):
        kernels.kernels_of(_LINES[:2], seconds=0.01)


def test_the_table_shows_medians_in_order_of_the_difference():
    ours = [kernels.kernels_of(_LINES, seconds=seconds) for seconds in (0.010, 0.008, 0.090)]
    torch = [kernels.kernels_of([line.replace(",4", ",5") for line in _LINES[2:5]], seconds=0.009)]
    rows = [
        line.split("  ")[0] + str([float(cell) for cell in line[44:].split()])
        for line in kernels.table(ours, torch)[1:]
    ]
    assert rows == [
        "reorder[1.0, 0.2, 0.0, 0.2]",
        "convolution, forward[2.0, 2.0, 2.0, 2.0, 0.0]",
        "convolution, gradient of the weights[1.0, 4.0, 1.0, 5.0, -1.0]",
        "all kernels[6.2, 7.0, -0.8]",
        "the step[10.0, 9.0, 1.0]",
        "the step without its kernels[3.8, 2.0, 1.8]",
    ]


def test_a_process_returns_what_its_step_has_printed(tmp_path):
    """Also what a library in C has printed, which Python's own buffers do not hold."""
    (tmp_path / "printing_step.py").write_text(
        "import ctypes\n"
        "from tests.bench.step_process import serve\n"
        "class Printing:\n"
        "    def __init__(self, settings):\n"
        "        self.count = 0\n"
        "    def run(self):\n"
        "        self.count += 1\n"
        "        ctypes.CDLL(None).printf(b'run %d\\n', self.count)\n"
        "serve(Printing)\n"
    )
    command = [sys.executable, "-c", f"import runpy; runpy.run_path({str(tmp_path / 'printing_step.py')!r})"]
    settings = StepSettings(
        architecture="resnet18",
        num_classes=10,
        image_size=8,
        batch_size=2,
        steps=0,
        epsilon=0.0,
        step_size=0.0,
        precision="float32",
        compiled=False,
        device="CPU",
    )
    process = StepProcess(command, environment={"PYTHONUNBUFFERED": ""})
    try:
        process.build("step", settings)
        assert process.new_output() == ""
        process.run("step")
        assert process.new_output() == "run 1\n"
        process.run("step")
        process.run("step")
        assert process.new_output() == "run 2\nrun 3\n"
        assert process.new_output() == ""
    finally:
        process.close()
