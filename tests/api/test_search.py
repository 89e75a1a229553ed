"""What a search is asked and what it tells: recall targets, exact scores, explain, and the counters
that follow from them. Truth is numpy's, in double precision."""
import shutil
import struct
import subprocess

import numpy as np
import pytest

from conftest import Server, clustered, exact, write_bin
from test_http import Client, vectors

ROWS, DIM, QUERIES = 1200, 256, 60
METRICS = ("ip", "cosine", "l2")
# The error a score may have, by its scale. Rounding of single components averages out, so these
# hold from some 200 dimensions on; below, half floats err by at most 2^-11.
STORES = {"f32": 2e-6, "f16": 1e-4, "8bit": 2e-3}
FLOAT32 = 2e-6
TIGHT = "24M"  # codes and tables, and hardly a page


def build(annd, folder, name, base, metric, *options):
    annd("build", write_bin(folder / name, base), "--output", folder / f"{name}.index", "--metric",
         metric, "--max-degree", 24, "--build-list", 50, *options)
    annd("attach", folder / f"{name}.index", "--data", folder / "data", "--as", name)


class Site:
    """A collection of the same floats for every metric and store, those of few dimensions, one
    without originals and one of bytes; a server with room for all pages and one with hardly any."""

    def __init__(self, annd, folder):
        base, queries = clustered(ROWS, DIM, "f32", queries=QUERIES)
        random = np.random.default_rng(3)
        # Lengths differ, so that a score's scale does too.
        self.base = (base * random.uniform(0.2, 3, (ROWS, 1))).astype(np.float32)
        self.queries = (queries * random.uniform(0.5, 5, (QUERIES, 1))).astype(np.float32)
        self.base[11] = 0
        for metric in METRICS:
            for store in STORES:
                build(annd, folder, f"{metric}_{store}", self.base, metric, "--store", store)
            build(annd, folder, f"few_{metric}", self.base[:, :8], metric)
        build(annd, folder, "bare", self.base, "l2", "--no-originals")
        self.bytes, self.byte_queries = clustered(ROWS, DIM, "u8", queries=QUERIES)
        build(annd, folder, "bytes", self.bytes, "l2")
        self.data = folder / "data"
        self.annd = annd
        self.server = Server(annd, self.data, "--memory", "256M", "--threads", 2)


@pytest.fixture(scope="module")
def site(annd, tmp_path_factory):
    made = Site(annd, tmp_path_factory.mktemp("site"))
    yield made
    if made.server:
        made.server.__exit__()


@pytest.fixture
def client(site):
    made = Client(site.server.listen)
    yield made
    made.connection.close()


@pytest.fixture
def tight(site):
    """A client of a server that has to read pages. The directory takes one server at a time."""
    site.server.__exit__()
    server = Server(site.annd, site.data, "--memory", TIGHT, "--threads", 2, "--prefer", "latency")
    made = Client(server.listen)
    yield made
    made.connection.close()
    server.__exit__()
    site.server = Server(site.annd, site.data, "--memory", "256M", "--threads", 2)


def search(client, name, queries, limit=10, **params):
    return client.good("entities/search", {"collectionName": name, "data": vectors(queries),
                                           "limit": limit, "searchParams": {"params": params}})


def answers(out, limit=10):
    """(ids, scores) of a search that found `limit` rows for each query."""
    assert set(out["topks"]) == {limit}
    ids = np.array([row["id"] for row in out["data"]]).reshape(-1, limit)
    return ids, np.array([row["distance"] for row in out["data"]]).reshape(-1, limit)


def recall(ids, truth):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(ids.tolist(), truth.tolist())])


def scores(base, queries, metric):
    """(score of every row for every query, the scale of its error)"""
    base, queries = base.astype(np.float64), queries.astype(np.float64)
    products = queries @ base.T
    squares = (queries ** 2).sum(1)[:, None], (base ** 2).sum(1)[None, :]
    norms = np.sqrt(squares[0] * squares[1])
    if metric == "l2":
        return squares[0] - 2 * products + squares[1], squares[0] + squares[1]
    if metric == "ip":
        return products, norms
    return np.divide(products, norms, out=np.zeros_like(products), where=norms > 0), \
        np.ones_like(products)


# ---- scores ----

@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("metric", METRICS)
def test_scores_are_as_near_as_their_store_promises(site, client, metric, store):
    true, scale = scores(site.base, site.queries, metric)
    ids, got = answers(search(client, f"{metric}_{store}", site.queries))
    error = np.abs(got - np.take_along_axis(true, ids, 1)) / np.take_along_axis(scale, ids, 1)
    assert error.max() <= STORES[store]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("metric", METRICS)
def test_exact_scores_are_those_of_the_floats_that_were_given(site, client, metric, store):
    true, scale = scores(site.base, site.queries, metric)
    out = search(client, f"{metric}_{store}", site.queries, exact_scores=True, recall_target=0.99)
    ids, got = answers(out)
    error = np.abs(got - np.take_along_axis(true, ids, 1)) / np.take_along_axis(scale, ids, 1)
    assert error.max() <= FLOAT32
    assert (np.diff(got if metric == "l2" else -got, axis=1) >= 0).all()
    assert recall(ids, exact(site.base, site.queries, metric, 10)[0]) >= 0.97


def test_scores_of_few_dimensions(site, client):
    for metric in METRICS:
        true, scale = scores(site.base[:, :8], site.queries[:, :8], metric)
        for limit, params in ((2 ** -11 + 2e-6, {}), (FLOAT32, {"exact_scores": True})):
            ids, got = answers(search(client, f"few_{metric}", site.queries[:, :8], **params))
            error = np.abs(got - np.take_along_axis(true, ids, 1))
            assert (error <= limit * np.take_along_axis(scale, ids, 1)).all()


def test_exact_scores_of_a_row_with_itself(site, client):
    for store in STORES:
        ids, got = answers(search(client, f"l2_{store}", site.base[:40], 1, exact_scores="true"), 1)
        assert ids[:, 0].tolist() == list(range(40)) and (got == 0).all()


def test_exact_scores_of_bytes_are_those_they_have_anyway(site, client):
    plain = search(client, "bytes", site.byte_queries)
    assert search(client, "bytes", site.byte_queries, exact_scores=True) == plain


def test_exact_scores_need_the_originals(site, client):
    query = {"collectionName": "bare", "data": vectors(site.queries[:1])}
    client.bad(1100, "entities/search", {**query, "searchParams": {"exact_scores": True}},
               "exact_scores: the original vectors of field vector were not kept")
    client.good("entities/search", {**query, "searchParams": {"exact_scores": False}})


# ---- how far a search goes ----

@pytest.mark.parametrize("name, metric", [("cosine_f16", "cosine"), ("l2_8bit", "l2")])
def test_a_recall_target_is_reached_and_costs_reads(site, tight, name, metric):
    truth = exact(site.base, site.queries, metric, 10)[0]
    reads, rules = [], []
    for target in (0.6, 0.9, 0.95, 0.99, 0.9999):
        out = search(tight, name, site.queries, recall_target=target, explain=True)
        # A sample of 600 rows strays by about a hundredth.
        assert recall(answers(out)[0], truth) >= target - 0.02, target
        reads.append(sum(q["reads"] for q in out["explain"]["queries"]))
        rule = out["explain"]["segments"][0]["rule"]
        rules.append((rule["search_list"], rule["patience"], -rule["gain"]))
    # Clusters this clear need no more reads for a higher target; the rule is stricter all the same.
    assert reads == sorted(reads) and rules == sorted(rules) and rules[0] != rules[-1]


def test_levels_rise(site, client):
    targets = [search(client, "l2_f16", site.queries[:1], level=level, explain=True)["explain"][
        "segments"][0]["rule"]["recall_target"] for level in range(1, 11)]
    assert targets == sorted(set(targets)) and 0.85 < targets[0] and targets[-1] < 1


def test_explain_tells_what_was_asked_and_what_was_used(site, client):
    for params, by, target, least in (
            ({"recall_target": 0.9}, "recall_target", 0.9, 10),
            ({"recall_target": "0.99"}, "recall_target", 0.99, 10),
            ({"search_list": 77}, "search_list", None, 77), ({"ef": 55}, "ef", None, 55),
            ({"nprobe": 16}, "nprobe", None, 64), ({"search_list": 3}, "search_list", None, 10),
            ({"search_list": 40, "ef": 50, "level": 2}, "search_list", None, 40)):
        part = search(client, "l2_f16", site.queries[:1], explain=True, **params)["explain"][
            "segments"][0]
        assert part["given_by"] == by and part["rows"] == ROWS
        rule = part["rule"]
        assert rule["recall_target"] == target
        assert rule["search_list"] == least if target is None else rule["search_list"] >= least
        assert target is None or isinstance(rule["gain"], (int, float))
    # Nothing asked: 0.97 where a calibration can tell what that takes.
    part = search(client, "l2_f16", site.queries[:1], explain=True)["explain"]["segments"][0]
    assert part["given_by"] == "default"
    assert part["rule"]["recall_target"] == (0.97 if part["calibrated"] else None)
    assert part["calibrated"] or part["rule"]["search_list"] == 100


def check_query(query, limit):
    assert query["read_bytes"] == 4096 * query["reads"]
    assert (query["reads"] > 0) == (query["rounds"] > 0)
    assert query["reads"] + query["resident_hits"] > 0
    assert query["exact"] >= limit and query["latency_us"] > 0
    assert query["expanded"] + query["scanned"] > 0
    assert len(query["stop"]) == 1 and query["stop"][0] in ("gain", "list", "reads")
    assert (query["cells"] > 0) == (query["scanned"] > 0)
    times = query["time_us"]
    assert set(times) == {"prepare", "seed", "score", "expand", "exact"}
    assert all(value >= 0 for value in times.values())
    assert 0 < sum(times.values()) <= query["latency_us"] * 1.01 + 5


def test_explain_adds_up_when_pages_are_in_memory(site, client):
    for name in ("l2_f16", "cosine_8bit", "ip_f32", "bytes"):
        queries = site.byte_queries if name == "bytes" else site.queries
        plain = search(client, name, queries)
        out = search(client, name, queries, explain=True)
        explain = out.pop("explain")
        assert out == plain and set(plain) == {"code", "cost", "data", "topks"}
        assert explain["exact_scores"] is False and len(explain["segments"]) == 1
        assert len(explain["queries"]) == QUERIES
        part = explain["segments"][0]
        assert part["resident_share"] == 1 and part["beam_width"] == 2
        for query in explain["queries"]:
            check_query(query, 10)
            assert query["reads"] == 0 and query["time_us"]["exact"] == 0


def test_explain_adds_up_when_pages_are_read(site, tight):
    for name in ("l2_f16", "cosine_8bit", "ip_f32"):
        plain = search(tight, name, site.queries)
        out = search(tight, name, site.queries, explain=True)
        explain = out.pop("explain")
        assert out == plain
        part = explain["segments"][0]
        assert part["resident_share"] < 0.5 and part["beam_width"] == 4
        for query in explain["queries"]:
            check_query(query, 10)
            assert query["reads"] > 0
        # Exact scores are reads of their own, in one more round.
        more = search(tight, name, site.queries, explain=True, exact_scores=True)["explain"]
        assert more["exact_scores"] is True
        if not name.endswith("f32"):
            assert all(a["reads"] < b["reads"] <= a["reads"] + 20 and b["rounds"] == a["rounds"] + 1
                       for a, b in zip(explain["queries"], more["queries"]))
        few = search(tight, name, site.queries, explain=True, search_list=500, reads_max=3,
                     beamwidth=1)["explain"]
        assert all(q["reads"] <= 3 and q["stop"] == ["reads"] for q in few["queries"])
        assert few["segments"][0]["reads_max"] == 3 and few["segments"][0]["beam_width"] == 1
    # The same rows whether pages are read or at hand, as long as the same ones are looked at.
    listed = search(tight, "l2_f16", site.queries, search_list=400, beamwidth=1)
    assert recall(answers(listed)[0], exact(site.base, site.queries, "l2", 10)[0]) >= 0.99


def test_an_answer_is_the_same_alone_and_among_others(site, tight):
    for params in ({}, {"recall_target": 0.9}, {"exact_scores": True, "beamwidth": 8}):
        together = search(tight, "cosine_8bit", site.queries, **params)["data"]
        for i in range(0, QUERIES, 7):
            alone = search(tight, "cosine_8bit", site.queries[i:i + 1], **params)["data"]
            assert alone == together[10 * i:10 * i + 10]


# ---- what is wrong is named ----

@pytest.mark.parametrize("params, says", [
    ({"recall_target": 0.95, "search_list": 100}, "recall_target and search_list"),
    ({"recall_target": 0.95, "ef": 100}, "recall_target and ef"),
    ({"recall_target": 0.95, "nprobe": 8}, "recall_target and nprobe"),
    ({"recall_target": 0.95, "level": 1}, "recall_target and level"),
    ({"recall_target": 0.4}, "'recall_target' (0.4) should be in range [0.5, 0.9999]"),
    ({"recall_target": 1}, "'recall_target' (1) should be in range [0.5, 0.9999]"),
    ({"recall_target": 95}, "'recall_target' (95)"),
    ({"recall_target": "high"}, "'recall_target' (\"high\") should be a number"),
    ({"recall_target": True}, "'recall_target' (true) should be a number"),
    ({"recall_target": {}}, "'recall_target'"),
    ({"explain": 1}, "'explain' (1) should be true or false"),
    ({"exact_scores": "yes"}, "'exact_scores' (\"yes\") should be true or false"),
    ({"reads_max": 0}, "'reads_max' (0) should be in range"),
    ({"reads_max": 2.5}, "'reads_max' (2.5) should be integer"),
    ({"level": 11}, "'level' (11) should be in range [1, 10]"),
])
def test_bad_parameters_are_named(site, client, params, says):
    query = {"collectionName": "l2_f16", "data": vectors(site.queries[:1])}
    client.bad(1100, "entities/search", {**query, "searchParams": {"params": params}}, says)
    client.bad(1100, "entities/search", {**query, "searchParams": params}, says)
    first, *rest = params.items()
    if rest:  # one of two here, one there
        client.bad(1100, "entities/search", {**query, "searchParams": {
            **dict(rest), "params": {first[0]: first[1]}}}, says)


def test_null_and_equal_parameters_do_no_harm(site, client):
    query = {"collectionName": "l2_f16", "data": vectors(site.queries[:1])}
    out = client.good("entities/search", {**query, "searchParams": {
        "recall_target": 0.9, "search_list": None, "explain": "true",
        "params": {"recall_target": "0.9", "exact_scores": None}}})
    assert out["explain"]["segments"][0]["rule"]["recall_target"] == 0.9


# ---- counters ----

def figures(client, name):
    """What /metrics says of one collection: {(metric, label or None): value}."""
    out = {}
    for line in client.send("GET", "/metrics")[1].decode().splitlines():
        if f'collection_name="{name}"' not in line or line.startswith("#"):
            continue
        head, value = line.rsplit(" ", 1)
        metric, labels = head.split("{")
        label = [x.split('"')[1] for x in labels.split(",") if x.startswith(("reason=", "le="))]
        out[metric, label[0] if label else None] = float(value)
    return out


def test_metrics_count_what_explain_tells(site, tight):
    name = "l2_f16"
    before = figures(tight, name)
    queries = search(tight, name, site.queries, explain=True)["explain"]["queries"]
    few = search(tight, name, site.queries, explain=True, reads_max=1,
                 search_list=300)["explain"]["queries"]
    after = figures(tight, name)
    more = {key: after[key] - before[key] for key in after}
    assert set(before) == set(after)
    for metric, figure in (("annd_search_reads_total", "reads"),
                           ("annd_search_resident_pages_total", "resident_hits"),
                           ("annd_search_codes_scanned_total", "scanned"),
                           ("annd_search_estimates_total", "estimates"),
                           ("annd_search_distances_total", "exact"),
                           ("annd_search_rounds_total", "rounds")):
        assert more[metric, None] == sum(q[figure] for q in queries + few), metric
    for reason in ("gain", "list", "reads"):
        assert more["annd_search_stops_total", reason] == sum(
            reason in q["stop"] for q in queries + few)
    reads = [q["reads"] for q in queries + few]
    histogram = "annd_search_reads_per_query"
    assert more[histogram + "_count", None] == 2 * QUERIES
    assert more[histogram + "_sum", None] == sum(reads)
    for (metric, label), value in more.items():
        if metric == histogram + "_bucket":
            assert value == sum(x <= float(label) for x in reads), label
    assert more["annd_searches_total", None] == 2
    text = tight.send("GET", "/metrics")[1].decode()
    kinds = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(kinds) == len(set(kinds))


# ---- annd serve --prefer ----

def test_what_a_server_prefers_is_said_at_the_start(annd, site):
    annd.fails(2, "serve", "--data", site.data, "--prefer", "both", says="latency")
    assert site.server.stop() == 0
    assert "2 search threads for throughput" in site.server.err.splitlines()[0]
    site.server = Server(annd, site.data, "--memory", "256M", "--threads", 2, "--prefer", "latency")
    one = Client(site.server.listen)
    assert search(one, "bytes", site.byte_queries[:1], explain=True)["explain"]["segments"][0][
        "beam_width"] == 4
    assert site.server.stop() == 0
    assert "2 search threads for latency" in site.server.err.splitlines()[0]
    site.server = Server(annd, site.data, "--memory", "256M", "--threads", 2)


# ---- the shared sets ----

def check_targets(annd, folder, base, queries, metric, truth):
    """Builds, and holds recall against each target with some pages in memory and with all of them.
    Without a calibration there is no promise to hold, only a rule of thumb."""
    annd("build", write_bin(folder / "base", base), "--output", folder / "index", "--metric",
         metric, timeout=1500)
    annd("attach", folder / "index", "--data", folder / "data", "--as", "c")
    for memory in ("13M", "256M"):
        reads = []
        with Server(annd, folder / "data", "--memory", memory, "--threads", 2) as server:
            one = Client(server.listen, 120)
            for target in (0.9, 0.95, 0.99):
                out = one.good("entities/search", {
                    "collectionName": "c", "data": queries.tolist(), "limit": 10,
                    "searchParams": {"recall_target": target, "explain": True}})
                found = recall(answers(out)[0], truth)
                part, took = out["explain"]["segments"][0], out["explain"]["queries"]
                reads.append(np.mean([q["reads"] for q in took]))
                print(f"{metric} {target}: recall {found:.4f}, {reads[-1]:.1f} reads, {part}")
                assert found >= (target - 0.01 if part["calibrated"] else 0.9)
                assert (part["resident_share"] == 1) == (memory == "256M")
        assert reads == sorted(reads)


@pytest.mark.slow
def test_recall_targets_are_reached_on_the_shared_images(annd_release, shared_data, tmp_path):
    base = read_bin(shared_data / "images.512.fbin", "<f4")
    queries = read_bin(shared_data / "emb.query.fbin", "<f4")[:500]
    check_targets(annd_release, tmp_path, base, queries, "cosine",
                  exact(base, queries, "cosine", 10)[0])


@pytest.mark.slow
def test_recall_targets_are_reached_on_the_first_of_sift(annd_release, shared_data, tmp_path):
    rows = 50000
    unpack = subprocess.Popen([shutil.which("zstd"), "-dcq", shared_data / "sift-1m.base.u8bin.zst"],
                              stdout=subprocess.PIPE)
    count, dim = struct.unpack("<II", unpack.stdout.read(8))
    assert count >= rows
    base = np.frombuffer(unpack.stdout.read(rows * dim), np.uint8).reshape(rows, dim)
    unpack.kill()
    unpack.communicate()
    queries = read_bin(shared_data / "sift.query.u8bin", np.uint8)[:500]
    check_targets(annd_release, tmp_path, base, queries, "l2", exact(base, queries, "l2", 10)[0])


def read_bin(path, kind):
    data = path.read_bytes()
    return np.frombuffer(data, kind, offset=8).reshape(struct.unpack_from("<II", data))
