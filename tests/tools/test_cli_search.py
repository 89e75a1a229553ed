"""How far a search goes and what it tells of it: targets of recall, lists, explain, exact scores,
and the options of build they rest on."""
import json

import numpy as np
import pytest

from conftest import clustered, exact, write_bin

ROWS, DIM, QUERIES = 4000, 32, 100
SMALL = ("--max-degree", 32, "--build-list", 50)
CODES = ("--code", "pq", "--own-distortion", "no")  # no bake-off: faster
COUNTS = {"rounds", "reads", "read_bytes", "resident_hits", "cells", "scanned", "estimates",
          "expanded", "exact"}
PHASES = {"prepare", "seed", "score", "expand", "exact", "wait"}


class Set:
    def __init__(self, annd, folder):
        self.base, self.queries = clustered(ROWS, DIM, "f32", queries=QUERIES)
        self.base_file = write_bin(folder / "base", self.base)
        self.query_file = write_bin(folder / "queries", self.queries)
        self.index = folder / "index"
        self.printed = annd("build", self.base_file, "--output", self.index, *SMALL)
        self.truth_file = folder / "truth.bin"
        annd("truth", self.base_file, "--queries", self.query_file, "-k", 20, "--output",
             self.truth_file)
        self.ids, self.distances = exact(self.base, self.queries, "l2", 10)


@pytest.fixture(scope="module")
def made(annd, tmp_path_factory):
    return Set(annd, tmp_path_factory.mktemp("search"))


def field_of(annd, index):
    return json.loads(annd("inspect", index, "--output", "json"))["segments"][0]["fields"][0]


def search(annd, index, queries, *options):
    return [json.loads(line) for line in annd("search", index, "--queries", queries, "--output",
                                              "jsonl", *options).splitlines()]


def recall(answers, ids):
    return np.mean([len({h["id"] for h in a["hits"]} & set(row)) / len(row)
                    for a, row in zip(answers, ids.tolist())])


def bench(annd, s, *options):
    return [json.loads(line) for line in
            annd("bench", s.index, "--queries", s.query_file, "--truth", s.truth_file, "--output",
                 "jsonl", *options).splitlines()]


# ---- how far ----

def test_a_sweep_by_recall_reaches_its_targets(annd, made):
    records = bench(annd, made, "--recall", "0.8,0.95,0.99")
    assert [r["recall_target"] for r in records] == [0.8, 0.95, 0.99]
    for r in records:
        assert r["recall"] >= r["recall_target"] - 0.04, r
        assert 0 <= r["recall_p5"] <= 1
        assert r["search_list"] >= 10 and r["cells"] >= 1
    assert records[0]["reads_mean"] <= records[1]["reads_mean"] <= records[2]["reads_mean"]


def test_a_sweep_by_list_has_no_target(annd, made):
    records = bench(annd, made, "--search-list", "16,64")
    assert [(r["recall_target"], r["search_list"], r["gain"]) for r in records] == [
        (None, 16, 0), (None, 64, 0)]
    assert records[0]["reads_mean"] < records[1]["reads_mean"]


def test_what_is_measured_when_nothing_is_said(annd, made):
    records = bench(annd, made)
    if field_of(annd, made.index)["calibration"]:
        assert [r["recall_target"] for r in records] == [0.9, 0.95, 0.99]
    else:
        assert [r["search_list"] for r in records] == [16, 24, 32, 48, 64, 100, 150, 200]


def test_parts_of_the_rule_can_be_set(annd, made):
    words = ("--cells", 7, "--patience", 3, "--gain", 0.25)
    for target in (("--recall", "0.95"), ("--search-list", 80)):
        (r,) = bench(annd, made, *target, *words)
        assert (r["cells"], r["patience"], r["gain"]) == (7, 3, 0.25)
        assert 0 < r["cells_scanned_mean"] <= 7
        assert r["reads_expected"] is None
    (none,) = bench(annd, made, "--search-list", 80, "--cells", 0)
    assert none["scanned_mean"] == 0 and none["recall"] > 0.5


def test_latency_and_throughput_are_preferences(annd, made):
    for words, wanted in (((), (128, 2)), (("--prefer", "throughput"), (128, 2)),
                          (("--prefer", "latency"), (32, 4)),
                          (("--prefer", "latency", "--reads-in-flight", 9), (9, 4)),
                          (("--reads-in-flight", 1, "--beam-width", 3), (1, 3))):
        (r,) = bench(annd, made, "--search-list", 32, *words)
        assert (r["reads_in_flight"], r["beam_width"]) == wanted


def test_reads_at_once_threads_and_company_change_no_answer(annd, made):
    wanted = None
    for words in (("--reads-in-flight", 1), ("--threads", 1, "--inflight", 1),
                  ("--threads", 4, "--inflight", 64), ("--inflight", 500), ("--io", "pread"),
                  ("--repeat", 7), ()):
        (r,) = bench(annd, made, "--recall", "0.95", *words)
        found = [r[k] for k in ("recall", "recall_p5", "reads_mean", "rounds_mean", "exact_mean",
                                "estimates_mean", "scanned_mean")]
        wanted = wanted or found
        assert found == wanted, words


def test_memory_of_a_measurement_does_not_grow_with_repeats(annd_release, made):
    few, many = (bench(annd_release, made, "--search-list", 16, "--repeat", n)[0]["memory_bytes"]
                 for n in (1, 200))
    assert many < few + (4 << 20)


def test_search_aims_at_a_recall_unless_told(annd, made):
    plain = search(annd, made.index, made.query_file)
    assert plain == search(annd, made.index, made.query_file, "--recall", "0.95")
    assert recall(plain, made.ids) >= 0.9
    more = search(annd, made.index, made.query_file, "--recall", "0.999")
    assert recall(more, made.ids) >= max(0.98, recall(plain, made.ids))


# ---- explain ----

def test_explain_tells_what_a_search_did(annd, made):
    plain = search(annd, made.index, made.query_file, "--recall", "0.9")
    told = search(annd, made.index, made.query_file, "--recall", "0.9", "--explain")
    for a, b in zip(plain, told):
        e = b.pop("explain")
        assert a == b
        assert COUNTS <= set(e) and all(e[c] >= 0 for c in COUNTS)
        assert e["rule"]["recall_target"] == pytest.approx(0.9)
        assert e["rule"]["search_list"] >= 10
        assert e["rounds"] <= e["reads"] and e["read_bytes"] == 4096 * e["reads"] > 0
        assert e["exact"] >= 10 and e["scanned"] > 0 and e["cells"] > 0
        assert e["stop"] in ("gain", "list")
        assert e["gain"] is None or e["gain"] >= 0
        assert set(e["time_us"]) == PHASES
        assert 0 < sum(e["time_us"].values()) <= 1.01 * e["latency_us"] + 1


def test_explain_of_a_list_in_every_form(annd, made):
    told = search(annd, made.index, made.query_file, "--search-list", 40, "--explain")
    assert all(a["explain"]["rule"]["recall_target"] is None for a in told)
    assert all(a["explain"]["rule"]["search_list"] == 40 for a in told)
    assert all(a["explain"]["stop"] == "list" for a in told)
    whole = json.loads(annd("search", made.index, "--queries", made.query_file, "--search-list", 40,
                            "--explain", "--output", "json"))
    assert [a["explain"]["reads"] for a in whole] == [a["explain"]["reads"] for a in told]
    table = annd("search", made.index, "--queries", made.query_file, "--search-list", 40,
                 "--explain")
    said = [line for line in table.splitlines() if line.startswith("#")]
    assert len(said) == 5 * QUERIES
    for word in ("list of 40", "rounds", "codes scanned", "waiting", "stopped (list)"):
        assert sum(word in line for line in said) == QUERIES, word


def test_explain_of_an_index_in_memory_reads_nothing(annd, made):
    for a in search(annd, made.index, made.query_file, "--memory", "64M", "--explain"):
        assert a["explain"]["reads"] == 0 and a["explain"]["resident_hits"] > 0


# ---- exact scores ----

def test_exact_scores_come_from_the_originals(annd, made, tmp_path):
    annd("build", made.base_file, "--output", tmp_path / "i", "--store", "8bit", *SMALL, *CODES)
    rough = search(annd, tmp_path / "i", made.query_file, "--search-list", 100)
    fine = search(annd, tmp_path / "i", made.query_file, "--search-list", 100, "--exact-scores",
                  "--explain")
    queries, base = made.queries.astype(np.float64), made.base.astype(np.float64)
    for q, (a, b) in enumerate(zip(rough, fine)):
        wanted = ((base[[h["id"] for h in b["hits"]]] - queries[q]) ** 2).sum(1)
        found = [h["distance"] for h in b["hits"]]
        assert np.allclose(found, wanted, rtol=1e-5) and found == sorted(found)
        assert {h["id"] for h in a["hits"]} == {h["id"] for h in b["hits"]}
    records = [json.loads(annd("bench", tmp_path / "i", "--queries", made.query_file, "--truth",
                               made.truth_file, "--search-list", 100, "--output", "jsonl", *more))
               for more in ((), ("--exact-scores",))]
    assert [r["exact_scores"] for r in records] == [False, True]
    assert records[1]["reads_mean"] > records[0]["reads_mean"]


def test_exact_scores_without_originals_are_refused(annd, made, tmp_path):
    annd("build", made.base_file, "--output", tmp_path / "i", "--no-originals", *SMALL, *CODES)
    annd.fails(1, "search", tmp_path / "i", "--queries", made.query_file, "--exact-scores",
               says="original")
    annd.fails(1, "bench", tmp_path / "i", "--queries", made.query_file, "--truth",
               made.truth_file, "--exact-scores", says="original")


# ---- what build was told ----

def test_build_reports_its_choices_and_inspect_shows_them(annd, made):
    field = field_of(annd, made.index)
    assert field["code_trials"] and field["cells"] >= 1 and field["cell_pages"] >= 1
    assert "codes tried" in made.printed
    for trial in field["code_trials"]:
        assert trial in made.printed
    text = annd("inspect", made.index)
    for word in ("codes tried", "hot tiers", "calibration", "cells"):
        assert word in text
    rows = field["hot_tier_rows"]
    assert rows == sorted(rows) and all(0 < r <= ROWS for r in rows)
    if field["calibration"]:
        assert field["calibration"]["own_queries"] is False
        assert "recall reached for each target" in made.printed
        for curve in field["calibration"]["curves"]:
            targets = [p["recall"] for p in curve["points"]]
            assert targets == sorted(targets) and curve["k"] >= 1
            assert 0 <= curve["resident_share"] <= 1


def test_queries_of_the_users_calibrate(annd, made, tmp_path):
    _, queries = clustered(ROWS, DIM, "f32", queries=400)
    mine = write_bin(tmp_path / "mine", queries)
    printed = annd("build", made.base_file, "--output", tmp_path / "i", "--calibrate", mine, *SMALL,
                   *CODES)
    calibration = field_of(annd, tmp_path / "i")["calibration"]
    assert calibration["own_queries"] is True and calibration["queries"] > 0
    assert "queries of yours" in printed
    annd("check", tmp_path / "i")


def test_queries_that_cannot_calibrate_are_refused_up_front(annd, made, tmp_path):
    wrong = write_bin(tmp_path / "wrong", made.queries[:, :-1])
    outcome = annd.fails(1, "build", made.base_file, "--output", tmp_path / "i", "--calibrate",
                         wrong, says=("wrong.fbin", "31", "32"))
    annd.fails(3, "build", made.base_file, "--output", tmp_path / "i", "--calibrate",
               tmp_path / "none.fbin", says="none.fbin")
    bad = made.queries.copy()
    bad[5, 7] = np.nan
    annd.fails(1, "build", made.base_file, "--output", tmp_path / "i", "--calibrate",
               write_bin(tmp_path / "bad", bad), says=("bad.fbin", "5", "7"))
    assert "MiB" not in outcome.err and not (tmp_path / "i").exists()


@pytest.mark.parametrize("own", ["yes", "no"])
def test_own_distortion_can_be_told(annd, made, tmp_path, own):
    annd("build", made.base_file, "--output", tmp_path / "i", "--code", "pq", "--own-distortion",
         own, *SMALL)
    answers = search(annd, tmp_path / "i", made.query_file, "--search-list", 100)
    assert recall(answers, made.ids) >= 0.95
    annd("check", tmp_path / "i")


def test_memory_it_is_served_with_shapes_the_first_tier(annd, made, tmp_path):
    least = json.loads(annd("bench", made.index, "--queries", made.query_file, "--truth",
                            made.truth_file, "--search-list", 50, "--output",
                            "jsonl"))["index_memory_bytes"]
    memory = least + 40 * 4096
    annd("build", made.base_file, "--output", tmp_path / "i", "--serve-memory", memory, *SMALL)
    field = field_of(annd, tmp_path / "i")
    assert 0 < field["hot_tier_rows"][0] <= 42 * field["page_capacity"]
    (r,) = [json.loads(annd("bench", tmp_path / "i", "--queries", made.query_file, "--truth",
                            made.truth_file, "--search-list", 50, "--output", "jsonl",
                            "--index-memory", memory))]
    assert r["resident_hits_mean"] > 0 and r["index_memory_bytes"] <= memory
