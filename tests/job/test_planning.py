"""Plans of `--dry_run`: work against hand counts, time against published speeds, memory against measurements."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import keras
import pytest
import tensorflow as tf
from scaling_page import PAGE, current_page

from robust_tf import train
from robust_tf.config.job import JobConfig, read_flag_file
from robust_tf.config.optimization import OptimizationConfig
from robust_tf.errors import UserError
from robust_tf.job.planning import calibration
from robust_tf.job.planning import table as plan
from robust_tf.job.planning.calibration import expected, obstacle_to_xla
from robust_tf.job.planning.devices import DEVICES, parse_clusters
from robust_tf.job.planning.flops import GraphWork, Loop, Work, count_work
from robust_tf.job.planning.plan import PlannedTask, planned_job, planned_task
from robust_tf.job.planning.roofline import JobWork, device_plan, job_work
from robust_tf.job.planning.table import estimated_bytes
from robust_tf.job.task import load_job_task
from robust_tf.models import build_classifier

ROOT = pathlib.Path(__file__).parents[2]


def network(architecture: str, size: int, num_classes: int = 1000) -> keras.Model:
    return build_classifier(architecture, num_classes, image_size=size, mean=(0, 0, 0), std=(1, 1, 1))


def forward_of(model: keras.Model, *, batch: int = 1) -> Work:
    return count_work(lambda x: model(x, training=False), tf.TensorSpec([batch, *model.input_shape[1:]])).total


# Multiply-adds in units of 1e9, from torchvision's documentation of its models. The ResNet-18 for CIFAR has 0.5559
# (0.56 in its authors' tables).
@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "size", "giga"),
    [
        ("resnet18", 224, 1.81),
        ("resnet50", 224, 4.09),
        ("vgg16_bn", 224, 15.47),
        ("mobilenet_v2", 224, 0.30),
        ("resnext50_32x4d", 224, 4.23),
        ("cifar_resnet18", 32, 0.56),
    ],
)
def test_the_forward_pass_has_the_published_count(architecture, size, giga):
    assert forward_of(network(architecture, size)).forward / 2e9 == pytest.approx(giga, abs=0.006)


def test_counts_equal_hand_counts():
    inputs = keras.Input((8, 8, 3))
    hidden = keras.layers.Conv2D(5, 3, strides=2, padding="same")(inputs)  # 4 x 4 x 5 outputs of 3 x 3 x 3
    hidden = keras.layers.DepthwiseConv2D(3, padding="same")(hidden)  # 4 x 4 x 5 outputs of 3 x 3
    outputs = keras.layers.Dense(7)(keras.layers.Flatten()(hidden))  # 7 outputs of 80
    model = keras.Model(inputs, outputs)
    conv, depthwise, dense = 2 * 80 * 27, 2 * 80 * 9, 2 * 7 * 80

    def gradients(images):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(images) ** 2)
        return tape.gradient(loss, model.trainable_variables)

    work = count_work(gradients, tf.TensorSpec([2, 8, 8, 3])).total
    assert work.forward == work.weight_gradient == 2 * (conv + depthwise + dense)
    assert work.input_gradient == 2 * (depthwise + dense)  # the gradient of the images is not needed
    # Each operation reads two tensors and writes one, of 4 bytes a value.
    values = (2 * 192 + 135 + 2 * 80) + (2 * 80 + 45 + 2 * 80) + (2 * 80 + 560 + 2 * 7)
    assert forward_of(model, batch=2).bytes_moved == 4 * values


def test_a_loop_counts_once_for_each_iteration():
    kernel = tf.ones([4, 4])

    def function(x):
        return tf.while_loop(lambda i, x: i < 5, lambda i, x: (i + 1, x @ kernel), (0, x), maximum_iterations=5)[1]

    work = count_work(function, tf.TensorSpec([3, 4]))
    assert work.loops == (Loop(iterations=5, iteration=Work(forward=96.0, bytes_moved=4.0 * (12 + 16 + 12))),)
    assert work.total.flops == 5 * 96
    endless = lambda x: tf.while_loop(lambda x: tf.reduce_sum(x) < 5, lambda x: (x @ kernel,), (x,))[0]  # noqa: E731
    with pytest.raises(ValueError, match="does not give the number of iterations"):
        count_work(endless, tf.TensorSpec([3, 4]))


def digits(**changes) -> JobConfig:
    options = {"dry_run": True, "plan_devices": ("A100",), "norm": "l2", "epsilon": 1.0, "attack_steps": 5}
    return JobConfig.from_flags(**{**options, "architecture": "resnet8", "batch_size": 64, **changes})


def work_of(config: JobConfig) -> JobWork:
    keras.config.set_dtype_policy(config.optimization.precision)
    classifier, task = planned_job(config)
    return job_work(config, classifier, task)


@pytest.mark.slow
def test_an_adversarial_step_is_the_attack_and_one_training_pass():
    work = work_of(digits())
    forward = work.forward.flops
    (attack,) = work.step.loops
    assert attack == Loop(iterations=5, iteration=work.attack_step)
    assert (attack.iteration.forward, attack.iteration.input_gradient, attack.iteration.weight_gradient) == (
        forward,
        forward,
        0,
    )
    # Outside the loop are the last iterate (--use_best) and the training pass, which needs no gradient of the images.
    outside = work.step.outside
    assert (outside.forward, outside.weight_gradient) == (2 * forward, forward)
    assert 0.9 * forward < outside.input_gradient < forward
    assert work_of(digits(use_best=False)).step.outside.forward == forward


@pytest.mark.slow
def test_standard_training_and_frozen_layers_need_less_work(tmp_path):
    standard = work_of(digits(epsilon=0.0, eval_epsilon=1.0))
    assert standard.step.loops == () and 2.9 < standard.step.total.flops / standard.forward.flops < 3
    path = tmp_path / "source.cfg"
    path.write_text("--architecture=resnet8\n--norm=l2\n--epsilon=1\n")
    workdir = str(tmp_path / "job")
    head = work_of(digits(task="transfer", source=str(path), epsilon=0.0, workdir=workdir))
    assert head.step.total.flops == pytest.approx(
        head.forward.flops, rel=0.01
    )  # nothing below the head is differentiated
    assert head.gradient_bytes == 4 * (64 * 10 + 10)


TASK = PlannedTask(
    num_train=10_000,
    num_validation=1_000,
    num_test=2_000,
    class_names=("a", "b"),
    image_size=32,
    augmentation="none",
    steps_per_epoch=100,
)
ONE = Work(forward=1e9, bytes_moved=1e6)
WORK = JobWork(
    forward=ONE,
    step=GraphWork(loops=(Loop(iterations=3, iteration=ONE * 2),), outside=ONE * 4),
    attack_step=ONE * 2,
    weight_bytes=100_000_000,
    gradient_bytes=100_000_000,
    optimizer_bytes=100_000_000,
    compute_copy_bytes=0,
    image_bytes=100_000_000,
)


def rows_of(config: JobConfig, work: JobWork = WORK, task: PlannedTask = TASK) -> dict[str, str]:
    (cluster,) = parse_clusters(config.plan.plan_devices)
    table = device_plan(config, task, work, cluster)
    return dict(zip(*(list(column.cells) for column in table.columns), strict=True))


def test_the_arithmetic_of_a_plan():
    config = digits(plan_devices=("2x4xA100",), batch_size=80, epochs=10, attack_steps=3, eval_steps=20, plan_price=3.0)
    config_rows = rows_of(config)
    compute = 10e9 * 80 / (8 * 156e12)  # 0.641 ms; memory: 2 x 10 MB x 80 / (8 x 1.555 TB/s) = 0.129 ms
    reduce = 1e8 * 2 * 3 / 4 / 300e9 + 1e8 * 2 * 1 / 2 / 200e9  # 0.5 + 0.5 ms
    step = compute / 0.35 + reduce
    validation, test = 1000 * 8e9 / (8 * 156e12) / 0.35, 2000 * 42e9 / (8 * 156e12) / 0.35
    run = 10 * (100 * step + validation) + test
    assert config_rows["compute time"] == f"800 GFLOP / (8 x 156 TFLOP/s) = {compute * 1e3:.3g} ms"
    assert config_rows["memory time"].endswith("= 0.129 ms")
    assert config_rows["all-reduce"] == "100 MB x 2 x 3/4 / 300 GB/s + 100 MB x 2 x 1/2 / 200 GB/s = 1 ms"
    assert config_rows["time of a step"].startswith(f"{compute * 1e3:.3g} ms / 0.35 utilization + 1 ms = ")
    assert f"= {step * 1e3:.3g} ms, {80 / step:,.0f} images/s" in config_rows["time of a step"]
    assert config_rows["time of the run"].endswith(f"= {run:.3g} s")
    assert config_rows["cost"] == f"{run * 8 / 3600:,.2f} device-hours x 3 = {run * 8 / 1200:,.2f}"
    assert f"= {80 / step / 2:,.0f} images/s to decode" in config_rows["input"]
    assert config_rows["checkpoint"].startswith("100 MB weights + 100 MB optimizer = 200 MB")


def test_the_memory_is_the_limit_where_its_share_takes_longer():
    moving = Work(forward=1e9, bytes_moved=2.5e6)  # 4.1 ms of compute time on an A100, 2.06 ms of memory time
    work = dataclasses.replace(
        WORK, step=GraphWork(loops=(Loop(iterations=3, iteration=moving * 2),), outside=moving * 4)
    )
    with_xla = rows_of(digits(), work)
    assert with_xla["XLA"].startswith("yes") and "0.35 utilization" in with_xla["time of a step"]
    slow = rows_of(digits(jit_compile="false"), work)
    share = expected(compiled=False, precision="float32", gpu="A100").utilization
    memory = 10 * 2 * 2.5e6 * 64 / 1.555e12
    assert slow["XLA"] == "no: --jit_compile=false"
    assert slow["utilization"].startswith(f"{share:g} of the memory bandwidth") and "without XLA" in slow["utilization"]
    assert slow["time of a step"].startswith(f"{memory * 1e3:.3g} ms / {share:g} utilization + 0 ms = ")
    assert f"= {memory / share * 1e3:.3g} ms, {64 * share / memory:,.0f} images/s" in slow["time of a step"]
    given = rows_of(digits(jit_compile="false", plan_utilization=0.5), work)
    assert given["utilization"] == "0.5 (--plan_utilization)"
    assert given["time of a step"].startswith("4.1 ms / 0.5 utilization")  # now the compute time takes longer


def test_a_plan_says_that_deterministic_kernels_cost_time():
    assert "deterministic kernels" in rows_of(digits(deterministic=True))["not counted"]
    assert "deterministic kernels" not in rows_of(digits())["not counted"]


def test_without_xla_a_job_needs_the_memory_that_was_measured():
    factor = expected(compiled=False, precision="mixed_bfloat16", gpu="A100").memory_factor
    assert factor > 1.1
    slow = rows_of(digits(precision="mixed_bfloat16", jit_compile="false"))
    assert f"activations of 64 images of {100 * factor:.3g} MB" in slow["memory"]
    assert "activations of 64 images of 100 MB" in rows_of(digits(precision="mixed_bfloat16"))["memory"]


@pytest.mark.parametrize(
    ("changes", "obstacle"),
    [
        ({}, ""),
        ({"plan_devices": ("8xH100",)}, ""),  # compiled for each device
        ({"jit_compile": "false"}, "--jit_compile=false"),
        ({"jit_compile": "false", "plan_devices": ("v4-8",)}, ""),
        ({"deterministic": True}, ""),
        ({"sync_batchnorm": True, "distribution": "mirrored"}, ""),  # on one device
        ({"sync_batchnorm": True, "distribution": "mirrored", "plan_devices": ("8xH200",)}, "--sync_batchnorm"),
    ],
)
def test_a_plan_says_what_keeps_xla_out(changes, obstacle):
    config = digits(**changes)
    (cluster,) = parse_clusters(config.plan.plan_devices)
    assert obstacle_to_xla(config, cluster) == obstacle


def test_the_gpu_of_a_measurement_gives_way_before_the_precision_and_this_before_the_compiler():
    assert expected(compiled=True, precision="float32", gpu="H200").compiled
    assert expected(compiled=False, precision="float32", gpu="H100").precision == "float32"
    assert expected(compiled=True, precision="mixed_bfloat16", gpu="A100") == calibration.MEASURED[0]
    for row in calibration.MEASURED:
        assert expected(compiled=row.compiled, precision=row.precision, gpu=row.gpu) == row
        assert 0 < row.utilization < 1 and 1 <= row.memory_factor < 4


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["mixed_bfloat16", "float32"])
def test_plans_return_what_was_measured(precision):
    size = calibration.MEASURED_BATCH_SIZE
    shape = {"dataset": "imagenet2012", "architecture": "resnet50", "epsilon": 3.0, "attack_steps": 3}
    config = digits(**shape, batch_size=size, precision=precision, plan_devices=("H100",))
    work, task = work_of(config), planned_task(config)
    index = precision == "float32"
    counted = (work.step.total.bytes_moved, work.fixed_bytes, work.image_bytes)
    written = (calibration._MOVED[index], calibration._FIXED[index], calibration._PER_IMAGE[index])
    assert counted == pytest.approx(written, rel=1e-3)
    for row in (row for row in calibration.MEASURED if row.precision == precision):
        rows = rows_of(
            digits(
                **{**shape, "batch_size": size, "precision": precision},
                plan_devices=(row.gpu,),
                jit_compile="true" if row.compiled else "false",
            ),
            work,
            task,
        )
        predicted = float(rows["time of a step"].split()[-2].replace(",", ""))
        assert predicted == pytest.approx(row.images_per_second, rel=0.01)
        needed = work.fixed_bytes + size * work.image_bytes * row.memory_factor
        assert row.peak_gib * 2**30 * 0.99 < needed < row.peak_gib * 2**30 * 1.25


def test_a_job_that_does_not_fit_gets_ways_out():
    rows = rows_of(digits(plan_devices=("T4",), batch_size=256))
    # (16 GiB - 1 GiB - 300 MB) / 100 MB
    assert rows["memory verdict"].startswith("OUT OF MEMORY: 27 GB of 17.2 GB. At most 158 images fit on a device")
    for way in ("--accumulate_steps=2", "--precision=mixed_", "--batch_size", "--image_size"):
        assert way in rows["memory verdict"]
    assert rows_of(digits(plan_devices=("2xT4",), batch_size=256))["memory verdict"].startswith("fits: 83%")


@pytest.mark.parametrize(
    ("text", "hosts", "per_host", "device"),
    [
        ("A100", 1, 1, "A100"),
        ("8xA100", 1, 8, "A100"),
        ("4x8xh100", 4, 8, "H100"),
        ("2xA100-80GB", 1, 2, "A100-80GB"),
        ("v4-8", 1, 4, "v4"),
        ("v4-128", 16, 4, "v4"),  # the name counts cores, and a chip has two
        ("v5e-8", 1, 8, "v5e"),
        ("v5e-16", 4, 4, "v5e"),
    ],
)
def test_clusters_are_read(text, hosts, per_host, device):
    (cluster,) = parse_clusters([text])
    assert (cluster.hosts, cluster.per_host, cluster.device) == (hosts, per_host, DEVICES[device])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8xA10O", "Received: 'A10O'. Did you mean 'A100'"),
        ("0xA100", "Received: '0xA100'"),
        ("8", "e.g. 8xA100,4x8xH100,v4-128. Received: '8'"),
        ("8xv4", "e.g. v4-128. Received: --plan_devices=8xv4"),
        ("v4-9", "multiple of 8 cores. Received: --plan_devices=v4-9"),
        ("v9-8", "Received: 'v9'"),
    ],
)
def test_wrong_clusters_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_clusters([text])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan_devices": ("3xA100",)}, "--batch_size=64, which is not a multiple of 3"),
        ({"plan_devices": ("V100",), "precision": "mixed_bfloat16"}, "no units for this precision.*mixed_bfloat16"),
    ],
)
def test_impossible_plans_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        rows_of(digits(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dry_run": False}, "--plan_devices is for --dry_run. Received: --plan_devices=A100"),
        ({"plan_devices": (), "plan_price": 2.0}, "--plan_price=2.0"),
        ({"plan_devices": (), "plan_utilization": 0.5}, "--plan_utilization=0.5"),
        ({"plan_utilization": 1.5}, "at most 1. Received: 1.5"),
        ({"plan_price": -1.0}, "Received: -1.0"),
        ({"workdir": "gs://bucket/run"}, "Received: --workdir=gs://bucket/run"),
    ],
)
def test_wrong_plan_flags_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        digits(**changes)


def test_imagenet_is_planned_without_its_images(tmp_path):
    config = read_flag_file(ROOT / "configs" / "imagenet_resnet50_l2_eps3.cfg", [f"--data_dir={tmp_path}"])
    task = planned_task(config)
    assert (task.num_train + task.num_validation, task.num_test) == (1_281_167, 50_000)
    assert (len(task.class_names), task.image_size) == (1000, 224)
    assert task.steps_per_epoch == -(-task.num_train // 512)


def test_the_planned_size_equals_the_size_of_the_data(data_dir):
    config = digits(data_dir=str(data_dir))
    planned, real = planned_task(config), load_job_task(config)
    for name in ("num_train", "num_validation", "num_test", "image_size", "augmentation", "steps_per_epoch"):
        assert getattr(planned, name) == getattr(real, name)
    chosen = digits(data_dir=str(data_dir), classes=(1, 2))
    assert planned_task(chosen).num_train == load_job_task(chosen).num_train < planned.num_train


def test_dry_run_prints_a_plan_for_each_cluster(capsys, data_dir):
    train.run(digits(data_dir=str(data_dir), plan_devices=("2xA100", "v4-8"), precision="mixed_bfloat16"))
    out = capsys.readouterr().out
    assert "Plan on 2xA100: 1 x 2 A100, mixed_bfloat16" in out and "Plan on v4-8: 1 x 4 v4" in out
    assert out.count("forward passes") >= 2 and "fits" in out
    assert keras.config.dtype_policy().name == "float32"


# Images per second of NVIDIA's training of ResNet-50 v1.5 on one GPU, with TensorFlow and XLA. Source:
# DeepLearningExamples, TensorFlow/Classification/ConvNets/resnet50v1.5, "Training performance results".
@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "precision", "batch_size", "published"),
    [
        ("V100", "float32", 128, 412),
        ("V100", "mixed_float16", 256, 1270),
        ("A100", "float32", 256, 909),
        ("A100", "mixed_float16", 256, 2375),
    ],
)
def test_default_utilization_against_published_speeds(device, precision, batch_size, published):
    config = digits(
        dataset="imagenet2012",
        architecture="resnet50",
        epsilon=0.0,
        precision=precision,
        batch_size=batch_size,
        plan_devices=(device,),
    )
    rows = rows_of(config, work_of(config), planned_task(config))
    assert rows["memory verdict"].startswith("fits")  # as it did in their training
    predicted = float(rows["time of a step"].split()[-2].replace(",", ""))
    assert published / 2 < predicted < published * 1.5


_MEASURE = """
import json, re, sys
from robust_tf.environment import set_tensorflow_defaults
set_tensorflow_defaults()
import keras, numpy as np, tensorflow as tf
from robust_tf.config.attack import AttackConfig
from robust_tf.models import build_classifier
from robust_tf.training.metrics import CrossEntropy
from robust_tf.training.optimizers import build_optimizer
from robust_tf.training.trainer import AdversarialTrainer
architecture, size, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
classifier = build_classifier(architecture, 10, image_size=size, mean=(0, 0, 0), std=(1, 1, 1))
trainer = AdversarialTrainer(classifier, AttackConfig(norm="l2", epsilon=1.0, step_size=1.0, steps=2))
trainer.compile(optimizer=build_optimizer("sgd", learning_rate=0.01), loss=CrossEntropy(), jit_compile=False)
images = np.random.default_rng(0).uniform(size=(batch, size, size, 3)).astype("float32")
data = tf.data.Dataset.from_tensors((images, np.zeros(batch, "int32"))).repeat(3)
trainer.fit(data, verbose=0)
# With getrusage, a process would start with the peak of its parent.
print(json.dumps(int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "size", "batch_size"), [("resnet20", 32, 512), ("resnet18", 64, 128), ("mobilenet_v2", 64, 128)]
)
def test_the_estimated_memory_is_right_within_its_factor(architecture, size, batch_size):
    arguments = [sys.executable, "-c", _MEASURE, architecture, str(size), str(batch_size)]
    measured = json.loads(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)
    classifier = network(architecture, size, num_classes=10)
    estimate = estimated_bytes(digits(batch_size=batch_size), classifier)
    assert 1 / 1.5 < estimate / measured < 1.5, (estimate / 2**20, measured / 2**20)


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"lr_schedule": "cosine", "warmup_epochs": 2.0}, "0.1, cosine, rises from 0 for 2 epochs"),
        ({"lr_step_epochs": 2}, "0.1, step, x 0.1 after epochs 2, 4, 6, 8"),
        ({"lr_step_epochs": 1, "lr_decay": 0.9}, "0.1, step, x 0.9 after epochs 1, 2, 3, 4, ..."),
        ({"lr_step_epochs": 10}, "0.1, step, x 0.1 never within 10 epochs"),
        ({"lr_schedule": "piecewise", "lr_milestones": (6, 30)}, "0.1, piecewise, x 0.1 after epochs 6"),
        ({"base_batch_size": 256, "batch_size": 32, "accumulate_steps": 4}, "0.05, step, x 0.1 never within 10"),
    ],
)
def test_the_plan_shows_the_drops_of_the_learning_rate_that_the_job_reaches(settings, shown):
    assert plan._learning_rate(OptimizationConfig(epochs=10, **settings)).startswith(f"learning rate {shown}")


@pytest.mark.slow
def test_the_page_on_scaling_shows_what_its_commands_print():
    page = PAGE.read_text(encoding="utf-8")
    assert current_page(page) == page, "python tests/job/scaling_page.py brings it up to date"
