"""Searches of the cell space: each is a function that gives a SearchResult."""
from attnnas.search.differentiable import SearchConfig, SearchResult, differentiable

__all__ = ["SearchConfig", "SearchResult", "differentiable"]
