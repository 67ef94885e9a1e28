"""The warning that the processor emulates half precision."""

import pytest
import tensorflow as tf

from robust_tf.job.half_precision import emulation_warning

AVX2 = "processor\t: 0\nmodel name\t: AMD EPYC bf16\nflags\t\t: fpu sse2 avx2 fma f16c\n"
ZEN_4 = "processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n"
NEOVERSE = "processor\t: 0\nFeatures\t: fp asimd fphp asimdhp bf16\n"
CORTEX_A72 = "processor\t: 0\nFeatures\t: fp asimd crc32\n"


@pytest.fixture(autouse=True)
def no_accelerators(monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: [])


@pytest.fixture
def warning(tmp_path):
    def of(precision: str, text: str) -> str | None:
        (tmp_path / "cpuinfo").write_text(text)
        return emulation_warning(precision, tmp_path / "cpuinfo")

    return of


@pytest.mark.parametrize(
    ("text", "precision"),
    [(AVX2, "mixed_bfloat16"), (AVX2, "mixed_float16"), (ZEN_4, "mixed_float16"), (CORTEX_A72, "mixed_bfloat16")],
)
def test_the_warning_has_the_precision_and_the_way_out(warning, text, precision):
    message = warning(precision, text)
    assert f"--precision={precision}" in message and "--precision=float32" in message


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        (AVX2, "float32"),
        (ZEN_4, "mixed_bfloat16"),
        (NEOVERSE, "mixed_bfloat16"),
        (NEOVERSE, "mixed_float16"),
        ("processor : 0\n", "mixed_bfloat16"),
    ],
)
def test_there_is_no_warning_for_native_or_unknown_instructions(warning, text, precision):
    assert warning(precision, text) is None


def test_there_is_no_warning_without_a_description_of_the_processor(tmp_path):
    assert emulation_warning("mixed_bfloat16", tmp_path / "none") is None


def test_there_is_no_warning_on_an_accelerator(warning, monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: [kind] if kind == "GPU" else [])
    assert warning("mixed_bfloat16", AVX2) is None
