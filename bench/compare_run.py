"""How bench/compare runs the two sides: the machine, annd, and DiskANN in a process of its own."""
import glob
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
K = 10
# diskannpy wants an old numpy, some of the others a new one: an environment each.
PEERS = {"peer": ["diskannpy==0.7.0", "numpy", "matplotlib"],
         "context": ["hnswlib", "faiss-cpu", "usearch", "lancedb", "numpy"]}
CACHE_SHARE = .1  # diskannpy caches at most so much of the nodes

# annd's sweep by target, and by list for a program or a recall that targets do not reach.
TARGETS = (.88, .91, .93, .945, .955, .965, .975, .983, .988, .992, .995, .9958, .9965, .998,
           .999)
HIGH_TARGETS = (.99, .995, .997, .998, .999)
LISTS = (10, 12, 16, 20, 24, 32, 40, 50, 64, 80, 100, 128, 160, 200, 300, 400)
HIGH_LISTS = (64, 100, 150, 200, 300, 400, 600, 800)
PEER_LISTS = (10, 12, 15, 20, 25, 30, 40, 50, 60, 70, 80, 100, 120, 150, 200, 250, 300, 400)


def say(text):
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def run(command, **kw):
    say("+ " + " ".join(command))
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **kw).stdout


def unpack(machine, folder):
    run([ROOT + "/tools/unpack-data", folder], env=dict(os.environ, ANND_TEST_DATA=machine.data))


def add_places(p):
    """The options that say where things lie; Machine reads them."""
    p.add_argument("--data", default=os.environ.get("ANND_TEST_DATA", ROOT + "/../shared/data"),
                   help="folder of the packed sets")
    p.add_argument("--work", default=ROOT + "/build/compare",
                   help="for unpacked data and indexes, kept and shared [build/compare]")
    p.add_argument("--annd", default=ROOT + "/build/annd", help="[build/annd]")


def cores_of(text):
    cores = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        cores |= set(range(int(first), int(last or first) + 1))
    return cores


class Machine:
    def __init__(self, a):
        self.work, self.annd, self.data = (os.path.abspath(p) for p in (a.work, a.annd, a.data))
        self.rebuild, self.rebuilt = getattr(a, "rebuild", False), set()
        self.peer_python = self.python("peer")
        if getattr(a, "cores", None):
            os.sched_setaffinity(0, cores_of(a.cores))
        self.cores = len(os.sched_getaffinity(0))
        os.makedirs(self.work, exist_ok=True)
        if getattr(a, "again", None):
            return
        with open(self.annd, "rb") as f:
            self.annd_sha256 = hashlib.sha256(f.read()).hexdigest()
        bench = run([self.annd, "bench", "--help"])
        build = run([self.annd, "build", "--help"])
        self.has_recall = "\n  --recall " in bench
        self.has_reads_in_flight = "\n  --reads-in-flight " in bench
        self.has_serve_memory = "\n  --serve-memory " in build
        self.has_graph = "\n  --graph " in build
        for name, there in (("bench --recall", self.has_recall), ("build --graph", self.has_graph),
                            ("build --serve-memory", self.has_serve_memory)):
            if not there:
                say(f"this annd has no {name}: done without")

    def setup(self, with_context):
        """The peers' environments; what is there stays as it is."""
        for name in ["peer", "context"] if with_context else ["peer"]:
            if not os.path.exists(self.python(name)):
                run([sys.executable, "-m", "venv", f"{self.work}/{name}"])
            have = {line.split("==")[0].lower() for line in self.packages(name)}
            if not {n.split("==")[0] for n in PEERS[name]} <= have:
                run([self.python(name), "-m", "pip", "install", "--quiet", *PEERS[name]])

    def python(self, name):
        return f"{self.work}/{name}/bin/python"

    def packages(self, name="peer"):
        return run([self.python(name), "-m", "pip", "list", "--format", "freeze"]).split()

    def state(self):
        return {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "load_average": os.getloadavg()}

    def describe(self):
        with open("/proc/cpuinfo") as f:
            model = [line.split(":")[1].strip() for line in f if line.startswith("model name")][:1]
        with open("/proc/meminfo") as f:
            memory = [line.split()[1] for line in f if line.startswith("MemTotal")]
        return {"cores": self.cores, "core_ids": sorted(os.sched_getaffinity(0)),
                "model": model[0] if model else platform.machine(),
                "memory_bytes": int(memory[0]) * 1024, "kernel": platform.release(),
                "annd_version": run([self.annd, "--version"]).strip(),
                "annd_sha256": self.annd_sha256, "python": platform.python_version(),
                "packages": self.packages(), **self.state()}

    def plot(self, folder):
        run([self.peer_python, HERE + "/compare_plot.py", folder])


class Watched:
    """A process and its resident memory, seen from outside."""

    def __init__(self, command, **kw):
        self.process = subprocess.Popen(command, text=True, **kw)
        self.peak = 0
        threading.Thread(target=self.watch, daemon=True).start()

    def look(self):
        try:
            with open(f"/proc/{self.process.pid}/status") as f:
                for line in f:
                    if line.startswith("VmHWM:"):
                        self.peak = max(self.peak, int(line.split()[1]) * 1024)
        except OSError:
            pass

    def watch(self):
        while self.process.poll() is None:
            self.look()
            time.sleep(.02)


def annd_bench(machine, folder, data, options, **kw):
    """`annd bench` of an index on a set's queries: (Watched, its process ended; points)."""
    command = [machine.annd, "bench", folder, "--queries", data["queries"], "--truth",
               data["truth"], "-k", str(K), *options, "--output", "jsonl"]
    say("+ " + " ".join(command[3:]))
    watched = Watched(command, stdout=subprocess.PIPE, **kw)
    out = watched.process.communicate()[0]
    points = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    for p in points:
        p["peak_bytes"] = watched.peak
        p["pages_mean"] = p["read_bytes_mean"] / 4096
    return watched, points


class Annd:
    """One index of annd, built when it is not there, and its sweeps."""

    def __init__(self, machine, data, code_bytes, store, memory):
        self.machine, self.data, self.memory = machine, data, memory
        name = f"{data['name']}-{data['metric']}-c{code_bytes}"
        command = [machine.annd, "build", data["base"], "--metric", data["metric"],
                   "--code-bytes", str(code_bytes), "--progress", "off"]
        if store:
            name += "-" + store
            command += ["--store", store]
        if machine.has_serve_memory and memory:
            name += f"-m{memory}"
            command += ["--serve-memory", str(memory)]
        self.folder = f"{machine.work}/annd/{name}"
        if machine.has_graph:
            command += ["--graph", f"{machine.work}/annd/{data['name']}-{data['metric']}.graph"]
        record = self.folder + ".json"
        stale = machine.rebuild and name not in machine.rebuilt
        if stale or not os.path.exists(record):
            machine.rebuilt.add(name)
            os.makedirs(machine.work + "/annd", exist_ok=True)
            shutil.rmtree(self.folder, ignore_errors=True)
            if os.path.exists(record):
                os.remove(record)
            graph = machine.has_graph and os.path.exists(command[-1])
            start = time.monotonic()
            run([*command, "--output", self.folder])
            with open(record, "w") as f:
                json.dump({"command": [os.path.basename(c) for c in command],
                           "seconds": time.monotonic() - start, "graph_was_there": graph,
                           "annd_sha256": machine.annd_sha256, **machine.state()}, f, indent=1)
        with open(record) as f:
            self.facts = json.load(f)
        self.facts["index"] = name
        if self.facts["annd_sha256"] != machine.annd_sha256:
            say(f"{name} was built by another annd; --rebuild makes it anew")

    def settings(self, a, latency):
        if latency:
            grid = [(1, w, None) for w in ((4,) if a.quick else (2, 4, 6, 8))]
        elif a.quick:
            grid = [(64, 2, None)]
        else:
            grid = [(f, w, None) for f in (64, 32, 128) for w in (2, 1)] + [(64, 4, None)]
            grid += [(64, w, cells) for cells in (100, 200) for w in (1, 2)]
        return [{"owner": self, "inflight": f, "beam_width": w, "cells": cells,
                 "reads_in_flight": max(128, f * min(w, 2))} for f, w, cells in grid]

    def sweep(self, setting, seconds, full):
        high = setting.get("high")
        points = []
        if self.machine.has_recall:
            targets = HIGH_TARGETS if high else TARGETS if full else TARGETS[::2]
            points = self.bench(setting, seconds, "--recall", targets)
        # Some runs need the top of the curve; a program without targets needs the lists for all.
        if not points or max(p["recall"] for p in points) < (.995 if high else .99):
            lists = HIGH_LISTS if high else LISTS
            points += self.bench(setting, seconds, "--search-list", lists)
        return points

    def bench(self, setting, seconds, option, values):
        # As many passes as fill the seconds at the speed seen last; a point apart is not possible.
        repeat = max(1, round(setting.get("qps", 2000) * seconds / 1000))
        memory = setting.get("memory", self.memory)
        options = [option, ",".join(f"{v:g}" for v in values),
                   "--inflight", str(setting["inflight"]),
                   "--beam-width", str(setting["beam_width"]), "--repeat", str(min(repeat, 1000))]
        if setting.get("cells") and option == "--recall":
            options += ["--cells", str(setting["cells"])]
        if setting["inflight"] == 1:
            options += ["--prefer", "latency"]
        if memory:
            options += ["--index-memory", str(memory)]
        if self.machine.has_reads_in_flight:
            options += ["--reads-in-flight", str(setting["reads_in_flight"])]
        watched, points = annd_bench(self.machine, self.folder, self.data, options)
        if watched.process.returncode or not points:
            raise subprocess.CalledProcessError(watched.process.returncode, watched.process.args)
        for p in points:
            p["repeat"] = repeat
            if memory and p["index_memory_bytes"] > memory:
                raise SystemExit(f"annd keeps {p['index_memory_bytes']} bytes, allowed {memory}")
        setting["qps"] = statistics.median(p["qps"] for p in points)
        return points


class DiskAnn:
    """One pair of DiskANN graph and codes, its node cache, and the process that serves them."""

    def __init__(self, machine, data, degree, build_list, pq, memory):
        self.machine, self.data, self.pq = machine, data, pq
        base = f"{machine.work}/diskann/{data['name']}-R{degree}-L{build_list}"
        self.folder = f"{base}-pq{pq}"
        self.record = self.folder + "/built.json"
        if not os.path.exists(self.record):
            self.build(base, degree, build_list)
        with open(self.record) as f:
            self.facts = json.load(f)
        with open(self.folder + "/ann_disk.index", "rb") as f:
            head = f.read(48)
        self.node_bytes = int.from_bytes(head[32:40], "little")
        room = (memory or 0) - pq * data["rows"]
        if memory and room < 0:
            raise SystemExit(f"PQ{pq} needs more than {memory} bytes")
        self.cache_nodes = min(max(room, 0) // self.node_bytes, int(CACHE_SHARE * data["rows"]))
        self.bytes = pq * data["rows"] + self.cache_nodes * self.node_bytes
        self.facts.update(index=os.path.basename(self.folder), pq=pq, cache_nodes=self.cache_nodes,
                          node_bytes=self.node_bytes, memory_bytes=self.bytes)
        self.watched = None

    def build(self, base, degree, build_list):
        python, helper = self.machine.peer_python, HERE + "/compare_diskann.py"
        data, part = self.data, self.folder + ".part"
        threads = str(self.machine.cores)
        shutil.rmtree(part, ignore_errors=True)
        os.makedirs(part)
        graphs = [os.path.dirname(p) for p in sorted(glob.glob(base + "-*/ann_disk.index"))
                  if not p.endswith(".part/ann_disk.index")]
        if graphs:
            run([python, helper, "codes", data["peer_base"], graphs[0], part, data["dtype"],
                 str(self.pq), threads])
        else:
            run([python, helper, "build", data["peer_base"], part, data["dtype"], str(degree),
                 str(build_list), str(self.pq), threads])
        os.rename(part, self.folder)

    def settings(self, a, latency):
        cores = self.machine.cores
        if latency:
            grid = [(1, w) for w in ((4,) if a.quick else (2, 4, 8))]
        elif a.quick:
            grid = [(4 * cores, w) for w in (2, 4)]
        else:
            grid = [(t * cores, w) for t in (8, 4, 1) for w in (2, 4, 1)]
        return [{"owner": self, "threads": t, "beam_width": w, "pq": self.pq,
                 "cache_nodes": self.cache_nodes} for t, w in grid]

    def start(self):
        say(f"DiskANN PQ{self.pq}, {self.cache_nodes} nodes cached: loading")
        self.log = open(self.folder + ".log", "a")  # noqa: SIM115 (open as long as the process)
        self.watched = Watched(
            [self.machine.peer_python, HERE + "/compare_diskann.py", "serve", self.folder,
             self.data["dtype"], self.data["queries"], self.data["truth"], str(K),
             str(self.cache_nodes), str(8 * self.machine.cores)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log)
        opened = self.answer()
        if opened["code_bytes"] != self.pq or opened["rows"] != self.data["rows"]:
            raise SystemExit(f"{self.folder} is not what its name says: {opened}")
        self.facts.update(opened)

    def answer(self):
        line = self.watched.process.stdout.readline()
        if not line:
            raise SystemExit(f"DiskANN ended; see {self.folder}.log")
        return json.loads(line)

    def sweep(self, setting, seconds, full):
        if not self.watched:
            self.start()
        job = {"threads": setting["threads"], "beam_width": setting["beam_width"],
               "lists": PEER_LISTS if full else PEER_LISTS[1::2] + (500,), "seconds": seconds,
               "stop": .997 if full else .991}
        say(f"DiskANN PQ{self.pq} {setting['threads']} threads, beam {setting['beam_width']}")
        self.watched.process.stdin.write(json.dumps(job) + "\n")
        self.watched.process.stdin.flush()
        points = []
        while True:
            point = self.answer()
            if "end" in point:
                return points
            self.watched.look()
            point.update(index_memory_bytes=self.bytes, peak_bytes=self.watched.peak,
                         pages_mean=point["reads_mean"])
            points.append(point)

    def close(self):
        if self.watched:
            self.watched.process.stdin.close()
            self.watched.process.wait(60)
            self.watched = None
            self.log.close()
