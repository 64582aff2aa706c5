"""What keeps each method from collapsing, shown by taking it away; and other claims of the papers, by running them.

    python scripts/benchmark/collapse.py --data ../shared/data --output_dir docs

Every case trains a small ViT from scratch for some hundred steps (about half a minute each on one core) on CIFAR-10,
or any two labelled data sets: `--train a.parquet --test b.parquet`. Leaves `collapse.json` with every figure, the
tables as Markdown on the screen, and the images `images/collapse_*.png`. `--claims BYOL DINO` runs some only.
`--from_json collapse.json` draws and prints again what was measured before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))

import collapse_cases as training
import collapse_theory as theory
from timing import header, table

CLAIMS = (*dict.fromkeys(case.claim for case in training.cases()), "Temperature", "Bound")
# what of a step's metrics shows the collapse, best first: outputs of the head, or of DINO's prototypes
WATCHED = {
    "information": "information of the teacher's answers",
    "z_spread": "spread of z",
    "query_spread": "spread of q",
}
COLORS = ("black", "tab:blue", "tab:red")  # of a claim's variants: the published one first
DIRECTIONS = ("z_rank", "query_rank", "h_rank")


def run_cases(claims: list[str], data: training.Data, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains the cases of these claims, for every seed."""
    found = []
    for case in training.cases():
        if case.claim not in claims:
            continue
        for seed in options.seeds:
            start = time.perf_counter()
            steps, batch_size = options.steps, options.batch_size
            objective, history = training.train(case, data, steps=steps, batch_size=batch_size, seed=seed)
            seconds = time.perf_counter() - start
            bank, queries = (training.features(objective, part) for part in data)
            record = {"claim": case.claim, "variant": case.variant, "intact": case.intact, "seed": seed}
            record |= {"history": history, "seconds": seconds, "knn": training.knn_of(bank, queries, data)}
            record["probe"] = training.probe(bank, queries, data)
            with torch.no_grad():
                if case.claim == "Head":
                    record["z_probe"] = training.probe(objective.head(bank), objective.head(queries), data)
                if case.claim == "Views" and case.intact:
                    record["shares"] = theory.hard_shares(objective.head(queries)[:512])
            found.append(record)
            told = f"kNN {record['knn']:.3f}, probe {record['probe']:.3f}, {seconds:.0f} s"
            sys.stderr.write(f"{case.claim}, {case.variant}, seed {seed}: {told}\n")
    return found


def untrained(data: training.Data, seeds: list[int]) -> dict[str, list[float]]:
    """kNN and probe of the encoder before any training."""
    case, found = training.cases()[0], {"knn": [], "probe": []}
    for seed in seeds:
        objective = training.build(case, data.train.pixels.shape[-1], seed).eval()
        bank, queries = (training.features(objective, part) for part in data)
        found["knn"].append(training.knn_of(bank, queries, data))
        found["probe"].append(training.probe(bank, queries, data))
    return found


def spread_of(values: list[float], digits: int = 3) -> str:
    """Median, and the range where there are several."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def variants(results: list[dict[str, Any]], claim: str) -> dict[str, list[dict[str, Any]]]:
    """The runs of a claim by variant, in the order that they ran."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in results:
        if record["claim"] == claim:
            found.setdefault(record["variant"], []).append(record)
    return found


def watched(record: dict[str, Any]) -> str:
    """The metric that shows this run's collapse."""
    return next(name for name in WATCHED if name in record["history"][0])


def last(record: dict[str, Any], name: str) -> float:
    """Mean over the last tenth of the steps."""
    tail = record["history"][-max(1, len(record["history"]) // 10) :]
    return statistics.fmean(step[name] for step in tail)


def collapse_table(results: list[dict[str, Any]], before: dict[str, list[float]]) -> str:
    rows = []
    for claim in dict.fromkeys(record["claim"] for record in results):
        for variant, runs in variants(results, claim).items():
            name = watched(runs[0])
            rank = next(key for key in DIRECTIONS if key in runs[0]["history"][0])
            cells = [spread_of([last(run, key) for run in runs], digits) for key, digits in ((name, 3), (rank, 1))]
            accuracy = [spread_of([run[key] for run in runs]) for key in ("knn", "probe")]
            loss = spread_of([last(run, "loss") for run in runs])
            rows.append([claim, variant, loss, f"{WATCHED[name]}: {cells[0]}", cells[1], *accuracy])
    rows.append(["untrained encoder", "", "", "", "", spread_of(before["knn"]), spread_of(before["probe"])])
    return table(["method", "variant", "loss", "at the end", "directions", "kNN of h", "probe of h"], rows)


def temperature_table(shares: list[dict[str, Any]]) -> str:
    titles = ["temperature", "weight of the hardest 1 %", "of the hardest 10 %", "negatives that count"]
    names = ("hardest_hundredth", "hardest_tenth")
    rows = [
        [each["temperature"], *(f"{each[name]:.1%}" for name in names), f"{each['negatives_that_count']:.0f}"]
        for each in shares
    ]
    return table(titles, rows)


def bound_table(records: list[dict[str, float]]) -> str:
    counts = sorted({int(each["candidates"]) for each in records})
    rows: list[list[Any]] = [
        ["ln N", *(f"{next(r['limit'] for r in records if r['candidates'] == n):.2f}" for n in counts)]
    ]
    for information in sorted({each["information"] for each in records}):
        mine = {int(each["candidates"]): each for each in records if each["information"] == information}
        cells = [f"{mine[n]['bound']:.2f} (highest {mine[n]['highest']:.2f})" for n in counts]
        rows.append([f"{information:g} nats", *cells])
    return table(["information", *(f"N = {n}" for n in counts)], rows)


def draw(report: dict[str, Any], folder: Path) -> None:
    """The images of docs/collapse.md."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    results = report["results"]
    claims = [claim for claim in dict.fromkeys(record["claim"] for record in results) if claim not in ("Views", "Head")]
    if claims:
        figure, axes = plt.subplots(1, len(claims), figsize=(3.4 * len(claims), 3.2), squeeze=False)
        for axis, claim in zip(axes[0], claims, strict=True):
            for color, (variant, runs) in zip(COLORS, variants(results, claim).items(), strict=False):
                name = watched(runs[0])
                curves = np.array([smooth([each[name] for each in run["history"]]) for run in runs])
                steps = [each["step"] for each in runs[0]["history"]]
                axis.plot(steps, np.median(curves, axis=0), color=color, lw=1.5, label=variant)
                axis.fill_between(steps, curves.min(axis=0), curves.max(axis=0), color=color, alpha=0.2, lw=0)
            axis.set(title=claim, xlabel="step", ylabel=WATCHED[name], ylim=(0, None))
            axis.legend(fontsize=8)
        _save(figure, folder / "collapse_training.png")
    if report.get("shares"):
        figure, axis = plt.subplots(figsize=(4.6, 3.4))
        for each in report["shares"]:
            cumulated = each["cumulated"]
            ranks = [100 * (rank + 1) / len(cumulated) for rank in range(len(cumulated))]
            axis.plot(ranks, cumulated, label=f"{each['temperature']:g}", lw=1.5)
        axis.set(
            xlabel="negatives, hardest first (%)", ylabel="share of the gradient's weight", xscale="log", ylim=(0, 1)
        )
        axis.legend(title="temperature", fontsize=8)
        _save(figure, folder / "collapse_temperature.png")
    if report.get("bounds"):
        figure, axis = plt.subplots(figsize=(4.6, 3.4))
        counts = sorted({each["candidates"] for each in report["bounds"]})
        for count in counts:
            mine = sorted((e["information"], e["bound"]) for e in report["bounds"] if e["candidates"] == count)
            (line,) = axis.plot(*zip(*mine, strict=True), marker="o", ms=3, label=f"N = {count:g}")
            limit = next(each["limit"] for each in report["bounds"] if each["candidates"] == count)
            axis.axhline(limit, ls=":", lw=1, color=line.get_color())
        highest = max(each["information"] for each in report["bounds"])
        axis.plot([0, highest], [0, highest], color="black", lw=1, label="the information itself")
        axis.set(xlabel="mutual information (nats)", ylabel="ln N - loss (nats)", ylim=(0, 9))
        axis.legend(fontsize=8)
        _save(figure, folder / "collapse_bound.png")


def smooth(values: list[float], width: int = 9) -> np.ndarray:
    """Means over `width` steps, fewer at both ends."""
    ones = np.ones(min(width, len(values)))
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {"header": header(), "results": []}
    wanted = {"Views" for claim in options.claims if claim == "Temperature"}
    wanted |= set(options.claims) & {case.claim for case in training.cases()}
    if wanted:
        train, test = (getattr(options, name) or options.data / f"cifar10_{name}.parquet" for name in ("train", "test"))
        data = training.load(train, test, options.train_rows, options.test_rows)
        report["untrained"] = untrained(data, options.seeds)
        report["results"] = run_cases([claim for claim in CLAIMS if claim in wanted], data, options)
        intact = next((record for record in report["results"] if "shares" in record), None)
        report["shares"] = intact["shares"] if intact else []
    if "Bound" in options.claims:
        report["bounds"] = theory.bounds([0.5, 1, 2, 4, 6, 8, 12, 16], [2, 16, 128, 1024])
    return report


def show(report: dict[str, Any]) -> str:
    """All tables as Markdown."""
    parts = [report["header"]]
    if report["results"]:
        parts.append(collapse_table(report["results"], report["untrained"]))
        both = [(run["probe"], run["z_probe"]) for run in report["results"] if "z_probe" in run]
        if both:
            before, behind = (spread_of(list(values)) for values in zip(*both, strict=True))
            parts.append(f"Linear probe of SimCLR's h, before the head: {before}; of z, behind it: {behind}.")
    if report.get("shares"):
        parts.append(temperature_table(report["shares"]))
    if report.get("bounds"):
        parts.append(bound_table(report["bounds"]))
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder of cifar10_{train,test}.parquet"
    )
    parser.add_argument("--train", type=Path, help="another training set, with labels")
    parser.add_argument("--test", type=Path, help="another test set, with labels")
    parser.add_argument("--train_rows", type=int, default=4096)
    parser.add_argument("--test_rows", type=int, default=1000)
    parser.add_argument("--claims", nargs="+", choices=CLAIMS, default=list(CLAIMS))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--output_dir", type=Path, help="where collapse.json and images/ go; nothing is written without"
    )
    parser.add_argument("--from_json", type=Path, nargs="+", help="show runs that were measured before")
    options = parser.parse_args(argv)
    if options.from_json:
        report = {}
        for path in options.from_json:
            again = json.loads(path.read_text(encoding="utf-8"))
            results = report.get("results", []) + again["results"]
            report |= {name: value for name, value in again.items() if value} | {"results": results}
    else:
        report = measure(options)
    if options.output_dir is not None:
        options.output_dir.mkdir(parents=True, exist_ok=True)
        if not options.from_json:
            (options.output_dir / "collapse.json").write_text(json.dumps(report), encoding="utf-8")
        draw(report, options.output_dir / "images")
    print(show(report))
    return report


if __name__ == "__main__":
    main()
