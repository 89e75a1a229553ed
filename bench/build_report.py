"""The table of bench/build, from what build.json holds alone.

A build is {"runs": [facts, ...], "reads": {"0.95": pages, ...}, "data": name, "rows": N}.
"""
import statistics

from compare_report import table, verdict

# What makes the graph; a `page order` before the last of them counts to it: it sorts the sample
# that rows are placed by, or the rows for insertion.
GRAPH_PHASES = ("sample", "assign", "place", "candidates", "edges", "connect", "graph",
                "graph insert", "graph finish", "nearest neighbours")
MIB = 1 << 20


def graph_names(phases):
    """For each phase, in order: does it make the graph?"""
    names, out = [p["phase"] for p in phases], []
    for i, name in enumerate(names):
        early = name == "page order" and any(n in GRAPH_PHASES for n in names[i + 1:])
        out.append(early or name in GRAPH_PHASES)
    return out


def graph_seconds(facts):
    return sum(p["seconds"] for p, mine in zip(facts["phases"], graph_names(facts["phases"]))
               if mine)


def rest_share(facts):
    """P10: all of the wall time that is not the graph, the time between phases included."""
    return 1 - graph_seconds(facts) / facts["seconds"]


def median(build, key):
    values = [f[key] for f in build["runs"]]
    return statistics.median(values) if values else None


def spread(build, key, form="{:.1f}", scale=1):
    values = [f[key] / scale for f in build["runs"]]
    text = form.format(statistics.median(values))
    return text if len(values) < 2 else \
        f"{text} ({form.format(min(values))}-{form.format(max(values))})"


def peak_row(gate, build, memory_bytes=None):
    limit = memory_bytes or build["runs"][0]["memory_limit_bytes"]
    peak = max(f["peak_bytes"] for f in build["runs"])
    return (gate, f"{build['data']}: peak resident, MiB", f"<= {limit / MIB:.0f} (--memory)",
            f"{peak / MIB:.0f}", "-", f"{peak / limit:.2f}x", verdict(peak <= limit))


def read_rows(gate, build, classic, recalls):
    rows = []
    for r in recalls:
        mine, old = build["reads"][str(r)], classic and classic["reads"][str(r)]
        rows.append((gate, f"{build['data']}: reads at {r}", "<= classic graph's",
                     f"{mine:.2f}" if mine else "not reached", f"{old:.2f}" if old else "-",
                     f"{mine / old:.3f}x" if mine and old else "-",
                     verdict(None if not old else mine is not None and mine <= old)))
    return rows


def against_peer(gate, run, needed, recalls):
    ours, peer = run["annd"], run.get("diskann")
    wall = median(ours, "seconds")
    theirs = median(peer, "seconds") if peer else None
    ratio = theirs / wall if theirs else None
    rows = [(gate, f"{ours['data']}: wall, s", f"<= 1/{needed} of DiskANN's",
             spread(ours, "seconds"), spread(peer, "seconds") if peer else "-",
             f"1/{ratio:.2f}" if ratio else "-",
             verdict(None if ratio is None else ratio >= needed)),
            (gate, f"{ours['data']}: CPU, s", "-", spread(ours, "cpu_seconds", "{:.0f}"),
             spread(peer, "cpu_seconds", "{:.0f}") if peer else "-",
             f"1/{median(peer, 'cpu_seconds') / median(ours, 'cpu_seconds'):.2f}" if peer else "-",
             "-")]
    peak = list(peak_row(gate, ours))
    if peer:
        peak[4] = spread(peer, "peak_bytes", "{:.0f}", MIB)
    return [*rows, tuple(peak), *read_rows(gate, ours, run.get("classic"), recalls)]


def share_rows(builds):
    rows = []
    for build in builds:
        shares = [rest_share(f) for f in build["runs"]]
        value = statistics.median(shares)
        rows.append(("P10", f"{build['data']}: all besides the graph, share of wall", "<= 40 %",
                     f"{100 * value:.1f} %", "-", "-", verdict(value <= .4)))
    return rows


def large_rows(run):
    large, small = run["large"], run["small"]
    per_row = [median(b, "seconds") / b["rows"] * 1e6 for b in (large, small)]
    ratio = per_row[0] / per_row[1]
    title = f"{large['data']} against {small['data']}"
    rows = [("P11", f"{title}: wall, s", "-", spread(large, "seconds"), spread(small, "seconds"),
             "-", "-"),
            ("P11", f"{title}: us a row", "<= 1.3x", f"{per_row[0]:.1f}", f"{per_row[1]:.1f}",
             f"{ratio:.2f}x", verdict(ratio <= 1.3)),
            ("P11", f"{title}: CPU, s", "-", spread(large, "cpu_seconds", "{:.0f}"),
             spread(small, "cpu_seconds", "{:.0f}"), "-", "-"),
            peak_row("P11", large), peak_row("P11", small)]
    for name, key in (("folder and scratch at most", "disk_peak_bytes"),
                      ("finished index", "disk_end_bytes")):
        rows.append(("P11", f"{title}: {name}, MiB", "-", spread(large, key, "{:.0f}", MIB),
                     spread(small, key, "{:.0f}", MIB), "-", "-"))
    for r in (.95, .99):
        a, b = large["reads"][str(r)], small["reads"][str(r)]
        rows.append(("P11", f"{title}: reads at {r}", "-", f"{a:.2f}" if a else "not reached",
                     f"{b:.2f}" if b else "not reached", f"{a / b:.2f}x" if a and b else "-", "-"))
    return rows


def bounded_rows(run, recalls):
    facts = run["annd"]["runs"][0]
    killed = run["kills"] or facts["code"]
    end = "killed: out of memory" if run["kills"] else f"exit {facts['code']}"
    ok = not killed and run["peak_bytes"] <= run["limit_bytes"]
    rows = [("M256", f"{run['annd']['data']}, --memory 256M, {run['how']}: end", "exit 0", end, "-",
             "-", verdict(not killed)),
            ("M256", f"peak, MiB ({run['source']})", f"<= {run['limit_bytes'] / MIB:.0f}",
             f"{run['peak_bytes'] / MIB:.0f}", "-", "-", verdict(ok))]
    if not killed:
        rows.append(("M256", "wall, s", "-", f"{facts['seconds']:.1f}", "-", "-", "-"))
        rows.append(peak_row("M256", run["annd"]))
        for r in recalls:
            reads = run["annd"]["reads"][str(r)]
            rows.append(("M256", f"reads at {r}", "-", f"{reads:.2f}" if reads else "not reached",
                         "-", "-", "-"))
    return rows


def phase_table(build):
    """Medians over the runs, a row a phase."""
    first, runs = build["runs"][0]["phases"], build["runs"]
    rows, between = [], median(build, "seconds")
    for i, (phase, mine) in enumerate(zip(first, graph_names(first))):
        seconds = statistics.median(f["phases"][i]["seconds"] for f in runs
                                    if i < len(f["phases"]))
        between -= seconds
        rows.append((phase["phase"], "graph" if mine else "rest", f"{seconds:.2f}",
                     f"{100 * seconds / median(build, 'seconds'):.1f} %",
                     f"{(phase['memory_bytes'] or 0) / MIB:.0f}"))
    rows.append(("(start, end, between)", "rest", f"{between:.2f}",
                 f"{100 * between / median(build, 'seconds'):.1f} %", "-"))
    return table((f"{build['data']} {build['options']}", "part", "s", "share", "MiB at its end"),
                 rows)


def builds_of(results):
    """What P10 looks at: annd's own builds with the batch builder, whatever gate they are for."""
    found = []
    for run in results["gates"].values():
        found += [run[k] for k in ("annd", "large", "small")
                  if run.get(k) and run[k]["runs"] and not run[k]["runs"][0]["code"]]
    return found


def render(results):
    m, options, recalls = results["machine"], results["options"], results["recalls"]
    gates, chosen, rows = results["gates"], results["chosen"], []
    for gate in ("P5", "P6"):
        if gate in gates and gate in chosen:
            rows += against_peer(gate, gates[gate], gates[gate]["needed"], recalls)
    if "P10" in chosen:
        rows += share_rows([gates[g]["annd"] for g in ("P5", "P6") if g in gates])
    if "P11" in gates:
        rows += large_rows(gates["P11"])
    if "M256" in gates:
        rows += bounded_rows(gates["M256"], recalls)
    text = ["# Builds by annd and DiskANN", "",
            (f"{m['cores']} cores of {m['model']}, {m['memory_bytes'] / 2**30:.0f} GiB, kernel "
             f"{m['kernel']}; {m['date']} to {results['end']['date']}; load average at the start "
             f"{m['load_average'][0]:.2f}, at the end {results['end']['load_average'][0]:.2f}."),
            f"{m['annd_version']}; " + ", ".join(p.replace("==", " ") for p in m["packages"]
                                                 if p.startswith(("diskannpy", "numpy")))
            + f". annd {options['rounds']} rounds (median; least and most), DiskANN "
            + f"{options['peer_rounds']}"
            + (", quick: a trial run, no measurement" if options["quick"] else "") + ".", ""]
    text += table(("gate", "figure", "needed", "annd", "beside it", "ratio", "met"), rows)
    text += [("Beside it: DiskANN for wall, CPU and peak, annd's classic graph (--builder insert, "
              "R=64, L=100) for reads, the smaller set in P11."), ""]
    for build in builds_of(results):
        text += phase_table(build)
        if len(build["runs"]) > 1:
            same = len({f["sha256"] for f in build["runs"]}) == 1
            text += [f"{len(build['runs'])} runs, the same bytes: {'yes' if same else 'NO'}", ""]
    for failure in results["failures"]:
        text += [f"Failed: {failure}", ""]
    return "\n".join(text)
