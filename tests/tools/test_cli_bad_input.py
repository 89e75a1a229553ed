"""What is wrong with the input is said in one sentence, with the right exit code, and leaves
nothing behind that a reader could take for whole."""
import ctypes
import json
import os
import pathlib
import random
import resource
import shutil
import struct
import subprocess

import numpy as np
import pytest

from conftest import clustered, write_bin, write_vecs

ROWS, DIM = 600, 16
SMALL = ("--max-degree", 16, "--build-list", 30)


class Good:
    """A sound input of each kind, which every test here spoils in one way."""

    def __init__(self, annd, folder):
        self.folder = folder
        self.base, self.queries = clustered(ROWS, DIM, "f32", queries=20)
        self.base_file = write_bin(folder / "base", self.base)
        self.query_file = write_bin(folder / "queries", self.queries)
        self.truth_file = folder / "truth.bin"
        self.index = folder / "index"
        annd("build", self.base_file, "--output", self.index, *SMALL)
        annd("truth", self.base_file, "--queries", self.query_file, "-k", 10, "--output",
             self.truth_file)
        self.answer = annd("search", self.index, "--queries", self.query_file, "--output", "jsonl")


@pytest.fixture(scope="session")
def good(annd, tmp_path_factory):
    return Good(annd, tmp_path_factory.mktemp("good"))


def header(rows, dim):
    return struct.pack("<II", rows, dim)


def npy(text, body=b"\0" * 64):
    text = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


def f32(*shape):
    return np.ones(shape, "<f4").tobytes()


BAD_FILES = [
    ("empty.fbin", b""),
    ("empty.fvecs", b""),
    ("empty.npy", b""),
    ("header-cut.fbin", header(600, 16)[:6]),
    ("header-only.fbin", header(600, 16)),
    ("truncated.fbin", header(600, 16) + f32(599, 16)),
    ("a-byte-less.fbin", header(600, 16) + f32(600, 16)[:-1]),
    ("a-byte-more.fbin", header(600, 16) + f32(600, 16) + b"\0"),
    ("oversized.fbin", header(600, 16) + f32(700, 16)),
    ("no-rows.fbin", header(0, 16)),
    ("no-dimensions.fbin", header(600, 0)),
    ("huge.fbin", header(0xffffffff, 0xffffffff) + f32(10, 16)),
    ("overflow.fbin", header(0x80000000, 0x80000000)),
    ("other-type.u8bin", header(600, 16) + f32(600, 16)),
    ("dimension.fvecs", struct.pack("<i", -5) + f32(600, 16)),
    ("ragged.fvecs", b"".join(struct.pack("<I", 16 if i != 300 else 15) + f32(16)
                              for i in range(600))),
    ("cut.fvecs", (struct.pack("<I", 16) + f32(16)) * 599 + b"\x10\0\0\0\0\0"),
    ("cut.bvecs", (struct.pack("<I", 16) + b"\1" * 16) * 599 + b"\x10\0\0"),
    ("not.npy", b"hello, world, this is text\n" * 20),
    ("objects.npy", npy("{'descr': '|O', 'fortran_order': False, 'shape': (2, 2), }")),
    ("doubles.npy", npy("{'descr': '<f8', 'fortran_order': False, 'shape': (2, 4), }")),
    ("big-endian.npy", npy("{'descr': '>f4', 'fortran_order': False, 'shape': (4, 4), }")),
    ("fortran.npy", npy("{'descr': '<f4', 'fortran_order': True, 'shape': (4, 4), }")),
    ("3-d.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2, 4), }")),
    ("short.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (400, 16), }")),
    ("negative.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-4, 4), }")),
    ("vast.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': "
                     "(99999999999999999999, 4), }")),
    ("no-shape.npy", npy("{'descr': '<f4', 'fortran_order': False, }")),
    ("no-such-format.csv", b"1,2,3\n" * 600),
    ("no-suffix", header(600, 16) + f32(600, 16)),
]


@pytest.mark.parametrize("name, content", BAD_FILES, ids=[name for name, _ in BAD_FILES])
def test_a_bad_vector_file_is_named_by_every_verb_that_reads_it(annd, good, tmp_path, name,
                                                                content):
    path = tmp_path / name
    path.write_bytes(content)
    annd.fails(1, "build", path, "--output", tmp_path / "i", says=name)
    annd.fails(1, "truth", path, "--queries", good.query_file, "--output", tmp_path / "t.bin",
               says=name)
    annd.fails(1, "search", good.index, "--queries", path, says=name)
    annd.fails(1, "inspect", path, says=name)
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_by_row_and_dimension(annd, good, tmp_path, value):
    rows = good.base.copy()
    rows[417, 11] = value
    path = write_bin(tmp_path / "x", rows)
    annd.fails(1, "build", path, "--output", tmp_path / "i", says=("417", "11"))
    annd.fails(1, "truth", path, "--queries", good.query_file, "--output", tmp_path / "t.bin",
               says="417")
    queries = good.queries.copy()
    queries[13, 2] = value
    query_file = write_bin(tmp_path / "q", queries)
    annd.fails(1, "search", good.index, "--queries", query_file, says="13")
    annd.fails(1, "truth", good.base_file, "--queries", query_file, "--output", tmp_path / "t.bin",
               says="13")
    assert {p.name for p in tmp_path.iterdir()} == {"x.fbin", "q.fbin"}


@pytest.mark.parametrize("rows", [1, 2, 255])
def test_too_few_rows_to_train_are_refused(annd, good, tmp_path, rows):
    path = write_bin(tmp_path / "x", good.base[:rows])
    annd.fails(1, "build", path, "--output", tmp_path / "i", says=(str(rows), "256"))
    assert [p.name for p in tmp_path.iterdir()] == ["x.fbin"]


def test_fewest_rows_that_can_be_trained_are_enough(annd, good, tmp_path):
    path = write_bin(tmp_path / "x", good.base[:256])
    annd("build", path, "--output", tmp_path / "i", *SMALL)
    annd("check", tmp_path / "i")


def test_queries_of_another_dimension_are_refused(annd, good, tmp_path):
    path = write_bin(tmp_path / "q", good.queries[:, :15].copy())
    annd.fails(1, "search", good.index, "--queries", path, says=("15", "16"))
    annd.fails(1, "truth", good.base_file, "--queries", path, "--output", tmp_path / "t.bin",
               says=("15", "16"))
    annd.fails(1, "bench", good.index, "--queries", path, "--truth", good.truth_file,
               says=("15", "16"))


@pytest.mark.parametrize("verb, options, says", [
    ("search", ("--recall", "0.9", "--search-list", 50), ("--recall", "--search-list", "both")),
    ("bench", ("--recall", "0.9", "--search-list", "50,60"), ("--recall", "--search-list", "both")),
    ("search", ("--recall", "0"), ("--recall", "above 0", "'0'")),
    ("search", ("--recall", "1"), ("--recall", "below 1", "'1'")),
    ("search", ("--recall", "nan"), ("--recall", "'nan'")),
    ("search", ("--recall", ""), ("--recall",)),
    ("search", ("--recall", "0.9,0.95"), ("--recall", "at most 1", "0.9,0.95")),
    ("bench", ("--recall", "0.9,"), ("--recall", "'0.9,'")),
    ("bench", ("--recall", "0.9;0.95"), ("--recall", "with commas")),
    ("bench", ("--recall", "95"), ("--recall", "below 1", "'95'")),
    ("bench", ("--recall", ",".join(["0.9"] * 65)), ("--recall", "at most 64")),
    ("bench", ("--search-list", "0"), ("--search-list", "'0'")),
    ("bench", ("--search-list", ""), ("--search-list", "empty")),
    ("bench", ("--prefer", "speed"), ("--prefer", "latency|throughput", "speed")),
    ("bench", ("--reads-in-flight", 0), ("--reads-in-flight", "0")),
    ("bench", ("--gain", "-1"), ("--gain", "0 or more")),
    ("search", ("--explain", "--output", "csv"), ("--explain", "csv", "jsonl")),
    ("search", ("--explain", "--output", "ids"), ("--explain", "ids", "table")),
])
def test_what_a_search_cannot_aim_at_is_a_usage_error(annd, good, verb, options, says):
    more = ("--truth", good.truth_file) if verb == "bench" else ()
    annd.fails(2, verb, good.index, "--queries", good.query_file, *more, *options, says=says)


def test_k_above_the_row_count_is_refused(annd, good, tmp_path):
    annd.fails(1, "search", good.index, "--queries", good.query_file, "-k", 601,
               says=("601", "600"))
    annd.fails(1, "truth", good.base_file, "--queries", good.query_file, "-k", 601, "--output",
               tmp_path / "t.bin", says=("601", "600"))
    assert not list(tmp_path.iterdir())


def spoil_truth(data):
    yield "empty", b""
    yield "cut", data[:-3]
    yield "more", data + b"\0"
    yield "header", data[:5]
    yield "id", data[:8] + struct.pack("<I", 600) + data[12:]
    yield "shape", header(20, 9) + data[8:]


def test_a_bad_truth_file_is_refused(annd, good, tmp_path):
    path = tmp_path / "t.bin"
    for what, data in spoil_truth(good.truth_file.read_bytes()):
        path.write_bytes(data)
        outcome = annd.run("bench", good.index, "--queries", good.query_file, "--truth", path)
        assert outcome.code == 1 and "t.bin" in outcome.sentence and not outcome.out, (what, outcome)
    few = write_bin(tmp_path / "q", good.queries[:7])
    annd.fails(1, "bench", good.index, "--queries", few, "--truth", good.truth_file,
               says=("20", "7"))
    annd.fails(1, "bench", good.index, "--queries", good.query_file, "--truth", good.truth_file,
               "-k", 11, says="11")


@pytest.mark.parametrize("verb, more", [
    ("build", ("--output", "i")),
    ("truth", ("--queries", "QUERIES", "--output", "t.bin")),
    ("search", ("--queries", "QUERIES")),
    ("bench", ("--queries", "QUERIES", "--truth", "TRUTH")),
    ("inspect", ()),
    ("check", ()),
    ("attach", ("--data", "data", "--as", "x")),
])
def test_what_is_not_there_is_exit_3(annd, good, tmp_path, verb, more):
    words = [{"QUERIES": good.query_file, "TRUTH": good.truth_file}.get(m, m) for m in more]
    name = "missing.fbin" if verb in ("build", "truth") else "missing"
    annd.fails(3, verb, name, *words, says=name, cwd=tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.name != "data"]


def test_a_missing_second_file_is_exit_3(annd, good, tmp_path):
    annd.fails(3, "search", good.index, "--queries", tmp_path / "none.fbin", says="none.fbin")
    annd.fails(3, "bench", good.index, "--queries", good.query_file, "--truth",
               tmp_path / "none.bin", says="none.bin")
    for option in ("--keys", "--attributes", "--schema"):
        annd.fails(3, "build", good.base_file, "--output", tmp_path / "i", option,
                   tmp_path / "none.txt", says="none.txt")
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_no_index_is_exit_3(annd, good, tmp_path):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "file").write_text("x")
    for words in (("search", "some", "--queries", good.query_file), ("check", "some"),
                  ("inspect", "some"), ("attach", "some", "--data", "data", "--as", "x"),
                  ("bench", "some", "--queries", good.query_file, "--truth", good.truth_file)):
        annd.fails(3, *words, says="some", cwd=tmp_path)
    # A file where a directory belongs.
    outcome = annd.run("check", good.base_file)
    assert outcome.code in (1, 3) and "base.fbin" in outcome.sentence, outcome


# ---- keys, attributes, schema ----

def build_fails(annd, good, tmp_path, *options, says=()):
    outcome = annd.fails(1, "build", good.base_file, "--output", tmp_path / "i", *options, *SMALL,
                         says=says)
    assert not (tmp_path / "i").exists() and not (tmp_path / "i.tmp").exists()
    return outcome


def test_duplicate_keys_are_refused_by_both_rows(annd, good, tmp_path):
    keys = np.arange(ROWS) * 10
    keys[431] = keys[77]
    np.save(tmp_path / "k.npy", keys)
    build_fails(annd, good, tmp_path, "--keys", tmp_path / "k.npy", says=("77", "431", "770"))
    words = [f"key-{i}" for i in range(ROWS)]
    words[502] = words[3]
    (tmp_path / "k.txt").write_text("\n".join(words) + "\n")
    build_fails(annd, good, tmp_path, "--keys", tmp_path / "k.txt", says=("3", "502", "key-3"))


def test_bad_keys_are_refused(annd, good, tmp_path):
    path = tmp_path / "k.txt"
    good_lines = [f"k{i}\n".encode() for i in range(ROWS)]
    for what, lines, says in (
            ("few", good_lines[:-1], ("599", "600")),
            ("many", good_lines + [b"more\n"], ("601", "600")),
            ("blank", good_lines[:9] + [b"\n"] + good_lines[10:], ("10",)),
            ("not UTF-8", good_lines[:9] + [b"\xff\xfe\n"] + good_lines[10:], ("10",)),
            ("long", good_lines[:9] + [b"x" * 65536 + b"\n"] + good_lines[10:], ("10",)),
            ("empty", [], ("600",))):
        path.write_bytes(b"".join(lines))
        build_fails(annd, good, tmp_path, "--keys", path, says=("k.txt", *says))
    for what, keys in (("few", np.arange(599)), ("2-d", np.ones((600, 2), "<i8")),
                       ("floats", np.ones(600)), ("above int64", np.arange(600, dtype="<u8") +
                                                  np.uint64(2 ** 63))):
        np.save(tmp_path / "k.npy", keys)
        build_fails(annd, good, tmp_path, "--keys", tmp_path / "k.npy", says="k.npy")


def test_bad_attributes_are_refused_by_line(annd, good, tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"n": i}).encode() + b"\n" for i in range(ROWS)]

    def spoilt(line):
        return lines[:41] + [line] + lines[42:]

    for what, content, says in (
            ("few", lines[:-1], "600"), ("many", lines + lines[:1], "600"),
            ("cut", spoilt(b'{"n": 4\n'), "42"), ("array", spoilt(b"[1]\n"), "42"),
            ("blank", spoilt(b"\n"), "42"), ("text", spoilt(b"hello\n"), "42"),
            ("not UTF-8", spoilt(b'{"n": "\xff"}\n'), "42"),
            ("deep", spoilt(b'{"n": ' + b"[" * 5000 + b"]" * 5000 + b"}\n"), "42"),
            ("two", spoilt(b'{"n": 1} {"n": 2}\n'), "42"),
            ("vector", spoilt(b'{"vector": [1, 2]}\n'), "42")):
        path.write_bytes(b"".join(content))
        outcome = build_fails(annd, good, tmp_path, "--attributes", path, says=("a.jsonl", says))
        assert outcome.code == 1, what


def schema_of(*fields, **more):
    return json.dumps({"autoID": False, "enableDynamicField": True, "fields": list(fields), **more})


KEY = {"fieldName": "id", "dataType": "Int64", "isPrimary": True}
VECTOR = {"fieldName": "v", "dataType": "FloatVector", "elementTypeParams": {"dim": DIM}}


@pytest.mark.parametrize("text", [
    "", "{", "[]", "{}", schema_of(), schema_of(KEY), schema_of(VECTOR),
    schema_of(KEY, KEY, VECTOR),
    schema_of(KEY, {**VECTOR, "elementTypeParams": {"dim": DIM + 1}}),
    schema_of(KEY, {**VECTOR, "dataType": "Int8Vector"}),
    schema_of(KEY, {**VECTOR, "dataType": "NoSuchType"}),
    schema_of({**KEY, "dataType": "Float"}, VECTOR),
    schema_of(KEY, VECTOR, {"fieldName": "v", "dataType": "Int64"}),
    schema_of(KEY, VECTOR, {"fieldName": "1 bad name", "dataType": "Int64"}),
    schema_of({**KEY, "dataType": "VarChar", "elementTypeParams": {"max_length": 10}}, VECTOR),
])
def test_a_bad_schema_is_refused(annd, good, tmp_path, text):
    (tmp_path / "s.json").write_text(text)
    build_fails(annd, good, tmp_path, "--schema", tmp_path / "s.json")


def test_attributes_that_do_not_fit_the_schema_are_refused(annd, good, tmp_path):
    (tmp_path / "s.json").write_text(schema_of(KEY, VECTOR, {"fieldName": "n", "dataType": "Int8"}))
    for value in ("128", '"x"', "1.5", "null", "[1]"):
        (tmp_path / "a.jsonl").write_text("".join(
            '{"n": %s}\n' % (value if i == 99 else "1") for i in range(ROWS)))
        build_fails(annd, good, tmp_path, "--schema", tmp_path / "s.json", "--attributes",
                    tmp_path / "a.jsonl", says=("100", "n"))


# ---- what the machine refuses ----

def test_an_output_that_is_there_is_not_touched(annd, good, tmp_path):
    before = {p: p.read_bytes() for p in good.index.rglob("*") if p.is_file()}
    annd.fails(1, "build", good.base_file, "--output", good.index, says="index")
    assert before == {p: p.read_bytes() for p in good.index.rglob("*") if p.is_file()}
    (tmp_path / "f").write_text("mine")
    annd.fails(1, "build", good.base_file, "--output", tmp_path / "f", says="f")
    assert (tmp_path / "f").read_text() == "mine"


def test_an_output_in_a_folder_that_is_not_there_is_refused(annd, good, tmp_path):
    outcome = annd.run("build", good.base_file, "--output", tmp_path / "no" / "i")
    assert outcome.code in (1, 3) and str(tmp_path / "no") in outcome.err, outcome
    assert not list(tmp_path.iterdir())


def test_stdout_that_is_full_is_a_failure(annd, good):
    with open("/dev/full", "w") as full:
        outcome = annd.run("search", good.index, "--queries", good.query_file, stdout=full)
    assert outcome.code == 1 and "stdout" in outcome.sentence, outcome


def as_nobody():
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


@pytest.fixture
def as_user(annd, tmp_path_factory):
    """Runs annd as one who may not do everything. LeakSanitizer cannot follow a change of user."""
    folder = pathlib.Path("/var/tmp") / f"annd-nobody-{os.getpid()}"
    folder.mkdir(mode=0o755)
    program = folder / "annd"
    shutil.copy2(annd.path, program)
    program.chmod(0o755)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    original, annd.path = annd.path, program
    yield folder, {"preexec_fn": as_nobody, "env": environment}
    annd.path = original
    subprocess.run(["chmod", "-R", "u+rwX", folder], check=False)
    shutil.rmtree(folder)


def test_no_permission_is_said(annd, good, as_user):
    folder, options = as_user
    base = folder / "base.fbin"
    shutil.copy2(good.base_file, base)
    base.chmod(0o000 if os.getuid() else 0o600)
    annd.fails(1, "build", base, "--output", folder / "i", says=("base.fbin", "ermission"),
               **options)
    base.chmod(0o644)
    folder.chmod(0o555)
    annd.fails(1, "build", base, "--output", folder / "i", says=("/i", "ermission"), **options)
    folder.chmod(0o755)
    shutil.copytree(good.index, folder / "index")
    for path in (folder / "index").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (folder / "index").chmod(0o755)
    section = next((folder / "index").glob("seg-*/*.pages"))
    section.chmod(0o000 if os.getuid() else 0o600)
    query_file = folder / "q.fbin"
    shutil.copy2(good.query_file, query_file)
    query_file.chmod(0o644)
    annd.fails(1, "search", folder / "index", "--queries", query_file, says=("pages", "ermission"),
               **options)
    section.chmod(0o644)
    annd("search", folder / "index", "--queries", query_file, **options)
    (folder / "index").chmod(0o000 if os.getuid() else 0o700)
    annd.fails(1, "search", folder / "index", "--queries", query_file, says="ermission", **options)
    assert not (folder / "i").exists() and not (folder / "i.tmp").exists()


def test_a_disk_that_cannot_hold_the_index_is_refused_up_front(annd, tmp_path, small_disk):
    base, _ = clustered(20000, 64, "f32")
    path = write_bin(tmp_path / "b", base)
    disk = small_disk("4m")
    outcome = annd.run("build", path, "--output", disk / "i")
    assert outcome.code == 5 and "MiB" in outcome.sentence, outcome
    assert not list(disk.iterdir())


def test_a_disk_that_fills_up_leaves_nothing_that_looks_whole(annd, good, tmp_path, small_disk):
    disk = small_disk("2560k")
    # Attributes that do not compress come on top of what can be known before.
    words = random.Random(1)
    (tmp_path / "a.jsonl").write_text("".join(
        json.dumps({"x": "%0*x" % (6000, words.getrandbits(24000))}) + "\n" for _ in range(ROWS)))
    outcome = annd.run("build", good.base_file, "--output", disk / "i", "--attributes",
                       tmp_path / "a.jsonl", *SMALL)
    assert outcome.code in (1, 5) and "pace" in outcome.sentence, outcome
    # Room may be made; until then the folder is an unfinished build.
    assert [p.name for p in disk.iterdir()] == ["i"]
    outcome = annd.fails(1, "resume", disk / "i", says="pace")
    assert f"annd resume {disk / 'i'}" in outcome.err
    annd("discard", disk / "i")
    assert not list(disk.iterdir())
    # Truth and generate, which know what they need only by writing.
    (disk / "filler").write_bytes(b"x" * 2500000)
    outcome = annd.run("truth", good.base_file, "--queries", good.base_file, "-k", 100, "--output",
                       disk / "t.bin")
    assert outcome.code in (1, 5) and "pace" in outcome.sentence, outcome
    outcome = annd.run("generate", "--rows", 10000, "--dim", 64, "--output", disk / "g.fbin")
    assert outcome.code in (1, 5) and "pace" in outcome.sentence, outcome
    assert [p.name for p in disk.iterdir()] == ["filler"]


class SockFilter(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte),
                ("k", ctypes.c_uint)]


class SockProgram(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.POINTER(SockFilter))]


def forbid_uring():
    """What a container's seccomp profile does: io_uring_setup fails with EPERM."""
    load, equal, give = 0x20, 0x15, 0x06
    program = (SockFilter * 4)(SockFilter(load, 0, 0, 0), SockFilter(equal, 0, 1, 425),
                               SockFilter(give, 0, 0, 0x00050001), SockFilter(give, 0, 0, 0x7fff0000))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(
            22, 2, ctypes.byref(SockProgram(4, program)), 0, 0):
        os._exit(99)


def test_io_uring_that_is_forbidden_is_done_without(annd, good):
    words = ("search", good.index, "--queries", good.query_file, "--output", "jsonl")
    outcome = annd.run(*words, preexec_fn=forbid_uring)
    if outcome.code == 99:
        pytest.skip("skipped, seccomp is not to be had here")
    assert outcome.code == 0 and outcome.out == good.answer
    assert annd(*words, "--io", "pread", preexec_fn=forbid_uring) == good.answer
    outcome = annd.fails(1, *words, "--io", "uring", says="io_uring", preexec_fn=forbid_uring)
    assert "pread" in outcome.err


def test_little_address_space_is_an_error_and_no_crash(annd_release, good):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20))

    outcome = annd_release.run("search", good.index, "--queries", good.query_file, "--threads", 256,
                               preexec_fn=limit, timeout=30,
                               env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
    assert outcome.code == 1 and len(outcome.sentence) > 20, outcome


# ---- damage ----

def flips(index, count, seed):
    """(path, offset, mask) all over the index: manifests and headers more than the rest."""
    draw = random.Random(seed)
    files = sorted(p for p in index.rglob("*") if p.is_file())
    for _ in range(count):
        path = draw.choice(files)
        size = path.stat().st_size
        offset = draw.randrange(min(size, 128)) if draw.random() < 0.3 else draw.randrange(size)
        yield path, offset, draw.randrange(1, 256)


def test_a_flipped_byte_is_named_and_never_a_wrong_answer(annd, good, tmp_path):
    index = tmp_path / "i"
    shutil.copytree(good.index, index)
    for path, offset, mask in flips(index, 60, 20260301):
        data = path.read_bytes()
        path.write_bytes(data[:offset] + bytes([data[offset] ^ mask]) + data[offset + 1:])
        where = f"{path.name} byte {offset} ^ {mask}"
        outcome = annd.run("check", index)
        assert outcome.code == 4, f"{where}: {outcome}"
        assert str(index) in outcome.err and not outcome.out, f"{where}: {outcome}"
        outcome = annd.run("search", index, "--queries", good.query_file, "--output", "jsonl")
        if outcome.code == 0:
            assert outcome.out == good.answer, where
        else:
            assert outcome.code == 4 and not outcome.out, f"{where}: {outcome}"
        path.write_bytes(data)
    annd("check", index)


@pytest.mark.parametrize("how", ["missing", "empty", "cut", "longer", "swapped", "directory"])
def test_a_file_of_the_index_that_is_not_what_it_was_is_named(annd, good, tmp_path, how):
    index = tmp_path / "i"
    shutil.copytree(good.index, index)
    for path in sorted(p for p in index.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if how in ("missing", "directory"):
            path.unlink()
            if how == "directory":
                path.mkdir()
        elif how == "empty":
            path.write_bytes(b"")
        elif how == "cut":
            path.write_bytes(data[:-1])
        elif how == "longer":
            path.write_bytes(data + b"\0" * 4096)
        else:
            other = next(p for p in sorted(index.rglob("*")) if p.is_file() and p != path)
            path.write_bytes(other.read_bytes())
        outcome = annd.run("check", index)
        # Without MANIFEST it is no index at all.
        wanted = (3,) if how == "missing" and path.name == "MANIFEST" else (4,)
        if how == "directory":
            wanted = (1, 3, 4)
        if how == "missing":
            wanted += (3,)
        assert outcome.code in wanted and not outcome.out, (path.name, outcome)
        outcome = annd.run("search", index, "--queries", good.query_file, "--output", "jsonl")
        assert outcome.code or outcome.out == good.answer, (path.name, outcome)
        if path.is_dir():
            path.rmdir()
        path.write_bytes(data)
    annd("check", index)
