import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster import head, processes
from cluster.session import ClusterError, connect, down, is_loopback, recorded, runtime_env, up

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test here sees a cluster that somebody else runs."""
    monkeypatch.setenv("CARAVAN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path / "home"


# -- without a cluster


def test_importing_the_session_does_not_import_ray() -> None:
    script = "import sys, cluster.session, cluster.jobs, cluster.placement; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY).returncode == 0


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", r"no cluster answers at 127\.0\.0\.1:1 .*caravan up"),
        ("nonsense", "'nonsense' is not host:port"),
        ("ray://127.0.0.1:10001", "not host:port.*caravan submit"),
        ("http://127.0.0.1:8265", "not host:port.*caravan submit"),
    ],
)
def test_bad_address_is_one_clear_error_at_once(address: str, message: str) -> None:
    begun = time.monotonic()
    with pytest.raises(ClusterError, match=message):
        connect(address)
    assert time.monotonic() - begun < 10


def test_address_order_is_argument_then_environment_then_record(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    me = processes.this_process()
    record = {"pid": os.getpid(), "started": me.create_time(), "address": "127.0.0.1:3", "dashboard_url": "http://x"}
    home.mkdir()
    (home / "cluster.json").write_text(json.dumps(record))
    with pytest.raises(ClusterError, match=r"127\.0\.0\.1:3 .*caravan down"):
        connect()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:2")
    with pytest.raises(ClusterError, match=r"127\.0\.0\.1:2 "):
        connect()
    with pytest.raises(ClusterError, match=r"127\.0\.0\.1:1 "):
        connect("127.0.0.1:1")


def test_what_describes_an_own_cluster_is_refused_for_a_running_one() -> None:
    with pytest.raises(ClusterError, match="num_cpus=4 cannot change the running cluster at 10.0.0.1:6379"):
        connect("10.0.0.1:6379", num_cpus=4)


@pytest.mark.parametrize(
    "change", [{"pid": 2**22 + 1}, {"started": 1.0}], ids=["no such process", "another process of that number"]
)
def test_stale_record_is_removed_under_the_lock_with_one_line(
    home: Path, change: dict, caplog: pytest.LogCaptureFixture
) -> None:
    me = processes.this_process()
    record = {"pid": os.getpid(), "started": me.create_time(), "address": "127.0.0.1:3", "dashboard_url": "http://x"}
    home.mkdir()
    text = json.dumps(record | change)
    (home / "cluster.json").write_text(text)
    assert recorded() is None and caplog.messages == []
    assert (home / "cluster.json").read_text() == text, "without the lock it may be a newer cluster's by now"
    with pytest.raises(ClusterError, match=r"no cluster is up: the cluster at 127\.0\.0\.1:3 .* its record is removed"):
        down()
    assert not (home / "cluster.json").exists()
    with pytest.raises(ClusterError, match="nothing is noted"):
        down()
    (home / "cluster.json").write_text(text)
    with pytest.raises(ClusterError, match="port=99999 cannot be used"):
        up(port=99999)
    assert not (home / "cluster.json").exists()
    assert len(caplog.messages) == 1 and "127.0.0.1:3" in caplog.messages[0]


def test_record_that_is_none_names_its_file(home: Path) -> None:
    home.mkdir()
    for text in ("{", "[]", '{"pid": 1}'):
        (home / "cluster.json").write_text(text)
        with pytest.raises(ClusterError, match="home/cluster.json is not a record"):
            recorded()


def test_taken_port_is_refused_before_anything_starts(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("something was started"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match=rf"port={port} cannot be used .*in use.*choose another"):
            up(port=port)
        with pytest.raises(ClusterError, match=rf"dashboard_port={port} cannot be used"):
            up(dashboard_port=port)
    with pytest.raises(ClusterError, match="port=99999 cannot be used"):
        up(port=99999)
    assert not (home / "cluster.json").exists()


@pytest.mark.integration
def test_head_that_does_not_start_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(home / ("too-long-for-a-socket" * 8)))
    with pytest.raises(ClusterError, match=r"Ray did not start: .+; see .*head\.log"):
        up(num_cpus=1)
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nowhere")
    with pytest.raises(ClusterError, match=r"Ray did not start: /proc/nowhere/.* cannot be made .*RAY_TMPDIR"):
        up(num_cpus=1)
    assert not (home / "cluster.json").exists() and processes.tree(processes.this_process())[1:] == []


_SLOW_HEAD = """
    import subprocess, sys
    from cluster import head
    command = [sys.executable, "-c", "import time; time.sleep(100)"]
    head._launch = lambda *arguments: subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    head.up()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_up_leaves_no_head_that_down_cannot_find(home: Path, number: signal.Signals) -> None:
    record = home / "cluster.json"
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_SLOW_HEAD)], cwd=REPOSITORY, stderr=subprocess.PIPE
    ) as starting:
        deadline = time.monotonic() + 60
        while not record.exists():
            assert starting.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        pid = json.loads(record.read_text())["pid"]
        assert processes.find(pid) is not None
        starting.send_signal(number)
        starting.communicate(timeout=60)
    if number == signal.SIGKILL:
        noted = recorded()
        assert noted is not None and down() == noted
    elif number == signal.SIGTERM:
        assert starting.returncode == 128 + number
    assert processes.find(pid) is None and not record.exists()


def test_signals_are_handled_as_before_after_up_and_in_other_threads() -> None:
    before = signal.getsignal(signal.SIGTERM)
    errors: list[BaseException | None] = []
    for run in (_failing_up, lambda: _in_thread(_failing_up)):
        errors.append(run())
        assert signal.getsignal(signal.SIGTERM) is before
    assert all("port=99999" in str(error) for error in errors), errors


def _failing_up() -> BaseException | None:
    try:
        up(port=99999)
    except Exception as error:
        return error
    return None


def _in_thread(call: Callable[[], BaseException | None]) -> BaseException | None:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_loopback_is_recognised() -> None:
    for address in ("127.0.0.1:1", "localhost:1", "127.9.9.9:1", "[::1]:1"):
        assert is_loopback(address), address
    for address in ("10.0.0.1:1", "head.example.org:6379", "0.0.0.0:1"):
        assert not is_loopback(address), address
    listeners = [processes.Listener(1, "x", host, 1) for host in ("127.0.0.1", "::1", "::ffff:127.0.0.1")]
    assert all(listener.is_loopback for listener in listeners)
    listeners = [processes.Listener(1, "x", host, 1) for host in ("0.0.0.0", "::", "10.0.0.1", "::ffff:10.0.0.1")]
    assert not any(listener.is_loopback for listener in listeners)


def test_listeners_and_end_tree_see_real_processes() -> None:
    script = """
        import signal, subprocess, sys, time
        if len(sys.argv) == 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            subprocess.Popen([sys.executable, __file__, "child"])
        else:
            import socket
            open_to_all = socket.create_server(("0.0.0.0", 0))
            print(open_to_all.getsockname()[1], flush=True)
        time.sleep(100)
    """
    path = Path(os.environ["CARAVAN_HOME"]).parent / "stubborn.py"
    path.write_text(textwrap.dedent(script))
    with subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, start_new_session=True) as child:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        process = processes.find(child.pid)
        members = processes.tree(process)
        assert [(found.port, found.is_loopback) for found in processes.listeners(members)] == [(port, False)]
        assert processes.end_tree(process, grace=0.5) == len(members) == 2
    assert all(processes.find(member.pid) is None for member in members)


def test_runtime_env_ships_our_three_packages() -> None:
    folders = runtime_env()["py_modules"]
    assert folders == [str(REPOSITORY / name) for name in ("llama", "cluster", "pipelines")]


# -- with a cluster of our own, in a process of its own

_OWN_CLUSTER = """
    import json, os, sys, time
    from cluster.session import ClusterError, connect, node_folder, ray_processes
    from cluster import processes
    session = connect(num_cpus=1)
    import ray

    @ray.remote
    def where():
        import cluster, llama, pipelines
        return [module.__file__ for module in (llama, cluster, pipelines)], os.getcwd(), sys.path
    files, folder, path = ray.get(where.remote())
    members = ray_processes()
    shared = connect()
    shared.close()
    try:
        connect(num_cpus=2)
        sys.exit("num_cpus of a shared connection was ignored")
    except ClusterError:
        pass
    facts = {
        "owned": session.owned, "shared": shared.owned, "alive": ray.is_initialized(), "files": files, "cwd": folder,
        "path": path, "folder": str(node_folder("shards")),
        "pids": [member.pid for member in members],
        "open": [str(found) for found in processes.listeners(members) if not found.is_loopback],
        "listening": len(processes.listeners(members)), "dashboard": session.dashboard_url,
    }
    print(json.dumps(facts), flush=True)
    sys.stdin.readline()
    session.close()
"""


@pytest.mark.integration
def test_own_cluster_is_loopback_only_ships_our_packages_and_leaves_nothing(tmp_path: Path) -> None:
    for name in ("decoy", "elsewhere", "user"):
        (tmp_path / name).mkdir()
    (tmp_path / "decoy" / "llama").mkdir()
    (tmp_path / "decoy" / "llama" / "__init__.py").write_text("raise RuntimeError('the decoy was imported')")
    script = (
        f"import sys; sys.path.remove({str(tmp_path / 'decoy')!r}); sys.path.insert(0, {str(REPOSITORY)!r})\n"
        + textwrap.dedent(_OWN_CLUSTER)
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(tmp_path / "decoy"), "HOME": str(tmp_path / "user"), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path / "elsewhere",
        env=environment,
    ) as driver:
        assert driver.stdin is not None and driver.stdout is not None
        line = driver.stdout.readline()
        facts = json.loads(line)
        assert Path(facts["folder"]).is_dir()
        driver.communicate("\n", timeout=60)
        assert driver.returncode == 0
        assert all(processes.find(pid) is None for pid in facts["pids"]), "close() returns when all are gone"
    assert not Path(facts["folder"]).exists(), "it goes with its cluster"
    assert facts["owned"] and not facts["shared"] and facts["alive"]
    assert facts["open"] == [] and facts["listening"] > 5, "every socket of the cluster is on loopback"
    assert all("/py_modules_files/" in file for file in facts["files"]), facts["files"]
    assert str(tmp_path / "decoy") in facts["path"], "the decoy was in reach"
    assert facts["dashboard"].startswith("http://127.0.0.1:")
    assert list((tmp_path / "user").iterdir()) == [], "no ~/.ray"
    assert not head.caravan_home().exists()
