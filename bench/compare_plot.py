"""Plots of bench/compare: recall against QPS, latency, reads and memory, a picture a gate.

  compare_plot.py RESULTS_FOLDER     reads compare.json there, writes GATE.png and memory.png
"""
import json
import os
import sys

import compare_report as report
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter

TICKS = (.8, .9, .95, .98, .99, .995, .998)
COLOURS = {"annd": "tab:blue", "annd f16": "tab:blue", "annd 8bit": "tab:green",
           "DiskANN": "tab:red"}


def number(v, _=None):
    return f"{v:,.0f}" if v >= 10 or v == int(v) else f"{v:g}"


def recall_axis(ax, low):
    # 1 - recall on a log scale, turned round so that better is to the right.
    ax.set_xscale("function", functions=(lambda r: -np.log(np.maximum(1 - np.asarray(r), 1e-6)),
                                         lambda v: 1 - np.exp(-np.asarray(v))))
    ax.set_xlim(low, .9985)
    ticks = [t for t in TICKS if t >= low]
    ax.set_xticks(ticks)
    ax.set_xticklabels([f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.set_xlabel("recall@10 (1 - recall on a log scale)")
    for r in (.95, .99):
        ax.axvline(r, color="0.6", lw=.8, ls=":")


def log_values(ax, values):
    low, high = min(values), max(values)
    ax.set_yscale("log")
    ax.set_ylim(low / 1.2, high * 1.2)
    ticks = [m * 10**e for e in range(7) for m in (1, 1.5, 2, 3, 5, 7)
             if low / 1.2 <= m * 10**e <= high * 1.2]
    ax.set_yticks(ticks, minor=False)
    ax.yaxis.set_major_formatter(FuncFormatter(number))
    ax.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: ""))
    ax.grid(True, axis="y", color="0.9")


def sides_of(run):
    out = {f"annd {v}".strip(): s for v, s in run["annd"].items()}
    out["DiskANN"] = run["diskann"]
    return {name: settings for name, settings in out.items() if report.timed(settings)}


def draw_gate(gate, run, path):
    sides = sides_of(run)
    if not sides:
        return
    fig, axes = plt.subplots(2, 2, figsize=(12, 9))
    panels = ((axes[0][0], "qps", "queries a second"),
              (axes[0][1], "latency_us_mean", "mean latency, ms"),
              (axes[1][0], report.READS, "4 KiB reads a query"))
    points = [p for s in sides.values() for x in report.timed(s) for p in x["points"]]
    low = max(.8, min(p["recall"] for p in points) - .01)
    for ax, key, label in panels:
        scale = 1e-3 if key.startswith("latency") else 1
        shown = []
        for name, settings in sides.items():
            winners = [report.best(settings, r, run["latency"])[1] for r in (.95, .99)]
            for s in report.timed(settings):
                line = sorted((p["recall"], p[key] * scale) for p in report.useful(s["points"])
                              if low <= p["recall"] <= .9985)
                if not line:
                    continue
                won = [f"{r}" for r, w in zip((.95, .99), winners) if w is s]
                text = f"{name}: {report.name_of(s)}" + (f" (best at {', '.join(won)})"
                                                         if won else "")
                ax.plot(*zip(*line), marker="o", ms=3.5, lw=1.8 if won else .8,
                        alpha=1 if won else .45, color=COLOURS.get(name, "tab:gray"),
                        ls=("-" if winners[0] is s or not won else "--"), label=text)
                shown += [v for _, v in line]
        recall_axis(ax, low)
        log_values(ax, shown)
        ax.set_ylabel(label)
    ax = axes[1][1]
    bars = []
    for name, settings in sides.items():
        done = {}
        for s in report.timed(settings):
            label = name + (f"\nPQ{s['pq']}" if "pq" in s else "")
            done[label] = (max(p["index_memory_bytes"] for p in s["points"]) / 1e6,
                           max(p["peak_bytes"] for p in s["points"]) / 1e6)
        bars += [(label, name, *v) for label, v in done.items()]
    for i, (_, name, index, peak) in enumerate(bars):
        colour = COLOURS.get(name, "tab:gray")
        ax.bar(i - .2, index, .38, color=colour, label="index" if i == 0 else None)
        ax.bar(i + .2, peak, .38, color=colour, alpha=.35,
               label="peak of the process (DiskANN's with Python)" if i == 0 else None)
        for x, v in ((i - .2, index), (i + .2, peak)):
            ax.text(x, v, f"{v:.0f}", ha="center", va="bottom", fontsize=8)
    if run["memory"]:
        ax.axhline(run["memory"] / 1e6, color="0.3", ls="--", lw=1,
                   label=f"allowed: {run['memory'] / 1e6:.0f} MB")
    ax.set_xticks(range(len(bars)), [b[0] for b in bars])
    ax.set_ylim(0, max(b[3] for b in bars) * 1.25)
    ax.set_ylabel("resident, MB")
    ax.legend(fontsize=8)
    memory = f"{run['memory'] / 1e6:.0f} MB" if run["memory"] else "least memory"
    fig.suptitle(f"{gate}: {run['set']}, {memory}, {run['begin']['date'][:10]}")
    lines, labels = axes[0][0].get_legend_handles_labels()
    rows = (len(labels) + 1) // 2
    fig.legend(lines, labels, fontsize=8, loc="lower center", ncol=2)
    fig.tight_layout(rect=(0, .02 * rows + .01, 1, 1))
    fig.savefig(path, dpi=110)
    plt.close(fig)


def draw_memory(gates, path):
    """Reads against memory a vector, both sides, all gates of a set."""
    sets = {}
    for run in gates.values():
        if not run["latency"] and run["memory"]:
            sets.setdefault(run["set"], []).append(run)
    sets = {name: runs for name, runs in sets.items() if len(runs) > 1}
    if not sets:
        return
    fig, axes = plt.subplots(1, len(sets), figsize=(6.5 * len(sets), 5), squeeze=False)
    for ax, (name, runs) in zip(axes[0], sets.items()):
        shown = []
        for side in dict.fromkeys(s for r in runs for s in sides_of(r)):
            for recall, style in ((.95, "-o"), (.99, "--s")):
                line = []
                for run in runs:
                    settings = sides_of(run).get(side, [])
                    won = report.best(settings, recall)[1]
                    if won:
                        line.append((run["memory"] / run["rows"],
                                     report.at_recall(won["points"], recall, report.READS)))
                if line:
                    ax.plot(*zip(*sorted(line)), style,
                            color=COLOURS.get(side, "tab:gray"), label=f"{side} at {recall}")
                    shown += [v for _, v in line]
        ax.set_xlabel("memory, bytes a vector")
        ax.set_ylabel("4 KiB reads a query (fastest setting)")
        ax.set_title(name)
        ax.set_xlim(0)
        if shown:
            log_values(ax, shown)
        ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main():
    folder = sys.argv[1]
    plt.switch_backend("Agg")  # pictures only: there may be no display
    with open(os.path.join(folder, "compare.json")) as f:
        results = json.load(f)
    for gate, run in results["gates"].items():
        draw_gate(gate, run, os.path.join(folder, gate + ".png"))
    draw_memory(results["gates"], os.path.join(folder, "memory.png"))


if __name__ == "__main__":
    main()
