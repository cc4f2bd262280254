"""Spatiotemporal attention cell search for video classification."""
__version__ = "0.1.0"

from attnnas import search
from attnnas.backbones.registry import create_model, list_models
from attnnas.cell import AttentionCell
from attnnas.core import AttnnasError
from attnnas.insertion import insert, inserted, remove, site_shapes
from attnnas.non_local import NonLocalBlock
from attnnas.space import CellSpec, OperationSpec, SearchSpace

__all__ = ["AttentionCell", "AttnnasError", "CellSpec", "NonLocalBlock", "OperationSpec", "SearchSpace", "create_model",
           "insert", "inserted", "list_models", "remove", "search", "site_shapes"]
