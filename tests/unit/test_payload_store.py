"""The store on a real folder, and on a server that speaks as much of S3 as a store needs."""

import asyncio
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pydantic import ValidationError

from events.failure import FailureKind
from streams import payloads
from streams.payloads import PayloadStore, PayloadStoreError, failure
from streams.settings import Settings
from streams.workflow.expressions import from_json, to_json
from streams.workflow.payloads import (
    INLINE_BYTES,
    MAX_PAYLOAD_BYTES,
    PayloadDamagedError,
    PayloadMissingError,
    PayloadTooDeepError,
    PayloadTooLargeError,
    digest_of,
    reference,
)

ROOT = Path(__file__).parent.parent.parent


def store(folder: Path) -> PayloadStore:
    """Return a store that remembers nothing of what others did."""
    return PayloadStore(Settings(data_dir=folder))


def text(size: int, letter: str = "x") -> str:
    """Return a JSON text of so many letters."""
    return f'"{letter * (size - 2)}"'


def digest(of: str) -> str:
    """Return a text's digest."""
    return digest_of(of.encode())


def place(folder: Path, of: str) -> Path:
    """Return where a text's payload is."""
    return folder / "payloads" / digest(of)[:2] / digest(of)[2:]


def files(folder: Path) -> list[Path]:
    """Return all files below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def use(kept: PayloadStore, how: str) -> None:
    """Put something, or get what isn't there."""
    kept.put("1") if how == "put" else kept.get("0" * 64)


# --- A folder ---


def test_what_is_put_can_be_had_by_another_process(tmp_path: Path) -> None:
    """Under its digest, as the plain text that it is."""
    asked = store(tmp_path).put('"é"')
    assert asked == reference('"é"')
    assert store(tmp_path).get(digest('"é"')) == '"é"'
    assert files(tmp_path) == [place(tmp_path, '"é"')]
    assert place(tmp_path, '"é"').read_text("utf-8") == '"é"'


def test_a_store_is_opened_when_it_is_needed(tmp_path: Path) -> None:
    """Workers that see no large payload leave no trace."""
    made = store(tmp_path)
    assert not (tmp_path / "payloads").exists()
    made.put("1")
    assert (tmp_path / "payloads").exists()


def test_a_store_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tools are somebody's code: one of them may change the process's folder."""
    monkeypatch.chdir(tmp_path)
    made = store(Path("data"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    made.put("1")
    assert files(tmp_path) == [place(tmp_path / "data", "1")]


def test_a_file_url_is_a_folder_as_well(tmp_path: Path) -> None:
    """With what a URL has to escape."""
    PayloadStore(Settings(payload_store=f"file://{tmp_path}/a%20b/c")).put("1")
    assert files(tmp_path) == [tmp_path / "a b" / "c" / digest("1")[:2] / digest("1")[2:]]


def test_other_urls_are_refused_by_the_settings() -> None:
    """A store in memory would lose what it was given, one on a web server takes nothing."""
    for url in ("memory:///", "https://example.org/x", "payloads", ""):
        with pytest.raises(ValidationError, match="payload_store"):
            Settings(payload_store=url)


def test_a_payload_is_stored_once(tmp_path: Path) -> None:
    """Whoever stores it again finds it there and leaves it alone."""
    first = store(tmp_path)
    first.put(text(1_000_000))
    before = place(tmp_path, text(1_000_000)).stat()
    assert first.put(text(1_000_000)) == store(tmp_path).put(text(1_000_000))
    after = place(tmp_path, text(1_000_000)).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert len(files(tmp_path)) == 1


def test_a_missing_payload_says_where_it_was_looked_for(tmp_path: Path) -> None:
    """The likeliest cause is another store."""
    with pytest.raises(
        PayloadMissingError, match=r"is not in .*payloads: was it deleted, or .* FOLDFLOW_PAYLOAD_STORE"
    ) as caught:
        store(tmp_path).get("0" * 64)
    assert caught.value.digest == "0" * 64


@pytest.mark.parametrize("name", ["../../secret", "", "0" * 63, "A" * 64, "0" * 62 + "/."])
def test_what_is_no_digest_is_not_looked_up(tmp_path: Path, name: str) -> None:
    """No name leads out of the store."""
    (tmp_path / "secret").write_text("1")
    with pytest.raises(PayloadMissingError, match="is no payload's digest"):
        store(tmp_path).get(name)


@pytest.mark.parametrize("damage", [b'"abd"', b'"ab', b"", b'"abcd"', b"\xff\xff\xff\xff\xff"])
def test_a_damaged_object_is_noticed(tmp_path: Path, damage: bytes) -> None:
    """Its content is never taken for the payload."""
    store(tmp_path).put('"abc"')
    place(tmp_path, '"abc"').write_bytes(damage)
    with pytest.raises(PayloadDamagedError, match=r"is damaged: .*; delete ../"):
        store(tmp_path).get(digest('"abc"'))


def test_an_object_that_is_no_text_is_noticed(tmp_path: Path) -> None:
    """Even when its name is right."""
    wrong = tmp_path / "payloads" / digest_of(b"\xff")[:2] / digest_of(b"\xff")[2:]
    wrong.parent.mkdir(parents=True)
    wrong.write_bytes(b"\xff")
    with pytest.raises(PayloadDamagedError, match="is no text"):
        store(tmp_path).get(digest_of(b"\xff"))


def test_an_object_that_lost_its_end_is_stored_again(tmp_path: Path) -> None:
    """As it can be after a loss of power."""
    store(tmp_path).put('"abc"')
    place(tmp_path, '"abc"').write_bytes(b"")
    store(tmp_path).put('"abc"')
    assert store(tmp_path).get(digest('"abc"')) == '"abc"'


def test_no_payload_is_larger_than_64_mib(tmp_path: Path) -> None:
    """Neither stored nor read."""
    with pytest.raises(PayloadTooLargeError):
        store(tmp_path).put(text(MAX_PAYLOAD_BYTES + 1))
    assert files(tmp_path) == []
    huge = text(MAX_PAYLOAD_BYTES + 1)
    place(tmp_path, huge).parent.mkdir(parents=True)
    place(tmp_path, huge).write_text(huge)
    with pytest.raises(PayloadDamagedError):
        store(tmp_path).get(digest(huge))


def test_nobody_sees_half_an_object(tmp_path: Path) -> None:
    """While it is written it isn't there; then it is there whole."""
    for letter in "abcd":
        large = text(20_000_000, letter)
        writer = threading.Thread(target=store(tmp_path).put, args=(large,))
        writer.start()
        seen = None
        while seen is None:
            try:
                seen = store(tmp_path).get(digest(large))
            except PayloadMissingError:
                continue  # not there yet
        writer.join()
        assert seen == large


def test_what_a_killed_process_left_hinders_nobody(tmp_path: Path) -> None:
    """Its half-written object stands beside the place and is never read."""
    beside = place(tmp_path, '"abc"').with_name(digest('"abc"')[2:] + "#1")
    beside.parent.mkdir(parents=True)
    beside.write_bytes(b'"a')
    with pytest.raises(PayloadMissingError):
        store(tmp_path).get(digest('"abc"'))
    store(tmp_path).put('"abc"')
    assert store(tmp_path).get(digest('"abc"')) == '"abc"'


def test_two_processes_may_store_the_same_at_once(tmp_path: Path) -> None:
    """Both succeed, and each payload is there once and whole."""
    script = (
        "import sys; from pathlib import Path; from streams.payloads import PayloadStore; from streams.settings import Settings\n"
        "store = PayloadStore(Settings(data_dir=Path(sys.argv[1])))\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for n in range(100): print(store.put('\"' + str(n) * 300_000 + '\"'))"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", script, tmp_path], cwd=ROOT, stdin=-1, stdout=-1, stderr=-1, text=True)
        for _ in range(2)
    ]
    for each in both:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    for each in both:
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()
    said = [each.communicate() for each in both]
    assert [each.returncode for each in both] == [0, 0], said
    assert said[0][0] == said[1][0]
    assert len(files(tmp_path)) == 100
    for n in range(100):
        assert store(tmp_path).get(from_json(said[0][0].splitlines()[n])["$payload"]) == '"' + str(n) * 300_000 + '"'


# --- What goes wrong ---


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Let the system refuse to write more, as it does when a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may write anywhere, so don't be root."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_a_full_store_says_so(tmp_path: Path) -> None:
    """And holds nothing of what had no room; once there is room, the same call succeeds."""
    full = store(tmp_path)
    with (
        no_file_larger_than(100_000),
        pytest.raises(PayloadStoreError, match=r"can't be stored in .*payloads; it is full: make room"),
    ):
        full.put(text(1_000_000))
    assert files(tmp_path) == []
    full.put(text(1_000_000))
    assert full.get(digest(text(1_000_000))) == text(1_000_000)


@contextmanager
def small_disk(folder: Path, size: str = "1m") -> Iterator[Path]:
    """Give a file system of its own, or skip where none can be mounted."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_says_how_much_room_there_is(tmp_path: Path) -> None:
    """Nothing half-written stays, what was stored can be read, and with room the same call succeeds."""
    with small_disk(tmp_path / "disk") as disk:
        full = store(disk)
        kept = full.put(text(400_000, "k"))
        with pytest.raises(
            PayloadStoreError, match=r"it is full: make room there \([\d,]+ of 1,048,576 bytes are free\)"
        ) as caught:
            full.put(text(900_000))
        assert caught.value.passing
        assert files(disk) == [place(disk, text(400_000, "k"))]
        assert full.put(text(400_000, "k")) == kept
        assert store(disk).get(digest(text(400_000, "k"))) == text(400_000, "k")
        place(disk, text(400_000, "k")).unlink()
        assert full.put(text(900_000)) == reference(text(900_000))
        assert store(disk).get(digest(text(900_000))) == text(900_000)


def test_a_result_is_held_while_its_store_is_full(tmp_path: Path) -> None:
    """The call was made: once there is room, its output is stored, and the call isn't made again."""
    with small_disk(tmp_path / "disk") as disk:
        filler = disk / "filler"
        filler.write_bytes(b"x" * 900_000)

        async def work() -> str:
            held = asyncio.create_task(store(disk).inlined(text(400_000)))
            await asyncio.sleep(0.5)
            assert not held.done()
            filler.unlink()
            return await held

        assert asyncio.run(work()) == reference(text(400_000))
        assert store(disk).get(digest(text(400_000))) == text(400_000)


def test_a_result_is_held_neither_for_ever_nor_with_too_many_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After 30 s (here: none), or beyond 256 MB in all (here: 1 MB), it is a failure that is worth another attempt."""
    with small_disk(tmp_path / "disk") as disk:
        (disk / "filler").write_bytes(b"x" * 900_000)
        for name, value in (("_HOLD_S", -1.0), ("_HOLD_BYTES", 1_000_000)):
            with monkeypatch.context() as smaller:
                smaller.setattr(payloads, name, value)
                began = time.monotonic()
                with pytest.raises(PayloadStoreError) as caught:
                    asyncio.run(store(disk).inlined(text(1_100_000)))
                assert failure(caught.value).retryable
                assert time.monotonic() - began < 20


def test_a_caller_s_time_limit_ends_the_holding(tmp_path: Path) -> None:
    """Nobody waits longer for the store than for the call."""

    async def work(disk: Path) -> None:
        async with asyncio.timeout(0.3):
            await store(disk).inlined(text(1_500_000))

    with small_disk(tmp_path / "disk") as disk, pytest.raises(TimeoutError):
        asyncio.run(work(disk))


def test_a_store_without_permission_says_so() -> None:
    """Whether it can't be written or can't be read."""
    folder = Path(tempfile.mkdtemp())  # not pytest's, which only its owner may enter
    try:
        store(folder).put("1")
        for mode, refused in ((0o555, "stored"), (0o000, "read")):
            (folder / "payloads").chmod(0o755)
            folder.chmod(0o755)
            (folder / "payloads").chmod(mode)
            with unprivileged(), pytest.raises(PayloadStoreError, match=f"can't be {refused} in .*; access is refused: give"):
                store(folder).put("2") if refused == "stored" else store(folder).get(digest("1"))
    finally:
        (folder / "payloads").chmod(0o755)
        shutil.rmtree(folder)


def test_a_place_that_is_no_folder_says_so(tmp_path: Path) -> None:
    """With what the system says, and the setting's name."""
    (tmp_path / "payloads").write_text("")
    for how in ("put", "get"):
        with pytest.raises(PayloadStoreError, match=r"it can't be used: check FOLDFLOW_PAYLOAD_STORE.*\(File exists"):
            use(store(tmp_path), how)


def test_what_an_error_means_for_a_call() -> None:
    """Only a store that can't be used is worth another attempt."""
    kinds = {
        PayloadStoreError("full"): (FailureKind.UNAVAILABLE, True),
        PayloadMissingError("0" * 64): (FailureKind.INVALID_ARGUMENTS, False),
        PayloadDamagedError("0" * 64): (FailureKind.INVALID_ARGUMENTS, False),
        PayloadTooDeepError("deep"): (FailureKind.INVALID_ARGUMENTS, False),
        PayloadTooLargeError(10**9): (FailureKind.TOO_LARGE, False),
    }
    assert {error: (failure(error).kind, failure(error).retryable) for error in kinds} == kinds
    assert (
        failure(PayloadTooLargeError(10**9)).message == "a payload of 1,000,000,000 bytes is too large; the limit is 67,108,864"
    )


# --- The cache ---


def test_what_was_had_once_is_not_read_again(tmp_path: Path) -> None:
    """Within 64 MB; what was used least recently goes first."""
    made = store(tmp_path)
    texts = [text(1_000_000, chr(ord("!") + n)) for n in range(80)]
    for each in texts:
        made.put(each)
        place(tmp_path, each).unlink()
        made.get(digest(texts[0]))
    had = []
    for n, each in enumerate(texts):
        try:
            assert made.get(digest(each)) == each
            had.append(n)
        except PayloadMissingError:
            pass
    assert had == [0, *range(80 - len(had) + 1, 80)]
    assert 60 <= len(had) <= 67


def test_what_is_read_is_cached_as_what_is_stored(tmp_path: Path) -> None:
    """A second reader asks the store once."""
    store(tmp_path).put("1")
    reader = store(tmp_path)
    reader.get(digest("1"))
    shutil.rmtree(tmp_path)
    assert reader.get(digest("1")) == "1"


# --- On an event loop ---


def test_the_event_loop_goes_on_while_payloads_are_read(tmp_path: Path) -> None:
    """Reading, checking and parsing 20 MB takes a while, but none of the loop's."""
    value = {"rows": [text(1000) for _ in range(20_000)]}
    asked = store(tmp_path).put(to_json(value))

    async def work() -> tuple[object, int]:
        task = asyncio.create_task(store(tmp_path).resolve(asked))
        turns = 0
        while not task.done():
            turns += 1
            await asyncio.sleep(0.001)
        return await task, turns

    got, turns = asyncio.run(work())
    assert got == value
    assert turns >= 3


def test_large_texts_become_references_on_an_event_loop_too(tmp_path: Path) -> None:
    """And small ones don't."""
    made = store(tmp_path)
    assert asyncio.run(made.inlined(text(INLINE_BYTES))) == text(INLINE_BYTES)
    assert asyncio.run(made.inlined(text(INLINE_BYTES + 1))) == reference(text(INLINE_BYTES + 1))
    assert files(tmp_path) == [place(tmp_path, text(INLINE_BYTES + 1))]


# --- A bucket ---


class Bucket(ThreadingHTTPServer):
    """One bucket called `bucket`, reached as S3 is; `status`: what it answers to everything, if not what it should."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.status = 0


class Requests(BaseHTTPRequestHandler):
    server: Bucket
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        """Answer HEAD, GET and PUT."""
        self.server.requests.append(self.command)
        sent = self.rfile.read(int(self.headers.get("content-length", 0)))
        found = self.server.objects.get(self.path)
        if self.server.status:
            status, body = self.server.status, b"<Error/>"
        elif not self.path.startswith("/bucket/"):
            status, body = 404, b"<Error><Code>NoSuchBucket</Code></Error>"
        elif self.command == "PUT":
            self.server.objects[self.path] = sent
            status, body = 200, b""
        else:
            status, body = (404, b"") if found is None else (200, found)
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.send_header("etag", '"1"')
        self.send_header("last-modified", "Sat, 01 Jan 2022 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET = do_PUT = answer  # noqa: N815 - the library's names

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """Serve a bucket, found as Amazon's own tools find theirs: by environment variables."""
    with Bucket() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        names = {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "REGION": "here", "ALLOW_HTTP": "true"}
        for name, value in (names | {"ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}).items():
            monkeypatch.setenv(f"AWS_{name}", value)
        yield server
        server.shutdown()


def remote(url: str = "s3://bucket/some/prefix") -> PayloadStore:
    """Return a store in a bucket."""
    return PayloadStore(Settings(payload_store=url))


def test_a_bucket_keeps_payloads_below_its_prefix(bucket: Bucket) -> None:
    """Under the same names as a folder does."""
    large = text(6_000_000)
    assert remote().put(large) == reference(large)
    assert list(bucket.objects) == [f"/bucket/some/prefix/{digest(large)[:2]}/{digest(large)[2:]}"]
    assert remote().get(digest(large)) == large


def test_a_bucket_is_asked_once(bucket: Bucket) -> None:
    """Whether it has the payload, then nothing more; whoever else stores it doesn't send it."""
    first = remote()
    for _ in range(3):
        first.put("1")
        first.get(digest("1"))
    assert bucket.requests == ["HEAD", "PUT"]
    remote().put("1")
    assert bucket.requests == ["HEAD", "PUT", "HEAD"]
    reader = remote()
    reader.get(digest("1"))
    reader.put("1")
    assert bucket.requests == ["HEAD", "PUT", "HEAD", "GET"]


def test_a_bucket_without_the_payload_is_no_broken_bucket(bucket: Bucket) -> None:
    """It is asked once: waiting doesn't help."""
    with pytest.raises(PayloadMissingError, match="is not in s3://bucket/some/prefix"):
        remote().get("0" * 64)
    assert bucket.requests == ["GET"]


@pytest.mark.parametrize("status", [401, 403])
def test_a_bucket_that_refuses_says_so(bucket: Bucket, status: int) -> None:
    """What to look at is the credentials."""
    bucket.status = status
    for how in ("put", "get"):
        with pytest.raises(PayloadStoreError, match=r"s3://bucket/some/prefix; access is refused: .*credentials"):
            use(remote(), how)


def test_a_bucket_that_does_not_exist_is_no_missing_payload(bucket: Bucket) -> None:
    """What can't be stored is told as such."""
    with pytest.raises(PayloadStoreError, match=r"can't be stored in s3://other; it can't be used: check FOLDFLOW_PAYLOAD_STORE"):
        remote("s3://other").put("1")
    assert bucket.objects == {}


def test_a_bucket_in_trouble_is_tried_again_shortly(bucket: Bucket) -> None:
    """A blip is hidden; of what lasts longer the orchestrator hears within seconds."""
    bucket.status = 503
    with pytest.raises(PayloadStoreError, match="it can't be used"):
        remote().put("1")
    assert bucket.requests == ["HEAD"] * 3


def test_nobody_at_the_address_says_so(monkeypatch: pytest.MonkeyPatch, bucket: Bucket) -> None:
    """Within seconds, with the store's name."""
    del bucket
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(PayloadStoreError, match=r"can't be stored in s3://bucket/some/prefix; it can't be used"):
        remote().put("1")


def test_a_store_that_lacks_a_setting_says_which() -> None:
    """As soon as it is needed."""
    with pytest.raises(PayloadStoreError, match=r"az://container.*Account must be specified"):
        remote("az://container/prefix").put("1")


def test_a_store_needs_no_path(bucket: Bucket) -> None:
    """A bucket alone is a place."""
    remote("s3://bucket").put("1")
    assert list(bucket.objects) == [f"/bucket/{payloads._path(digest('1'))}"]
