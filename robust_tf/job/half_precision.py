"""A warning for half precision on a processor that has to emulate it, which is many times slower."""

import pathlib

import tensorflow as tf

# Processor instructions that multiply half-precision numbers on x86 and ARM, as /proc/cpuinfo names them.
_INSTRUCTIONS = {
    "mixed_bfloat16": {"avx512_bf16", "amx_bf16", "bf16", "svebf16"},
    "mixed_float16": {"avx512_fp16", "amx_fp16", "fphp", "asimdhp"},
}


def emulation_warning(precision: str, cpu_info: pathlib.Path = pathlib.Path("/proc/cpuinfo")) -> str | None:
    """Returns a warning for a job that would compute in emulated half precision, or None.

    Args:
        precision: Value of `--precision`.
        cpu_info: Linux's description of the processors. Without that file there is no warning.
    """
    if precision not in _INSTRUCTIONS or any(tf.config.list_physical_devices(kind) for kind in ("GPU", "TPU")):
        return None
    try:
        text = cpu_info.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    lines = [line.partition(":") for line in text.splitlines()]
    known = {flag for name, _, flags in lines if name.strip() in ("flags", "Features") for flag in flags.split()}
    if not known or known & _INSTRUCTIONS[precision]:
        return None
    return (
        f"WARNING: this processor has no instructions for --precision={precision}. TensorFlow emulates them: a step "
        "takes many times as long as with --precision=float32."
    )
