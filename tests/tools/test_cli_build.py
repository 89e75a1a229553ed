"""A build that stops, however it stops, goes on: annd build, resume and discard on one folder."""
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import time

import numpy as np
import pytest

from conftest import SANITIZER_WORDS, clustered, write_bin

ROWS, DIM = 4000, 32
SMALL = ("--max-degree", 24, "--build-list", 50)


def sums(folder):
    """sha256 of every file of a folder, by relative path."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(pathlib.Path(folder).rglob("*")) if p.is_file()}


class Made:
    def __init__(self, annd, folder, rows=ROWS, words=SMALL):
        self.base, self.queries = clustered(rows, DIM, "f32", queries=20)
        self.base_file = write_bin(folder / "base", self.base)
        self.query_file = write_bin(folder / "queries", self.queries)
        self.key_file = folder / "keys.txt"
        self.key_file.write_text("".join(f"key-{i}\n" for i in range(rows)))
        self.attribute_file = folder / "rows.jsonl"
        self.attribute_file.write_text("".join(
            json.dumps({"n": i, "odd": i % 2 == 1}) + "\n" for i in range(rows)))
        self.words = ("--keys", self.key_file, "--attributes", self.attribute_file, "--calibrate",
                      self.query_file, *words)
        self.index = folder / "index"
        annd("build", self.base_file, "--output", self.index, *self.words)
        self.sums = sums(self.index)


@pytest.fixture(scope="session")
def made(annd, tmp_path_factory):
    return Made(annd, tmp_path_factory.mktemp("made"))


class Running:
    """An annd at work in `folder`, with its progress as JSON lines."""

    def __init__(self, annd, folder, *words, **variables):
        self.folder = pathlib.Path(folder)
        self.process = subprocess.Popen(
            [annd.path, *map(str, words), "--progress", "json"], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **variables})
        self.lines = []

    def until(self, phase_number):
        """Reads on until it is so far; False when it ended before."""
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("{") and json.loads(line)["phase_number"] >= phase_number:
                return True
        return False

    def stop(self, number):
        """(exit code, stderr) after a signal."""
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=120)
        err = "".join(self.lines) + err
        assert not any(word in err for word in SANITIZER_WORDS), err
        return self.process.returncode, err


def start(annd, made, folder):
    return Running(annd, folder, "build", made.base_file, "--output", folder, *made.words)


@pytest.fixture
def stopped(annd, made, tmp_path):
    """A build killed in its third phase."""
    running = start(annd, made, tmp_path / "i")
    assert running.until(3)
    code, _ = running.stop(signal.SIGKILL)
    assert code == -signal.SIGKILL
    return tmp_path / "i"


def test_a_build_leaves_an_index_and_nothing_else(made):
    names = {p.name for p in made.index.iterdir()}
    (segment,) = [name for name in names if name.startswith("seg-")]
    assert names == {"MANIFEST", "schema.json", segment}
    assert [p for p in made.index.parent.iterdir() if p.name.startswith("index")] == [made.index]


def test_a_killed_build_says_what_it_is_and_ends_with_the_same_bytes(annd, made, stopped):
    assert (stopped / "build.job").exists() and not (stopped / "MANIFEST").exists()
    data = stopped.parent / "data"
    for words in (("search", stopped, "--queries", made.query_file), ("inspect", stopped),
                  ("check", stopped), ("attach", stopped, "--data", data, "--as", "x")):
        outcome = annd.fails(3, *words, says=("unfinished build", str(stopped)))
        assert f"annd resume {stopped}" in outcome.err
    outcome = annd.fails(1, "build", made.base_file, "--output", stopped, *made.words,
                         says=("unfinished build", str(stopped)))
    assert f"annd resume {stopped}" in outcome.err and f"annd discard {stopped}" in outcome.err
    annd("resume", stopped, "--threads", 3)
    assert sums(stopped) == made.sums
    annd("check", stopped)


def test_resume_of_a_finished_index_is_no_work_and_discard_leaves_it_alone(annd, made):
    assert "finished" in annd("resume", made.index)
    annd.fails(1, "discard", made.index, says=("finished index", str(made.index)))
    assert sums(made.index) == made.sums


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("phase", [1, 3, 5])
def test_an_interrupted_build_says_how_to_go_on(annd, made, tmp_path, number, phase):
    running = start(annd, made, tmp_path / "i")
    assert running.until(phase)
    code, err = running.stop(number)
    assert code == 75, err
    (sentence,) = [line for line in err.splitlines() if line.startswith("annd: ")]
    assert "stopped" in sentence and str(tmp_path / "i") in sentence
    assert f"annd resume {tmp_path / 'i'}" in err
    annd("resume", tmp_path / "i")
    assert sums(tmp_path / "i") == made.sums


def test_an_interrupted_resume_goes_on_too(annd, made, stopped):
    for phase in (2, 4, 6):
        running = Running(annd, stopped, "resume", stopped)
        if not running.until(phase):
            break
        code, err = running.stop(signal.SIGINT)
        if code == 0:
            break
        assert code == 75, err
    annd("resume", stopped)
    assert sums(stopped) == made.sums


@pytest.mark.slow
@pytest.mark.parametrize("builder, rows", [("batch", 12_000), ("insert", ROWS)])
def test_a_build_killed_in_every_phase_and_at_any_moment_ends_with_the_same_bytes(
        annd, tmp_path, builder, rows):
    made = Made(annd, tmp_path, rows, (*SMALL, "--builder", builder))
    folder = tmp_path / "i"
    began = time.monotonic()
    running = start(annd, made, folder)
    running.until(1000)  # undisturbed, for the number of phases and the time they take
    assert running.process.wait(timeout=120) == 0
    seconds = time.monotonic() - began
    phases = max(json.loads(line)["phase_number"] for line in running.lines if line[0] == "{")
    shutil.rmtree(folder)
    random, kills = np.random.default_rng(5), 0
    moments = [("phase", n) for n in range(1, phases + 1)] + [
        ("seconds", s) for s in random.uniform(0, seconds, 24)]
    for kind, value in moments:
        words = ("resume", folder) if (folder / "build.job").exists() else (
            "build", made.base_file, "--output", folder, *made.words)
        # Commits as often as there can be one, so that every place to go on from is met.
        running = Running(annd, folder, *words, ANND_COMMIT_SECONDS="0")
        if kind == "phase":
            running.until(value)
        else:
            time.sleep(value)
        code, err = running.stop(signal.SIGKILL)
        kills += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), err
        if (folder / "MANIFEST").exists() and not (folder / "build.job").exists():
            # It was quicker, by a moment at least.
            assert sums(folder) == made.sums
            annd("check", folder)
            shutil.rmtree(folder)
    assert kills >= 30
    if not (folder / "build.job").exists():
        annd("build", made.base_file, "--output", folder, *made.words)
    annd("resume", folder)
    assert sums(folder) == made.sums


def test_discard_removes_all_of_an_unfinished_build(annd, made, stopped):
    others = sorted(p for p in stopped.parent.iterdir() if p != stopped)
    assert str(stopped) in annd("discard", stopped)
    assert sorted(stopped.parent.iterdir()) == others
    annd.fails(3, "discard", stopped, says=str(stopped))
    annd.fails(3, "resume", stopped, says=str(stopped))
    annd("build", made.base_file, "--output", stopped, *made.words)
    assert sums(stopped) == made.sums


def test_what_is_no_build_is_not_touched(annd, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "build.job").write_text("make: all\n")
    (folder / "precious").write_text("x")
    before = sums(folder)
    annd.fails(4, "discard", folder, says="build.job")
    annd.fails(4, "resume", folder, says="build.job")
    (folder / "build.job").unlink()
    annd.fails(3, "discard", folder, says="mine")
    annd.fails(3, "resume", folder, says="mine")
    annd.fails(3, "resume", folder / "precious", says="precious")
    assert {k: v for k, v in before.items() if k != "build.job"} == {
        k: v for k, v in sums(folder).items() if k != "build.lock"}


def test_two_processes_do_not_build_in_one_folder(annd, made, tmp_path):
    running = start(annd, made, tmp_path / "i")
    assert running.until(2)
    running.process.send_signal(signal.SIGSTOP)
    try:
        for words in (("build", made.base_file, "--output", tmp_path / "i"),
                      ("resume", tmp_path / "i"), ("discard", tmp_path / "i")):
            annd.fails(9, *words, says=(str(tmp_path / "i"), "another process"))
    finally:
        running.process.send_signal(signal.SIGCONT)
    out, err = running.process.communicate(timeout=120)
    assert running.process.returncode == 0, err
    assert sums(tmp_path / "i") == made.sums


@pytest.mark.parametrize("which", ["base_file", "key_file", "attribute_file", "query_file"])
@pytest.mark.parametrize("how", ["longer", "later", "gone"])
def test_an_input_that_changed_is_named(annd, made, tmp_path, which, how):
    inputs = {}
    for name in ("base_file", "key_file", "attribute_file", "query_file"):
        path = getattr(made, name)
        inputs[name] = pathlib.Path(shutil.copy2(path, tmp_path / path.name))
    folder = tmp_path / "i"
    running = Running(annd, folder, "build", inputs["base_file"], "--output", folder, "--keys",
                      inputs["key_file"], "--attributes", inputs["attribute_file"], "--calibrate",
                      inputs["query_file"], *SMALL)
    assert running.until(3)
    running.stop(signal.SIGKILL)
    changed = inputs[which]
    stat = changed.stat()
    if how == "longer":
        with open(changed, "ab") as f:
            f.write(b"\n")
        os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif how == "later":
        os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    else:
        changed.rename(tmp_path / "elsewhere")
    before = sums(folder)
    outcome = annd.fails(3 if how == "gone" else 1, "resume", folder, says=changed.name)
    assert f"annd discard {folder}" in outcome.err
    assert sums(folder) == before
    if how == "gone":  # and back, it is what it was
        (tmp_path / "elsewhere").rename(changed)
        annd("resume", folder)
        assert sums(folder) == made.sums


def spoil(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def test_a_damaged_record_is_said_and_can_be_discarded(annd, made, stopped):
    whole = (stopped / "build.job").read_bytes()
    for at in (9, 70, len(whole) - 1):
        spoil(stopped / "build.job", at)
        code = 1 if at == 9 else 4  # the version: nothing this annd can read
        outcome = annd.fails(code, "resume", stopped, says="build.job")
        assert f"annd discard {stopped}" in outcome.err
        (stopped / "build.job").write_bytes(whole)
    (stopped / "build.job").write_bytes(whole[:len(whole) // 2])
    annd.fails(4, "resume", stopped, says="build.job")
    annd("discard", stopped)
    assert not stopped.exists()


def test_a_damaged_state_is_said(annd, stopped):
    (stopped / "build.state").write_bytes(b"ANNDJOBM" + bytes(100))
    outcome = annd.run("resume", stopped)
    assert outcome.code in (1, 4) and "build.state" in outcome.sentence, outcome
    assert f"annd discard {stopped}" in outcome.err
    annd("discard", stopped)


def test_resume_takes_no_other_parameters(annd, made, stopped):
    before = sums(stopped)
    annd.fails(2, "resume", stopped, "--metric", "ip", says="--metric")
    annd.fails(2, "resume", stopped, "--threads", 0, says="--threads")
    annd.fails(2, "resume", says="DIR")
    annd.fails(5, "resume", stopped, "--memory", "100K", says="memory")
    assert sums(stopped) == before
    annd("resume", stopped, "--memory", "1G")
    assert sums(stopped) == made.sums


def test_the_status_file_can_be_read_at_any_time(annd, tmp_path):
    base, _ = clustered(20000, 64, "f32")
    base_file = write_bin(tmp_path / "b", base)
    running = Running(annd, tmp_path / "i", "build", base_file, "--output", tmp_path / "i",
                      "--memory", "2G", "--threads", 2)
    assert running.until(1)
    seen = []
    deadline = time.monotonic() + 60
    while len(seen) < 2 and time.monotonic() < deadline and running.process.poll() is None:
        try:
            status = json.loads((tmp_path / "i" / "build.status").read_text())
        except FileNotFoundError:
            continue
        if not seen or status["elapsed_seconds"] != seen[-1]["elapsed_seconds"]:
            seen.append(status)
        time.sleep(0.01)
    code, err = running.stop(signal.SIGINT)
    assert code == 75, err
    assert len(seen) == 2
    for status in seen:
        assert set(status) == {
            "phase", "phase_number", "phases", "done", "total", "rate", "eta_seconds",
            "eta_total_seconds", "elapsed_seconds", "memory_bytes", "memory_limit_bytes",
            "checkpoint_age_seconds", "phase_end"}
        assert status["memory_limit_bytes"] == 2 << 30 > status["memory_bytes"] > 1 << 20
        assert status["checkpoint_age_seconds"] >= 0
    assert 0.9 < seen[1]["elapsed_seconds"] - seen[0]["elapsed_seconds"] < 30
    # The same is on stderr.
    assert set(json.loads(running.lines[0])) == set(seen[0])


def test_an_index_whose_build_died_at_the_very_end_only_has_to_be_cleared(annd, made, tmp_path):
    stopped = tmp_path / "i"
    copy = pathlib.Path(shutil.copy2(made.base_file, tmp_path))
    running = Running(annd, stopped, "build", copy, "--output", stopped, *made.words)
    assert running.until(3)
    running.stop(signal.SIGKILL)
    record = (stopped / "build.job").read_bytes()
    annd("resume", stopped)
    (stopped / "build.job").write_bytes(record)
    (stopped / "scratch").mkdir()
    (stopped / "scratch" / "rest").write_bytes(b"x")
    times = {p: p.stat().st_mtime_ns for p in stopped.rglob("seg-*/*")}
    annd("search", stopped, "--queries", made.query_file)  # it is an index already
    annd.fails(1, "discard", stopped, says="whole index")
    copy.unlink()  # no longer needed
    annd("resume", stopped)
    assert sums(stopped) == made.sums
    assert times == {p: p.stat().st_mtime_ns for p in stopped.rglob("seg-*/*")}


def test_a_build_that_is_refused_leaves_no_folder(annd, made, tmp_path):
    broken = write_bin(tmp_path / "nan", made.base)
    content = bytearray(broken.read_bytes())
    content[8 + 4 * 1000:8 + 4 * 1001] = struct.pack("<f", float("nan"))
    broken.write_bytes(content)
    for words, code in (((made.base_file, "--memory", "100K"), 5),
                        ((made.base_file, "--keys", made.query_file), 1),
                        ((made.base_file, "--attributes", made.key_file), 1),
                        ((made.base_file, "--schema", made.key_file), 1),
                        ((made.base_file, "--calibrate", made.key_file), 1),
                        ((made.base_file, "--keys", tmp_path / "no"), 3),
                        ((broken,), 1)):
        annd.fails(code, "build", *words, "--output", tmp_path / "i", *SMALL)
        assert [p.name for p in tmp_path.iterdir()] == [broken.name], words


def test_a_folder_that_a_killed_start_left_is_taken(annd, made, tmp_path):
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "build.lock").touch()
    (tmp_path / "i" / "build.job.tmp").write_bytes(b"ANND")
    annd("build", made.base_file, "--output", tmp_path / "i", *made.words)
    assert sums(tmp_path / "i") == made.sums


def test_a_disk_that_fills_up_stops_the_build_until_there_is_room(annd, made, small_disk):
    disk = small_disk("16M")
    running = start(annd, made, disk / "i")
    assert running.until(2)
    running.process.send_signal(signal.SIGSTOP)
    junk = os.open(disk / "junk", os.O_WRONLY | os.O_CREAT)
    try:  # somebody else takes what was free
        while os.write(junk, bytes(4096)):
            pass
    except OSError as full:
        assert full.errno == errno.ENOSPC
    os.close(junk)
    running.process.send_signal(signal.SIGCONT)
    out, err = running.process.communicate(timeout=120)
    assert running.process.returncode == 1, err
    assert "No space left" in err and f"annd resume {disk / 'i'}" in err
    # Still full, it is no different.
    outcome = annd.fails(1, "resume", disk / "i", says="No space left")
    assert f"annd resume {disk / 'i'}" in outcome.err
    (disk / "junk").unlink()
    annd("resume", disk / "i")
    assert sums(disk / "i") == made.sums


def test_a_lock_that_somebody_holds_is_enough_to_be_busy(annd, stopped):
    with open(stopped / "build.lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        annd.fails(9, "resume", stopped, says="another process")
        annd.fails(9, "discard", stopped, says="another process")
    annd("discard", stopped)
