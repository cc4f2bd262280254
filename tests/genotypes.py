"""Supergraphs in which a derivation leaves nothing out: what the tests of derived cells start from."""
import torch

from attnnas.attention.formula import ACTIVATIONS


@torch.no_grad()
def leave_only(graph, found):
    "Silence every connection and activation of `graph` that the derivation `found` did not keep, in place."
    connections = graph.connections
    keep = {p: torch.zeros(p.shape, dtype=torch.bool) for p in (connections.level, connections.sink)}
    for k, ((i, j), read) in enumerate(zip(found.kept, found.cell.inputs), 1):
        keep[connections.sink][i, j] = k in found.cell.outputs
        if i: keep[connections.level][i - 1, j, [found.kept[f - 1][1] for f in read]] = True
        if connections.activations == "mixture":
            graph.operations[i][j].mixture_logits.fill_(-1e4)[ACTIVATIONS.index(found.cell.operations[k - 1].activation)] = 0
    for p, kept in keep.items(): p[~kept] = 0.0 if connections.parameterisation == "free" else -1e4
