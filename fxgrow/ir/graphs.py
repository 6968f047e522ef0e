"""Copies of graphs, and their nodes by name."""

from __future__ import annotations

from torch import fx

from fxgrow.errors import GrowthRefused


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with the same node names and shallow copies of the metadata."""
    out = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        env[node] = out.node_copy(node, lambda n: env[n])
        env[node].name = node.name
    return out


class NodesByName:
    """The nodes of a graph by their names; those that are added to it later are found, too."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._known: dict[str, fx.Node] = {}

    def __call__(self, name: str) -> fx.Node:
        """The node of that name.

        Raises:
            GrowthRefused: there is none.
        """
        if name not in self._known:
            self._known = {n.name: n for n in self.graph.nodes}
        if name not in self._known:
            raise GrowthRefused(f"the graph has no node {name!r}; the plan belongs to another graph")
        return self._known[name]
