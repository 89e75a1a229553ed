"""annd as a command line: help, generate, inspect, messages and exit codes of wrong usage."""
import json
import re

import numpy as np
import pytest

from conftest import ROOT, clustered, write_bin, write_vecs

VERBS = ("generate", "plan", "build", "resume", "discard", "truth", "search", "bench", "inspect",
         "check", "attach", "serve", "doctor")


def test_help_lists_every_verb_and_each_verb_has_help(annd):
    text = annd("--help")
    for verb in VERBS:
        assert re.search(rf"^  {verb} ", text, re.M), verb
        own = annd(verb, "--help")
        assert f"usage: annd {verb}" in own and "examples:" in own
        assert max(map(len, own.splitlines())) < 160


def test_version_is_one_line(annd):
    assert re.fullmatch(r"annd \d+\.\d+\.\d+.*\n", annd("--version"))


def test_nothing_to_do_is_wrong_usage(annd):
    outcome = annd.run()
    assert outcome.code == 2 and "usage: annd" in outcome.err and not outcome.out


@pytest.mark.parametrize("arguments, word", [
    (("serach", "idx"), "serach"),
    (("build", "x.fbin", "--metirc", "l2"), "--metirc"),
    (("build", "--output", "idx"), "INPUT"),
    (("build", "x.fbin"), "--output"),
    (("build", "x.fbin", "y.fbin", "--output", "idx"), "y.fbin"),
    (("build", "x.fbin", "--output", "idx", "--metric", "hamming"), "hamming"),
    (("build", "x.fbin", "--output", "idx", "--max-degree", "3"), "--max-degree"),
    (("build", "x.fbin", "--output", "idx", "--threads", "0"), "--threads"),
    (("build", "x.fbin", "--output", "idx", "--threads", "-1"), "--threads"),
    (("build", "x.fbin", "--output", "idx", "--memory", "lots"), "--memory"),
    (("build", "x.fbin", "--output"), "--output"),
    (("search", "idx"), "--queries"),
    (("search", "idx", "--queries", "q.fbin", "-k", "0"), "-k"),
    (("search", "idx", "--queries", "q.fbin", "-k", "ten"), "-k"),
    (("search", "idx", "--queries", "q.fbin", "--output", "xml"), "xml"),
    (("bench", "idx", "--queries", "q.fbin"), "--truth"),
    (("bench", "idx", "--queries", "q", "--truth", "t", "--search-list", "16,,x"), "16,,x"),
    (("truth", "x.fbin", "--queries", "q.fbin"), "--output"),
    (("generate", "--rows", "10"), "--dim"),
    (("attach", "idx", "--as", "name"), "--data"),
    (("serve",), "--data"),
])
def test_wrong_usage_is_exit_2_and_names_the_word(annd, tmp_path, arguments, word):
    annd.fails(2, *arguments, says=word, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_mistyped_word_gets_the_nearest(annd):
    assert "annd search" in annd.fails(2, "serach").err
    assert "--metric" in annd.fails(2, "build", "x.fbin", "--metirc", "l2").err


@pytest.mark.parametrize("kind, suffix, size", [("f32", ".fbin", 4), ("u8", ".u8bin", 1)])
def test_generate_makes_the_same_set_for_the_same_seed(annd, tmp_path, kind, suffix, size):
    def make(name, seed):
        base, queries = tmp_path / f"{name}{suffix}", tmp_path / f"{name}.q{suffix}"
        annd("generate", "--rows", 5000, "--dim", 24, "--type", kind, "--clusters", 20, "--seed",
             seed, "--output", base, "--queries", queries)
        return base.read_bytes(), queries.read_bytes()

    base, queries = make("a", 5)
    assert (base, queries) == make("b", 5)
    other = make("c", 6)
    assert base != other[0] and queries != other[1]
    assert np.frombuffer(base, "<u4", 2).tolist() == [5000, 24]
    assert np.frombuffer(queries, "<u4", 2).tolist() == [1000, 24]
    assert len(base) == 8 + 5000 * 24 * size
    assert queries[8:] != base[8:8 + 1000 * 24 * size]


def test_generate_clusters_so_that_neighbours_mean_something(annd, tmp_path):
    annd("generate", "--rows", 2000, "--dim", 32, "--type", "f32", "--clusters", 10, "--output",
         tmp_path / "x.fbin")
    x = np.frombuffer((tmp_path / "x.fbin").read_bytes(), "<f4", -1, 8).reshape(2000, 32)
    distances = ((x[:50, None] - x[None]) ** 2).sum(2)
    distances.sort(1)
    assert distances[:, 10].mean() < 0.6 * distances.mean()


def test_generate_refuses_a_name_of_another_type(annd, tmp_path):
    annd.fails(1, "generate", "--rows", 10, "--dim", 4, "--type", "f32", "--output",
               tmp_path / "x.u8bin", says="x.u8bin")
    assert not list(tmp_path.iterdir())


def inspect(annd, path):
    return json.loads(annd("inspect", path, "--output", "json"))


@pytest.mark.parametrize("kind", ["f32", "u8", "i8"])
@pytest.mark.parametrize("form", ["bin", "npy", "vecs"])
def test_inspect_tells_rows_dimension_type_and_norms(annd, tmp_path, kind, form):
    rows, _ = clustered(300, 10, kind)
    if form == "bin":
        path = write_bin(tmp_path / "x", rows)
    elif form == "npy":
        path = tmp_path / "x.npy"
        np.save(path, rows)
    elif kind == "i8":
        pytest.skip("there is no such format")
    else:
        path = write_vecs(tmp_path / "x", rows)
    report = inspect(annd, path)
    assert (report["kind"], report["rows"], report["dimension"], report["type"]) == (
        "vectors", 300, 10, kind)
    assert report["bytes"] == path.stat().st_size
    assert report["nan_values"] == report["infinite_values"] == report["zero_vectors"] == 0
    assert str(report["rows"]) in annd("inspect", path)


def test_inspect_counts_nan_infinity_zeros_and_copies(annd, tmp_path):
    rows, _ = clustered(400, 8, "f32")
    rows[3, 2] = np.nan
    rows[5, 1] = np.inf
    rows[5, 2] = -np.inf
    rows[10:13] = 0
    rows[20] = rows[21]
    report = inspect(annd, write_bin(tmp_path / "x", rows))
    assert report["nan_values"] == 1 and report["infinite_values"] == 2
    assert report["unusable_rows"] == 2 and report["first_unusable_row"] == 3
    assert report["zero_vectors"] == 3
    good = np.delete(rows, [3, 5], 0).astype(np.float64)
    assert report["norms"]["max"] == pytest.approx(np.linalg.norm(good, axis=1).max(), rel=1e-5)


def test_every_c_test_is_in_the_build():
    text = (ROOT / "tests" / "meson.build").read_text()
    for path in ROOT.glob("tests/*/*.c"):
        kind, _, name = path.stem.partition("_")
        if kind in ("test", "fuzz") and path.parent.name != "support":
            assert f"'{name}'" in text, f"{path} is not built by tests/meson.build"
    text = (ROOT / "bench" / "meson.build").read_text()
    for path in ROOT.glob("bench/bench_*.c"):
        assert f"'{path.stem[6:]}'" in text, f"{path} is not built by bench/meson.build"


def test_the_top_level_is_what_it_should_be():
    wanted = {"src", "index", "storage", "tools", "tests", "bench", "meson.build", "README.md",
              "LICENSE", "meson.options"}
    found = {p.name for p in ROOT.iterdir()
             if not p.name.startswith((".", "build", "annd-demo", "__pycache__"))}
    assert found <= wanted, f"more than there should be: {sorted(found - wanted)}"
