"""Training of a classifier to its best weights: compiles it, restores the last checkpoint, and fits."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from robust_tf.config.job import JobConfig
from robust_tf.console import console
from robust_tf.data import TaskData
from robust_tf.errors import UserError
from robust_tf.flags import to_flag_file
from robust_tf.job.building import job_loss, job_optimizer, job_recipe, optimizer_steps_per_epoch
from robust_tf.job.dense import MeasureEachEpoch
from robust_tf.job.out_of_memory import out_of_memory_explained
from robust_tf.job.patience import StopEarly, patience_of
from robust_tf.job.reuse import reused_trainer, reuses_trainer
from robust_tf.tasks.base import DenseTask
from robust_tf.tasks.table import dense_task
from robust_tf.training.alarms import NUM_IMAGES, Alarms, EndOnAlarm, TrainingAlarm
from robust_tf.training.batchnorm import prepare_batchnorm
from robust_tf.training.callbacks import CallbacksFromStep, SaveProgress, StopOnNaN
from robust_tf.training.checkpoint import Checkpoints, State, TrainingProgress, named_arrays
from robust_tf.training.distribution import Distribution
from robust_tf.training.interruption import signals_held_back
from robust_tf.training.metrics import Accuracy, MeanPerClassAccuracy
from robust_tf.training.optimizers import average_statistics
from robust_tf.training.progress import ProgressBar
from robust_tf.training.tensorboard import ProfileSteps, TensorBoardLogger, write_config
from robust_tf.training.trainer import AdversarialTrainer
from robust_tf.training.unfreezing import UnfreezeAtEpoch
from robust_tf.training.xla import CompilingLines, execution_line
from robust_tf.transfer.stages import freeze

_PREVIEW_IMAGES = 8
_MOST_ROLLBACKS = 3
_ROLLBACK_FACTOR = 0.1  # factor for the learning rate at each rollback


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Fit:
    """The objects that stay the same during a training.

    Attributes:
        job: Job that is run.
        classifier: Classifier that is trained in place.
        task: Data of the job.
        workdir: Folder of the job.
        distribution: Devices of the job.
    """

    job: JobConfig
    classifier: keras.Model
    task: TaskData
    workdir: pathlib.Path
    distribution: Distribution

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.workdir / "checkpoints")

    @property
    def board(self) -> pathlib.Path:
        """Folder for TensorBoard."""
        return self.workdir / "tensorboard"

    @property
    def dense(self) -> DenseTask | None:
        return dense_task(self.job.data.task_type)

    @property
    def attacked(self) -> bool:
        return self.job.adversarial.training_attack.active


def fit_classifier(
    job: JobConfig, classifier: keras.Model, task: TaskData, workdir: pathlib.Path, distribution: Distribution
) -> TrainingProgress:
    """Trains the classifier in place and leaves it with the weights of the best epoch.

    Training that `workdir` already holds is not repeated. An epoch that raised an alarm is never the best one, unless
    `on_alarm` only warns.

    Args:
        job: Job to run.
        classifier: Classifier to train, with the right layers frozen.
        task: Data of the job.
        workdir: Folder of the job.
        distribution: Devices of the job.

    Raises:
        UserError: The first epoch raised an alarm even after the last allowed rollback.
        Interrupted: Ctrl-C or SIGTERM was received. The state has been saved.
    """
    fit = _Fit(job=job, classifier=classifier, task=task, workdir=workdir, distribution=distribution)
    checkpoints, patience = fit.checkpoints, patience_of(job)
    progress, alarmed = _train(fit)
    while alarmed and job.adversarial.on_alarm == "rollback" and progress.rollbacks < _MOST_ROLLBACKS:
        progress.rollbacks += 1
        distribution.on_chief(functools.partial(checkpoints.go_back_an_epoch, progress))
        console.print(
            f"Rollback {progress.rollbacks} of at most {_MOST_ROLLBACKS}: back to the end of epoch "
            f"{progress.epochs_done}, and the learning rate x {_ROLLBACK_FACTOR:g}."
        )
        progress, alarmed = _train(fit)
    if progress.best_epoch < 0:
        raise UserError(
            f"The first epoch raised an alarm in {progress.rollbacks + 1} tries. Received: {progress.alarms[-1]} Use "
            "--on_alarm=warn to continue despite alarms, in a new --workdir."
        )
    if patience.is_exhausted(progress):
        console.print(patience.explanation(progress))
    if alarmed:
        console.print(f"Training ends here; epoch {progress.best_epoch + 1}, the best before the alarm, is kept.")
    best = _state_of_chief(lambda: checkpoints.best(progress), distribution)
    if best is not None:
        best.assign_to(classifier.variables)
    prepare_batchnorm(classifier, synchronized=False)  # a saved classifier runs on a single device
    return progress


def _train(fit: _Fit) -> tuple[TrainingProgress, bool]:
    """Trains from the latest checkpoint to the end or an alarm; returns the progress and whether an alarm ended it."""
    job, task, checkpoints, distribution = fit.job, fit.task, fit.checkpoints, fit.distribution
    state = _state_of_chief(checkpoints.latest, distribution)
    progress = state.progress if state else TrainingProgress()
    unfrozen = _freeze_as_before(fit, progress)
    prepare_batchnorm(fit.classifier, synchronized=job.run.sync_batchnorm)
    with distribution.scope():
        trainer, compile_with = _compiled_trainer(fit, rollbacks=progress.rollbacks)
    if trainer.jit_compile and distribution.num_replicas == 1:  # XLA would compile anew for a smaller last batch
        task = dataclasses.replace(task, fill_remainder=True)
    if state:
        state.assign_to(trainer.state)
        console.print(
            f"Continuing after {_position(progress, task.steps_per_epoch, job.data_epochs)} in {fit.workdir}."
        )
    elif job.adversarial.on_alarm == "rollback":  # even the first epoch may have to be thrown away
        start = named_arrays(trainer.state)
        distribution.on_chief(lambda: checkpoints.save(progress, start))
    if progress.epochs_done == job.data_epochs or patience_of(job).is_exhausted(progress):
        return progress, False

    console.print(
        execution_line(
            job.optimization.jit_compile,
            compiled=trainer.jit_compile,
            deterministic=job.run.deterministic,
            replicas=distribution.num_replicas,
            precision=job.optimization.precision,
            tf32=job.optimization.tf32,
        )
    )
    if distribution.is_chief and job.run.outputs == "all":
        write_config(fit.board, to_flag_file(job.resolved()))
    bar = ProgressBar(
        num_images=task.num_train,
        batch_size=task.batch_size,
        epochs=job.data_epochs,
        adversarial=fit.attacked,
        epsilon=(lambda: trainer.epsilon) if job.adversarial.fast == "epsilon_warmup" else None,
        compiles=trainer.jit_compile,
        metric=None if fit.dense is None else fit.dense.metric,
    )
    try:
        with out_of_memory_explained(job, fit.classifier), signals_held_back() as pending:
            stop_on_nan = StopOnNaN()
            save = SaveProgress(
                checkpoints,
                progress,
                select_by=_selecting_metric(fit),
                every_steps=job.run.checkpoint_every_steps,
                every_minutes=job.run.checkpoint_every_minutes,
                pending=pending,
                rate=lambda: bar.images_per_second,
                distribution=distribution,
                before_save=stop_on_nan.check,
            )
            callbacks = _callbacks(fit, stop_on_nan, bar, save, progress)
            unfreeze_at = job.transfer.unfreeze_at_epoch
            if unfreeze_at is not None and not unfrozen:
                callbacks.insert(0, UnfreezeAtEpoch(unfreeze_at, fit.classifier, recompile=compile_with))
            if progress.steps_done:
                _run_epochs(trainer, task, callbacks, progress, distribution, until=progress.epochs_done + 1)
            # An alarm, or exhausted patience, may have stopped the training at the end of that epoch.
            if not trainer.stop_training:
                _run_epochs(trainer, task, callbacks, progress, distribution, until=job.data_epochs)
    except TrainingAlarm:
        return progress, True
    finally:
        bar.close()
    return progress, False


def _freeze_as_before(fit: _Fit, progress: TrainingProgress) -> bool:
    """Freezes the layers as they were in the state from which training continues. Returns whether all were unfrozen."""
    transfer = fit.job.transfer
    unfreeze_at = transfer.unfreeze_at_epoch
    # Unfreezing happens before the first step of its epoch.
    unfrozen = unfreeze_at is not None and (progress.epochs_done, progress.steps_done) > (unfreeze_at, 0)
    if unfrozen:
        freeze(fit.classifier, mode="full_network")  # the saved state of the optimizer covers the whole network
    elif unfreeze_at is not None and progress.rollbacks:
        # The rollback may have gone back to a state from before the unfreezing.
        freeze(
            fit.classifier,
            mode=transfer.transfer_mode,
            through=transfer.freeze_through or None,
            batchnorm=transfer.frozen_batchnorm,
        )
    return unfrozen


def _compiled_trainer(
    fit: _Fit, *, rollbacks: int
) -> tuple[AdversarialTrainer, Callable[[keras.optimizers.Optimizer], None]]:
    """Returns the trainer with all of its variables, and a function that compiles it with another optimizer."""
    adversarial, optimization, task = fit.job.adversarial, fit.job.optimization, fit.task
    steps = optimizer_steps_per_epoch(optimization, replays=adversarial.replays, batches=task.steps_per_epoch)
    num_classes, dense = len(task.class_names), fit.dense
    loss: Any
    if dense is None:
        loss, metrics = job_loss(optimization.class_weight, task), [Accuracy(), MeanPerClassAccuracy(num_classes)]
    else:
        loss, metrics = dense.loss(), dense.metrics(num_classes)

    def new_trainer() -> AdversarialTrainer:
        trainer = AdversarialTrainer(
            fit.classifier,
            adversarial.training_attack,
            recipe=job_recipe(adversarial, optimization, steps),
            validation_attack=adversarial.validation_attack,
            seed=fit.job.run.seed,
            # A single-step recipe is so cheap that a forward pass just for clean metrics would be a sixth of its cost.
            clean_figures=not adversarial.single_step,
        )
        # Compiled first: under mixed_float16 Keras wraps the optimizer, and the wrapped one holds the state to restore.
        compile_with(trainer, job_optimizer(optimization, steps, factor=_ROLLBACK_FACTOR**rollbacks))
        trainer.optimizer.build(fit.classifier.trainable_variables)
        average_statistics(trainer.optimizer, fit.classifier)
        return trainer

    def compile_with(trainer: AdversarialTrainer, optimizer: keras.optimizers.Optimizer) -> None:
        trainer.compile(
            optimizer=optimizer,
            loss=loss,
            # Weighted, because with several replicas the images that only fill up a batch have weight 0.
            weighted_metrics=metrics,
            jit_compile=optimization.xla,
        )
        trainer.build_metrics(None if dense is None else dense.trial_labels)

    if reuses_trainer(fit.job):
        besides = (steps, num_classes, tuple(loss.class_weights or ()))
        trainer = reused_trainer(fit.job, fit.classifier, new_trainer, besides=besides)
    else:
        trainer = new_trainer()
    return trainer, functools.partial(compile_with, trainer)


def _run_epochs(
    trainer: AdversarialTrainer,
    task: TaskData,
    callbacks: list[keras.callbacks.Callback],
    progress: TrainingProgress,
    distribution: Distribution,
    *,
    until: int,
) -> None:
    """Trains from `progress` until `until` epochs are done. If it starts in mid-epoch, it must end with that epoch."""
    epoch, first_step = progress.epochs_done, progress.steps_done
    if epoch == until:
        return
    steps = task.steps_per_epoch - first_step
    listed = CallbacksFromStep(callbacks, first_step=first_step, model=trainer, epochs=until, steps=steps)
    validation, validation_steps = distribution.validation_data(task)
    if task.fill_remainder:
        validation = task.validation_share(replicas=1)  # all batches have one size, and extra images have weight 0
    if steps == 0:
        _finish_epoch(trainer, validation, validation_steps, listed, epoch)
        return
    trainer.fit(
        distribution.train_data(task, first_epoch=epoch, epochs=until, first_step=first_step),
        steps_per_epoch=steps,
        initial_epoch=epoch,
        epochs=until,
        validation_data=validation,
        validation_steps=validation_steps,
        callbacks=listed,
        shuffle=False,  # the pipeline shuffles
        verbose=0,
    )


def _finish_epoch(
    trainer: AdversarialTrainer,
    validation: Any,
    validation_steps: int | None,
    callbacks: keras.callbacks.CallbackList,
    epoch: int,
) -> None:
    """Does what `fit` does after the last step of an epoch, for a run that was interrupted at that point."""
    callbacks.on_train_begin()
    callbacks.on_epoch_begin(epoch)
    logs = trainer.get_metrics_result()
    validation_logs = trainer.evaluate(
        validation, steps=validation_steps, callbacks=callbacks, return_dict=True, verbose=0
    )
    logs = {name: float(value) for name, value in logs.items()}
    callbacks.on_epoch_end(epoch, {**logs, **{f"val_{name}": value for name, value in validation_logs.items()}})
    callbacks.on_train_end()


def _position(progress: TrainingProgress, steps_per_epoch: int, epochs: int) -> str:
    if not progress.steps_done:
        return f"epoch {progress.epochs_done} of {epochs}"
    return f"step {progress.steps_done} of {steps_per_epoch} of epoch {progress.epochs_done + 1} of {epochs}"


def _callbacks(
    fit: _Fit, stop_on_nan: StopOnNaN, bar: ProgressBar, save: SaveProgress, progress: TrainingProgress
) -> list[keras.callbacks.Callback]:
    """Returns the callbacks in the order in which they must see the end of an epoch."""
    run, adversarial = fit.job.run, fit.job.adversarial
    callbacks: list[keras.callbacks.Callback] = [stop_on_nan, CompilingLines()]
    measured = alarms = None
    if fit.dense is not None:
        measured = MeasureEachEpoch(fit.job, fit.dense, fit.classifier, fit.task)
        callbacks.append(measured)  # adds its measurements to the logs that the next callbacks show
    callbacks.append(bar)
    if run.profile_steps and fit.distribution.is_chief:
        callbacks.append(ProfileSteps(fit.board, *run.profile_steps))
    if fit.attacked and adversarial.alarm_every_epochs and fit.dense is None:
        alarms = Alarms(
            fit.classifier,
            held_out=fit.task.preview(NUM_IMAGES),
            attack=adversarial.training_attack,
            every_epochs=adversarial.alarm_every_epochs,
            history=progress.alarms,
            agree=fit.distribution.any,
            share_trace=reuses_trainer(fit.job),
        )
        callbacks.append(alarms)  # adds its measurements to the logs that the next callback charts
    if fit.distribution.is_chief and run.outputs == "all":
        tensorboard = TensorBoardLogger(
            fit.board,
            attack=adversarial.validation_attack,
            preview=fit.task.preview(_PREVIEW_IMAGES),
            progress=bar,
            steps_per_epoch=fit.task.steps_per_epoch,
            every_steps=run.log_every_steps,
            share_trace=reuses_trainer(fit.job),
            picture=None if measured is None else measured.picture,
        )
        callbacks.append(tensorboard)
    if alarms and adversarial.on_alarm != "warn":
        callbacks.append(EndOnAlarm(alarms, save_anyway=adversarial.on_alarm == "stop"))
    return [*callbacks, save, StopEarly(patience_of(fit.job), progress)]


def _state_of_chief(read: Callable[[], State | None], distribution: Distribution) -> State | None:
    """Returns, in every process, the state that the chief has read.

    The processes need not see the same disk, and one of them might find a file damaged that another can read.
    """
    state = distribution.on_chief(read)
    if distribution.num_workers == 1 or not distribution.any(state is not None):
        return state
    packed = None
    if state is not None:
        progress = np.array(json.dumps(dataclasses.asdict(state.progress)))
        packed = [progress, np.array(str(state.path)), np.array(list(state.arrays)), *state.arrays.values()]
    progress, path, names, *arrays = distribution.broadcast(packed)
    fields = json.loads(str(progress))
    return State(TrainingProgress(**fields), dict(zip(map(str, names), arrays, strict=True)), pathlib.Path(str(path)))


def _selecting_metric(fit: _Fit) -> str | None:
    """Returns the name, in the logs, of the metric that selects the best epoch, or None to keep the last epoch."""
    select_by, metric = fit.job.optimization.select_by, fit.task.metric
    if select_by == "last":
        return None
    if fit.dense is not None:
        robust = fit.attacked and select_by != "accuracy"
        return f"val_{'robust' if robust else 'clean'}_{metric}"
    if select_by == "accuracy":
        return "val_clean_accuracy" if fit.attacked else "val_accuracy"
    # With an attack, the compiled accuracy is the robust accuracy.
    return "val_accuracy" if fit.attacked else f"val_{metric}"
