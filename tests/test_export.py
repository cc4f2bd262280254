"""Programs made of cells: traced once, they take any number of clips and give the same numbers."""
import pytest
import torch
from torch import nn

from attnnas.attention.formula import attend
from attnnas.attention.kernels import ROWS
from attnnas.cells.cell import AttentionCell
from attnnas.cells.spec import CellSpec, OperationSpec
from attnnas.networks.insertion import insert

OPERATIONS = (OperationSpec("temporal", "dot-product", "softmax"), OperationSpec("spatial", "dot-product", "relu"),
              OperationSpec("spatiotemporal", "map-based", "sigmoid"))
SPEC = CellSpec(OPERATIONS, inputs=((0,), (0, 1), (1,)), outputs=(2, 3), width=4)


def test_a_network_with_a_cell_is_exported_for_any_batch():
    "If this fails, an exported network takes only as many clips as it was exported with."
    network = nn.Sequential(nn.Conv3d(3, 4, 1), nn.AdaptiveAvgPool3d(1))
    insert(network, SPEC, "0", (1, 3, 3, 4, 4)).eval()
    assert isinstance(network[0].added, AttentionCell)
    nn.init.ones_(network[0].added.zero_norm.weight)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(network, (torch.rand(2, 3, 3, 4, 4),), dynamic_shapes=({0: batch},)).module()
    clips = torch.rand(5, 3, 3, 4, 4)
    torch.testing.assert_close(program(clips), network(clips))


class Attend(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.activation = activation

    def forward(self, x): return attend(x, x, x, self.activation)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("positions", [40, 4 * ROWS + 5])
def test_every_path_of_attention_is_compiled_whole(activation, positions):
    "If this fails, torch.compile(fullgraph=True) refuses a network with cells."
    module = Attend(activation)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="eager")
    for clips in (2, 3):
        x = torch.rand(clips, positions, 8)
        torch.testing.assert_close(compiled(x), module(x))
