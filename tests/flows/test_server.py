"""The local servers: one for all callers, found again, private, ended with all they started."""

import dataclasses
import json
import multiprocessing
import os
import socket
import stat
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import HTTPServer, SimpleHTTPRequestHandler

import psutil
import pytest

from flows import local_server, server
from flows.local_server import ServerKind
from qlora_core.errors import LaunchError, StoreError, UserError

HTTP = "import http.server as h, sys; h.HTTPServer(('127.0.0.1', int(sys.argv[1])), h.SimpleHTTPRequestHandler).serve_forever()"  # noqa: E501


def answers(url):
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def small_server(program=HTTP, first_port=18200, well=answers):
    """A web server that starts at once: what is tested is how servers are kept, not Prefect."""
    return ServerKind(
        name="small",
        first_port=first_port,
        command=lambda port: [sys.executable, "-c", program, str(port)],
        environment={},
        answers=well,
        timeout_s=20,
    )


def test_a_second_call_finds_the_server_of_the_first(tmp_path):
    first = local_server.ensure(small_server(), tmp_path)

    second = local_server.ensure(small_server(), tmp_path)

    assert second == first
    assert local_server.stop("small", tmp_path)


def _ensure(folder, all_up, results):
    all_up.wait(60)
    results.put(local_server.ensure(small_server(), folder).pid)


def test_six_callers_at_once_share_one_server(tmp_path):
    spawn = multiprocessing.get_context("spawn")  # a forked copy of a process with Prefect is ill
    results = spawn.Queue()
    arguments = (tmp_path, spawn.Barrier(6), results)
    callers = [spawn.Process(target=_ensure, args=arguments) for _ in range(6)]

    for caller in callers:
        caller.start()
    pids = {results.get(timeout=60) for _ in callers}
    for caller in callers:
        caller.join()

    assert len(pids) == 1
    assert local_server.stop("small", tmp_path)


def test_a_stopped_server_is_gone_and_stopping_again_says_so(tmp_path):
    running = local_server.ensure(small_server(), tmp_path)

    assert local_server.stop("small", tmp_path)

    assert not psutil.pid_exists(running.pid) or (
        psutil.Process(running.pid).status() == psutil.STATUS_ZOMBIE
    )
    assert not answers(running.url)
    assert not local_server.stop("small", tmp_path)
    assert local_server.status(small_server(), tmp_path) is None


def test_the_server_is_not_ended_under_a_run_unless_forced(tmp_path):
    kind = dataclasses.replace(small_server(), name="prefect")
    running = local_server.ensure(kind, tmp_path / "server")

    with server.server_kept(tmp_path):
        with pytest.raises(UserError, match="a run is going on"):
            server.stop_server(tmp_path)
        assert answers(running.url)
        assert server.stop_server(tmp_path, force=True)


def test_the_server_is_ended_once_no_run_goes_on_any_more(tmp_path):
    local_server.ensure(dataclasses.replace(small_server(), name="prefect"), tmp_path / "server")
    with server.server_kept(tmp_path):
        pass

    assert server.stop_server(tmp_path)


def test_a_run_on_somebody_elses_server_leaves_no_trace_of_its_own(tmp_path):
    with server.server_kept(tmp_path / "home"):
        assert not (tmp_path / "home").exists()


def test_a_home_that_cannot_be_written_is_refused_with_its_path(tmp_path):
    (tmp_path / "afile").touch()

    with pytest.raises(StoreError, match=r"cannot write .*afile/server: a file is in the way"):
        local_server.secret(tmp_path / "afile" / "server" / "prefect.secret")


def test_a_killed_server_is_started_again_on_its_old_port(tmp_path):
    first = local_server.ensure(small_server(), tmp_path)
    psutil.Process(first.pid).kill()

    second = local_server.ensure(small_server(), tmp_path)

    assert second.pid != first.pid
    assert second.port == first.port
    assert answers(second.url)
    local_server.stop("small", tmp_path)


def test_a_recorded_pid_that_is_somebody_else_by_now_is_not_touched(tmp_path):
    (tmp_path / "small.json").write_text(
        json.dumps({"pid": psutil.Process().pid, "process_started": 1.0, "port": 18200})
    )

    running = local_server.ensure(small_server(), tmp_path)

    assert running.pid != psutil.Process().pid
    local_server.stop("small", tmp_path)


def test_a_port_that_is_taken_is_passed_over(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]

        running = local_server.ensure(small_server(first_port=taken), tmp_path)

    assert running.port > taken
    local_server.stop("small", tmp_path)


def test_a_port_that_somebody_else_takes_meanwhile_and_answers_on_is_left_to_them(tmp_path):
    kind, others = small_server("import time; time.sleep(1)\n" + HTTP), []

    def command(port: int) -> list[str]:
        if not others:
            others.append(HTTPServer(("127.0.0.1", port), SimpleHTTPRequestHandler))
            threading.Thread(target=others[0].serve_forever).start()
        return kind.command(port)

    running = local_server.ensure(dataclasses.replace(kind, command=command), tmp_path)
    others[0].shutdown()
    others[0].server_close()

    assert running.port > others[0].server_port
    assert answers(running.url)
    assert local_server.stop("small", tmp_path)


def test_a_port_that_was_taken_for_a_moment_only_is_no_reason_to_give_up(tmp_path):
    lost, others = tmp_path / "lost", []
    program = (
        "import http.server as h, pathlib, sys, time\n"
        "try:\n"
        "    s = h.HTTPServer(('127.0.0.1', int(sys.argv[1])), h.SimpleHTTPRequestHandler)\n"
        "except OSError:\n"
        "    pathlib.Path('lost').touch()\n"
        "    while pathlib.Path('lost').exists(): time.sleep(0.02)\n"
        "    raise\n"
        "s.serve_forever()\n"
    )
    kind = small_server(program)

    def leave() -> None:
        while not lost.exists():
            time.sleep(0.02)
        others[0].close()
        lost.unlink()

    def command(port: int) -> list[str]:
        if not others:
            others.append(socket.create_server(("127.0.0.1", port)))
            threading.Thread(target=leave).start()
        return kind.command(port)

    running = local_server.ensure(dataclasses.replace(kind, command=command), tmp_path)

    assert answers(running.url)
    assert local_server.stop("small", tmp_path)


def test_a_server_that_fails_is_told_with_the_end_of_its_log(tmp_path):
    with pytest.raises(LaunchError, match="ended with code 3") as caught:
        local_server.ensure(
            small_server("import sys; print('no such database'); sys.exit(3)"), tmp_path
        )

    assert "no such database" in str(caught.value)


def test_an_address_in_the_environment_goes_before_a_server_of_our_own(tmp_path, monkeypatch):
    running = local_server.ensure(small_server(), tmp_path)
    monkeypatch.setenv("PREFECT_API_URL", f"{running.url}/api")

    found = server.ensure_server(tmp_path / "home")

    assert found.api_url == f"{running.url}/api"
    assert not (tmp_path / "home").exists()
    local_server.stop("small", tmp_path)


def test_an_address_in_the_environment_that_does_not_answer_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")

    with pytest.raises(LaunchError, match=r"PREFECT_API_URL=http://127\.0\.0\.1:9/api"):
        server.ensure_server(tmp_path)


def test_a_proxy_is_passed_by_whichever_variable_names_its_exceptions(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "here.example")
    monkeypatch.delenv("NO_PROXY", raising=False)
    connection = server.Connection("http://127.0.0.1:4200/api")

    with connection.in_use():
        passed_by = [urllib.request.proxy_bypass(h) for h in ("127.0.0.1:4200", "here.example")]
        both = os.environ["NO_PROXY"], os.environ["no_proxy"]

    assert all(passed_by)
    assert both[0] == both[1]
    assert (os.environ.get("NO_PROXY"), os.environ["no_proxy"]) == (None, "here.example")


def status_of(url, auth=None):
    request = urllib.request.Request(url)
    if auth:
        import base64

        request.add_header("Authorization", f"Basic {base64.b64encode(auth.encode()).decode()}")
    try:
        return urllib.request.urlopen(request, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.prefect
def test_prefect_wants_its_password_and_keeps_it_from_others(home, connection):
    flows = f"{connection.api_url}/admin/version"

    assert status_of(flows) == 401
    assert status_of(flows, "qlora:wrong") == 401
    assert status_of(flows, connection.auth) == 200
    secret = home / "server" / "prefect.secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert connection.auth not in repr(connection)


@pytest.mark.prefect
def test_prefect_listens_on_loopback_alone(home, connection):
    running = local_server.Running.model_validate_json(
        (home / "server" / "prefect.json").read_text()
    )
    listening = [
        c.laddr.ip
        for c in psutil.Process(running.pid).net_connections()
        if c.status == psutil.CONN_LISTEN
    ]

    assert listening == ["127.0.0.1"]


@pytest.mark.prefect
def test_status_finds_the_prefect_server_that_ensure_started(home, connection):
    assert server.server_status(home) == connection
    assert server.ensure_server(home) == connection


def test_mlflow_shows_a_server_that_is_one_already(tmp_path):
    assert server.ensure_mlflow_ui(tmp_path, "http://mlflow:5000") == "http://mlflow:5000"
