"""Train every cell of a small space on composed tasks and write results/tabular/TASK.json.gz: searches are then compared in seconds.

The tasks, the space, the clips and the recipe are in benchmarks/tabular.toml. Finished runs are kept in reproduced/tabular: the
same command continues. About 35 CPU-minutes a task for three seeds.
"""
import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path  # noqa: E402

from attnnas.evidence.ablation import validation_top1  # noqa: E402
from attnnas.evidence.config import load_tier  # noqa: E402
from attnnas.evidence.executor import execute  # noqa: E402
from attnnas.evidence.store import Store  # noqa: E402
from attnnas.search.tabular import TabularBenchmark, different_cells, run_of  # noqa: E402
from attnnas.cells.space import SearchSpace  # noqa: E402

HERE = Path(__file__).resolve().parent


def tasks() -> list: return load_tier(str(HERE / "tabular.toml")).templates["tabular"]["data"]


def plan(data: str, seeds: int | None = None) -> tuple:
    "The space, and {(cell, seed): run} on the task `data`, all cells of a seed before the next seed."
    tier = load_tier(str(HERE / "tabular.toml"))
    s = tier.templates["tabular"]
    space = SearchSpace(s["operations"], tier.search["width"], s["dimensions"], s["types"], s["activations"], s["chain"])
    runs = {}
    for seed in s["seeds"][:seeds]:
        for cell in sorted(different_cells(space).values(), key=lambda cell: cell.hash):
            runs[cell, seed] = tier.run(data, s["backbone"], "cell", seed, cell=cell)
    return space, runs


def collect(space: SearchSpace, runs: dict, records) -> TabularBenchmark:
    "The table of the finished `records` of `runs`. The multiply-adds are those of one clip's forward pass."
    lines = [run_of(space, cell, seed, validation_top1(r), r.test and r.test["top1"], r.seconds["cpu"], round(r.gflops * 1e9 / 2))
             for (cell, seed), r in zip(runs, records, strict=True)]
    first = records[0]
    recipe = {name: first.config[name] for name in ("data", "training")} | {"backbone": first.run.network.backbone}
    provenance = {"command": "python benchmarks/tabular.py", "configuration": recipe, "data": first.data["fingerprint"],
                  "source": sorted({r.source for r in records}), "device": sorted({r.device for r in records}), "versions": first.versions}
    return TabularBenchmark(space, tuple(lines), provenance)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=tasks(), choices=tasks(), help="the tasks")
    parser.add_argument("--records", default=HERE.parent / "reproduced" / "tabular", help="folder of the run records")
    parser.add_argument("--output", type=Path, default=HERE.parent / "results" / "tabular", help="folder of the tables")
    parser.add_argument("--seeds", type=int, help="only the first so many seeds")
    parser.add_argument("--rebuild", action="store_true", help="train nothing: the table of the records that are there")
    parser.add_argument("--workers", type=int, default=0, help="runs made at once; default: one a core")
    options = parser.parse_args()
    for data in options.data:
        space, runs = plan(data, options.seeds)
        records = execute(runs.values(), Store(options.records), options.workers, rebuild=options.rebuild)
        table = collect(space, runs, records)
        path = options.output / f"{data}.json.gz"
        table.save(path)
        print(f"{len(table.cells)} cells, {len(table.seeds)} seeds: {path}\nnoise {table.noise}\nbest {table.optimum}")


if __name__ == "__main__": main()
