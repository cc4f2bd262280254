"""Searches of the cell space: each is a function that gives a SearchResult."""
from attnnas.search.bandit import bandit
from attnnas.search.base import CellTraining
from attnnas.search.differentiable import SearchConfig, SearchResult, differentiable
from attnnas.search.evolution import evolution
from attnnas.search.health import health
from attnnas.search.random import random
from attnnas.search.tabular import TabularBenchmark

__all__ = ["CellTraining", "SearchConfig", "SearchResult", "TabularBenchmark", "bandit", "differentiable", "evolution", "health",
           "random"]
