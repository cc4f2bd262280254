"""Does the search find what was planted? Ten searches of each task, and single operations as a control.

A search is right where a planted node (dimension and type, see attnnas.search.planted) is among the `alpha` nodes that weigh
most at the sink: "strict". "lenient" also takes the spatiotemporal node of a planted type, which attends over the planted
dimension and more. Settings:

    one level     PatchNet, 6 nodes, activations fixed, the common recipe: here the task alone decides which nodes are right
    slow start    the same, but the learning rate rises over 20 % of the steps, not 10 %; so it does in the next two
    two levels    12 nodes: a node of level 2 reads what level 1 has attended to, and need not be a planted one itself; so
                  "chain" asks whether the first node or its best predecessor is (derivation with alpha = beta = 1)
    mixture       one level, activations learnt: dot-products without a softmax say how much they attend, and with that more

Every network sees its clips once (a task makes as many as are wanted). Writes results/bench/planted.csv (searches) and
planted_operations.csv (networks with one operation, or "none"; i3d_small with "none" too, to show what receptive fields
read without attention). Rows that a file has are kept, not made again: delete it to measure anew.

    python benchmarks/planted.py                        # the first two settings and the operations: twelve minutes of one core
    python benchmarks/planted.py --settings "one level" "slow start" --tasks relation --seeds 20 --controls 0
"""
import argparse
import time
from pathlib import Path

import torch

from attnnas.networks.registry import create_model
from attnnas.core.seeds import seed_everything
from attnnas.networks.insertion import insert
from attnnas.search.differentiable import SearchConfig, differentiable
from attnnas.data.planted import TASKS, planted_clips
from attnnas.networks.patches import PatchNet
from attnnas.search.planted import PLANTED, chance_level, planted_ranks
from attnnas.cells.spec import CellSpec
from attnnas.cells.supergraph import TALK, level_nodes
from attnnas.training.evaluation import evaluate
from attnnas.training.loop import Trainer, TrainingConfig

COMMON, SLOW = TrainingConfig(epochs=1), TrainingConfig(epochs=1, warmup=.2)
SETTINGS = {"one level": (SearchConfig(levels=1, width=16, activations="fixed"), COMMON),
            "slow start": (SearchConfig(levels=1, width=16, activations="fixed"), SLOW),
            "two levels": (SearchConfig(levels=2, width=16, activations="fixed"), SLOW),
            "mixture": (SearchConfig(levels=1, width=16, activations="mixture"), SLOW)}
CLIPS, TEST_CLIPS = 6144, 1024
NODES = level_nodes(TALK, "fixed")


def name_of(operation) -> str:
    "Its dimension and type, as nodes are named."
    return f"{operation.dimension} {operation.type}"


def prepare(task: str, seed: int, network: str = "PatchNet"):
    "Training and test clips, and a fresh network for them."
    pixels = 8 if network == "i3d_small" else 4
    train, test = (planted_clips(task, *part, seed, pixels) for part in (("train", CLIPS), ("test", TEST_CLIPS)))
    seed_everything(seed)
    classes = len(train.classes)
    return train, test, PatchNet(classes, pixels) if network == "PatchNet" else create_model(network, classes)


def search(setting: str, task: str, seed: int) -> dict:
    "One search: where the planted nodes came, and what was on top."
    train, test, net = prepare(task, seed)
    started = time.process_time()
    found = differentiable(net, train, *SETTINGS[setting], seed=seed)
    seconds = time.process_time() - started
    sink = torch.tensor(found.log.epochs[-1]["connections"][found.log.sites[0]]["sink"])
    ranking = sink.flatten().argsort(descending=True, stable=True).tolist()
    order = [divmod(i, len(TALK)) for i in ranking]
    ranks = planted_ranks(task, sink)
    over_both = {f"spatiotemporal {name.split(' ')[1]}" for name in PLANTED[task]}
    lenient = [rank for rank, (_, j) in enumerate(order, 1) if TALK[j] in over_both]
    best = {"strict": ranks[0], "lenient": min(ranks[0], lenient[0])}
    chain = [name_of(o) for o in found.log.derive(alpha=1, beta=1).cell.operations]
    row = dict(setting=setting, task=task, seed=seed)
    row |= {f"top_{k}": f"{TALK[j]} (level {i + 1})" for k, (i, j) in enumerate(order[:3], 1)}
    row |= dict(ranks=" ".join(map(str, ranks)), mean_rank=sum(ranks) / len(ranks))
    row |= {f"{how}_alpha_{alpha}": int(rank <= alpha) for how, rank in best.items() for alpha in (1, 3)}
    row |= dict(chain=" < ".join(reversed(chain)),
                chain_has_planted=int(any(name in PLANTED[task] for name in chain)))
    row |= {"weight": sink.max().item(), "accuracy": evaluate(net, test)["top1"], "cpu_seconds": seconds}
    return row


def operation(network: str, node, task: str, seed: int) -> dict:
    "A network with that one operation at its site, or with nothing."
    train, test, net = prepare(task, seed, network)
    if node: insert(net, CellSpec((node,), inputs=((0,),), width=16))
    trainer = Trainer(net, train, COMMON, seed=seed)
    trainer.fit()
    planted = bool(node) and name_of(node) in PLANTED[task]
    return dict(network=network, task=task, operation=str(node) if node else "none", planted=int(planted), seed=seed,
                accuracy=evaluate(net, test)["top1"], cpu_seconds=trainer.seconds["cpu"])


def summary(rows):
    "Shares of the searches that hit, each beside what a random ranking would."
    import pandas as pd
    table = pd.DataFrame(rows).groupby(["setting", "task"], sort=False).agg(
        searches=("seed", "count"), alpha_3=("strict_alpha_3", "mean"), alpha_1=("strict_alpha_1", "mean"),
        lenient_3=("lenient_alpha_3", "mean"), lenient_1=("lenient_alpha_1", "mean"), chain=("chain_has_planted", "mean"),
        mean_rank=("mean_rank", "mean"), accuracy=("accuracy", "mean"), cpu_seconds=("cpu_seconds", "mean"))
    for alpha in (3, 1):
        levels = [(len(PLANTED[task]), SETTINGS[setting][0].levels) for setting, task in table.index]
        chance = [chance_level(n * m, len(NODES) * m, alpha) for n, m in levels]
        table.insert(list(table).index(f"alpha_{alpha}") + 1, f"chance_{alpha}", chance)
    return table


def measure(path: Path, work, jobs: list, names: tuple) -> list[dict]:
    "The rows of the file, and after them one for each job, named by `names`, that it lacked; written after each."
    import pandas as pd
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    made = {tuple(str(row[name]) for name in names) for row in rows}
    for job in jobs:
        if tuple(str("none" if part is None else part) for part in job) in made: continue
        rows.append(work(*job))
        pd.DataFrame(rows).to_csv(path, index=False, float_format="%.4g")
        print(*rows[-1].values(), flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=["one level", "slow start"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=10, help="searches of a task in each setting")
    parser.add_argument("--controls", type=int, default=3, help="networks of a task with each operation")
    parser.add_argument("--output", type=Path, default=Path("results/bench"))
    a = parser.parse_args()
    torch.set_num_threads(1)
    a.output.mkdir(parents=True, exist_ok=True)
    networks = [*(("PatchNet", node) for node in (None, *NODES)), ("i3d_small", None)]
    controls = [(net, node, task, seed) for net, node in networks for task in a.tasks for seed in range(a.controls)]
    searches = [(setting, task, seed) for setting in a.settings for task in a.tasks for seed in range(a.seeds)]
    measure(a.output / "planted_operations.csv", operation, controls, ("network", "operation", "task", "seed"))
    rows = measure(a.output / "planted.csv", search, searches, ("setting", "task", "seed"))
    print(summary(rows).round(2).to_string())


if __name__ == "__main__": main()
