"""Plans a job for accelerators that this machine need not have, and shows the arithmetic (`--plan_devices`).

The work is counted on the traced training step. The time follows from a roofline (Williams et al. 2009): the operations
of the convolutions and matrix products at the peak speed of the device, or the bytes that they move at the bandwidth of
its memory, whichever takes longer, divided by the share of that speed which a job reaches: `--plan_utilization`, by
default what was measured with and without XLA (`calibration.py`).
"""

import dataclasses
import math
from collections.abc import Iterable

import keras
import tensorflow as tf
from rich.table import Table

from robust_tf.attacks import AttackConfig, run_pgd
from robust_tf.config.job import JobConfig
from robust_tf.config.optimization import Precision
from robust_tf.errors import UserError
from robust_tf.job.building import job_optimizer, job_recipe, optimizer_steps_per_epoch
from robust_tf.job.planning.calibration import (
    COMPUTE_UTILIZATION,
    TRAFFIC_FACTOR,
    Measured,
    expected,
    obstacle_to_xla,
)
from robust_tf.job.planning.devices import Cluster
from robust_tf.job.planning.flops import GraphWork, Work, count_work
from robust_tf.job.planning.table import fused_activation_bytes
from robust_tf.job.task import TaskSummary
from robust_tf.training.metrics import CrossEntropy
from robust_tf.training.trainer import AdversarialTrainer
from robust_tf.training.xla import compiles_with_xla

# GPU memory that CUDA, cuDNN's workspaces and TensorFlow take in addition to the tensors. This number is quoted
# from memory, not measured.
_RESERVED_BYTES = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobWork:
    """The operations and the memory that a job needs on any device.

    Attributes:
        forward: Work of the forward pass of one image.
        step: Work of the training step, including the attack, for one image of the batch.
        attack_step: Work of one attack step (forward pass and input gradient) for one image. None without an attack.
        weight_bytes: Bytes of all weights.
        gradient_bytes: Bytes of the gradients of the trainable weights.
        optimizer_bytes: Bytes of the optimizer's variables.
        compute_copy_bytes: Bytes of the copy of the weights in the lower precision that `--precision` sets.
        image_bytes: Bytes that training needs for one image of the batch.
    """

    forward: Work
    step: GraphWork
    attack_step: Work | None
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    compute_copy_bytes: int
    image_bytes: float

    @property
    def fixed_bytes(self) -> int:
        """Bytes that do not depend on the batch size."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.compute_copy_bytes

    def evaluation(self, attack_steps: int) -> Work:
        """Returns the work of evaluating one image: the steps of the attack, and the forward passes outside them.

        Args:
            attack_steps: Number of steps of the attack. 0 means no attack.
        """
        if attack_steps and self.attack_step is not None:
            return self.attack_step * attack_steps + self.forward * 2
        return self.forward


def job_work(job: JobConfig, classifier: keras.Model, task: TaskSummary) -> JobWork:
    """Counts the work of a job on traced graphs, without running anything.

    Args:
        job: Job to plan.
        classifier: Classifier that was built under the precision of the job, with the right layers frozen.
        task: Size of its data.
    """
    adversarial, optimization = job.adversarial, job.optimization
    steps = optimizer_steps_per_epoch(optimization, replays=adversarial.replays, batches=task.steps_per_epoch)
    recipe = job_recipe(adversarial, optimization, steps)
    trainer = AdversarialTrainer(classifier, adversarial.training_attack, recipe=recipe, seed=job.run.seed)
    # Without XLA, the trainer computes weight gradients on a CPU in another way than on the device that is planned for.
    compiled = compiles_with_xla(True, classifier)
    trainer.compile(optimizer=job_optimizer(optimization, steps), loss=CrossEntropy(), jit_compile=compiled)
    trainer.optimizer.build(classifier.trainable_variables)

    batch_size = optimization.batch_size
    shape = (batch_size, task.image_size, task.image_size, 3)
    images = tf.TensorSpec(shape, tf.float32)
    labels = tf.TensorSpec(shape[:1], tf.int32)
    train_labels = labels if job.data.mixing == "none" else tf.TensorSpec((shape[0], len(task.class_names)), tf.float32)
    share = 1 / batch_size
    attack = adversarial.training_attack if adversarial.training_attack.active else adversarial.evaluation_attack
    attack_step = None
    if attack.active:
        attacked = count_work(lambda x, y: run_pgd(classifier, x, y, attack=attack).images_adv, images, labels)
        attack_step = attacked.loops[0].iteration * share
    weight_bytes = _bytes_of(classifier.variables)
    return JobWork(
        forward=count_work(lambda x: classifier(x, training=False), images).total * share,
        step=count_work(lambda x, y: trainer.train_step((x, y)), images, train_labels) * share,
        attack_step=attack_step,
        weight_bytes=weight_bytes,
        gradient_bytes=_bytes_of(classifier.trainable_variables),
        optimizer_bytes=_bytes_of(trainer.optimizer.variables),
        compute_copy_bytes=0 if optimization.precision == "float32" else weight_bytes // 2,
        image_bytes=fused_activation_bytes(classifier, optimization.precision),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """The times of a job on a cluster, all in seconds.

    Attributes:
        compute: Time of the operations of a step at the peak speed.
        traffic: Time of the memory traffic of a step at the peak bandwidth.
        longest: The one of these two that limits the step at the share that it reaches.
        share: This share, in (0, 1].
        reduce: Time of the all-reduce of a step.
        reduce_text: The arithmetic of this time.
        step: Time of a step.
        validation: Time of a validation.
        epoch: Time of an epoch with its validation.
        test: Time of the final test.
        run: Time of the whole job.
        measured: Measured utilization that the shares come from.
        obstacle: Why XLA is not used; empty if it is.
        peak: Peak speed of a device at the job's precision, in FLOP/s.
    """

    compute: float
    traffic: float
    longest: float
    share: float
    reduce: float
    reduce_text: str
    step: float
    validation: float
    epoch: float
    test: float
    run: float
    measured: Measured
    obstacle: str
    peak: float


def estimate(
    job: JobConfig, task: TaskSummary, work: JobWork, cluster: Cluster, *, utilization: float | None
) -> Estimate:
    """Estimates how long a job takes on one cluster.

    With `--features=cached` it is the time in which the features of all images are computed, since fitting a head to
    them takes much less.

    Args:
        job: Job to plan.
        task: Size of its data.
        work: Operations and memory of the job.
        cluster: Devices to plan for.
        utilization: Share of the peak speed or bandwidth that the job reaches. None means what was measured.

    Raises:
        UserError: The devices lack the precision, or cannot share the batch equally.
    """
    device, count = cluster.device, cluster.devices
    precision, batch_size = job.optimization.precision, job.optimization.batch_size
    peak = device.peak(precision)
    if peak is None:
        raise UserError(
            f"{cluster.device_name} has no units for this precision. Received: --precision={precision} "
            f"--plan_devices={cluster.name}. Choose another one: float32, mixed_bfloat16 or mixed_float16."
        )
    if batch_size % count:
        raise UserError(
            f"The {count} devices of {cluster.name} share every batch equally. Received: "
            f"--batch_size={batch_size}, which is not a multiple of {count}."
        )
    attack_steps = _steps_of(job.adversarial.training_attack)
    obstacle = obstacle_to_xla(job, cluster)
    measured = expected(compiled=not obstacle, precision=precision, gpu=cluster.device_name)
    shares = (COMPUTE_UTILIZATION, measured.utilization) if utilization is None else (utilization, utilization)

    def roofline(needed: Work) -> tuple[float, float, float, float]:
        """Returns the compute time, the memory time, and of the one that takes longer at its share also that share."""
        times = needed.flops / (count * peak), TRAFFIC_FACTOR * needed.bytes_moved / (count * device.bandwidth)
        longest, share = max(zip(times, shares, strict=True), key=lambda pair: pair[0] / pair[1])
        return *times, longest, share

    compute, traffic, longest, share = roofline(work.step.total * batch_size)
    reduce_seconds, reduce_text = _all_reduce(work.gradient_bytes, cluster)
    step = longest / share + reduce_seconds

    def evaluation_seconds(images: int, steps: int) -> float:
        *_, longest, share = roofline(work.evaluation(steps) * images)
        return longest / share

    validation = evaluation_seconds(task.num_validation, attack_steps)
    test = evaluation_seconds(task.num_test, _steps_of(job.adversarial.evaluation_attack))
    epoch = task.steps_per_epoch * step + validation
    run = job.data_epochs * epoch + test
    if job.transfer.cached:
        run = evaluation_seconds(task.num_train * job.transfer.views + task.num_validation, 0) + test
    return Estimate(
        compute=compute,
        traffic=traffic,
        longest=longest,
        share=share,
        reduce=reduce_seconds,
        reduce_text=reduce_text,
        step=step,
        validation=validation,
        epoch=epoch,
        test=test,
        run=run,
        measured=measured,
        obstacle=obstacle,
        peak=peak,
    )


def _steps_of(attack: AttackConfig) -> int:
    return attack.steps if attack.active else 0


def device_plan(job: JobConfig, task: TaskSummary, work: JobWork, cluster: Cluster) -> Table:
    """Returns the plan on one cluster, with a line for each step of the arithmetic.

    Args:
        job: Job to plan.
        task: Size of its data.
        work: Operations and memory of the job.
        cluster: Devices to plan for.

    Raises:
        UserError: The devices lack the precision, or cannot share the batch equally.
    """
    price, given = job.plan.plan_price, job.plan.plan_utilization
    times = estimate(job, task, work, cluster, utilization=given)
    device, count, peak = cluster.device, cluster.devices, times.peak
    precision, batch_size = job.optimization.precision, job.optimization.batch_size
    attack_steps, final_steps = (
        _steps_of(attack) for attack in (job.adversarial.training_attack, job.adversarial.evaluation_attack)
    )
    per_device, step = batch_size // count, work.step.total
    hours = times.run * count / 3600

    title = f"Plan on {cluster.name}: {cluster.hosts} x {cluster.per_host} {cluster.device_name}, {precision}"
    table = Table(title=title, title_justify="left", show_header=False)
    rows = {
        "device": f"{_si(peak, 'FLOP/s')}, {_si(device.memory, 'B')} at {_si(device.bandwidth, 'B/s')} "
        f"({device.source})",
        "forward pass": f"{_si(work.forward.flops / 2, 'multiply-adds')} x 2 = {_si(work.forward.flops, 'FLOP')} an "
        "image, counted in the traced graph",
        **_step_rows(work),
        "step": f"{_si(step.flops, 'FLOP')} an image = {step.flops / work.forward.flops:.3g} forward passes; "
        f"x {batch_size} = {_si(step.flops * batch_size, 'FLOP')}",
        "compute time": f"{_si(step.flops * batch_size, 'FLOP')} / ({count} x {_si(peak, 'FLOP/s')}) = "
        f"{_time(times.compute)}",
        "memory time": f"{TRAFFIC_FACTOR} x {_si(step.bytes_moved, 'B')} an image x {batch_size} / "
        f"({count} x {_si(device.bandwidth, 'B/s')}) = {_time(times.traffic)}",
        "all-reduce": times.reduce_text,
        **_utilization_rows(times.measured, times.obstacle, given),
        "time of a step": f"{_time(times.longest)} / {times.share:g} utilization "
        f"+ {_time(times.reduce)} = {_time(times.step)}, {batch_size / times.step:,.0f} images/s",
        "time of an epoch": f"{task.steps_per_epoch:,} steps x {_time(times.step)} + validation "
        f"({task.num_validation:,} images, PGD-{attack_steps}) {_time(times.validation)} = {_time(times.epoch)}",
        "time of the run": f"{job.data_epochs} epochs x {_time(times.epoch)} + test ({task.num_test:,} images, "
        f"PGD-{final_steps}) {_time(times.test)} = {_time(times.run)}",
        "device-hours": f"{count} x {_time(times.run)} = {hours:,.2f} h",
        "input": f"{batch_size / times.step:,.0f} images/s / {cluster.hosts} (hosts) = "
        f"{batch_size / times.step / cluster.hosts:,.0f} images/s to decode and augment on each host",
        **_memory_rows(precision, work, cluster, per_device, times.measured.memory_factor),
        "checkpoint": f"{_si(work.weight_bytes, 'B')} weights + {_si(work.optimizer_bytes, 'B')} optimizer = "
        f"{_si(work.weight_bytes + work.optimizer_bytes, 'B')}; two are kept, and the best weights, "
        f"{_si(work.weight_bytes, 'B')}",
        "not counted": "launching kernels (microseconds each, which dominate where images are small and few), "
        "compiling, waiting for input, writing checkpoints, alarms"
        + (", what deterministic kernels cost" if job.run.deterministic else ""),
    }
    if price is not None:
        rows["cost"] = f"{hours:,.2f} device-hours x {price:g} = {hours * price:,.2f}"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _utilization_rows(measured: Measured, obstacle: str, given: float | None) -> dict[str, str]:
    xla = f"no: {obstacle}" if obstacle else "yes: it compiles each device's attack, forward pass and gradients"
    if given is not None:
        return {"XLA": xla, "utilization": f"{given:g} (--plan_utilization)"}
    return {
        "XLA": xla,
        "utilization": f"{measured.utilization:g} of the memory bandwidth, as measured on one {measured.gpu} "
        f"{'with' if measured.compiled else 'without'} XLA in {measured.precision} (ResNet-50 at 224x224, PGD-3: "
        f"{measured.images_per_second:,.0f} images/s), or {COMPUTE_UTILIZATION:g} of the peak speed, as assumed",
    }


def _step_rows(work: JobWork) -> dict[str, str]:
    rows = {}
    for number, loop in enumerate(work.step.loops):
        name = "attack" if number == 0 else f"loop {number + 1}"
        rows[name] = (
            f"{loop.iterations} x {_parts(loop.iteration)} = "
            f"{_si(loop.iteration.flops * loop.iterations, 'FLOP')} an image"
        )
    passes = work.step.outside.forward / work.forward.flops
    rows["outside the attack" if rows else "training pass"] = (
        f"{_parts(work.step.outside)} = {_si(work.step.outside.flops, 'FLOP')} an image, including {passes:.3g} "
        "forward passes"
    )
    return rows


def _parts(work: Work) -> str:
    parts = {"forward": work.forward, "input gradients": work.input_gradient, "weight gradients": work.weight_gradient}
    return "(" + " + ".join(f"{_si(value, 'FLOP')} {name}" for name, value in parts.items() if value) + ")"


def _all_reduce(gradient_bytes: int, cluster: Cluster) -> tuple[float, str]:
    """Returns the seconds of an all-reduce, and the arithmetic as text: a ring in each host, then one between hosts.

    It is assumed not to overlap with the backward pass. Source: a ring of n devices sends 2 (n - 1) / n of the bytes
    over each link (Patarasuk & Yuan 2009).
    """
    device, amount = cluster.device, _si(gradient_bytes, "B")
    if device.network is None:
        rings = [(cluster.devices, device.link)]
    else:
        rings = [(cluster.per_host, device.link), (cluster.hosts, device.network)]
    rings = [(members, speed) for members, speed in rings if members > 1]
    seconds = sum(2 * (members - 1) / members * gradient_bytes / speed for members, speed in rings)
    if not rings or not gradient_bytes:
        return seconds, "none on one device" if gradient_bytes else "none: nothing trains"
    terms = " + ".join(f"{amount} x 2 x {members - 1}/{members} / {_si(speed, 'B/s')}" for members, speed in rings)
    return seconds, f"{terms} = {_time(seconds)}"


def _memory_rows(
    precision: Precision, work: JobWork, cluster: Cluster, per_device: int, factor: float
) -> dict[str, str]:
    """Returns the rows on memory. `factor` multiplies the bytes of an image where XLA does not fuse the layers."""
    reserved = 0 if cluster.device.slice_unit else _RESERVED_BYTES
    image_bytes = work.image_bytes * factor
    free = cluster.device.memory - reserved - work.fixed_bytes
    needed = work.fixed_bytes + reserved + per_device * image_bytes
    parts = {
        "weights": work.weight_bytes,
        "copies in lower precision": work.compute_copy_bytes,
        "gradients": work.gradient_bytes,
        "optimizer": work.optimizer_bytes,
        f"activations of {per_device} images of {_si(image_bytes, 'B')}": per_device * image_bytes,
        "CUDA and TensorFlow": reserved,
    }
    listed = " + ".join(f"{_si(value, 'B')} {name}" for name, value in parts.items() if value)
    rows = {"memory": f"{listed} = {_si(needed, 'B')} a device"}
    if needed <= cluster.device.memory:
        rows["memory verdict"] = f"fits: {needed / cluster.device.memory:.0%} of {_si(cluster.device.memory, 'B')}"
        return rows
    most = int(max(free, 0) // image_bytes)
    rows["memory verdict"] = (
        f"OUT OF MEMORY: {_si(needed, 'B')} of {_si(cluster.device.memory, 'B')}. At most {most} images fit on a "
        f"device, {most * cluster.devices} in a batch. {_ways_out(precision, most, per_device)}"
    )
    return rows


def _ways_out(precision: Precision, most: int, per_device: int) -> str:
    ways = []
    parts = next((parts for parts in _divisors(per_device) if per_device // parts <= most), None)
    if parts:
        ways.append(f"--accumulate_steps={parts} (the same batch in {parts} parts)")
    if precision == "float32":
        ways.append("--precision=mixed_bfloat16 or mixed_float16")
    return f"Ways out: {', '.join([*ways, 'more devices', 'a smaller --batch_size', 'a smaller --image_size'])}."


def _divisors(number: int) -> Iterable[int]:
    return (candidate for candidate in range(1, number + 1) if number % candidate == 0)


def _bytes_of(variables: Iterable[keras.Variable]) -> int:
    return sum(math.prod(variable.shape) * tf.as_dtype(variable.dtype).size for variable in variables)


def _si(value: float, unit: str) -> str:
    """Writes a value with three digits and a decimal prefix, such as 8.18 GFLOP."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size * 0.9995:
            return f"{value / size:.3g} {prefix}{unit}" if len(unit) < 7 else f"{value / size:.3g} {prefix} {unit}"
    return f"{value:.3g} {unit}"


def _time(seconds: float) -> str:
    for unit, size, least in (("days", 86_400, 2), ("h", 3_600, 2), ("min", 60, 2), ("s", 1, 1)):
        if seconds >= least * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e3:.3g} ms"
