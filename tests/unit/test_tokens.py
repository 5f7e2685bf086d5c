"""Tokens, rates, and who may ask at all."""

import stat
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from api import tokens
from api.access import Access, Rates, payloads_shown
from infra.cli.main import command_line
from streams.settings import Settings


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer every request with whether payloads are shown."""
    if scope["type"] == "lifespan":
        for kind in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{kind}.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(payloads_shown.get()).encode()})


def client(held: tokens.Tokens | None, rate: float = 0, base_url: str = "http://127.0.0.1") -> TestClient:
    """Return a client of `app` behind the gate for readers and auditors."""
    return TestClient(Access(app, held, {tokens.READER, tokens.AUDITOR}, rate, {"/health"}), base_url=base_url)


def shown(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_the_file_holds_hashes_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    """Given a token, its file names it and doesn't hold it; nobody else can read the file; a second of that name is refused."""
    path = tmp_path / "deep" / "tokens"
    made = tokens.create(path, tokens.READER, "grafana")
    assert made not in path.read_text()
    assert made.removeprefix("foldflow_") not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(tokens.TokensError, match="already"):
        tokens.create(path, tokens.AUDITOR, "grafana")
    with pytest.raises(tokens.TokensError, match="no name"):
        tokens.create(path, tokens.AUDITOR, "a b")
    path.write_text(path.read_text() + "rubbish\n")
    with pytest.raises(tokens.TokensError, match="line 3"):
        tokens.read(path)


def test_a_token_counts_from_when_it_is_made_until_it_is_revoked(tmp_path: Path) -> None:
    """Given a running server, tokens made and revoked count at once; without a file nobody may ask."""
    path = tmp_path / "tokens"
    with client(tokens.Tokens(path)) as asking:
        assert asking.get("/runs", headers=shown("anything")).status_code == 401
        one, two = (tokens.create(path, tokens.READER, name) for name in ("one", "two"))
        assert [asking.get("/runs", headers=shown(each)).status_code for each in (one, two)] == [200, 200]
        tokens.revoke(path, "one")
        assert [asking.get("/runs", headers=shown(each)).status_code for each in (one, two)] == [401, 200]
        path.write_text("rubbish\n")
        assert asking.get("/runs", headers=shown(two)).status_code == 503


def test_each_role_has_its_place(tmp_path: Path) -> None:
    """Readers get no payloads, auditors do, requesters nothing; none or a wrong one: 401; a free path needs none."""
    path = tmp_path / "tokens"
    made = {role: tokens.create(path, role, role) for role in tokens.ROLES}
    with client(tokens.Tokens(path)) as asking:
        assert asking.get("/runs", headers=shown(made["reader"])).text == "False"
        assert asking.get("/runs", headers=shown(made["auditor"])).text == "True"
        assert asking.get("/runs", auth=("anybody", made["auditor"])).text == "True"
        forbidden = asking.get("/runs", headers=shown(made["requester"]))
        assert (forbidden.status_code, forbidden.json()["type"]) == (403, "urn:foldflow:forbidden")
        for headers in ({}, shown("x"), shown(""), {"Authorization": "Basic ä"}, {"Authorization": "Bearer \xff"}):
            answer = asking.get("/runs", headers={key: value.encode("latin-1") for key, value in headers.items()})
            assert (answer.status_code, answer.headers["content-type"]) == (401, "application/problem+json")
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
        assert asking.get("/health").status_code == 200


def test_without_tokens_no_page_of_another_site_may_ask() -> None:
    """Given no tokens, a request whose Host or Origin is not this machine's is refused: a browser may have sent it."""
    with client(None) as asking:
        assert asking.get("/runs").text == "True"
        for headers, status in (
            ({"Host": "localhost:29094"}, 200),
            ({"Host": "[::1]:29094", "Origin": "http://localhost:3000"}, 200),
            ({"Host": "evil.example"}, 403),
            ({"Host": "127.0.0.1.evil.example"}, 403),
            ({"Host": "[x"}, 403),
            ({"Origin": "https://evil.example"}, 403),
            ({"Origin": "null"}, 403),
        ):
            assert asking.get("/runs", headers=headers).status_code == status, headers


def test_a_server_that_others_can_reach_needs_tokens(tmp_path: Path) -> None:
    """Given no file of tokens, only loopback will do; with one, any address."""
    alone = Settings(data_dir=tmp_path)
    assert (
        tokens.configured(alone, "127.0.0.1") is tokens.configured(alone, "::1") is tokens.configured(alone, "localhost") is None
    )
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org", ""):  # noqa: S104 - it is refused
        with pytest.raises(tokens.TokensError, match="FOLDFLOW_API_TOKENS"):
            tokens.configured(alone, host)
    held = alone.model_copy(update={"api_tokens": tmp_path / "tokens"})
    assert tokens.configured(held, "0.0.0.0") is not None  # noqa: S104 - behind tokens


def test_the_api_and_the_gateway_do_not_start_open_to_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Given an address that others can reach and no tokens, both commands end with 1 and say what to do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOLDFLOW_API_HOST", "0.0.0.0")  # noqa: S104 - it is refused
    monkeypatch.setattr("infra.cli.read_only.forbid_writing", lambda: None)  # this process has other tests to run
    for command in ("api", "gateway"):
        ended = CliRunner().invoke(command_line([command]), [command])
        assert (ended.exit_code, "FOLDFLOW_API_TOKENS" in ended.stderr) == (1, True)


def test_a_caller_gets_its_rate_and_no_more() -> None:
    """Given 10 a second, a caller may make 20 at once, then one each tenth; another caller has its own; 0: no limit."""
    now = [0.0]
    rates = Rates(10, lambda: now[0])
    assert [rates.wait("a") for _ in range(20)] == [0.0] * 20
    assert rates.wait("a") == pytest.approx(0.1)
    assert rates.wait("b") == 0.0
    now[0] = 0.1
    assert rates.wait("a") == 0.0
    assert rates.wait("a") > 0
    now[0] = 1000.0
    assert [rates.wait("a") > 0 for _ in range(21)] == [False] * 20 + [True]
    assert not any(Rates(0).wait("a") for _ in range(1000))
    for number in range(20_000):
        rates.wait(str(number))
    assert len(rates._buckets) == 10_000


def test_too_many_requests_are_told_when_to_come_again(tmp_path: Path) -> None:
    """Given a rate of one, a third request at once gets 429 with Retry-After; guessing tokens is held back by address."""
    made = tokens.create(tmp_path / "tokens", tokens.READER, "ci")
    with client(tokens.Tokens(tmp_path / "tokens"), rate=1) as asking:
        answers = [asking.get("/runs", headers=shown(made)) for _ in range(3)]
        assert [each.status_code for each in answers] == [200, 200, 429]
        assert answers[2].headers["Retry-After"] == "1"
        assert [asking.get("/runs", headers=shown("guess")).status_code for _ in range(3)] == [401, 401, 429]


def test_the_command_makes_lists_and_revokes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`foldflow token` works on the configured file, prints a token once, and says what to do when there is no file."""
    monkeypatch.chdir(tmp_path)

    def token(*arguments: str) -> tuple[int, str, str]:
        ended = CliRunner().invoke(command_line(["token"]), ["token", *arguments])
        return ended.exit_code, ended.stdout, ended.stderr

    code, _, said = token("list")
    assert (code, "FOLDFLOW_API_TOKENS" in said) == (2, True)
    monkeypatch.setenv("FOLDFLOW_API_TOKENS", "tokens")
    code, out, _ = token("create", "--role", "auditor", "--name", "ann")
    found = tokens.Tokens(tmp_path / "tokens").find(out.strip())
    assert (code, found and found.role) == (0, "auditor")
    assert token("create", "--role", "king", "--name", "bob")[0] == 2
    assert token("create", "--role", "reader", "--name", "ann")[0] == 2
    code, out, _ = token("list", "--json")
    assert (code, '"name": "ann"' in out, "foldflow_" in out) == (0, True, False)
    assert token("revoke", "ann")[0] == 0
    assert token("revoke", "ann")[0] == 2
    assert token("list")[1].split() == ["name", "role", "made"]
