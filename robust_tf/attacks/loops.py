"""The loops of the attacks, written with `tf.while_loop`. Images that need no more steps can leave the batch.

A Python loop would be unrolled, which takes minutes of tracing for a deep network, and `for` over `tf.range` does not
work inside `fit`, where autograph is off.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import tensorflow as tf

# State of an attack: tensors whose first axis is the image. The state always has the key "fallen", (batch,) bool, which
# is true for the images for which the attack has reached its goal.
State = dict[str, tf.Tensor]

# A batch shrinks when an eighth of it has fallen. Shrinking more often would not pay, because the convolution kernels
# are prepared again for every new batch size.
_SHRINK_AT = 8

_for_accelerator = contextvars.ContextVar("_for_accelerator", default=False)

Step = TypeVar("Step", bound=Callable[..., Any])


@contextlib.contextmanager
def for_accelerator() -> Iterator[None]:
    """Makes the attacks that are traced inside this block suit XLA and GPUs. The verdicts are the same either way.

    All images stay in the batch, also those that have fallen. XLA needs this, because it compiles for fixed shapes.
    Without XLA it is useful on a GPU, where cuDNN looks for the fastest convolution again for every new batch size.

    The step of a loop is not a separate function. XLA does not need that, and XLA's cache would not find the program
    again, because each process gives its functions other names.
    """
    token = _for_accelerator.set(True)
    try:
        yield
    finally:
        _for_accelerator.reset(token)


def step_of_loop(step: Step) -> Step:
    """Returns the step of a `tf.while_loop` as a separate function, where that is faster: in a graph on a CPU.

    TensorFlow passes the gradient of max pooling to oneDNN only if it comes after its pooling in the order in which it
    visits the graph. In the cycle of a loop the gradient often comes first. It is then computed by another kernel,
    which took a tenth of the attack on a ResNet-18 (see tests/bench/README.md). The graph of a function has no cycle.

    Args:
        step: Function of tensors, or structures of tensors, that returns such.
    """
    if _for_accelerator.get() or tf.executing_eagerly() or tf.config.list_logical_devices("GPU"):
        return step
    # Inlined, the function would become a part of the cycle.
    return cast(Step, tf.function(step, autograph=False, experimental_attributes={"_noinline": True}))


def select_images(condition: tf.Tensor, images: tf.Tensor, others: tf.Tensor) -> tf.Tensor:
    """Chooses between whole images by a condition (batch,)."""
    return tf.where(condition[:, None, None, None], images, others)


def repeat(step: Callable[[tf.Tensor, State], State], state: State, times: int | tf.Tensor) -> State:
    """Returns the state after `state = step(i, state)` for i = 0, 1, ..., `times` - 1."""
    keys = sorted(state)
    call = step_of_loop(step)

    def body(i: tf.Tensor, *values: tf.Tensor) -> tuple[tf.Tensor, ...]:
        new = call(i, dict(zip(keys, values, strict=True)))
        return (i + 1, *(new[key] for key in keys))

    if isinstance(times, int) and times == 1:
        # Without a loop a step may also update variables that several replicas share, as BatchNorm's statistics.
        return step(tf.constant(0), state)
    start = (tf.constant(0), *(state[key] for key in keys))
    result = tf.while_loop(lambda i, *_: i < times, body, start, maximum_iterations=times)
    return dict(zip(keys, result[1:], strict=True))


def in_graph(
    loop: Callable[[Callable[[tf.Tensor, State], State], State, int], State],
    step: Callable[[tf.Tensor, State], State],
    state: State,
    times: int,
) -> State:
    """Returns `loop(step, state, times)`, traced as a graph if called eagerly, because a long loop is worth it."""
    if not tf.executing_eagerly():
        return loop(step, state, times)
    return cast(State, tf.function(lambda start: loop(step, start, times), autograph=False)(state))


def repeat_while_resisting(step: Callable[[tf.Tensor, State], State], state: State, times: int | tf.Tensor) -> State:
    """Repeats a step like `repeat`, but drops images that have fallen and ends when none is left.

    The cost grows with the number of images that still resist, not with the batch size. A fallen image stays in the
    batch until enough others have fallen, but its "images_adv", if the state has this key, no longer changes.

    Args:
        step: Function of (i, state of some of the images) that returns their new state, separately for each image.
        state: State of all images, with the key "fallen".
        times: Largest number of steps.

    Returns:
        The state of all images in their original order. A fallen image has the state in which it left the batch, or
        the last one if batches stay whole.
    """
    if _for_accelerator.get():
        return _repeat_until_all_fall(step, state, times)
    keys, call = sorted(state), step_of_loop(step)
    count = tf.shape(state["fallen"])[0]

    def going_on(i: tf.Tensor, rows: tf.Tensor, active: State, everything: State) -> tf.Tensor:
        del rows, everything
        return (i < times) & ~tf.reduce_all(active["fallen"])

    def body(
        i: tf.Tensor, rows: tf.Tensor, active: State, everything: State
    ) -> tuple[tf.Tensor, tf.Tensor, State, State]:
        active = _without_the_fallen(active, call(i, active))
        fallen = tf.math.count_nonzero(active["fallen"], dtype=tf.int32)

        def shrink() -> tuple[tf.Tensor, State, State]:
            left = tf.where(~active["fallen"])[:, 0]
            written = _scattered(everything, rows, active)
            return tf.gather(rows, left), {key: tf.gather(active[key], left) for key in keys}, written

        rows, active, everything = tf.cond(
            fallen * _SHRINK_AT >= tf.maximum(tf.shape(rows)[0], 1), shrink, lambda: (rows, active, everything)
        )
        return i + 1, rows, active, everything

    free = {key: tf.TensorShape([None, *state[key].shape[1:]]) for key in keys}
    whole = {key: state[key].shape for key in keys}
    _, rows, active, everything = tf.while_loop(
        going_on,
        body,
        (tf.constant(0), tf.range(count), state, state),
        shape_invariants=(tf.TensorShape([]), tf.TensorShape([None]), free, whole),
        maximum_iterations=times,
    )
    return _scattered(everything, rows, active)


def _repeat_until_all_fall(step: Callable[[tf.Tensor, State], State], state: State, times: int | tf.Tensor) -> State:
    """Does the same as `repeat_while_resisting` with a batch whose size does not change."""
    keys = sorted(state)

    def going_on(i: tf.Tensor, active: State) -> tf.Tensor:
        return (i < times) & ~tf.reduce_all(active["fallen"])

    def body(i: tf.Tensor, active: State) -> tuple[tf.Tensor, State]:
        new = _without_the_fallen(active, step(i, active))
        return i + 1, {key: new[key] for key in keys}

    _, state = tf.while_loop(going_on, body, (tf.constant(0), dict(state)), maximum_iterations=times)
    return state


def _without_the_fallen(old: State, new: State) -> State:
    """Returns the new state with the old "images_adv", if the state has this key, of the images that had fallen.

    Otherwise the result of an image would depend on how long it stays in the batch, and so on the other images.
    """
    if "images_adv" not in new:
        return new
    return {**new, "images_adv": select_images(old["fallen"], old["images_adv"], new["images_adv"])}


def _scattered(everything: State, rows: tf.Tensor, active: State) -> State:
    return {
        key: tf.ensure_shape(tf.tensor_scatter_nd_update(value, rows[:, None], active[key]), value.shape)
        for key, value in everything.items()
    }
