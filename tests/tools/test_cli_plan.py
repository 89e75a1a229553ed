"""annd plan forecasts what annd build then does; annd doctor looks at the machine."""
import json
import os
import re
import time

import pytest

from conftest import Annd, clustered, program, write_bin

SMALL = ("--max-degree", 24, "--build-list", 50)


@pytest.fixture(scope="session")
def sanitized():
    return Annd(program("ANND", "build-asan", "build"))


@pytest.fixture(scope="module", name="annd")
def optimised(annd_release):
    """A plan builds miniatures, some twenty in this file: under sanitizers one has to do."""
    return annd_release


@pytest.fixture(scope="session")
def base_file(tmp_path_factory):
    base, _ = clustered(9000, 32, "f32")
    return write_bin(tmp_path_factory.mktemp("plan") / "base", base)


@pytest.fixture(scope="session")
def byte_file(tmp_path_factory):
    base, _ = clustered(9000, 32, "u8")
    return write_bin(tmp_path_factory.mktemp("plan") / "base", base)


def plan(annd, *words):
    return json.loads(annd("plan", *words, "--output", "json"))


def index_bytes(folder):
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def test_a_plan_is_made_by_the_sanitized_program(sanitized, base_file):
    answer = plan(sanitized, base_file, *SMALL[2:], "--profile", "default", "--memory", "1G")
    assert [p["name"] for p in answer["profiles"]] == ["default"]


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_a_plan_tells_memory_disk_time_and_reads_of_three_profiles(annd, base_file, metric):
    before = sorted(base_file.parent.iterdir())
    answer = plan(annd, base_file, *SMALL[2:], "--metric", metric, "--memory", "1G")
    assert sorted(base_file.parent.iterdir()) == before, "nothing is left behind"
    assert (answer["rows"], answer["dim"], answer["element"]) == (9000, 32, "f32")
    assert [p["name"] for p in answer["profiles"]] == ["small", "default", "roomy"]
    for profile in answer["profiles"]:
        assert profile["fits"]
        assert 0 < profile["memory_bytes"] < 1 << 30
        assert profile["memory_bytes"] == max(p["memory_bytes"] for p in profile["phases"])
        assert profile["greatest_phase"] in [p["name"] for p in profile["phases"]]
        assert profile["scratch_bytes"] > 9000 * 32 * 4
        assert 0 < profile["seconds_low"] < profile["seconds"] < profile["seconds_high"]
        assert profile["times"] and profile["sample_rows"] <= 9000
        assert profile["serve_bytes"] >= profile["serve_bytes_min"] >= 9000 * profile["code_bytes"]
        reads = [point["reads"] for point in profile["recall"]]
        assert reads and reads == sorted(reads)
        for point in profile["recall"]:
            assert point["reads_low"] <= point["reads"] <= point["reads_high"]
    small, default, roomy = answer["profiles"]
    assert default["options"] == "" and "--store 8bit" in small["options"]
    assert small["code_bytes"] < default["code_bytes"] < roomy["code_bytes"]
    assert small["index_bytes"] < default["index_bytes"]


@pytest.mark.parametrize("which", ["base_file", "byte_file"])
def test_the_index_is_as_large_as_planned(annd, which, request, tmp_path):
    path = request.getfixturevalue(which)
    for profile in plan(annd, path, "--threads", 2)["profiles"]:
        out = tmp_path / profile["name"]
        annd("build", path, "--output", out, "--threads", 2, *profile["options"].split())
        # Headers and tables, which stand in no proportion to so few rows.
        assert abs(index_bytes(out) - profile["index_bytes"]) < 0.05 * index_bytes(out) + (3 << 20)


def test_attributes_and_text_keys_are_counted(annd, base_file, tmp_path):
    attributes, keys = tmp_path / "rows.jsonl", tmp_path / "keys.txt"
    attributes.write_text("".join(
        json.dumps({"name": os.urandom(100).hex(), "n": i}) + "\n" for i in range(9000)))
    keys.write_text("".join(f"key-{i}\n" for i in range(9000)))
    (bare,) = plan(annd, base_file, "--profile", "default")["profiles"]
    (full,) = plan(annd, base_file, "--profile", "default", "--attributes", attributes, "--keys",
                   keys)["profiles"]
    assert 9000 * 80 < full["index_bytes"] - bare["index_bytes"] < 9000 * 400
    assert full["memory_bytes"] > bare["memory_bytes"] + 9000 * 16
    annd.fails(1, "plan", base_file, "--keys", base_file)
    annd.fails(3, "plan", base_file, "--attributes", tmp_path / "no", says="no")


def test_what_was_asked_for_stays_in_every_profile(annd, byte_file):
    answer = plan(annd, byte_file, "--code-bytes", 12, "--max-degree", 32)
    assert [p["name"] for p in answer["profiles"]] == ["default"]
    assert answer["profiles"][0]["code_bytes"] == 12
    annd.fails(1, "plan", byte_file, "--code-bytes", 12, "--profile", "roomy", says="roomy")
    (one,) = plan(annd, byte_file, "--profile", "small")["profiles"]
    assert one["name"] == "small" and "--code-bytes" in one["options"]


def test_memory_to_serve_from_lessens_reads(annd, byte_file):
    def reads(*words):
        (profile,) = plan(annd, byte_file, "--profile", "default", *words)["profiles"]
        return profile, [p["reads"] for p in profile["recall"] if p["recall"] == 0.95][0]

    bare, without = reads()
    rich, within = reads("--serve-memory", "2M")
    assert bare["resident_share"] == 0 < rich["resident_share"] <= 1
    assert rich["serve_bytes"] <= 2 << 20
    assert within < without
    poor, _ = reads("--serve-memory", "100K")
    assert poor["serve_bytes_min"] > 100 << 10 and poor["resident_share"] == 0


def test_the_table_names_every_phase_and_profile(annd, byte_file):
    text = annd("plan", byte_file, "--memory", "1G")
    for word in ("small", "default", "roomy", "memory to build", "partition", "graph", "(greatest)",
                 "index on disk", "scratch", "time to build", "memory to serve", "0.95",
                 "annd build with --code-bytes"):
        assert word in text, word
    assert max(map(len, text.splitlines()[2:])) < 160  # paths stand in the first two


def test_what_cannot_fit_is_refused_with_the_sum(annd, base_file, tmp_path):
    before = sorted(base_file.parent.iterdir())
    began = time.monotonic()
    for memory in ("1M", "20M"):
        outcome = annd.fails(5, "plan", base_file, "--memory", memory,
                             says=("MiB of memory in phase", f"grants {memory[:-1]} MiB"))
        assert re.search(r"grant \d+ MiB", outcome.err)
        annd.fails(5, "build", base_file, "--memory", memory, "--output", tmp_path / "i",
                   says="MiB of memory in phase")
    assert time.monotonic() - began < 60, "refused before the sample is built"
    assert sorted(base_file.parent.iterdir()) == before


def test_a_disk_that_is_too_small_is_refused_with_the_sum(annd, base_file, small_disk):
    disk = small_disk("4M")
    annd.fails(5, "plan", base_file, "--folder", disk,
               says=("MiB of disk", "scratch files", str(disk), "free"))
    assert not [p for p in disk.iterdir() if p.name.startswith(".annd")]


def test_bad_input_is_named(annd, base_file, tmp_path):
    annd.fails(3, "plan", tmp_path / "no.fbin", says="no.fbin")
    annd.fails(3, "plan", base_file, "--folder", tmp_path / "nowhere", says="nowhere")
    few, _ = clustered(100, 8, "f32")
    annd.fails(1, "plan", write_bin(tmp_path / "few", few), says="256")
    annd.fails(2, "plan", says="INPUT")


def test_few_rows_can_be_planned(annd, tmp_path):
    base, _ = clustered(600, 16, "f32")
    (profile,) = plan(annd, write_bin(tmp_path / "few", base), "--profile", "default")["profiles"]
    assert profile["fits"] and profile["recall"] == []
    assert "too few rows" in annd("plan", tmp_path / "few.fbin")


def test_the_time_falls_into_the_band(annd_release, tmp_path):
    base, _ = clustered(60000, 64, "u8")
    path = write_bin(tmp_path / "base", base)
    (profile,) = plan(annd_release, path, "--profile", "default")["profiles"]
    began = time.monotonic()
    annd_release("build", path, "--output", tmp_path / "i", timeout=600)
    seconds = time.monotonic() - began
    # Twice the band: other tests may run beside one of the two and not beside the other.
    assert profile["seconds_low"] / 2 < seconds < 2 * profile["seconds_high"], profile["times"]
    assert abs(index_bytes(tmp_path / "i") / profile["index_bytes"] - 1) < 0.1


def test_doctor_tells_what_runs(annd, tmp_path):
    outcome = annd.run("doctor", "--folder", tmp_path)
    assert outcome.code in (0, 1), outcome
    for word in ("cpu", "kernels", "openblas", "reads", "memory", "disk", "limits", str(tmp_path)):
        assert word in outcome.out
    assert ("all is well" in outcome.out) == (outcome.code == 0)
    assert ("SLOW" in outcome.out) == (outcome.code == 1)
    assert list(tmp_path.iterdir()) == []


def test_doctor_names_what_is_slow(annd, tmp_path):
    def problems(**environment):
        outcome = annd.run("doctor", "--folder", tmp_path, "--output", "json",
                           env={**os.environ, **environment})
        answer = json.loads(outcome.out)
        assert outcome.code == (1 if answer["problems"] else 0)
        return answer, " ".join(answer["problems"])

    answer, text = problems()
    assert answer["disk"]["write_bytes_per_second"] > 0 and answer["openblas"]["threads"] == 1
    assert answer["processors"] >= 1 and "ANND_ISA" not in text
    answer, text = problems(ANND_IO="pread")
    assert answer["reads"] == "pread" and "io_uring" in text
    _, text = problems(ANND_ISA="mmx")
    assert "ANND_ISA=mmx" in text
    answer, text = problems(ANND_ISA="scalar")
    assert answer["kernels"]["distances"] == "scalar"
    annd.fails(3, "doctor", "--folder", tmp_path / "no", says="no")
