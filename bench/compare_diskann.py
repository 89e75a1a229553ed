"""DiskANN's side of bench/compare: builds, code files and searches, each in a process of its own.

It runs in the peers' environment (diskannpy, numpy) and prints one JSON object a line.

  build DATA FOLDER DTYPE DEGREE LIST CODE_BYTES THREADS
  codes DATA GRAPH_FOLDER FOLDER DTYPE CODE_BYTES THREADS
  serve FOLDER DTYPE QUERIES TRUTH K CACHE_NODES THREADS_MAX
      opens the index and answers jobs on stdin, one JSON object a line:
      {"threads": T, "beam_width": W, "lists": [L, ...], "seconds": S, "stop": RECALL}
      with a point per list and a line {"end": true}; a sweep ends early above the recall `stop`.

Reads are what the kernel counted for the process (read_bytes of /proc/self/io over 4,096; the index
is opened for direct reads), between start and end of a batch, so loading is never in them. The
graph file does not contain the PQ codes: `codes` trains and encodes with a throw-away graph and
puts the result beside the graph that is there, which gives the same files as a full build.
"""
import json
import math
import os
import resource
import shutil
import sys
import time

import numpy as np

TYPES = {"u8": np.uint8, "f32": np.float32}


def say(**fields):
    print(json.dumps(fields), flush=True)


def shape_of(path):
    return tuple(int(v) for v in np.fromfile(path, "<u4", 2))


def code_bytes_of(folder):
    """What the code file itself says: rows and bytes a row."""
    return shape_of(os.path.join(folder, "ann_pq_compressed.bin"))[1]


def status_bytes(name):
    with open("/proc/self/status") as f:
        for line in f:
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return 0


def run_build(data, folder, dtype, degree, build_list, code_bytes, threads):
    import diskannpy
    count = shape_of(data)[0]
    # DiskANN takes floor(memory / rows) as its code bytes, so half a byte more hits the number.
    diskannpy.build_disk_index(
        data=data, distance_metric="l2", index_directory=folder, complexity=build_list,
        graph_degree=degree, search_memory_maximum=(code_bytes + .5) * count / 2**30,
        build_memory_maximum=64, num_threads=threads, pq_disk_bytes=0, vector_dtype=TYPES[dtype],
        index_prefix="ann")
    got = code_bytes_of(folder)
    if got != code_bytes:
        raise SystemExit(f"{folder}: DiskANN made {got} code bytes a vector, wanted {code_bytes}")


def finish(folder, start, **fields):
    usage = resource.getrusage(resource.RUSAGE_SELF)
    fields.update(seconds=time.monotonic() - start, cpu_seconds=usage.ru_utime + usage.ru_stime,
                  peak_bytes=status_bytes("VmHWM:"), date=time.strftime("%Y-%m-%d %H:%M"),
                  load_average=os.getloadavg())
    with open(os.path.join(folder, "built.json"), "w") as out:
        json.dump(fields, out, indent=1)
    say(**fields)


def build(data, folder, dtype, degree, build_list, code_bytes, threads):
    start = time.monotonic()
    run_build(data, folder, dtype, int(degree), int(build_list), int(code_bytes), int(threads))
    os.remove(os.path.join(folder, "ann_mem.index.data"))  # a copy of the input, not searched
    finish(folder, start, what="graph", degree=int(degree), list=int(build_list),
           code_bytes=int(code_bytes), threads=int(threads))


def codes(data, graph, folder, dtype, code_bytes, threads):
    start = time.monotonic()
    scratch = os.path.join(folder, "scratch")
    os.makedirs(scratch)
    run_build(data, scratch, dtype, 8, 10, int(code_bytes), int(threads))
    for name in ("ann_pq_compressed.bin", "ann_pq_pivots.bin"):
        os.replace(os.path.join(scratch, name), os.path.join(folder, name))
    shutil.rmtree(scratch)
    for name in os.listdir(graph):
        if name.startswith("ann_") and "_pq_" not in name:
            os.link(os.path.join(graph, name), os.path.join(folder, name))
    finish(folder, start, what="codes", code_bytes=int(code_bytes), threads=int(threads))


def read_truth(path):
    count, k = shape_of(path)
    ids = np.fromfile(path, "<u4", count * k, offset=8).reshape(count, k)
    distances = np.fromfile(path, "<f4", count * k, offset=8 + 4 * count * k).reshape(count, k)
    return ids, distances


def hits_of(found, ids, distances, k):
    """Hits a query, counted as annd bench does: an id that the truth lists not behind its k-th."""
    hits = np.zeros(len(found), int)
    for q, row in enumerate(found[:, :k]):
        allowed = ids[q][distances[q] <= distances[q][k - 1]]
        hits[q] = min(len(np.intersect1d(row, allowed)), k)
    return hits


def counters():
    with open("/proc/self/io") as f:
        read = next(int(line.split()[1]) for line in f if line.startswith("read_bytes:"))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return time.monotonic(), read, usage.ru_utime + usage.ru_stime


def serve(folder, dtype, queries, truth, k, cache_nodes, threads_max):
    import diskannpy
    k, cache_nodes, threads_max = int(k), int(cache_nodes), int(threads_max)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DiskANN talks on stdout
    count, dim = shape_of(queries)
    vectors = np.fromfile(queries, TYPES[dtype], offset=8).reshape(count, dim)
    if dtype == "f32":
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    ids, distances = read_truth(truth)
    bare = status_bytes("VmRSS:")
    start = time.monotonic()
    index = diskannpy.StaticDiskIndex(folder, num_threads=threads_max,
                                      num_nodes_to_cache=cache_nodes,
                                      cache_mechanism=1 if cache_nodes else 0)
    rows, degree = vector_rows(folder)
    print(json.dumps({"load_seconds": time.monotonic() - start, "rows": rows,
                      "node_bytes": degree, "code_bytes": code_bytes_of(folder),
                      "bare_bytes": bare}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        for search_list in job["lists"]:
            point = measure(index, vectors, ids, distances, k, search_list, job)
            point["rss_bytes"], point["peak_bytes"] = status_bytes("VmRSS:"), status_bytes("VmHWM:")
            print(json.dumps(point), file=answers, flush=True)
            if point["recall"] >= job["stop"]:
                break
        print(json.dumps({"end": True}), file=answers, flush=True)


def vector_rows(folder):
    """Rows and bytes a node, from the graph file's own header."""
    head = np.fromfile(os.path.join(folder, "ann_disk.index"), "<u8", 6)
    return int(head[1]), int(head[4])


def measure(index, vectors, ids, distances, k, search_list, job):
    count = len(vectors)

    def search(rows):
        return index.batch_search(rows, k_neighbors=k, complexity=search_list,
                                  num_threads=job["threads"], beam_width=job["beam_width"])

    # A first pass gives recall and speed; then as many passes in one batch as fill the seconds.
    before = counters()
    found = search(vectors).identifiers
    after = counters()
    repeat = max(1, math.ceil(job["seconds"] / (after[0] - before[0])))
    if repeat > 1:
        tiled = np.tile(vectors, (repeat, 1))
        before = counters()
        search(tiled)
        after = counters()
    n = count * repeat
    hits = hits_of(found, ids, distances, k) / k
    seconds = after[0] - before[0]
    return {"search_list": search_list, "recall": float(hits.mean()),
            "recall_p5": float(np.sort(hits)[count // 20]), "qps": n / seconds,
            "latency_us_mean": seconds * 1e6 * min(job["threads"], n) / n,
            "reads_mean": (after[1] - before[1]) / 4096 / n,
            "cpu_us_mean": (after[2] - before[2]) * 1e6 / n, "seconds": seconds, "repeat": repeat}


if __name__ == "__main__":
    {"build": build, "codes": codes, "serve": serve}[sys.argv[1]](*sys.argv[2:])
