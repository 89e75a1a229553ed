"""The gates, data sets and index parameters that bench/compare, targets and memory_bound share."""
import os

from compare_run import HERE, Annd, run, unpack

# memory: bytes both sides may keep resident; None is the least that works (no node cache).
# pq: code bytes DiskANN may choose from; all of them are tried. needs: (reads at 0.95, at 0.99),
# QPS ratio at 0.95 and 0.99; None where the gate asks nothing.
GATES = {
    "P1": {"set": "sift-1m", "memory": 34_000_000, "pq": (32,), "annd": {
        "": {"code_bytes": 32, "reads": (15.5, 25), "ratio": (2.0, 2.2)}}},
    "P1b": {"set": "sift-1m", "memory": 73_000_000, "pq": (32, 64), "annd": {
        "": {"code_bytes": 32, "reads": (9.5, 15.5), "ratio": (1.8, 2.4)}}},
    "P2": {"set": "sift-1m", "memory": 105_000_000, "pq": (64,), "annd": {
        "": {"code_bytes": 64, "reads": (6.5, 9.5), "ratio": (1.8, 3.0)}}},
    "P3a": {"set": "emb-200k", "memory": 24_000_000, "pq": (96,), "annd": {
        "f16": {"code_bytes": 97, "reads": (13, 21), "ratio": (2.0, 2.9)},
        "8bit": {"code_bytes": 97, "reads": (11, 18), "ratio": (2.1, 3.3)}}},
    "P3b": {"set": "emb-200k", "memory": 43_000_000, "pq": (96, 128), "annd": {
        "f16": {"code_bytes": 129, "reads": (10, 15), "ratio": (1.8, 4.0)},
        "8bit": {"code_bytes": 129, "reads": (8.5, 12.5), "ratio": (None, None)}}},
    "P9": {"set": "wide-200k", "memory": None, "pq": (128,), "annd": {
        "f16": {"code_bytes": 128, "reads": (None, None), "ratio": (2.5, None)}}},
}
SETS = {
    "sift-1m": {"base": "sift-1m.base.u8bin", "queries": "sift.query.u8bin",
                "truth": "sift-1m.gt.bin", "metric": "l2", "dtype": "u8", "dim": 128},
    "emb-200k": {"base": "emb-200k.base.fbin", "queries": "emb.query.fbin",
                 "truth": "emb-200k.gt.bin", "metric": "cosine", "dtype": "f32", "dim": 512},
    "grid-200k": {"base": "grid-200k.base.fbin", "queries": "emb.query.fbin",
                  "truth": "grid-200k.gt.bin", "metric": "cosine", "dtype": "f32", "dim": 512},
    "wide-200k": {"base": "wide-200k.base.fbin", "queries": "wide-200k.query.fbin",
                  "truth": "wide-200k.gt.bin", "metric": "cosine", "dtype": "f32", "dim": 2048},
}
RECALLS = (.95, .99)


def prepare(names, machine, peers=True):
    """Makes what the sets need: unpacked files, made sets, truths, DiskANN's unit-length copies."""
    folder = machine.work + "/data"
    unpack(machine, folder)
    python = machine.peer_python
    for name in names:
        s = SETS[name] = {k: os.path.join(folder, v) if k in ("base", "queries", "truth") else v
                          for k, v in SETS[name].items()}
        s["name"] = name
        if name == "wide-200k" and not os.path.exists(s["queries"]):
            run([python, HERE + "/make_wide.py", folder + "/emb-200k.base.fbin",
                 folder + "/emb.query.fbin", s["base"], s["queries"]])
        if name == "grid-200k" and not os.path.exists(s["base"]):
            run([python, HERE + "/make_perturbed.py", folder + "/emb-200k.base.fbin", s["base"]])
        s["peer_base"] = s["base"]
        # The perturbed copy is searched by annd alone.
        if peers and s["metric"] == "cosine" and name != "grid-200k":
            s["peer_base"] = folder + f"/{name}.unit.fbin"
            if not os.path.exists(s["peer_base"]):
                run([python, HERE + "/compare_data.py", s["base"], s["peer_base"]])
        if not os.path.exists(s["truth"]):
            run([machine.annd, "truth", s["base"], "--queries", s["queries"], "--metric",
                 s["metric"], "-k", "100", "--output", s["truth"], "--progress", "off"])
        with open(s["base"], "rb") as f:
            s["rows"] = int.from_bytes(f.read(4), "little")


def gate_index(machine, spec, variant, name=None):
    """annd's index for one of GATES, built when not there; of another set of its shape if named."""
    return Annd(machine, SETS[name or spec["set"]], spec["annd"][variant]["code_bytes"],
                variant or None, spec["memory"])
