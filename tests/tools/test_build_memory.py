"""--memory of a build is a promise for the whole process: measured from outside, and in a memory
cgroup of its size and 64 MiB (page cache counts there) where this user may make one."""
import json
import os
import pathlib
import shutil
import subprocess

import numpy as np
import pytest

from conftest import clustered, write_bin
from test_shared_data import unpacked

MIB = 1 << 20
GROUPS = ("/sys/fs/cgroup/memory", "/sys/fs/cgroup")  # v1, v2


@pytest.fixture
def group(request):
    """A function that makes a memory group of so many bytes, or None where there can be none."""
    made = []

    def make(limit):
        for root in map(pathlib.Path, GROUPS):
            folder = root / f"annd-test-{os.getpid()}"
            v1 = (root / "memory.limit_in_bytes").exists()
            try:
                folder.mkdir()
                made.append(folder)
                (folder / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(limit))
                if not v1:
                    (folder / "memory.swap.max").write_text("0")
                return folder
            except OSError:
                continue
        return None

    yield make
    for folder in made:
        folder.rmdir()


def run(path, words, folder=None):
    """(exit code, peak resident bytes, output) of a process, inside the group if there is one."""
    def enter():
        if folder:
            (folder / "cgroup.procs").write_text(str(os.getpid()))

    with subprocess.Popen([path, *map(str, words)], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, preexec_fn=enter) as process:
        out = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * 1024, out


@pytest.mark.slow
def test_sift_1m_is_built_in_256_mib(annd_release, shared_data, tmp_path, group):
    base = unpacked(shared_data / "sift-1m.base.u8bin.zst", 1_000_000, np.uint8)
    base_file = write_bin(tmp_path / "base", base)
    del base
    words = ("build", base_file, "--output", tmp_path / "i", "--code-bytes", 32, "--memory", "256M",
             "--progress", "off")
    code, peak, out = run(annd_release.path, words, group(320 * MIB))
    assert code == 0, out
    assert peak <= 256 * MIB, f"peak resident {peak / MIB:.0f} MiB"
    assert "1000000 rows" in out
    shutil.rmtree(tmp_path / "i")


def test_the_least_memory_gives_the_same_bytes_or_says_what_is_missing(annd, tmp_path):
    """Whatever is held and whatever goes through files: the bytes are the same unless the page order
    had to be cut, which the segment's name tells."""
    base, queries = clustered(60_000, 64, "u8", queries=50)
    base_file, query_file = write_bin(tmp_path / "b", base), write_bin(tmp_path / "q", queries)
    words = ("build", base_file, "--code-bytes", 16, "--code", "pq", "--calibrate", query_file)
    refused = annd.fails(5, *words, "--output", tmp_path / "no", "--memory", "20M",
                         says=("MiB of memory in phase", "--memory grants 20 MiB", "grant"))
    least = int(refused.err.split("grant ")[-1].split(" MiB")[0])
    annd(*words, "--output", tmp_path / "roomy")
    annd(*words, "--output", tmp_path / "tight", "--memory", f"{least + 1}M")
    annd("check", tmp_path / "tight")
    (one,), (other,) = (list((tmp_path / n).glob("seg-*")) for n in ("roomy", "tight"))
    if one.name == other.name:
        for name in ("f0.pages", "f0.codes", "keys"):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    truth = tmp_path / "t.bin"
    annd("truth", base_file, "--queries", query_file, "-k", 10, "--output", truth)
    found = []
    for name in ("roomy", "tight"):
        out = annd("bench", tmp_path / name, "--queries", query_file, "--truth", truth,
                   "--search-list", 60, "--output", "jsonl")
        found.append(json.loads(out.splitlines()[0])["recall"])
    assert found[1] >= found[0] - 0.01 and found[0] >= 0.9
