"""Recall on parts of the shared data sets, with the optimised program; skipped without the data."""
import json
import struct
import subprocess

import numpy as np
import pytest

from conftest import exact, read_truth, write_bin

pytestmark = pytest.mark.slow


def unpacked(path, rows, dtype):
    """The first rows of a packed .u8bin or .i8bin."""
    with subprocess.Popen(["zstd", "-dcq", path], stdout=subprocess.PIPE) as process:
        _, dim = struct.unpack("<II", process.stdout.read(8))
        data = process.stdout.read(rows * dim)
        process.stdout.close()
        process.kill()
    return np.frombuffer(data, dtype).reshape(rows, dim)


def bench(annd, index, queries, truth, lists):
    lines = annd("bench", index, "--queries", queries, "--truth", truth, "-k", 10, "--search-list",
                 ",".join(map(str, lists)), "--output", "jsonl")
    return {r["search_list"]: r for r in map(json.loads, lines.splitlines())}


@pytest.fixture(scope="session")
def sift(annd_release, shared_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sift")
    base = unpacked(shared_data / "sift-1m.base.u8bin.zst", 50000, np.uint8)
    base_file = write_bin(folder / "base", base)
    annd_release("build", base_file, "--output", folder / "index", "--code-bytes", 32, timeout=600)
    annd_release("truth", base_file, "--queries", shared_data / "sift.query.u8bin", "-k", 10,
                 "--output", folder / "truth.bin")
    return folder, base


def test_truth_on_sift_is_exact(sift, shared_data):
    folder, base = sift
    queries = np.frombuffer((shared_data / "sift.query.u8bin").read_bytes(), np.uint8, -1,
                            8).reshape(1000, 128)
    ids, distances = read_truth(folder / "truth.bin")
    wanted_ids, wanted = exact(base, queries[:100], "l2", 10)
    assert (ids[:100] == wanted_ids).all() and (distances[:100] == wanted).all()


def test_recall_on_sift(annd_release, sift, shared_data):
    folder, _ = sift
    found = bench(annd_release, folder / "index", shared_data / "sift.query.u8bin",
                  folder / "truth.bin", (20, 50, 100, 200))
    assert found[50]["recall"] >= 0.95
    assert found[100]["recall"] >= 0.985
    assert found[200]["recall"] >= 0.995
    recalls = [found[n]["recall"] for n in (20, 50, 100, 200)]
    assert recalls == sorted(recalls)
    assert found[200]["memory_bytes"] <= found[200]["index_memory_bytes"] + (64 << 20)


@pytest.fixture(scope="session")
def embeddings(annd_release, shared_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("emb")
    base = unpacked(shared_data / "emb-200k.base.i8bin.zst", 20000, np.int8)
    base = base.astype(np.float32) / np.float32(512)
    base_file = write_bin(folder / "base", base)
    annd_release("build", base_file, "--output", folder / "index", "--metric", "cosine",
                 timeout=600)
    annd_release("truth", base_file, "--queries", shared_data / "emb.query.fbin", "-k", 10,
                 "--metric", "cosine", "--output", folder / "truth.bin")
    return folder


def test_recall_on_embeddings(annd_release, embeddings, shared_data):
    found = bench(annd_release, embeddings / "index", shared_data / "emb.query.fbin",
                  embeddings / "truth.bin", (20, 50, 100, 200))
    assert found[50]["recall"] >= 0.95
    assert found[100]["recall"] >= 0.985
    assert found[200]["recall"] >= 0.995


def test_inspect_knows_the_published_truths(annd_release, shared_data):
    for name, order in (("sift-1m.gt.bin", "ascending"), ("emb-200k.gt.bin", "ascending")):
        report = json.loads(annd_release("inspect", shared_data / name, "--output", "json"))
        assert (report["queries"], report["neighbours"]) == (1000, 100)
        assert report["order"].startswith(order)


def test_truth_agrees_with_the_published_one(annd_release, shared_data, tmp_path):
    base = write_bin(tmp_path / "b", unpacked(shared_data / "sift-1m.base.u8bin.zst", 200000,
                                              np.uint8))
    annd_release("truth", base, "--queries", shared_data / "sift.query.u8bin", "-k", 100,
                 "--output", tmp_path / "t.bin", timeout=600)
    assert (tmp_path / "t.bin").read_bytes() == (shared_data / "sift-200k.gt.bin").read_bytes()
