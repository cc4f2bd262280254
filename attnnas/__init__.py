"""Spatiotemporal attention cell search for video classification."""
__version__ = "0.1.0"

from attnnas import search
from attnnas.networks.registry import create_model, list_models
from attnnas.cells.cell import AttentionCell
from attnnas.core.errors import AttnnasError
from attnnas.networks.insertion import insert, inserted, remove, site_shapes
from attnnas.networks.non_local import NonLocalBlock
from attnnas.cells.space import SearchSpace
from attnnas.cells.spec import CellSpec, OperationSpec

__all__ = ["AttentionCell", "AttnnasError", "CellSpec", "NonLocalBlock", "OperationSpec", "SearchSpace", "create_model",
           "insert", "inserted", "list_models", "remove", "search", "site_shapes"]
