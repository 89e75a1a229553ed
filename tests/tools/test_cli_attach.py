"""annd attach: an index goes into a data directory, whole or not at all."""
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time
import urllib.request

import numpy as np
import pytest

from conftest import clustered, write_bin

ROWS, DIM = 600, 16
SMALL = ("--max-degree", 16, "--build-list", 30)


@pytest.fixture(scope="session")
def good(annd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("attach")
    base, queries = clustered(ROWS, DIM, "f32", queries=20)
    base_file, query_file = write_bin(folder / "base", base), write_bin(folder / "queries", queries)
    annd("build", base_file, "--output", folder / "index", *SMALL)
    return folder


@pytest.fixture
def index(good, tmp_path):
    shutil.copytree(good / "index", tmp_path / "index")
    return tmp_path / "index"


def inodes(folder):
    return {p.stat().st_ino for p in pathlib.Path(folder).rglob("*") if p.is_file()}


def answer(annd, path, good):
    return annd("search", path, "--queries", good / "queries.fbin", "--output", "jsonl")


def post(server, path, **body):
    request = urllib.request.Request(server.url + "/v2/vectordb/" + path,
                                     json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    out = json.loads(urllib.request.urlopen(request, timeout=60).read())
    assert out["code"] == 0, out
    return out["data"]


def names(serve, data):
    return sorted(post(serve(data), "collections/list"))


def test_attach_links_and_leaves_the_index_usable(annd, good, index, serve, tmp_path):
    before = answer(annd, index, good)
    data = tmp_path / "data"
    printed = annd("attach", index, "--data", data, "--as", "photos")
    assert "photos" in printed and str(ROWS) in printed
    shared = inodes(index) & inodes(data)
    assert len(shared) >= len(inodes(index)) - 2  # all but what names may differ in
    assert answer(annd, index, good) == before
    annd("check", index)
    server = serve(data)
    assert post(server, "collections/list") == ["photos"]
    queries = np.frombuffer((good / "queries.fbin").read_bytes(), "<f4", -1, 8).reshape(-1, DIM)
    hits = post(server, "entities/search", collectionName="photos", data=queries[:3].tolist(),
                limit=10)
    wanted = [h["id"] for line in before.splitlines()[:3] for h in json.loads(line)["hits"]]
    assert [h["id"] for h in hits] == wanted
    # The files are the collection's as well: the index may go.
    assert server.stop() == 0
    shutil.rmtree(index)
    assert post(serve(data), "collections/get_stats", collectionName="photos")["rowCount"] == ROWS


def test_one_index_may_be_attached_twice_and_beside_others(annd, index, serve, tmp_path):
    data = tmp_path / "data"
    for name in ("one", "two"):
        annd("attach", index, "--data", data, "--as", name)
    annd.fails(1, "attach", index, "--data", data, "--as", "one", says="one")
    assert names(serve, data) == ["one", "two"]


def test_copy_shares_nothing_and_move_leaves_nothing(annd, good, index, serve, tmp_path):
    before = answer(annd, index, good)
    annd("attach", index, "--data", tmp_path / "a", "--as", "x", "--copy")
    assert not inodes(index) & inodes(tmp_path / "a")
    assert answer(annd, index, good) == before
    annd("attach", index, "--data", tmp_path / "b", "--as", "x", "--move")
    assert not index.exists()
    assert names(serve, tmp_path / "a") == names(serve, tmp_path / "b") == ["x"]


@pytest.fixture
def other_file_system(tmp_path):
    for place in ("/dev/shm", "/tmp", "/var/tmp"):
        if os.access(place, os.W_OK) and os.stat(place).st_dev != tmp_path.stat().st_dev:
            folder = tempfile.mkdtemp(prefix="annd-test-", dir=place)
            yield pathlib.Path(folder)
            shutil.rmtree(folder)
            return
    pytest.skip("skipped, there is one file system only")


def test_another_file_system_is_refused_with_the_ways_out(annd, index, other_file_system, serve):
    data = other_file_system / "data"
    outcome = annd.fails(1, "attach", index, "--data", data, "--as", "x", says="file system")
    assert "--move" in outcome.err and "--copy" in outcome.err
    assert not data.exists() or not inodes(data) & inodes(index)
    annd("attach", index, "--data", data, "--as", "x", "--copy")
    annd("attach", index, "--data", data, "--as", "y", "--move")
    assert not index.exists()
    assert names(serve, data) == ["x", "y"]


def test_a_damaged_index_is_not_attached(annd, good, index, serve, tmp_path):
    data = tmp_path / "data"
    annd("attach", good / "index", "--data", data, "--as", "sound")
    before = sorted(str(p) for p in data.rglob("*") if p.name != "lock")
    path = next(index.glob("seg-*/*.pages"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    for how in ((), ("--copy",), ("--move",)):
        annd.fails(4, "attach", index, "--data", data, "--as", "damaged", *how, says="pages")
        assert index.exists()
    assert sorted(str(p) for p in data.rglob("*") if p.name != "lock") == before
    assert names(serve, data) == ["sound"]


def test_a_data_directory_in_use_is_exit_9(annd, index, serve, tmp_path):
    data = tmp_path / "data"
    annd("attach", index, "--data", data, "--as", "one")
    server = serve(data)
    annd.fails(9, "attach", index, "--data", data, "--as", "two", says="data")
    annd.fails(9, "serve", "--data", data, "--listen", "127.0.0.1:0", "--metrics-listen", "off",
               says="data")
    assert post(server, "collections/list") == ["one"]
    assert server.stop() == 0
    annd("attach", index, "--data", data, "--as", "two")
    assert names(serve, data) == ["one", "two"]


@pytest.mark.parametrize("name", ["", "1st", "a-b", "a b", "../up", "x" * 256, "\u00e9"])
def test_a_bad_name_is_refused(annd, index, tmp_path, name):
    annd.fails(2, "attach", index, "--data", tmp_path / "data", "--as", name)
    assert not (tmp_path / "data").exists()


def test_a_data_directory_that_is_something_else_is_refused(annd, index, tmp_path):
    (tmp_path / "file").write_text("mine")
    outcome = annd.run("attach", index, "--data", tmp_path / "file", "--as", "x")
    assert outcome.code in (1, 3) and "file" in outcome.sentence, outcome
    assert (tmp_path / "file").read_text() == "mine"
    outcome = annd.run("attach", index, "--data", index, "--as", "x")
    assert outcome.code in (1, 4) and "index" in outcome.sentence, outcome
    annd("check", index)


def test_a_killed_attach_leaves_the_data_directory_as_it_was_or_whole(annd, good, serve, tmp_path):
    data = tmp_path / "data"
    annd("attach", good / "index", "--data", data, "--as", "first")
    for n in range(8):
        process = subprocess.Popen([annd.path, "attach", good / "index", "--data", data, "--as",
                                    f"n{n}", "--copy"], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        time.sleep(0.02 + 0.03 * n)
        process.kill()
        process.wait()
    server = serve(data)
    found = post(server, "collections/list")
    assert "first" in found
    for name in found:
        assert post(server, "collections/get_stats", collectionName=name)["rowCount"] == ROWS
