"""PPO of examples/popgym_ppo.py on tasks of POPGym with every kind of memory and several seeds, and the table of docs/rl.md.

python benchmarks/popgym_table.py runs.jsonl [--steps S] [--seeds K] [--processes P]

Runs what the file does not have yet, one thread each, and then prints the table of all that it has.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("RepeatPrevious", "Autoencode", "CountRecall", "Concentration")
DIFFICULTIES = ("Easy", "Medium")
MODELS = ("lrua", "ntm", "lstm", "gru")
EPISODES = 200  # of actions drawn evenly, for the column of chance


def wanted(seeds: int) -> Iterator[tuple[str, str, int]]:
    """Seed by seed, so that what is there when somebody stops it is of all tasks and memories."""
    for seed in range(seeds):
        for difficulty in DIFFICULTIES:
            for task in TASKS:
                for model in MODELS:
                    yield task + difficulty, model, seed


def run(task: str, model: str, seed: int, steps: int, out: Path) -> None:
    named = {"task": task, "model": model, "seed": seed, "steps": steps}
    options = [part for name, value in named.items() for part in (f"--{name}", str(value))]
    line = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "popgym_ppo.py"), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    with out.open("a", encoding="utf-8") as file:
        file.write(line)


@cache
def chance(task: str) -> float:
    """The mean return of actions drawn evenly."""
    import popgym.envs

    environment = getattr(popgym.envs, task)()
    environment.action_space.seed(0)
    returns = []
    for episode in range(EPISODES):
        environment.reset(seed=episode)
        earned, ended = 0.0, False
        while not ended:
            _, reward, terminated, truncated, _ = environment.step(environment.action_space.sample())
            earned, ended = earned + reward, terminated or truncated
        returns.append(earned)
    return statistics.fmean(returns)


def table(runs: list[dict], measure: str) -> str:
    """In Markdown: the mean over seeds, and the least and the greatest, of one number of a run."""
    values, steps = defaultdict(list), {x["steps"] for x in runs}
    for x in runs:
        values[x["options"]["task"], x["options"]["model"]].append(x[measure])
    lines = [
        f"{measure}, after {', '.join(f'{n:,}' for n in sorted(steps))} steps:",
        "",
        "| task | chance | " + " | ".join(f"`{model}`" for model in MODELS) + " |",
        "| --- |" + " --- |" * (len(MODELS) + 1),
    ]
    for task in (task + difficulty for difficulty in DIFFICULTIES for task in TASKS):
        cells = []
        for model in MODELS:
            of = values[task, model]
            cells.append(f"{statistics.fmean(of):.2f} ({min(of):.2f} to {max(of):.2f})" if of else "")
        lines.append(f"| {task} | {chance(task):.2f} | " + " | ".join(cells) + " |")
    counts = {
        model: [x["steps_per_second"] for x in runs if x["options"]["model"] == model] for model in MODELS
    }
    speeds = (f"{statistics.median(of):,.0f}" if of else "" for of in counts.values())
    return "\n".join([*lines, "| steps a second, median | | " + " | ".join(speeds) + " |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, help="a file of one line of JSON for each run, which is added to")
    parser.add_argument("--steps", type=int, default=300_000, help="of each run (300000)")
    parser.add_argument("--seeds", type=int, default=3, help="of each task and memory (3)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="side by side (all processors)")
    args = parser.parse_args()

    def read() -> list[dict]:
        text = args.runs.read_text(encoding="utf-8") if args.runs.exists() else ""
        return [x for x in map(json.loads, text.splitlines()) if x["options"]["steps"] == args.steps]

    there = {tuple(x["options"][name] for name in ("task", "model", "seed")) for x in read()}
    with ThreadPoolExecutor(args.processes) as pool:
        todo = [key for key in wanted(args.seeds) if key not in there]
        for _ in pool.map(lambda key: run(*key, args.steps, args.runs), todo):
            pass
    for measure in ("mmer", "last"):
        print(table(read(), measure), end="\n\n")


if __name__ == "__main__":
    main()
