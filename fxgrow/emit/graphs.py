"""The graphs of single calls, without baked devices and dtypes."""

from __future__ import annotations

import builtins
from typing import Any

import torch
from torch import fx

from fxgrow.ir.nodes import NodeInfo, info_of, meta_of
from fxgrow.ir.ops import set_argument
from fxgrow.ir.traced import Traced
from fxgrow.rules.base import implied_arguments

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def call_graphs(program: Traced, graph: fx.Graph) -> list[fx.Graph]:
    """One graph per captured call, inputs under the model's own names; parameters are read where they are used."""
    if len(program.calls) <= 1:
        return [graph]
    out = []
    for number in range(len(program.calls)):
        own = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}

        def value(n: fx.Node, own: fx.Graph = own, env: dict[fx.Node, fx.Node] = env) -> fx.Node:
            if n not in env:
                env[n] = own.get_attr(str(n.target))
                env[n].meta = dict(n.meta)
            return env[n]

        for node in graph.nodes:
            if node.op == "output":
                own.output(fx.map_arg(node.args[0][number], value))
            elif node.op == "placeholder" and info_of(node).call == number:
                name = info_of(node).input or str(node.target)
                is_tensor = isinstance(node.meta.get("val"), torch.Tensor)
                env[node] = own.placeholder(
                    name, **({} if is_tensor or not node.args else {"default_value": node.args[0]})
                )
                env[node].meta = dict(node.meta)
            elif node.op == "call_function" and info_of(node).call == number:
                env[node] = own.node_copy(node, value)
        out.append(own)
    return out


def clean_graph(graph: fx.Graph, double: bool) -> fx.Graph:
    """A copy without baked devices (and, to verify, without baked float dtypes)."""
    out = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    devices: dict[int, Any] = {}
    for node in graph.nodes:
        new = env[node] = out.node_copy(node, lambda n: env[n])
        if node.op == "call_function":
            if isinstance(new.kwargs.get("device"), torch.device):
                call = info_of(node).call
                if call not in devices:
                    devices[call] = _device_node(out, new, env.values(), call)
                new.kwargs = {**new.kwargs, "device": devices[call]}
            if double:
                for name, value in implied_arguments(node).items():  # as in the model's own dtype
                    set_argument(new, name, value)
                new.args = _to_double(new.args)
                new.kwargs = _to_double(new.kwargs)
    return out


def _device_node(graph: fx.Graph, before: fx.Node, nodes: Any, call: int) -> Any:
    """The device of the call's first tensor input (or of a parameter), read when the module runs."""
    inputs = [n for n in nodes if n.op == "placeholder" and info_of(n).call == call]
    candidates = [n for n in inputs if isinstance(n.meta.get("val"), torch.Tensor)]
    candidates += [n for n in nodes if n.op == "get_attr" and isinstance(n.meta.get("val"), torch.Tensor)]
    if not candidates:
        return before.kwargs["device"]
    place = inputs[-1] if candidates[0].op == "placeholder" else candidates[0]
    with graph.inserting_after(place):
        node = graph.create_node("call_function", builtins.getattr, (candidates[0], "device"), name="device")
    node.meta = meta_of(None, NodeInfo(call=call))
    return node


def _to_double(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _FLOATS else value
    if isinstance(value, tuple | list):
        return type(value)(_to_double(v) for v in value)
    if isinstance(value, dict):
        return {k: _to_double(v) for k, v in value.items()}
    return value
