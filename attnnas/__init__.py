"""Spatiotemporal attention cell search for video classification."""
__version__ = "0.1.0"

from attnnas import search
from attnnas.cells.cell import AttentionCell
from attnnas.cells.space import SearchSpace
from attnnas.cells.spec import CellSpec, OperationSpec
from attnnas.core.errors import AttnnasError
from attnnas.data.datasets import as_clips
from attnnas.data.splits import clips_of
from attnnas.figures.attention_video import attention_video
from attnnas.networks.export import export
from attnnas.networks.insertion import insert, inserted, remove, site_shapes
from attnnas.networks.non_local import NonLocalBlock
from attnnas.networks.over_frames import over_frames
from attnnas.networks.pathways import Pathways
from attnnas.networks.registry import create_model, list_models
from attnnas.networks.saved import from_pretrained, load, save
from attnnas.networks.sites import propose_sites
from attnnas.training.loop import TrainingConfig
from attnnas.training.predict import predict
from attnnas.training.train import train

__all__ = ["AttentionCell", "AttnnasError", "CellSpec", "NonLocalBlock", "OperationSpec", "Pathways", "SearchSpace",
           "TrainingConfig", "as_clips", "attention_video", "clips_of", "create_model", "export", "from_pretrained",
           "insert", "inserted", "list_models", "load", "over_frames", "predict", "propose_sites", "remove", "save", "search",
           "site_shapes", "train"]
