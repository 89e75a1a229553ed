"""How bench/build runs one build: a process of its own, seen from outside, and what it read later.

A build's wall time is from its start to its end as a process; CPU seconds are what wait4 says of
it; its peak is the larger of VmHWM (polled) and wait4's ru_maxrss, which a fork's first moments
raise to what this program holds itself, some 20 MB, at least. Phases are timed where their first
and last line of --progress json arrive here.
"""
import glob
import hashlib
import json
import os
import shutil
import subprocess
import threading
import time

from compare_report import READS, at_recall
from compare_run import HERE, LISTS, TARGETS, annd_bench, say

POLL_SECONDS = .02
SCRATCH_SECONDS = 1


class Phases:
    """Seconds of each phase, from lines of --progress json as they come."""

    def __init__(self):
        self.done, self.open, self.limit, self.text = [], None, None, []

    def line(self, line, now):
        try:
            p = json.loads(line)
            name = p["phase"]
        except (ValueError, TypeError, KeyError):
            self.text.append(line.rstrip())
            return
        self.limit = p.get("memory_limit_bytes") or self.limit
        if self.open is None:
            self.open = (name, now)
        if p.get("phase_end"):
            self.done.append({"phase": self.open[0], "seconds": now - self.open[1],
                              "memory_bytes": p.get("memory_bytes")})
            self.open = None


def disk_bytes(folder, pid):
    """What the folder takes on disk, and what the process still holds of files removed."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
            except OSError:
                pass  # removed meanwhile
    for link in glob.glob(f"/proc/{pid}/fd/*"):
        try:
            if os.readlink(link).endswith(" (deleted)"):
                total += os.stat(link).st_blocks * 512
        except OSError:
            pass
    return total


class Process:
    """A command run to its end and what it took."""

    def __init__(self, command, folder, log=None, group=None):
        self.folder, self.vm_peak, self.disk_peak = folder, 0, 0
        self.phases, self.ended = Phases(), threading.Event()
        say("+ " + " ".join(command))
        os.sync()  # what others wrote is not to be written at this one's cost
        self.load = os.getloadavg()[0]
        start = time.monotonic()
        self.process = subprocess.Popen(
            command, text=True, stdout=log or subprocess.PIPE, stderr=log or subprocess.PIPE,
            preexec_fn=group.enter if group else None)
        threads = [threading.Thread(target=t, daemon=True)
                   for t in (self.watch_memory, self.watch_disk)]
        self.stdout = ""
        if not log:
            threads += [threading.Thread(target=t, daemon=True)
                        for t in (self.read_errors, self.read_output)]
        for t in threads:
            t.start()
        try:
            _, status, usage = os.wait4(self.process.pid, 0)
        except BaseException:
            self.process.kill()
            raise
        self.seconds = time.monotonic() - start
        self.ended.set()
        # Python's own way to wait would look for a process that wait4 has taken already.
        self.process.returncode = self.code = os.waitstatus_to_exitcode(status)
        for t in threads:
            t.join()
        self.cpu = usage.ru_utime + usage.ru_stime
        self.peak = max(usage.ru_maxrss * 1024, self.vm_peak)

    def read_errors(self):
        for line in self.process.stderr:
            self.phases.line(line, time.monotonic())

    def read_output(self):
        self.stdout = self.process.stdout.read()

    def watch_memory(self):
        while not self.ended.wait(POLL_SECONDS):
            try:
                with open(f"/proc/{self.process.pid}/status") as f:
                    for line in f:
                        if line.startswith("VmHWM:"):
                            self.vm_peak = max(self.vm_peak, int(line.split()[1]) * 1024)
            except OSError:
                return

    def watch_disk(self):
        while not self.ended.wait(SCRATCH_SECONDS):
            self.disk_peak = max(self.disk_peak, disk_bytes(self.folder, self.process.pid))

    def facts(self, command):
        return {"command": [os.path.basename(c) for c in command], "code": self.code,
                "seconds": self.seconds, "cpu_seconds": self.cpu, "peak_bytes": self.peak,
                "vm_hwm_bytes": self.vm_peak, "disk_peak_bytes": self.disk_peak,
                "disk_end_bytes": disk_bytes(self.folder, 0), "phases": self.phases.done,
                "memory_limit_bytes": self.phases.limit, "load_average_before": self.load}


def warm(path):
    """Reads a file once: no side is to pay for being the first."""
    with open(path, "rb") as f:
        while f.read(1 << 22):
            pass


def digest(folder):
    """Of all files, their names in the index's folder included."""
    total = hashlib.sha256()
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(place, name)
            total.update(os.path.relpath(path, folder).encode() + b"\0")
            with open(path, "rb") as f:
                while block := f.read(1 << 22):
                    total.update(block)
    return total.hexdigest()


def build_annd(machine, data, folder, options, group=None):
    """One build by annd: its facts, with `sha256` of the index; raises where it failed."""
    shutil.rmtree(folder, ignore_errors=True)
    warm(data["base"])
    command = [machine.annd, "build", data["base"], "--metric", data["metric"], "--output", folder,
               *options, "--progress", "json"]
    done = Process(command, folder, group=group)
    facts = done.facts(command)
    if done.code:
        text = "\n".join(done.phases.text[-5:]) or f"exit code {done.code}"
        raise BuildError(f"annd build {data['name']} {' '.join(options)}: {text}", facts)
    facts["sha256"] = digest(folder)
    facts["said"] = done.stdout.splitlines()[:1]
    say(f"annd {data['name']}: {done.seconds:.1f} s, {done.cpu:.0f} s of CPU, "
        f"{done.peak / 2**20:.0f} MiB")
    return facts


def build_peer(machine, data, folder, degree, build_list, pq):
    """One whole build by DiskANN, PQ and disk layout included."""
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    warm(data["peer_base"])
    command = [machine.peer_python, HERE + "/compare_diskann.py", "build", data["peer_base"],
               folder, data["dtype"], str(degree), str(build_list), str(pq), str(machine.cores)]
    with open(folder + ".log", "w") as log:
        done = Process(command, folder, log=log)
    facts = done.facts(command)
    if done.code:
        raise BuildError(f"DiskANN ended with {done.code}; see {folder}.log", facts)
    with open(folder + "/built.json") as f:
        # Its own clock: without the start of Python.
        facts.update(process_seconds=facts["seconds"], seconds=json.load(f)["seconds"])
    say(f"DiskANN {data['name']}: {facts['seconds']:.1f} s, {done.cpu:.0f} s of CPU, "
        f"{done.peak / 2**20:.0f} MiB")
    return facts


class BuildError(Exception):
    def __init__(self, text, facts):
        super().__init__(text)
        self.facts = facts


def sweep(machine, folder, data, memory, quick):
    """The points of an index over recall, at the memory it is given."""
    points = []
    for option, values in (("--recall", TARGETS), ("--search-list", LISTS)):
        # Lists are for a recall that no target reaches.
        if points and max(p["recall"] for p in points) >= .99:
            break
        options = [option, ",".join(f"{v:g}" for v in values[::2 if quick else 1]), "--inflight",
                   "64", "--beam-width", "2", "--index-memory", str(memory)]
        watched, more = annd_bench(machine, folder, data, options)
        if watched.process.returncode or not more:
            raise BuildError(f"annd bench {folder} ended with {watched.process.returncode}", {})
        points += more
    return points


def reads_of(points, recalls):
    return {str(r): at_recall(points, r, READS) for r in recalls}
