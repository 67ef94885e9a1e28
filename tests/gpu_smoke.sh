#!/usr/bin/env bash
# Checks a machine with one GPU in a few minutes: training jobs run on it, PGD finds the same images as on a CPU, and
# compiled training repeats bit by bit.
#   python -m pip install '.[and-cuda,test]' && tests/gpu_smoke.sh
# Exits with 0 if everything works, with 1 if something is wrong, and with 3 if there is no GPU.
# The checks run side by side, since most of their time goes to starting TensorFlow and compiling. They share the GPU.
# SMOKE_DEVICE=CPU tries out the script itself on a machine without a GPU. The checks are then made on a smaller network,
# with fewer images and weaker attacks, without XLA, which is slow on a CPU, and only as many at once as there are cores.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}"
export TF_FORCE_GPU_ALLOW_GROWTH=true # otherwise the first process takes all of the GPU's memory
device=${SMOKE_DEVICE:-GPU}
python=${PYTHON:-python}
work=$(mktemp -d)
checks=()
stop() {
  jobs -rp | xargs -r kill 2>/dev/null || true
  wait || true
  rm -rf "$work"
}
trap stop EXIT
trap 'exit 1' INT TERM

case $device in
  GPU) ;;
  CPU) export CUDA_VISIBLE_DEVICES=-1 ;;
  *)
    echo "SMOKE_DEVICE must be GPU or CPU. Received: $device." >&2
    exit 1
    ;;
esac

# There is a GPU, this version reads every flag file, and the digits are prepared before several jobs want them.
"$python" - "$device" <<'PY' || exit
import pathlib
import sys
import tensorflow as tf
from robust_tf.config.job import read_flag_file
from robust_tf.data.tfds_preparation import prepared_builder

if sys.argv[1] == "GPU":
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        print(
            f"TensorFlow {tf.__version__} sees no GPU. Check that the driver works (nvidia-smi) and that the package was "
            "installed as '.[and-cuda]'. SMOKE_DEVICE=CPU tries out this script without a GPU.",
            file=sys.stderr,
        )
        sys.exit(3)
    details = tf.config.experimental.get_device_details(gpus[0])
    print(f"{details.get('device_name', gpus[0].name)}, compute capability {details.get('compute_capability')}")
for path in sorted(pathlib.Path("configs").glob("*.cfg")):
    if "--vary=" not in path.read_text(encoding="utf-8"):  # the grid of a study
        read_flag_file(path)
prepared_builder("digits")
PY

# start NAME COMMAND ...: runs a command in the background, with its output in NAME.log.
start() {
  local name=$1 limit=100
  shift
  [[ $device == CPU ]] && limit=$(nproc)
  while (($(jobs -rp | wc -l) >= limit)); do sleep 0.2; done
  checks+=("$name")
  (
    if "$@" >"$work/$name.log" 2>&1; then echo "$SECONDS" >"$work/$name.passed"; fi
  ) &
}

# The source of the quickstart with fewer epochs, then with the options for accelerators.
train() {
  local name=$1
  shift
  start "$name" training "$work/$name" "$@"
}
training() {
  local workdir=$1
  shift
  "$python" -m robust_tf.train --flagfile=configs/quickstart_source.cfg --epochs=3 --workdir="$workdir" "$@" || return
  "$python" - "$workdir" <<'PY'
import csv
import json
import pathlib
import sys

workdir = pathlib.Path(sys.argv[1])
results = json.loads((workdir / "results.json").read_text(encoding="utf-8"))
with (workdir / "history.csv").open(newline="", encoding="utf-8") as file:
    losses = [float(epoch["loss"]) for epoch in csv.DictReader(file)]
if not losses[-1] < losses[0]:
    sys.exit(f"The loss did not fall. Received: {losses}.")
print(
    f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, robust {results['robust_accuracy']:.1%} of the test images, "
    f"{results['images_per_second']:,.0f} images/s"
)
PY
}

xla=(--jit_compile=true)
smaller=()
# Half precision is slow on a CPU.
[[ $device == CPU ]] && xla=(--jit_compile=false) && smaller=(--architecture=resnet8 --subset=400 --attack_steps=2 --eval_steps=2 --alarm_every_epochs=100)
train float32 "${smaller[@]}"
for precision in float32 mixed_bfloat16 mixed_float16; do
  train "${precision}${xla[0]#--jit_compile}" --nodeterministic --precision="$precision" "${xla[@]}" "${smaller[@]}"
done

# PGD equals the reference within the tolerance of the tests, and a GPU finds the images that a CPU finds. The tests turn
# TF32 off, whose mantissa has 10 bits.
start pgd "$python" -m pytest -q -p no:cacheprovider --basetemp="$work/pytest" \
  tests/attacks/test_pgd.py tests/attacks/test_pgd_on_gpu.py \
  -k "equals_the_reference or losses_of_the_reference or graph_equals_eager or on_gpu"

# XLA's deterministic kernels repeat and resume a training bit by bit. On a CPU the tests show that.
[[ $device == CPU ]] || start deterministic_xla "$python" tests/gpu_checks.py

failed=()
wait
for name in "${checks[@]}"; do
  if [[ -f $work/$name.passed ]]; then
    echo "$name: $(tail -n 1 "$work/$name.log") ($(<"$work/$name.passed") s after the start)"
  else
    cat "$work/$name.log" >&2
    echo "FAILED: $name, see above" >&2
    failed+=("$name")
  fi
done
((${#failed[@]} == 0)) || exit 1
echo "Everything works on this $device."
