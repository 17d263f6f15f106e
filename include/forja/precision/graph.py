"""What the precision variants share: walking, naming, ordering and checking ONNX graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forja.errors import Refused

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

WEIGHTED = ("Conv", "Gemm", "MatMul")
"""Operators that have weights: layers."""
PAIR = ("QuantizeLinear", "DequantizeLinear")


def front_nodes(graph: GraphProto) -> set[str]:
    """Names of the nodes between the input and the first weights or Q/DQ pair: the normalisation, whose inputs may be beyond float16."""
    before = {i.name for i in graph.input}
    made = {name for node in graph.node if node.op_type != "Constant" for name in node.output}
    front: set[str] = set()
    for node in graph.node:
        reads = set(node.input)
        if node.op_type not in (*WEIGHTED, *PAIR) and reads & before and reads & made <= before:
            before.update(node.output)
            front.add(node.name)
    return front


def named(model: ModelProto) -> None:
    """Give every node a name of its own, in place: lists of nodes go by name."""
    for i, node in enumerate(model.graph.node):
        node.name = f"{i:04d}_{node.name or node.op_type}"


def sort_nodes(graph: GraphProto) -> None:
    """Order the nodes so that each comes after what it reads, as ONNX demands; otherwise in the order they had."""
    waiting = list(graph.node)
    known = {"", *(i.name for i in graph.input), *(t.name for t in graph.initializer)}
    ordered: list[NodeProto] = []
    while waiting:
        late = []
        for node in waiting:
            if known.issuperset(node.input):
                known.update(node.output)
                ordered.append(node)
            else:
                late.append(node)
        if len(late) == len(waiting):
            raise Refused("ONNX graph: nodes read what nothing makes", value=[n.name for n in waiting])
        waiting = late
    del graph.node[:]
    graph.node.extend(ordered)


def drop_unused(graph: GraphProto) -> None:
    """Take out, in place, nodes and constants that no output depends on."""
    outputs = {o.name for o in graph.output}
    while True:
        used = {name for node in graph.node for name in node.input} | outputs
        dead = [node for node in graph.node if not used & set(node.output)]
        if not dead:
            break
        for node in dead:
            graph.node.remove(node)
    for tensor in [t for t in graph.initializer if t.name not in used]:
        graph.initializer.remove(tensor)


def checked(model: ModelProto, what: str) -> bytes:
    """The model's bytes, when onnx accepts it in full (types and shapes included); Refused otherwise."""
    import onnx

    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise Refused(f"{what}: not a valid ONNX model", value=str(error)) from error
    return bytes(model.SerializeToString(deterministic=True))


def attribute(node: NodeProto, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return next((a.i for a in node.attribute if a.name == name), default)


def makers(graph: GraphProto) -> dict[str, NodeProto]:
    """The node that makes each tensor."""
    return {name: node for node in graph.node for name in node.output}


def upgraded(model: ModelProto, opset: int, ir: int) -> ModelProto:
    """The model at a newer opset, or itself when it has that one or a newer."""
    import onnx

    if next(o.version for o in model.opset_import if not o.domain) < opset:
        model = onnx.version_converter.convert_version(model, opset)
        model.ir_version = ir
    return model
