"""Figures and the Markdown table of bench/compare, from its points alone.

A point is one line of `annd bench --output jsonl`, or the same fields from DiskANN. A setting holds
`scout`, the points of its first sweep, and, where it went on, `rounds`, a list of sweeps.
"""
import math
import statistics

# What "reads" means in all tables: 4 KiB pages, so that a wide vector's longer read counts as the
# drive counts it, on both sides.
READS = "pages_mean"
LOWEST = 5e-5  # half a hit in 1,000 queries of 10: what recall 1 counts as on a log scale


def plain(setting):
    """The setting without what runs it, with the median of its rounds."""
    out = {k: v for k, v in setting.items() if k not in ("owner", "qps")}
    if out.get("rounds"):
        out["points"] = medians(out["rounds"])
    return out


def medians(rounds):
    points = []
    for same in zip(*rounds):
        points.append({k: statistics.median(p[k] for p in same)
                       if isinstance(v, (int, float)) and not isinstance(v, bool) else v
                       for k, v in same[0].items()})
    return points


def useful(points):
    """The points in order of recall, without those that another reaches with fewer reads: where a
    curve ends, longer lists cost more and find no more. By reads: these do not vary by chance."""
    kept, fewest = [], math.inf
    for p in sorted(points, key=lambda p: (p["recall"], -p.get(READS, 0)), reverse=True):
        if p.get(READS, 0) <= fewest:
            kept.append(p)
            fewest = p.get(READS, 0)
    return kept[::-1]


def at_recall(points, recall, key):
    """The value of `key` where the curve crosses `recall`, linear in log(1 - recall) between two
    points; the first point's when all lie above, None when all lie below."""
    below = None
    for p in useful(points):
        if p["recall"] >= recall:
            if below is None:
                return p[key]
            x, a, b = (math.log(max(1 - r, LOWEST))
                       for r in (recall, below["recall"], p["recall"]))
            return below[key] if a == b else below[key] + (x - a) / (b - a) * (p[key] - below[key])
        below = p
    return None


def timed(settings):
    return [s for s in settings if s.get("points")]


def best(settings, recall, latency=False, number=None):
    """(value, setting): the most QPS or the least latency at a recall; of one round if named."""
    key = "latency_us_mean" if latency else "qps"
    found = []
    for s in timed(settings):
        points = s["points"] if number is None else s["rounds"][number]
        value = at_recall(points, recall, key)
        if value is not None:
            found.append((value, s))
    if not found:
        return None, None
    return (min if latency else max)(found, key=lambda f: f[0])


def ratios(ours, theirs, recall, latency=False):
    """annd over DiskANN, round by round."""
    rounds = [len(s["rounds"]) for s in timed(ours) + timed(theirs)]
    out = []
    for i in range(min(rounds, default=0)):
        a, b = (best(side, recall, latency, i)[0] for side in (ours, theirs))
        if a and b:
            out.append(a / b)
    return out


def show(value, form="{:.1f}"):
    return "not reached" if value is None else form.format(value)


def name_of(setting):
    if setting is None:
        return "-"
    if "threads" in setting and "pq" in setting:
        return (f"PQ{setting['pq']}, {setting['cache_nodes']} nodes cached, "
                f"T={setting['threads']} W={setting['beam_width']}")
    cells = f", {setting['cells']} cells" if setting.get("cells") else ""
    return f"{setting['inflight']} in flight, W={setting['beam_width']}{cells}"


def verdict(ok):
    return "-" if ok is None else "yes" if ok else "no"


def gate_rows(gate, run, spec, recalls):
    rows = [(f"{gate} {variant}".strip(), "all", "-", why, "-", "-", "no")
            for variant, why in run["failed"].items()]
    winners = []
    theirs = run["diskann"]
    for variant, ours in run["annd"].items():
        title = f"{gate} {variant}".strip()
        for i, recall in enumerate(recalls):
            latency = run["latency"]
            mine, my_setting = best(ours, recall, latency)
            peer, peer_setting = best(theirs, recall, latency)
            winners.append((title, recall, my_setting, peer_setting))
            ratio = mine / peer if mine and peer else None
            spread = ratios(ours, theirs, recall, latency)
            shown = show(ratio, "{:.2f}x") if ratio else "-"
            if len(spread) > 1:
                shown += f" ({min(spread):.2f}-{max(spread):.2f})"
            if latency:
                need = (.45, .35)[i]
                rows.append((title, f"mean latency at {recall}", f"<= {need}x",
                             show(mine, "{:.0f} us"), show(peer, "{:.0f} us"), shown,
                             verdict(ratio is not None and ratio <= need)))
                continue
            need = spec["annd"][variant]["ratio"][i]
            rows.append((title, f"QPS at {recall}", f">= {need}x" if need else "-",
                         show(mine, "{:.0f}"), show(peer, "{:.0f}"), shown,
                         verdict(None if not need else ratio is not None and ratio >= need)))
            need = spec["annd"][variant]["reads"][i]
            reads, peer_reads = (at_recall(s["points"], recall, READS) if s else None
                                 for s in (my_setting, peer_setting))
            rows.append((title, f"reads at {recall}", f"<= {need}" if need else "-",
                         show(reads), show(peer_reads),
                         f"{reads / peer_reads:.2f}x" if reads and peer_reads else "-",
                         verdict(None if not need else reads is not None and reads <= need)))
    return rows, winners


def cpu_rows(gates):
    rows = []
    for gate, need in (("P2", 150), ("P3a", 300)):
        if gate not in gates:
            continue
        run = gates[gate]
        _, peer = best(run["diskann"], .95)
        theirs = at_recall(peer["points"], .95, "cpu_us_mean") if peer else None
        for variant, ours in run["annd"].items():
            _, mine = best(ours, .95)
            cpu = at_recall(mine["points"], .95, "cpu_us_mean") if mine else None
            rows.append((f"P8 {gate} {variant}".strip(), "CPU a query at 0.95", f"<= {need} us",
                         show(cpu, "{:.0f} us"), show(theirs, "{:.0f} us"),
                         f"{cpu / theirs:.2f}x" if cpu and theirs else "-",
                         verdict(cpu is not None and cpu <= need)))
    return rows


def high_rows(runs):
    rows = []
    for r in runs:
        top = max(r["points"], key=lambda p: p["recall"])
        first = min((p for p in r["points"] if p["recall"] >= .995),
                    key=lambda p: p["recall"], default=top)
        rows.append((f"P7 {r['gate']} {r['variant']}".strip(), "recall@10; 5th percentile; reads",
                     ">= 0.995", (f"{first['recall']:.4f}; {first['recall_p5']:.2f}; "
                     f"{first['pages_mean']:.1f} (highest {top['recall']:.4f})"), "-", "-",
                     verdict(top["recall"] >= .995)))
    return rows


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return lines + ["| " + " | ".join(str(c) for c in r) + " |" for r in rows] + [""]


def mib(value):
    return f"{value / 2**20:.1f}"


def write(folder, results, gates):
    m, recalls = results["machine"], results["recalls"]
    rows, winners, memory, reads = [], [], [], []
    for gate, run in results["gates"].items():
        spec = gates["P2" if gate == "P4" else gate]
        if gate in results["chosen"]:
            more, won = gate_rows(gate, run, spec, recalls)
            rows += more
            winners += won
        sides = [(f"annd {v}".strip(), s) for v, s in run["annd"].items()]
        for side, settings in sides + [("DiskANN", run["diskann"])]:
            kinds = {}
            for s in timed(settings):
                key = f"PQ{s['pq']}" if "pq" in s else ""
                old = kinds.get(key, (0, 0))
                kinds[key] = (max(old[0], *(p["index_memory_bytes"] for p in s["points"])),
                              max(old[1], *(p["peak_bytes"] for p in s["points"])))
            for key, (index, peak) in kinds.items():
                memory.append((gate, f"{side} {key}".strip(),
                               f"{run['memory'] or 0:,}" if run["memory"] else "least",
                               f"{index:,.0f}", f"{index / run['rows']:.1f}", mib(peak)))
            # The fewest reads of any setting, whatever its speed.
            for recall in recalls:
                found = []
                for s in settings:
                    value = at_recall(s.get("points") or s["scout"], recall, READS)
                    if value is not None:
                        found.append((value, name_of(s)))
                if found:
                    reads.append((gate, side, recall, f"{min(found)[0]:.1f}", min(found)[1]))
    if "P8" in results["chosen"]:
        rows += cpu_rows(results["gates"])
    rows += high_rows(results.get("P7", []))
    options = results["options"]
    text = ["# annd against DiskANN", "",
            (f"{m['cores']} cores of {m['model']}, {m['memory_bytes'] / 2**30:.0f} GiB, kernel "
            f"{m['kernel']}; {m['date']} to {results['end']['date']}; load average at the start "
            f"{m['load_average'][0]:.2f}, at the end {results['end']['load_average'][0]:.2f}."),
            f"{m['annd_version']}; " + ", ".join(p.replace("==", " ") for p in m["packages"]
                                                 if p.startswith(("diskannpy", "numpy"))) +
            f". {options['rounds']} rounds, points of at least {options['seconds']} s"
            + (", quick: a trial run, no measurement" if options["quick"] else "") + ".", ""]
    text += table(("gate", "figure", "needed", "annd", "DiskANN", "ratio (rounds)", "met"), rows)
    if winners:
        text += ["Settings that won (reads above are theirs):", ""]
        text += table(("gate", "recall", "annd", "DiskANN"),
                      [(g, r, name_of(a), name_of(b)) for g, r, a, b in winners])
    if memory:
        text += [("Memory (index: what the side counts; peak: VmHWM of the process, seen from "
                 "outside; DiskANN's contains Python):"), ""]
        text += table(("gate", "side", "allowed B", "index B", "index B/vector", "peak MiB"),
                      memory)
    if reads:
        text += ["Fewest reads of any setting, whatever its speed:", ""]
        text += table(("gate", "side", "recall", "reads", "setting"), reads)
    if results.get("FILE"):
        text += ["One annd file at every memory:", ""]
        text += table(("file of", "memory B", "reads 0.95", "reads 0.99", "QPS 0.95", "QPS 0.99"),
                      [(r["gate"], f"{r['memory']:,}",
                        *(show(at_recall(r["points"], x, k), f)
                          for k, f in ((READS, "{:.1f}"), ("qps", "{:.0f}"))
                          for x in recalls)) for r in results["FILE"]])
    if results.get("GRID"):
        text += ["emb-200k moved off the 8-bit grid (own truth), the gates' memory, no gates:", ""]
        text += table(("row", *(f"reads {x}" for x in recalls), "of the gate",
                       "highest recall"),
                      [(f"{r['gate']}-perturbed {r['variant']}",
                        *(show(at_recall(r["points"], x, READS)) for x in recalls),
                        " / ".join(f"<= {n}" for n in
                                   gates[r["gate"]]["annd"][r["variant"]]["reads"]),
                        f"{max(p['recall'] for p in r['points']):.4f}")
                       for r in results["GRID"]])
    if results.get("CONTEXT"):
        text += ["Other libraries on sift-1m (all but LanceDB with everything in memory):", ""]
        text += table(("library", "parameters", "QPS 0.95", "QPS 0.99", "build s", "file MB",
                       "peak MiB"), [context_row(c, recalls) for c in results["CONTEXT"]])
    built = []
    for gate, run in results["gates"].items():
        for facts in list(run["facts"]["annd"].values()) + run["facts"]["diskann"]:
            row = (facts["index"], f"{facts['seconds']:.0f}", facts["date"],
                   "graph reused" if facts.get("graph_was_there") or facts.get("what") == "codes"
                   else "")
            if row not in built:
                built.append(row)
    if built:
        text += ["Indexes (built once, maybe on a busy machine):", ""]
        text += table(("index", "build s", "when", ""), built)
    with open(folder + "/compare.md", "w") as f:
        f.write("\n".join(text))


def context_row(c, recalls):
    if "error" in c:
        return (c["kind"], c["error"], *[""] * 5)
    return (f"{c['kind']} {c['version']}", c["parameters"],
            *(show(at_recall(c["points"], r, "qps"), "{:.0f}") for r in recalls),
            f"{c['build_seconds']:.0f}", f"{c['file_bytes'] / 1e6:.0f}", mib(c["peak_bytes"]))
