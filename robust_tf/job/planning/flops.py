"""Counts the work of a function on its traced graph: the multiply-adds of convolutions and matrix products.

Everything else (BatchNorm, activations, the arithmetic of the attack itself) is not counted. It is less than a
hundredth of the work in the networks of this package. The body of a loop counts once for each iteration.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf

Shape = Sequence[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Floating-point operations by purpose; an addition and a multiplication count as two.

    Attributes:
        forward: Operations for the outputs of the network.
        input_gradient: Operations for the gradients with respect to the inputs of each layer.
        weight_gradient: Operations for the gradients with respect to the weights of each layer.
        bytes_moved: Bytes that these operations read and write.
    """

    forward: float = 0.0
    input_gradient: float = 0.0
    weight_gradient: float = 0.0
    bytes_moved: float = 0.0

    @property
    def flops(self) -> float:
        """Number of operations of all kinds."""
        return self.forward + self.input_gradient + self.weight_gradient

    def __add__(self, other: "Work") -> "Work":
        return Work(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def __mul__(self, factor: float) -> "Work":
        return Work(**{name: value * factor for name, value in vars(self).items()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """A loop of a graph: the number of its iterations, and the work of one of them."""

    iterations: int
    iteration: Work


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphWork:
    """The work of a traced function, in its loops and outside them."""

    loops: tuple[Loop, ...]
    outside: Work

    @property
    def total(self) -> Work:
        """Work of all iterations of the loops, and of everything outside the loops."""
        return sum((loop.iteration * loop.iterations for loop in self.loops), self.outside)

    def __mul__(self, factor: float) -> "GraphWork":
        loops = tuple(Loop(iterations=loop.iterations, iteration=loop.iteration * factor) for loop in self.loops)
        return GraphWork(loops=loops, outside=self.outside * factor)


def count_work(function: Callable[..., Any], *arguments: tf.TensorSpec) -> GraphWork:
    """Traces a function, without running it, and counts its work.

    Args:
        function: Function of tensors. It may use variables.
        *arguments: Shapes and dtypes of its arguments, with no dimension left open.

    Raises:
        ValueError: The graph does not give the number of iterations of a loop, or a shape is unknown.
    """
    graph = tf.function(function, autograph=False).get_concrete_function(*arguments).graph
    graph_def = graph.as_graph_def(add_shapes=True)
    library = {function.signature.name: function for function in graph_def.library.function}
    needed = [*(tensor.op.name for tensor in graph.outputs), *(operation.name for operation in graph.control_outputs)]
    return _count(graph_def.node, needed, {}, library)


# A function that returns the number of multiply-adds of an operation, given the operation, the shapes of its inputs and
# the shape of its output. A kernel is (height, width, input channels of a group, output channels); the kernel of a
# depthwise convolution is (height, width, channels, multiplier).
_Rule = Callable[[Any, list[Shape], Shape], float]
_RULES: dict[str, _Rule] = {
    "Conv2D": lambda _node, inputs, output: math.prod(output) * math.prod(inputs[1][:3]),
    "Conv2DBackpropInput": lambda _node, inputs, _output: math.prod(inputs[2]) * math.prod(inputs[1][:3]),
    "Conv2DBackpropFilter": lambda _node, inputs, output: math.prod(inputs[2]) * math.prod(output[:3]),
    "DepthwiseConv2dNative": lambda _node, inputs, output: math.prod(output) * math.prod(inputs[1][:2]),
    "DepthwiseConv2dNativeBackpropInput": lambda _node, inputs, _output: (
        math.prod(inputs[2]) * math.prod(inputs[1][:2])
    ),
    "DepthwiseConv2dNativeBackpropFilter": lambda _node, inputs, output: math.prod(inputs[2]) * math.prod(output[:2]),
    "MatMul": lambda node, inputs, output: math.prod(output) * inputs[0][0 if node.attr["transpose_a"].b else 1],
    "BatchMatMulV2": lambda node, inputs, output: math.prod(output) * inputs[0][-2 if node.attr["adj_x"].b else -1],
}


def _kind(node: Any) -> str:
    """Returns the field of `Work` to which an operation is added.

    For outputs = images @ weights, the gradient with respect to the images is gradient @ weights^T, and the one with
    respect to the weights is images^T @ gradient.
    """
    if node.op.endswith("BackpropInput") or node.attr["transpose_b"].b or node.attr["adj_y"].b:
        return "input_gradient"
    if node.op.endswith("BackpropFilter") or node.attr["transpose_a"].b or node.attr["adj_x"].b:
        return "weight_gradient"
    return "forward"


def _count(
    nodes: Iterable[Any], needed: Iterable[str], argument_shapes: dict[str, list[Shape]], library: dict[str, Any]
) -> GraphWork:
    by_name = {node.name: node for node in nodes}
    shapes = argument_shapes | {name: _shapes(node.attr["_output_shapes"]) for name, node in by_name.items()}
    outside, loops = Work(), []
    for node in _run(by_name, needed):
        if node.op in _RULES:
            outside += _operation(node, [_of_input(name, shapes) for name in node.input if name[0] != "^"], shapes)
        called = [attribute.func.name for attribute in node.attr.values() if attribute.func.name]
        for name in called:  # every branch counts, since any of them might be taken
            function = library[name]
            names = [argument.name for argument in function.signature.input_arg]
            arguments = {
                name: [shape]
                for name, shape in zip(names, _shapes(function.attr["_input_shapes"]) or [()] * len(names), strict=True)
            }
            inside = _count(
                function.node_def, [*function.ret.values(), *function.control_ret.values()], arguments, library
            )
            if node.op in ("While", "StatelessWhile"):
                if inside.total.flops:
                    loops.append(Loop(iterations=_iterations(node, by_name), iteration=inside.total))
            else:
                loops += inside.loops
                outside += inside.outside
    return GraphWork(loops=tuple(loops), outside=outside)


def _run(by_name: dict[str, Any], needed: Iterable[str]) -> list[Any]:
    """Returns the operations that `needed` depends on.

    The traced graph may hold more operations. For example, it may compute gradients with respect to the weights in an
    attack, which only uses the gradient with respect to the images.
    """
    waiting, found = list(needed), {}
    while waiting:
        name = waiting.pop().removeprefix("^").split(":")[0]
        if name in by_name and name not in found:
            found[name] = by_name[name]
            waiting += by_name[name].input
    return list(found.values())


def _operation(node: Any, inputs: list[Shape], shapes: dict[str, list[Shape]]) -> Work:
    output = shapes[node.name][0]
    used = inputs
    if node.op.endswith("BackpropInput"):
        used = inputs[1:]  # the first input is only a shape
    elif node.op.endswith("BackpropFilter"):
        used = [inputs[0], inputs[2]]
    if any(size < 0 for shape in (*used, output) for size in shape):
        raise ValueError(f"{node.op} {node.name} has an open shape: {used} -> {output}.")
    values = sum(math.prod(shape) for shape in (*used, output))
    flops = 2.0 * _RULES[node.op](node, inputs, output)
    return Work(**{_kind(node): flops}, bytes_moved=values * float(tf.as_dtype(node.attr["T"].type).size))


def _iterations(node: Any, by_name: dict[str, Any]) -> int:
    # tf.while_loop's second input is its maximum_iterations, -1 for none.
    source = by_name.get(node.input[1].split(":")[0])
    iterations = (
        int(tf.make_ndarray(source.attr["value"].tensor)) if source is not None and source.op == "Const" else -1
    )
    if iterations < 0:
        raise ValueError(f"The graph does not give the number of iterations of the loop {node.name}.")
    return iterations


def _shapes(attribute: Any) -> list[Shape]:
    return [tuple(dim.size for dim in shape.dim) for shape in attribute.list.shape]


def _of_input(name: str, shapes: dict[str, list[Shape]]) -> Shape:
    """Returns the shape of an input named "node", "node:2" or, within a function, "node:output:0"."""
    source, *output = name.split(":")
    return shapes[source][int(output[-1]) if output else 0]
