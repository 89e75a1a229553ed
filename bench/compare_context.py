"""Other libraries on the same queries, for the scale of bench/compare's figures; not gates.

  compare_context.py KIND BASE.u8bin QUERIES TRUTH FOLDER THREADS SECONDS

KIND is hnswlib, faiss, usearch (all in memory) or lancedb (on disk, through the page cache). Builds
into FOLDER/KIND-PARAMETERS once, sweeps, prints one JSON object as the last line. The parameters
are each library's usual good ones for a million vectors, not a search for the best.
"""
import concurrent.futures
import glob
import importlib.metadata
import json
import math
import os
import shutil
import sys
import time

import numpy as np
from compare_diskann import hits_of, read_truth, shape_of, status_bytes

K = 10


def vectors_of(path):
    count, dim = shape_of(path)
    return np.fromfile(path, np.uint8, offset=8).reshape(count, dim).astype(np.float32)


class Hnswlib:
    package, name, effort = "hnswlib", "M16-efc200", (16, 24, 32, 48, 64, 96, 128, 192, 256)

    def build(self, base, folder, threads):
        import hnswlib
        index = hnswlib.Index("l2", base.shape[1])
        index.init_index(len(base), M=16, ef_construction=200, random_seed=1)
        index.add_items(base, num_threads=threads)
        index.save_index(folder + "/index")

    def open(self, folder, dim, threads):
        import hnswlib
        self.index = hnswlib.Index("l2", dim)
        self.index.load_index(folder + "/index")
        self.threads = threads

    def search(self, queries, effort):
        self.index.set_ef(effort)
        return self.index.knn_query(queries, K, num_threads=self.threads)[0]


class Faiss:
    package, name = "faiss-cpu", "IVF4096-PQ32x8-refineSQ8"
    effort = (8, 16, 32, 64, 128, 256)

    def build(self, base, folder, threads):
        import faiss
        faiss.omp_set_num_threads(threads)
        index = faiss.index_factory(base.shape[1], "IVF4096,PQ32x8,Refine(SQ8)")
        index.train(base)
        index.add(base)
        faiss.write_index(index, folder + "/index")

    def open(self, folder, dim, threads):
        import faiss
        faiss.omp_set_num_threads(threads)
        self.index = faiss.read_index(folder + "/index")
        self.index.k_factor = 4
        self.inner = faiss.extract_index_ivf(self.index)

    def search(self, queries, effort):
        self.inner.nprobe = effort
        return self.index.search(queries, K)[1]


class Usearch:
    package, name, effort = "usearch", "M16-add200", (16, 32, 48, 64, 96, 128, 192, 256)

    def build(self, base, folder, threads):
        from usearch.index import Index
        index = Index(ndim=base.shape[1], metric="l2sq", dtype="f32", connectivity=16,
                      expansion_add=200)
        index.add(np.arange(len(base), dtype=np.uint64), base, threads=threads)
        index.save(folder + "/index")

    def open(self, folder, dim, threads):
        from usearch.index import Index
        self.index = Index(ndim=dim, metric="l2sq", dtype="f32", connectivity=16,
                           expansion_add=200)
        self.index.load(folder + "/index")
        self.threads = threads

    def search(self, queries, effort):
        self.index.expansion_search = effort
        return np.asarray(self.index.search(queries, K, threads=self.threads).keys, np.int64)


class Lancedb:
    package, name, effort = "lancedb", "IVF1024-PQ32-refine10", (4, 8, 16, 32, 64, 128)

    def build(self, base, folder, threads):
        import lancedb
        import pyarrow as pa

        def batches():
            for start in range(0, len(base), 100_000):
                block = base[start:start + 100_000]
                flat = pa.array(block.reshape(-1))
                yield pa.RecordBatch.from_arrays(
                    [pa.FixedSizeListArray.from_arrays(flat, base.shape[1]),
                     pa.array(np.arange(start, start + len(block)))], ["vector", "id"])
        schema = pa.schema([("vector", pa.list_(pa.float32(), base.shape[1])),
                            ("id", pa.int64())])
        rows = lancedb.connect(folder).create_table("t", batches(), schema=schema)
        rows.create_index(metric="l2", num_partitions=1024, num_sub_vectors=32, index_type="IVF_PQ")

    def open(self, folder, dim, threads):
        import lancedb
        self.rows = lancedb.connect(folder).open_table("t")
        self.threads = 2 * threads  # a call is mostly fixed cost: more callers than cores

    def search(self, queries, effort):
        def one(query):
            found = self.rows.search(query).limit(K).nprobes(effort).refine_factor(10)
            ids = found.select(["id", "_distance"]).to_arrow()["id"].to_pylist()
            return ids + [-1] * (K - len(ids))
        with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
            return np.array(list(pool.map(one, queries)))


KINDS = {"hnswlib": Hnswlib, "faiss": Faiss, "usearch": Usearch, "lancedb": Lancedb}


def main():
    kind, base, queries, truth, folder, threads, seconds = sys.argv[1:]
    threads, seconds = int(threads), float(seconds)
    peer = KINDS[kind]()
    folder = f"{folder}/{kind}-{peer.name}"
    dim = shape_of(base)[1]
    if not os.path.exists(folder + "/built.json"):
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        start = time.monotonic()
        peer.build(vectors_of(base), folder, threads)
        with open(folder + "/built.json", "w") as out:
            json.dump({"seconds": time.monotonic() - start, "threads": threads}, out)
        # The build's memory would stand in the peak: search in a process that never built.
        os.execv(sys.executable, [sys.executable] + sys.argv)
    with open(folder + "/built.json") as f:
        built = json.load(f)
    asked = vectors_of(queries)
    ids, distances = read_truth(truth)
    peer.open(folder, dim, threads)
    points = []
    for effort in peer.effort:
        start = time.monotonic()
        found = peer.search(asked, effort)
        spent = time.monotonic() - start
        repeat = max(1, math.ceil(seconds / spent))
        if repeat > 1:
            many = np.tile(asked, (repeat, 1))
            start = time.monotonic()
            peer.search(many, effort)
            spent = time.monotonic() - start
        hits = hits_of(np.asarray(found), ids, distances, K) / K
        points.append({"effort": effort, "recall": float(hits.mean()),
                       "qps": len(asked) * repeat / spent})
        if points[-1]["recall"] >= .997:
            break
    files = [p for p in glob.glob(folder + "/**", recursive=True) if os.path.isfile(p)]
    print(json.dumps({
        "kind": kind, "version": importlib.metadata.version(peer.package),
        "parameters": f"{peer.name}, {threads} threads", "points": points,
        "build_seconds": built["seconds"], "file_bytes": sum(os.path.getsize(p) for p in files),
        "peak_bytes": status_bytes("VmHWM:")}))


if __name__ == "__main__":
    main()
