"""What the Python tests share: the annd under test, small sets of vectors, the shared data sets.

ANND names the program (tools/test sets the one with sanitizers), ANND_RELEASE an optimised one for
what is measured rather than checked, ANND_TEST_DATA the folder of the shared data sets."""
import os
import pathlib
import shutil
import signal
import socket
import struct
import subprocess
import time
import urllib.request

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SANITIZER_WORDS = ("AddressSanitizer", "LeakSanitizer", "ThreadSanitizer", "runtime error:",
                   "UndefinedBehaviorSanitizer")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out by tools/test --quick")


def program(variable, *folders):
    """The program a variable names, or the first that is built."""
    if os.environ.get(variable):
        return pathlib.Path(os.environ[variable]).resolve()
    for folder in folders:
        if (ROOT / folder / "annd").exists():
            return ROOT / folder / "annd"
    pytest.exit(f"no annd: set {variable}, or build one with tools/test or meson", 4)


class Outcome:
    """One finished run of annd."""

    def __init__(self, arguments, done):
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr
        self.arguments = arguments

    @property
    def sentence(self):
        """What a failed run says: the last message on stderr, which progress may go before."""
        return ([""] + [x for x in self.err.split("\n") if x.startswith("annd: ")])[-1]

    def __repr__(self):
        words = " ".join(map(str, self.arguments))
        return f"annd {words}\nexit code {self.code}\nstdout: {self.out}\nstderr: {self.err}"


class Annd:
    """Runs annd and checks what holds for every run: no sanitizer report, no signal."""

    def __init__(self, path):
        self.path = path

    def run(self, *arguments, timeout=240, **options):
        done = subprocess.run([self.path, *map(str, arguments)], stdin=subprocess.DEVNULL,
                              stdout=options.pop("stdout", subprocess.PIPE),
                              stderr=subprocess.PIPE, text=True, timeout=timeout, **options)
        outcome = Outcome(arguments, done)
        assert not any(word in outcome.err for word in SANITIZER_WORDS), outcome
        assert outcome.code >= 0, f"ended by signal {-outcome.code}: {outcome}"
        return outcome

    def __call__(self, *arguments, **options):
        """Runs and expects success; returns what was printed."""
        outcome = self.run(*arguments, **options)
        assert outcome.code == 0, outcome
        return outcome.out

    def fails(self, code, *arguments, says=(), **options):
        """Runs and expects this exit code and one clear sentence that holds every word of `says`."""
        outcome = self.run(*arguments, **options)
        assert outcome.code == code, outcome
        sentence = outcome.sentence
        assert 20 < len(sentence) < 1000, outcome
        for word in (says,) if isinstance(says, str) else says:
            assert word in sentence, f"'{word}' is not in the sentence: {outcome}"
        assert not outcome.out, f"a failure prints no data: {outcome}"
        return outcome


class Server:
    """annd serve on a free port of 127.0.0.1, ready when this returns."""

    def __init__(self, annd, data, *options, listen=None, timeout=60):
        self.listen = listen or f"127.0.0.1:{free_port()}"
        self.url = f"http://{self.listen}"
        self.process = subprocess.Popen(
            [annd.path, "serve", "--data", data, "--listen", self.listen, "--metrics-listen", "off",
             *map(str, options)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + timeout
        while True:
            try:
                urllib.request.urlopen(self.url + "/healthz", timeout=2).read()
                return
            except OSError:
                pass
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"annd serve is not ready: {self.process.communicate()}")
            time.sleep(0.05)

    def stop(self, number=signal.SIGTERM, timeout=60):
        """Asks it to end; the exit code, after a look for sanitizer reports."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            _, self.err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"annd serve did not end: {self.process.communicate()}") from None
        assert not any(word in self.err for word in SANITIZER_WORDS), self.err
        return self.process.returncode

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            code = self.stop()
            assert code == 0, f"exit code {code}: {self.err}"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ---- vector files ----

def write_bin(path, rows):
    """.fbin, .u8bin or .i8bin, whichever fits the element type."""
    rows = np.ascontiguousarray(rows)
    path = pathlib.Path(path).with_suffix({"f": ".fbin", "u": ".u8bin", "i": ".i8bin"}[
        rows.dtype.kind])
    path.write_bytes(struct.pack("<II", *rows.shape) + rows.tobytes())
    return path


def write_vecs(path, rows):
    """.fvecs or .bvecs."""
    path = pathlib.Path(path).with_suffix(".fvecs" if rows.dtype.kind == "f" else ".bvecs")
    head = struct.pack("<I", rows.shape[1])
    path.write_bytes(b"".join(head + row.tobytes() for row in np.ascontiguousarray(rows)))
    return path


def read_truth(path):
    """(ids, distances) of a truth file."""
    data = pathlib.Path(path).read_bytes()
    n, k = struct.unpack_from("<II", data)
    assert len(data) == 8 + n * k * 8
    return (np.frombuffer(data, "<u4", n * k, 8).reshape(n, k),
            np.frombuffer(data, "<f4", n * k, 8 + 4 * n * k).reshape(n, k))


def exact(base, queries, metric, k):
    """(ids, distances) by brute force in double precision: L2 squared ascending, 1 - cosine
    ascending, inner product descending; ties by lower id. A zero vector's cosine is 0."""
    base, queries = base.astype(np.float64), queries.astype(np.float64)
    products = queries @ base.T
    if metric == "l2":
        order = values = np.maximum(
            (queries ** 2).sum(1)[:, None] - 2 * products + (base ** 2).sum(1)[None, :], 0)
    elif metric == "ip":
        values, order = products, -products
    else:
        norms = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(base, axis=1)[None, :]
        order = values = 1 - np.divide(products, norms, out=np.zeros_like(products),
                                       where=norms > 0)
    ids = np.argsort(order, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(values, ids, 1)


def clustered(rows, dim, kind, seed=7, queries=100):
    """(base, queries) of the same clusters; kind: f32, u8, i8."""
    random = np.random.default_rng(seed)
    centres = random.uniform(-1, 1, (max(rows // 60, 2), dim))

    def draw(n):
        x = centres[random.integers(0, len(centres), n)] + random.normal(0, 0.35, (n, dim))
        if kind == "f32":
            return x.astype(np.float32)
        if kind == "u8":
            return np.clip(128 + 50 * x, 0, 255).astype(np.uint8)
        return np.clip(50 * x, -128, 127).astype(np.int8)

    return draw(rows), draw(queries)


# ---- fixtures ----

@pytest.fixture(scope="session")
def annd():
    return Annd(program("ANND", "build-asan", "build"))


@pytest.fixture(scope="session")
def annd_release():
    """For measures: the optimised program where there is one."""
    return Annd(program("ANND_RELEASE", "build", "build-asan"))


@pytest.fixture
def serve(annd):
    """serve(data, *options): a Server that ends with the test."""
    servers = []

    def start(data, *options, **more):
        servers.append(Server(annd, data, *options, **more))
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__()


@pytest.fixture(scope="session")
def shared_data():
    """Folder of the shared data sets; the test is skipped where there is none."""
    folder = pathlib.Path(os.environ.get("ANND_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "SHA256SUMS").exists():
        pytest.skip("skipped, no data")
    if not shutil.which("zstd"):
        pytest.skip("skipped, no data: zstd is missing")
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of so many bytes."""
    mounted = []

    def mount(size):
        folder = tmp_path / "disk"
        folder.mkdir()
        if os.getuid() != 0 or subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}", "annd-test", folder],
                capture_output=True, check=False).returncode != 0:
            pytest.skip("skipped, only root may mount a small disk")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=False)
