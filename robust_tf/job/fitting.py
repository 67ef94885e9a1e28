"""One training run, from a classifier to its best weights: compile, go on where it stopped, fit."""

import dataclasses
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
from robust_tf.job.building import loss_of, optimizer_of
from robust_tf.job.out_of_memory import out_of_memory_explained
from robust_tf.job.patience import StopEarly, say_why, stopped_early
from robust_tf.training.alarms import NUM_IMAGES, Alarms, EndOnAlarm, TrainingAlarm
from robust_tf.training.batchnorm import prepare_batchnorm
from robust_tf.training.callbacks import CallbacksFromStep, SaveProgress, StopOnNaN
from robust_tf.training.checkpoint import Checkpoints, State, TrainingProgress, named_arrays
from robust_tf.training.distribution import Distribution
from robust_tf.training.interruption import signals_held_back
from robust_tf.training.metrics import Accuracy, MeanPerClassAccuracy
from robust_tf.training.objectives import recipe_of
from robust_tf.training.optimizers import average_statistics
from robust_tf.training.progress import ProgressBar
from robust_tf.training.tensorboard import ProfileSteps, TensorBoardLogger, write_config
from robust_tf.training.trainer import AdversarialTrainer
from robust_tf.training.unfreezing import UnfreezeAtEpoch
from robust_tf.transfer.stages import freeze

_PREVIEW_IMAGES = 8
_MOST_ROLLBACKS = 3
_ROLLBACK_FACTOR = 0.1  # of the learning rate, at each rollback


def fit_classifier(
    config: JobConfig, classifier: keras.Model, task: TaskData, workdir: pathlib.Path, distribution: Distribution
) -> TrainingProgress:
    """Trains the classifier in place and leaves it with the weights of the best epoch.

    What `workdir` already holds of the run is not run again. An epoch that raised an alarm is never the best one,
    unless `config.on_alarm` only warns.

    Raises:
        UserError: the first epoch raised an alarm after every rollback.
        Interrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    checkpoints = Checkpoints(workdir / "checkpoints")
    progress, alarmed = _fit(config, classifier, task, workdir, checkpoints, distribution)
    while alarmed and config.on_alarm == "rollback" and progress.rollbacks < _MOST_ROLLBACKS:
        progress.rollbacks += 1
        distribution.on_chief(lambda: checkpoints.go_back_an_epoch(progress))
        console.print(
            f"Rollback {progress.rollbacks} of at most {_MOST_ROLLBACKS}: back to the end of epoch "
            f"{progress.epochs_done}, and the learning rate x {_ROLLBACK_FACTOR:g}."
        )
        progress, alarmed = _fit(config, classifier, task, workdir, checkpoints, distribution)
    if progress.best_epoch < 0:
        raise UserError(
            f"The first epoch raised an alarm in {progress.rollbacks + 1} tries. Received: {progress.alarms[-1]} Use "
            "--on_alarm=warn to train on in spite of it, in a new --workdir."
        )
    if stopped_early(config, progress):
        say_why(config, progress)
    if alarmed:
        console.print(f"Training ends here; epoch {progress.best_epoch + 1}, the best before the alarm, is kept.")
    best = _state_of_chief(lambda: checkpoints.best(progress), distribution)
    if best is not None:
        best.assign_to(classifier.variables)
    prepare_batchnorm(classifier, synchronized=False)  # a saved classifier is one of a single device
    return progress


def _fit(
    config: JobConfig,
    classifier: keras.Model,
    task: TaskData,
    workdir: pathlib.Path,
    checkpoints: Checkpoints,
    distribution: Distribution,
) -> tuple[TrainingProgress, bool]:
    """Trains from the latest checkpoint to the last epoch, or to the first that ends with an alarm (then True)."""
    state = _state_of_chief(checkpoints.latest, distribution)
    progress = state.progress if state else TrainingProgress()
    unfreeze_at = config.unfreeze_at_epoch
    # The epoch that goes on has begun with the unfreezing if any of its steps are done.
    unfrozen = unfreeze_at is not None and (progress.epochs_done, progress.steps_done) > (unfreeze_at, 0)
    if unfrozen:
        freeze(classifier, mode="full_network")  # the optimizer's saved state is that of the whole network
    elif unfreeze_at is not None and progress.rollbacks:
        # Back from after the unfreezing to before it.
        through = config.freeze_through or None
        freeze(classifier, mode=config.transfer_mode, through=through, batchnorm=config.frozen_batchnorm)

    prepare_batchnorm(classifier, synchronized=config.sync_batchnorm)
    with distribution.scope():
        trainer, compile_with = _compiled_trainer(config, classifier, task, rollbacks=progress.rollbacks)
    if state:
        state.assign_to(trainer.state)
        console.print(f"Going on after {_position(progress, task.steps_per_epoch, config.passes)} in {workdir}.")
    elif config.on_alarm == "rollback":  # the first epoch may have to be thrown away, too
        start = named_arrays(trainer.state)
        distribution.on_chief(lambda: checkpoints.save(progress, start))
    if progress.epochs_done == config.passes or stopped_early(config, progress):
        return progress, False

    if distribution.is_chief:
        write_config(workdir / "tensorboard", to_flag_file(config))
    bar = ProgressBar(
        num_images=task.num_train,
        batch_size=task.batch_size,
        epochs=config.passes,
        adversarial=config.attack.active,
        epsilon=(lambda: trainer.epsilon) if config.fast == "epsilon_warmup" else None,
    )
    try:
        with out_of_memory_explained(config, classifier), signals_held_back() as pending:
            save = SaveProgress(
                checkpoints,
                progress,
                select_by=_select_by(config, task.metric),
                every_steps=config.checkpoint_every_steps,
                every_minutes=config.checkpoint_every_minutes,
                pending=pending,
                rate=lambda: bar.images_per_second,
                distribution=distribution,
            )
            callbacks = _callbacks(config, classifier, task, workdir, bar, save, progress, distribution)
            if unfreeze_at is not None and not unfrozen:
                callbacks.insert(0, UnfreezeAtEpoch(unfreeze_at, classifier, recompile=compile_with))
            if progress.steps_done:
                _run_epochs(trainer, task, callbacks, progress, distribution, until=progress.epochs_done + 1)
            if not trainer.stop_training:  # by an alarm or for lack of patience, in the epoch that has just been ended
                _run_epochs(trainer, task, callbacks, progress, distribution, until=config.passes)
    except TrainingAlarm:
        return progress, True
    finally:
        bar.close()
    return progress, False


def _compiled_trainer(
    config: JobConfig, classifier: keras.Model, task: TaskData, *, rollbacks: int
) -> tuple[AdversarialTrainer, Callable[[keras.optimizers.Optimizer], None]]:
    """The trainer with all of its variables, and what compiles it with another optimizer."""
    trainer = AdversarialTrainer(
        classifier,
        config.attack,
        recipe=recipe_of(config, task.steps_per_epoch),
        validation_attack=config.validation_attack,
        seed=config.seed,
        # The cheap recipes have one gradient step: a forward pass for these figures alone would be a sixth of it.
        clean_figures=config.fast not in ("fgsm", "free"),
    )

    loss = loss_of(config, task)

    def compile_with(optimizer: keras.optimizers.Optimizer) -> None:
        trainer.compile(
            optimizer=optimizer,
            loss=loss,
            # Weighted: with several replicas, what only fills a batch has weight 0.
            weighted_metrics=[Accuracy(), MeanPerClassAccuracy(len(task.class_names))],
            # The replicas' exchange of gradients can't be within what XLA compiles.
            jit_compile={"auto": "auto", "true": True, "false": False}[config.jit_compile]
            if trainer.distribute_strategy.num_replicas_in_sync == 1
            else False,
        )
        trainer.build_metrics()

    # Compiled first: under mixed_float16 Keras wraps the optimizer, and the wrapped one has the state to restore.
    compile_with(optimizer_of(config, task.steps_per_epoch, factor=_ROLLBACK_FACTOR**rollbacks))
    trainer.optimizer.build(classifier.trainable_variables)
    average_statistics(trainer.optimizer, classifier)
    return trainer, compile_with


def _run_epochs(
    trainer: AdversarialTrainer,
    task: TaskData,
    callbacks: list[keras.callbacks.Callback],
    progress: TrainingProgress,
    distribution: Distribution,
    *,
    until: int,
) -> None:
    """Goes on from `progress`, which may be in the middle of an epoch (then `until` is the end of that), to `until`."""
    epoch, first_step = progress.epochs_done, progress.steps_done
    if epoch == until:
        return
    steps = task.steps_per_epoch - first_step
    listed = CallbacksFromStep(callbacks, first_step=first_step, model=trainer, epochs=until, steps=steps)
    validation, validation_steps = distribution.validation_data(task)
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
        shuffle=False,  # the pipeline does it
        verbose=0,
    )


def _finish_epoch(
    trainer: AdversarialTrainer,
    validation: Any,
    validation_steps: int | None,
    callbacks: keras.callbacks.CallbackList,
    epoch: int,
) -> None:
    """What `fit` does after the last step of an epoch: the run was interrupted in there."""
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
    config: JobConfig,
    classifier: keras.Model,
    task: TaskData,
    workdir: pathlib.Path,
    bar: ProgressBar,
    save: SaveProgress,
    progress: TrainingProgress,
    distribution: Distribution,
) -> list[keras.callbacks.Callback]:
    """In the order in which they have to see the end of an epoch."""
    callbacks: list[keras.callbacks.Callback] = [StopOnNaN(), bar]
    if config.profile_steps and distribution.is_chief:
        callbacks.append(ProfileSteps(workdir / "tensorboard", *config.profile_steps))
    alarms = _alarms(config, classifier, task, progress, distribution) if config.attack.active else None
    if alarms:
        callbacks.append(alarms)  # adds its figures to those that the next one charts
    if distribution.is_chief:
        tensorboard = TensorBoardLogger(
            workdir / "tensorboard",
            attack=config.validation_attack,
            preview=task.preview(_PREVIEW_IMAGES),
            progress=bar,
            steps_per_epoch=task.steps_per_epoch,
            every_steps=config.log_every_steps,
        )
        callbacks.append(tensorboard)
    if alarms and config.on_alarm != "warn":
        callbacks.append(EndOnAlarm(alarms, save_anyway=config.on_alarm == "stop"))
    return [*callbacks, save, StopEarly(config, progress)]


def _state_of_chief(read: Callable[[], State | None], distribution: Distribution) -> State | None:
    """What the chief reads, in every process: they need not see the same disk, nor agree on which file is damaged."""
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


def _alarms(
    config: JobConfig, classifier: keras.Model, task: TaskData, progress: TrainingProgress, distribution: Distribution
) -> Alarms:
    held = task.preview(NUM_IMAGES)
    return Alarms(
        classifier,
        held_out=held,
        attack=config.attack,
        every_epochs=config.alarm_every_epochs,
        history=progress.alarms,
        agree=distribution.any,
    )


def _select_by(config: JobConfig, metric: str) -> str | None:
    """The name in Keras's logs of the validation figure that chooses the epoch."""
    if config.select_by == "last":
        return None
    if config.select_by == "accuracy":
        return "val_clean_accuracy" if config.attack.active else "val_accuracy"
    # With an attack the compiled accuracy is the robust one.
    return "val_accuracy" if config.attack.active else f"val_{metric}"
