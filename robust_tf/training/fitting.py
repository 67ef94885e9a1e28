"""One training run, from a classifier to its best weights: compile, go on where it stopped, fit."""

import pathlib

import keras

from robust_tf.command_line import to_flag_file
from robust_tf.config import JobConfig
from robust_tf.data import TaskData
from robust_tf.errors import UserError
from robust_tf.training.alarms import NUM_IMAGES, Alarms, EndOnAlarm, TrainingAlarm
from robust_tf.training.callbacks import SaveEpochs, StopOnNaN
from robust_tf.training.checkpoint import Checkpoints, Progress
from robust_tf.training.metrics import Accuracy, CrossEntropy, MeanPerClassAccuracy
from robust_tf.training.optimizers import build_optimizer
from robust_tf.training.progress import ProgressBar, console
from robust_tf.training.schedules import schedule_of
from robust_tf.training.tensorboard import TensorBoardLogger, write_config
from robust_tf.training.trainer import AdversarialTrainer
from robust_tf.training.unfreezing import UnfreezeAtEpoch
from robust_tf.transfer.stages import freeze

_PREVIEW_IMAGES = 8
_MOST_ROLLBACKS = 3
_ROLLBACK_FACTOR = 0.1  # of the learning rate, at each rollback


def fit_classifier(config: JobConfig, classifier: keras.Model, task: TaskData, workdir: pathlib.Path) -> Progress:
    """Trains the classifier in place and leaves it with the weights of the best epoch.

    The epochs that `workdir` already holds are not run again. An epoch that raised an alarm is never the best one,
    unless `config.on_alarm` only warns.

    Raises:
        UserError: the first epoch raised an alarm after every rollback.
    """
    checkpoints = Checkpoints(workdir / "checkpoints")
    progress, alarmed = _fit(config, classifier, task, workdir, checkpoints)
    while alarmed and config.on_alarm == "rollback" and progress.rollbacks < _MOST_ROLLBACKS:
        before = checkpoints.peek()
        before.rollbacks, before.alarms = progress.rollbacks + 1, progress.alarms
        checkpoints.replace_progress(before)
        console.print(
            f"Rollback {before.rollbacks} of at most {_MOST_ROLLBACKS}: back to the end of epoch {before.epochs_done}, "
            f"and the learning rate x {_ROLLBACK_FACTOR:g}."
        )
        progress, alarmed = _fit(config, classifier, task, workdir, checkpoints)
    if progress.best_epoch < 0:
        raise UserError(
            f"The first epoch raised an alarm in {progress.rollbacks + 1} tries. Received: {progress.alarms[-1]} Use "
            "--on_alarm=warn to train on in spite of it, in a new --workdir."
        )
    if alarmed:
        console.print(f"Training ends here; epoch {progress.best_epoch + 1}, the best before the alarm, is kept.")
    checkpoints.restore_best(classifier)
    return progress


def _fit(
    config: JobConfig, classifier: keras.Model, task: TaskData, workdir: pathlib.Path, checkpoints: Checkpoints
) -> tuple[Progress, bool]:
    """Trains from the latest checkpoint to the last epoch, or to the first that ends with an alarm (then True)."""
    progress = checkpoints.peek() if checkpoints.exists else Progress()
    unfreeze_at = config.unfreeze_at_epoch
    if unfreeze_at is not None and progress.epochs_done > unfreeze_at:
        freeze(classifier, mode="full_network")  # the optimizer's saved state is that of the whole network
    elif unfreeze_at is not None and progress.rollbacks:
        # Back from after the unfreezing to before it.
        through = config.freeze_through or None
        freeze(classifier, mode=config.transfer_mode, through=through, batchnorm=config.frozen_batchnorm)

    trainer = AdversarialTrainer(classifier, config.attack, seed=config.seed)
    optimizer = build_optimizer(
        config.optimizer,
        learning_rate=schedule_of(config, task.steps_per_epoch, factor=_ROLLBACK_FACTOR**progress.rollbacks),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        multipliers=config.multipliers,
    )

    def compile_with(optimizer: keras.optimizers.Optimizer) -> None:
        trainer.compile(
            optimizer=optimizer,
            loss=CrossEntropy(),
            metrics=[Accuracy(), MeanPerClassAccuracy(len(task.class_names))],
            jit_compile={"auto": "auto", "true": True, "false": False}[config.jit_compile],
        )

    # Compiled first: under mixed_float16 Keras wraps the optimizer, and the wrapped one has the state to restore.
    compile_with(optimizer)
    trainer.optimizer.build(classifier.trainable_variables)
    if checkpoints.exists:
        progress = checkpoints.restore(classifier, trainer.optimizer)
        console.print(f"Going on after epoch {progress.epochs_done} of {config.epochs} in {workdir}.")
    elif config.on_alarm == "rollback":  # the first epoch may have to be thrown away, too
        checkpoints.save(progress, classifier, trainer.optimizer, is_best=False)
    if progress.epochs_done == config.epochs:
        return progress, False

    bar = ProgressBar(
        num_images=task.num_train,
        batch_size=task.batch_size,
        epochs=config.epochs,
        adversarial=config.attack.active,
    )
    tensorboard = TensorBoardLogger(
        workdir / "tensorboard",
        attack=config.attack,
        preview=task.preview(_PREVIEW_IMAGES),
        progress=bar,
        steps_per_epoch=task.steps_per_epoch,
        every_steps=config.log_every_steps,
    )
    save = SaveEpochs(checkpoints, progress, select_by=_select_by(config, task.metric))
    callbacks: list[keras.callbacks.Callback] = [StopOnNaN(), bar, tensorboard, save]
    if config.attack.active:
        alarms = _alarms(config, classifier, task, progress)
        callbacks.insert(callbacks.index(tensorboard), alarms)
        if config.on_alarm != "warn":
            callbacks.insert(callbacks.index(save), EndOnAlarm(alarms, save_anyway=config.on_alarm == "stop"))
    if unfreeze_at is not None and progress.epochs_done <= unfreeze_at:
        callbacks.insert(0, UnfreezeAtEpoch(unfreeze_at, classifier, recompile=compile_with))

    write_config(workdir / "tensorboard", to_flag_file(config))
    try:
        trainer.fit(
            task.train(first_epoch=progress.epochs_done, epochs=config.epochs),
            steps_per_epoch=task.steps_per_epoch,
            initial_epoch=progress.epochs_done,
            epochs=config.epochs,
            validation_data=task.validation,
            callbacks=callbacks,
            shuffle=False,  # the pipeline does it
            verbose=0,
        )
    except TrainingAlarm:
        return progress, True
    finally:
        bar.close()
    return progress, False


def _alarms(config: JobConfig, classifier: keras.Model, task: TaskData, progress: Progress) -> Alarms:
    held = task.preview(NUM_IMAGES)
    every_epochs = config.alarm_every_epochs
    return Alarms(classifier, held=held, attack=config.attack, every_epochs=every_epochs, history=progress.alarms)


def _select_by(config: JobConfig, metric: str) -> str | None:
    """The name in Keras's logs of the validation figure that chooses the epoch."""
    if config.select_by == "last":
        return None
    if config.select_by == "accuracy":
        return "val_clean_accuracy" if config.attack.active else "val_accuracy"
    # With an attack the compiled accuracy is the robust one.
    return "val_accuracy" if config.attack.active else f"val_{metric}"
