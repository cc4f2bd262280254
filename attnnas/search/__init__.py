"""Searches of the cell space: each is a function that gives a SearchResult."""
from attnnas.search.bandit import BanditConfig, bandit
from attnnas.search.base import EpochLog, SearchResult, TrialLog
from attnnas.search.budget import Budget, OverBudget, site_budget
from attnnas.search.differentiable import SearchConfig, differentiable
from attnnas.search.evolution import EvolutionConfig, evolution
from attnnas.search.health import health
from attnnas.search.methods import METHODS, black_box, search_config
from attnnas.search.objective import CellTraining
from attnnas.search.pareto import ParetoConfig, front, pareto, plot_front
from attnnas.search.random import RandomConfig, random
from attnnas.search.study import AnotherStudy, BlackBoxConfig
from attnnas.search.tabular import TabularBenchmark
from attnnas.search.verdict import plot_verdict, verdict

__all__ = ["AnotherStudy", "BanditConfig", "BlackBoxConfig", "Budget", "CellTraining",
           "EpochLog", "EvolutionConfig", "METHODS", "OverBudget", "ParetoConfig",
           "RandomConfig", "SearchConfig", "SearchResult", "TabularBenchmark", "TrialLog",
           "bandit", "black_box", "differentiable", "evolution", "front", "health", "pareto",
           "plot_front", "plot_verdict", "random", "search_config", "site_budget", "verdict"]
