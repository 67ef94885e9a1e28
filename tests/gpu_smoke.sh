#!/usr/bin/env bash
# Checks a machine with one GPU in two minutes: training jobs run on it, and PGD finds the same images as on a CPU.
#   python -m pip install '.[and-cuda,test]' && tests/gpu_smoke.sh
# Exits with 0 if everything works, with 1 if something is wrong, and with 3 if there is no GPU.
# SMOKE_DEVICE=CPU tries out the script itself on a machine without a GPU. The checks are then made on a smaller network,
# with fewer images and weaker attacks, and without XLA, which is slow on a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}"
device=${SMOKE_DEVICE:-GPU}
python=${PYTHON:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

case $device in
  GPU)
    "$python" - <<'PY' || exit 3
import sys
import tensorflow as tf

gpus = tf.config.list_physical_devices("GPU")
if not gpus:
    sys.exit(
        f"TensorFlow {tf.__version__} sees no GPU. Check that the driver works (nvidia-smi) and that the package was "
        "installed as '.[and-cuda]'. SMOKE_DEVICE=CPU tries out this script without a GPU."
    )
details = tf.config.experimental.get_device_details(gpus[0])
print(f"{details.get('device_name', gpus[0].name)}, compute capability {details.get('compute_capability')}")
PY
    ;;
  CPU) export CUDA_VISIBLE_DEVICES=-1 ;;
  *)
    echo "SMOKE_DEVICE must be GPU or CPU. Received: $device." >&2
    exit 1
    ;;
esac

# This version reads every flag file.
"$python" - <<'PY'
import pathlib
from robust_tf.config.job import read_flag_file

for path in sorted(pathlib.Path("configs").glob("*.cfg")):
    read_flag_file(path)
PY

# The source of the quickstart with fewer epochs, then with the options for accelerators.
train() {
  local name=$1
  shift
  "$python" -m robust_tf.train --flagfile=configs/quickstart_source.cfg --epochs=3 --workdir="$work/$name" "$@" \
    >"$work/$name.log" 2>&1 || {
    cat "$work/$name.log" >&2
    echo "FAILED: $name" >&2
    exit 1
  }
  "$python" - "$work/$name" <<'PY'
import json
import pathlib
import sys
from robust_tf.training.checkpoint import Checkpoints

workdir = pathlib.Path(sys.argv[1])
results = json.loads((workdir / "results.json").read_text())
losses = [epoch["loss"] for epoch in Checkpoints(workdir / "checkpoints").latest().progress.history]
if not losses[-1] < losses[0]:
    sys.exit(f"FAILED: {workdir.name}: the loss did not fall. Received: {losses}.")
print(f"{workdir.name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, robust {results['robust_accuracy']:.1%} of the test images")
PY
  grep '^epoch' "$work/$name.log" | tail -n 1 # ends with the images/s, without the time to compile
}

xla=(--jit_compile=true)
smaller=()
# Half precision is slow on a CPU.
[[ $device == CPU ]] && xla=(--jit_compile=false) && smaller=(--architecture=resnet8 --subset=400 --attack_steps=2 --eval_steps=2 --alarm_every_epochs=100)
train float32 "${smaller[@]}"
for precision in float32 mixed_bfloat16 mixed_float16; do
  train "${precision}${xla[0]#--jit_compile}" --nodeterministic --precision="$precision" "${xla[@]}" "${smaller[@]}"
done

# PGD equals the reference within the tolerance of the tests. This needs true float32: TF32 has a mantissa of 10 bits.
NVIDIA_TF32_OVERRIDE=0 "$python" -m pytest -q -p no:cacheprovider --basetemp="$work/pytest" \
  tests/attacks/test_pgd.py -k "equals_the_reference or losses_of_the_reference or graph_equals_eager" || {
  echo "FAILED: PGD differs from the reference on this device" >&2
  exit 1
}
echo "Everything works on this $device."
