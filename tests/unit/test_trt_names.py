"""Every name of TensorRT's Python API that engines use is there in TensorRT 10.16, in TensorRT 11.4 and in TensorRT-RTX.

The names are collected from the source. Nothing of TensorRT is typed, so the tables below say which variable holds which class, and
which variables hold nothing of TensorRT's; a variable in neither is an error.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from stubs import tensorrt

from forja import engines

pytestmark = pytest.mark.ml

PACKAGE = Path(engines.__file__).parent
OBJECTS: dict[str, dict[str, str]] = {
    "build": {
        "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser", "e": "ParserError", "config": "IBuilderConfig",
        "profile": "IOptimizationProfile", "tensor": "ITensor", "times": "ITimingCache",
    },
    "describe": {"runtime": "Runtime"},
    "inspect": {"engine": "ICudaEngine", "context": "IExecutionContext", "inspector": "EngineInspector"},
    "latency": {"engine": "ICudaEngine", "context": "IExecutionContext"},
    "log": {},
}  # fmt: skip
"""Class of each variable that holds an object of TensorRT's, by module; ``trt`` is always the module itself."""
OTHERS: dict[str, set[str]] = {
    "build": {"built", "chosen", "describe", "host", "importlib", "inspect", "latency", "log", "logger", "n", "place", "speed", "time"},
    "describe": {"body", "built", "capability", "document", "found", "host", "json", "log", "place", "re", "wrong"},
    "inspect": {"CONSTANT", "LINE", "TENSOR", "TYPES", "dict", "item", "json", "layer", "re", "t", "tensor", "text", "x"},
    "latency": {"buffers", "end", "made", "start", "stream", "times", "torch"},
    "log": {"logger", "message", "self"},
}
"""Other variables with attributes, by module."""
WITHOUT = {"__init__", "host", "verdict", "weights"}
"""Modules that use no object of TensorRT's."""
AHEAD_OF_TIME = "_target"
"""The one function for TensorRT-RTX alone."""


def used(source: str, module: str, objects: dict[str, str], others: set[str]) -> dict[str, set[str]]:
    """Dotted names of TensorRT's API in a source, by the function that they are in (empty for none).

    Raises:
        AssertionError: an attribute of a variable that no table has, or of what a call of TensorRT's gives.
    """
    found: dict[str, set[str]] = {}
    for function, node in _attributes(ast.parse(source), ""):
        names = []
        value: ast.expr = node
        while isinstance(value, ast.Attribute):
            names.insert(0, value.attr)
            value = value.value
        if isinstance(value, ast.Call | ast.Subscript):
            root: ast.expr = value
            while isinstance(root, ast.Call | ast.Subscript | ast.Attribute):
                root = root.func if isinstance(root, ast.Call) else root.value
            held = isinstance(root, ast.Name) and (root.id == "trt" or root.id in objects)
            assert not held, f"{module}.py line {node.lineno}: give {ast.unparse(value)} a name, so that its class can be told"
        if not isinstance(value, ast.Name):
            continue
        if value.id != "trt" and value.id not in objects:
            assert value.id in others, f"{module}.py line {node.lineno}: {value.id} is in no table of this test"
            continue
        prefix = [] if value.id == "trt" else [objects[value.id]]
        names = names[: next((i + 1 for i, part in enumerate(names) if part.startswith("__")), len(names))]  # then it is Python's own
        found.setdefault(function, set()).add(".".join([*prefix, *names]))
    return found


def _attributes(tree: ast.AST, function: str) -> Iterator[tuple[str, ast.Attribute]]:
    """Outermost attributes in a tree, each with the function that it is in."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.Attribute):
            yield function, child
            inner: ast.AST = child.value
            while isinstance(inner, ast.Attribute):
                inner = inner.value
            yield from _attributes(ast.Expression(body=inner), function) if isinstance(inner, ast.expr) else ()
        else:
            yield from _attributes(child, child.name if isinstance(child, ast.FunctionDef) and not function else function)


def all_used() -> dict[str, set[str]]:
    """What engines use, by function."""
    found: dict[str, set[str]] = {}
    for module, objects in OBJECTS.items():
        for function, names in used((PACKAGE / f"{module}.py").read_text(), module, objects, OTHERS[module]).items():
            found.setdefault(function, set()).update(names)
    return found


def common() -> set[str]:
    return set().union(*(names for function, names in all_used().items() if function != AHEAD_OF_TIME))


needs_compiler = pytest.mark.skipif(not tensorrt.COMPILER, reason="no C compiler (cc or gcc) for the stub libraries")


def test_all_modules_are_in_the_tables() -> None:
    assert {p.stem for p in PACKAGE.glob("*.py")} == OBJECTS.keys() | WITHOUT
    for module in WITHOUT:
        assert not any(isinstance(n, ast.Name) and n.id == "trt" for n in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())))


def test_the_collector_finds_what_there_is() -> None:
    names = common()
    assert {
        "Builder", "Builder.create_network", "NetworkDefinitionCreationFlag.STRONGLY_TYPED", "IBuilderConfig.profiling_verbosity",
        "IBuilderConfig.set_timing_cache", "ITimingCache.serialize", "ParserError.node_operator", "ITensor.name", "ILogger.WARNING",
        "Runtime.deserialize_cuda_engine", "EngineInspector.get_engine_information", "IExecutionContext.execute_async_v3",
    } <= names  # fmt: skip
    assert len(names) > 40
    assert "IBuilderConfig.set_compute_capability" in all_used()[AHEAD_OF_TIME]


@needs_compiler
@pytest.mark.parametrize(("major", "version"), [(10, "10.16.1.11"), (11, "11.4.0.106")])
def test_every_name_is_in_tensorrt(major: int, version: str) -> None:
    assert tensorrt.missing("tensorrt_bindings", common(), tensorrt.bindings(major)) == (version, [])


def test_every_name_is_in_tensorrt_rtx() -> None:
    version, missing = tensorrt.missing("tensorrt_rtx", common() | all_used()[AHEAD_OF_TIME])
    assert version.startswith("1.7.")
    assert missing == []


@needs_compiler
@pytest.mark.parametrize("major", [10, 11])
def test_only_tensorrt_rtx_builds_ahead_of_time(major: int) -> None:
    """Otherwise that function would need no exception."""
    _, missing = tensorrt.missing("tensorrt_bindings", all_used()[AHEAD_OF_TIME], tensorrt.bindings(major))
    assert set(missing) == {n for n in all_used()[AHEAD_OF_TIME]}


REMOVED = {
    "a precision flag": ("config.set_flag(trt.BuilderFlag.FP16)", "BuilderFlag.FP16"),
    "explicit batch": (
        "builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))",
        "NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
    ),
    "a calibrator": ("config.int8_calibrator = None", "IBuilderConfig.int8_calibrator"),
    "a question about the platform": ("x = builder.platform_has_fast_fp16", "Builder.platform_has_fast_fp16"),
}  # fmt: skip
"""Source, and the name in it that TensorRT 10 has and TensorRT 11 hasn't."""


@needs_compiler
@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_name_is_caught(name: str) -> None:
    source, removed = REMOVED[name]
    names = used(source, "test", {"builder": "Builder", "config": "IBuilderConfig"}, set())[""]
    assert removed in names
    assert tensorrt.missing("tensorrt_bindings", names, tensorrt.bindings(10))[1] == []
    assert tensorrt.missing("tensorrt_bindings", names, tensorrt.bindings(11))[1] == [removed]


ESCAPES = {
    "a call without a name": "trt.Runtime(logger).deserialize_cuda_engine(plan)",
    "a call without a name, deeper": "builder.create_builder_config().set_flag(1)",
    "a variable in no table": "def f(refitter):\n    refitter.set_weights()",
    "a variable in no table, as an argument": "print(refitter.refit_cuda_engine())",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_nothing_escapes_the_tables(name: str) -> None:
    with pytest.raises(AssertionError, match=r"give .* a name|in no table"):
        used(ESCAPES[name], "test", {"builder": "Builder"}, set())
