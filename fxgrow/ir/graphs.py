"""Copies of graphs."""

from __future__ import annotations

from torch import fx


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with the same node names and shallow copies of the metadata."""
    out = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        env[node] = out.node_copy(node, lambda n: env[n])
        env[node].name = node.name
    return out
