"""What the client makes of what an endpoint answers, or does not."""

import io
import logging
import socket
import subprocess
import sys
import zipfile

import pytest

from qlora_core.backends.ray_address import is_jobs_endpoint
from qlora_core.backends.ray_jobs_client import ClusterAwayError, JobsClient
from qlora_core.backends.ray_package import package
from qlora_core.errors import UserError
from tests.backends.jobs_endpoint import Endpoint, Handler, serving

TOKEN = "c4nary" * 10


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def endpoint():
    with serving(Endpoint()) as running:
        yield running


def client_of(endpoint: Endpoint) -> JobsClient:
    return JobsClient(endpoint.address)


def test_the_token_comes_from_the_environment_or_the_file_it_names(endpoint, monkeypatch, tmp_path):
    endpoint.token = TOKEN
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    client_of(endpoint).require_usable(patience_s=0)

    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / "token").write_text(TOKEN + "\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    client_of(endpoint).require_usable(patience_s=0)


@pytest.mark.parametrize("mode", [None, "token"])
def test_a_token_that_is_wrong_or_missing_is_told_without_saying_it(
    endpoint, monkeypatch, caplog, mode
):
    caplog.set_level(logging.DEBUG)
    endpoint.token = "another"
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)

    with pytest.raises(UserError, match="RAY_AUTH_MODE=token with RAY_AUTH_TOKEN") as caught:
        client_of(endpoint).require_usable(patience_s=0)

    assert ("refuses the token" if mode else "without a token") in caught.value.what
    assert TOKEN not in f"{caught.value} {caught.value.__context__!r} {caplog.text}"
    assert TOKEN not in repr(client_of(endpoint))
    assert endpoint.jobs == {}


@pytest.mark.parametrize("token", ["two words", "sm\u00f6rg\u00e5s", "line\nbreak"])
def test_a_token_that_no_header_can_carry_is_not_repeated(endpoint, monkeypatch, token):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)

    with pytest.raises(UserError, match="not one word") as caught:
        client_of(endpoint).jobs()

    assert token not in str(caught.value)


def test_a_token_file_that_is_not_there_is_named(endpoint, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere/token")

    with pytest.raises(UserError, match="/nowhere/token cannot be read: No such file"):
        client_of(endpoint).jobs()


def test_nobody_at_the_address_is_told_with_what_to_start():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

    with pytest.raises(UserError, match=r"no Ray Jobs endpoint answers .*refused") as caught:
        JobsClient(f"http://127.0.0.1:{port}").require_usable(patience_s=0)

    assert "ray start --head --dashboard-host" in caught.value.fix


def test_silence_is_not_waited_for_without_end():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"

        with pytest.raises(ClusterAwayError, match="timed out"):
            JobsClient(address, timeout_s=0.2).jobs()


def test_a_head_that_is_away_behind_its_dashboard_is_away(endpoint):
    endpoint.answers = 500

    with pytest.raises(ClusterAwayError, match=r"answers 500\.\n.*the head is away"):
        client_of(endpoint).jobs()


def test_a_redirect_is_not_followed_and_says_where_it_went(endpoint, monkeypatch):
    endpoint.answers = 302

    with pytest.raises(UserError, match=r"Name the right one: https://elsewhere\.example"):
        client_of(endpoint).require_usable(patience_s=0)


@pytest.mark.parametrize("answers", [404, 200])
def test_another_service_at_the_address_is_told(endpoint, answers):
    endpoint.answers = answers

    with pytest.raises(UserError, match="but no Ray Jobs endpoint"):
        client_of(endpoint).require_usable(patience_s=0)


def test_a_job_that_only_a_proxy_cannot_find_is_not_taken_for_gone(endpoint):
    endpoint.set("a", "RUNNING")
    endpoint.answers = 404

    with pytest.raises(UserError, match="but no Ray Jobs endpoint"):
        client_of(endpoint).job("a")


@pytest.mark.parametrize("said", ['{"detail": "slow down"}', '"ok"', "null"])
def test_json_that_describes_no_job_is_another_services(endpoint, monkeypatch, said):
    endpoint.set("a", "RUNNING")
    monkeypatch.setattr(Handler, "route", lambda self, _: self.reply(200, said))

    for ask in (client_of(endpoint).jobs, lambda: client_of(endpoint).job("a")):
        with pytest.raises(UserError, match="but no Ray Jobs endpoint"):
            ask()


@pytest.mark.parametrize(
    "address", ["http://", "http://head:port", "http://:8265", "ftp://head", "head:8265"]
)
def test_what_is_no_address_is_told_with_one_that_would_do(address):
    with pytest.raises(UserError, match="http://head:8265"):
        JobsClient(address).require_usable(patience_s=0)


@pytest.mark.parametrize("address", ["http://me:s3cret@head", "https://head/?token=s3cret"])
def test_an_address_with_a_secret_in_it_is_refused_without_saying_it(address):
    with pytest.raises(UserError, match="RAY_AUTH_TOKEN") as caught:
        JobsClient(address).require_usable(patience_s=0)

    assert "s3cret" not in str(caught.value)


def test_which_addresses_are_endpoints():
    assert is_jobs_endpoint("https://head:8265")
    assert not any(map(is_jobs_endpoint, [None, "auto", "head:6379", "ray://head:10001"]))


def test_a_job_is_submitted_once_however_often_it_is_asked_for(endpoint):
    endpoint.submit = lambda asked: endpoint.set(asked["submission_id"], "RUNNING")
    client = client_of(endpoint)

    client.submit("a", "true", {})
    client.submit("a", "true", {})

    assert [job.submission_id for job in client.jobs()] == ["a", None]
    client.stop("a")
    client.stop("unknown")
    assert client.job("a").is_over
    assert client.job("unknown") is None


def test_a_package_is_sent_once_and_is_a_module_that_python_imports(endpoint, tmp_path):
    client = client_of(endpoint)

    uri = client.upload(*package())
    assert client.upload(*package()) == uri

    assert [asked.split()[0] for asked in endpoint.asked] == ["GET", "PUT", "GET"]
    ((name, content),) = endpoint.packages.items()
    assert uri == f"gcs://{name}"
    zipfile.ZipFile(io.BytesIO(content)).extractall(tmp_path)
    where = "import qlora_core.backends.ray_job_order as m; print(m.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith(str(tmp_path))
