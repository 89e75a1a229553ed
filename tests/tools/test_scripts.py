"""The scripts of the README: the first command from end to end, and what goes wrong with them."""
import json
import os
import re
import signal
import socket
import subprocess
import threading

import pytest

from conftest import ROOT, free_port

TOOLS = ROOT / "tools"


def run(*words, timeout=600, **options):
    return subprocess.run([*map(str, words)], stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=timeout, check=False, **options)


def demos():
    return {p for p in ROOT.iterdir() if p.name.startswith("annd-demo")}


@pytest.mark.parametrize("name", ["quickstart", "test", "install-packages", "unpack-data"])
def test_every_script_has_help(name):
    done = run(TOOLS / name, "--help")
    assert done.returncode == 0 and f"usage: tools/{name}" in done.stdout


def test_packages_are_one_list_without_repeats():
    lines = [line.split() for line in (TOOLS / "packages.txt").read_text().splitlines()
             if not line.startswith("#")]
    assert all(len(line) == 2 and line[0] in ("build", "test") for line in lines)
    assert len({line[1] for line in lines}) == len(lines)


def test_packages_elsewhere_than_on_debian_are_said(tmp_path):
    # A PATH with what the script needs, but without apt-get and dpkg-query.
    for tool in ("bash", "env", "dirname", "readlink", "grep", "id"):
        (tmp_path / tool).symlink_to(run("sh", "-c", f"command -v {tool}").stdout.strip())
    done = run(TOOLS / "install-packages", env={"PATH": str(tmp_path)})
    assert done.returncode == 1 and "not Debian or Ubuntu" in done.stderr
    assert "liburing-dev" in done.stderr and "ANND_SKIP_PACKAGES" in done.stderr


def test_unpack_data_says_when_there_is_none(tmp_path):
    done = run(TOOLS / "unpack-data", "--from", tmp_path, tmp_path / "out")
    assert done.returncode == 1 and str(tmp_path) in done.stderr
    assert not (tmp_path / "out").exists()


def test_quickstart_says_that_its_port_is_taken_before_it_works():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        address = f"127.0.0.1:{s.getsockname()[1]}"
        done = run(TOOLS / "quickstart", "--once", "--listen", address)
    assert done.returncode == 1 and f"{address} is in use" in done.stderr
    assert not done.stdout


@pytest.mark.slow
def test_quickstart_ends_with_a_right_answer():
    before = demos()
    address = f"127.0.0.1:{free_port()}"
    done = run(TOOLS / "quickstart", "--once", env={**os.environ, "ANND_LISTEN": address})
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(re.search(r'^\{"code".*$', done.stdout, re.M).group())
    wanted = re.search(r"exact search says: (.*)", done.stdout).group(1).split()
    assert answer["code"] == 0
    assert [str(hit["id"]) for hit in answer["data"]] == wanted
    recalls = [float(m) for m in re.findall(r"^ +- +(?:16|32|64) +\d+ +\d+ +\S+ +([\d.]+) ",
                                             done.stdout, re.M)]
    assert len(recalls) == 3 and recalls[-1] >= 0.99
    assert demos() == before


@pytest.mark.slow
def test_quickstart_serves_until_ctrl_c_and_cleans_up():
    before = demos()
    address = f"127.0.0.1:{free_port()}"
    with subprocess.Popen([TOOLS / "quickstart", "--listen", address], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          start_new_session=True) as process:
        timer = threading.Timer(300, lambda: os.killpg(process.pid, signal.SIGKILL))
        timer.start()
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "until Ctrl-C" in line:
                break
        text = "".join(lines)
        assert "What to try next" in text, text
        # The commands it shows work.
        for command in re.findall(r"^  (curl .*|build/annd search .*)$", text, re.M):
            done = run("bash", "-o", "pipefail", "-c", command.replace("| head", "| cat"), cwd=ROOT)
            assert done.returncode == 0 and done.stdout, command + done.stderr
            assert command.startswith("build") or json.loads(done.stdout)["code"] == 0, done.stdout
        os.killpg(process.pid, signal.SIGINT)
        process.stdout.read()
        assert process.wait(60) == 130
        timer.cancel()
    assert demos() == before
    with socket.socket() as s:
        assert s.connect_ex(("127.0.0.1", int(address.split(":")[1]))) != 0
