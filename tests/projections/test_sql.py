"""Questions in SQL about real views: what is asked is answered, and nothing else can be done with them."""

import json
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
from projection_histories import BOTH, PARTITIONS, TOPIC_IDS, logs  # type: ignore[import-not-found]

from projections import sql
from projections.database import ViewsError
from projections.sql import QueryError, answer
from projections.views import Batch, Views

FORBIDDEN = [
    # Files, the network, other databases
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_blob('/etc/passwd')",
    "SELECT * FROM read_parquet('http://127.0.0.1:1/x')",
    "SELECT * FROM read_json_auto('/etc/passwd')",
    "SELECT * FROM read_duckdb('other.duckdb')",
    "SELECT * FROM glob('/etc/*')",
    "SELECT * FROM sniff_csv('/etc/passwd')",
    "SELECT * FROM parquet_metadata('/etc/passwd')",
    "SELECT (SELECT max(content) FROM read_text('/etc/passwd'))",
    "WITH a AS (SELECT * FROM range(3), LATERAL (SELECT * FROM read_text('/etc/passwd'))) SELECT * FROM a",
    "FROM runs WHERE EXISTS (FROM glob('/etc/*'))",
    "FROM '/etc/passwd'",
    "FROM 'data.parquet'",
    "COPY runs TO '/tmp/stolen.csv'",
    "COPY (SELECT 1) TO '/tmp/stolen.parquet'",
    "EXPORT DATABASE '/tmp/stolen'",
    "IMPORT DATABASE '/tmp/stolen'",
    "ATTACH '/tmp/other.duckdb'",
    "ATTACH ':memory:' AS other",
    "DETACH views",
    "USE memory",
    "INSTALL httpfs",
    "LOAD httpfs",
    "UPDATE EXTENSIONS",
    "CREATE SECRET s (TYPE s3)",
    # What the process and the machine are like
    "SELECT getenv('HOME')",
    "SELECT current_setting('temp_directory')",
    "SELECT getvariable('x')",
    "SELECT * FROM duckdb_settings()",
    "SELECT * FROM duckdb_secrets()",
    "SELECT * FROM duckdb_extensions()",
    "SELECT * FROM duckdb_databases()",
    "FROM duckdb_databases",
    "SHOW DATABASES",
    "SHOW SETTINGS",
    "FROM pragma_database_list",
    "FROM system.main.duckdb_columns",
    "FROM pg_catalog.pg_settings",
    # Settings
    "SET memory_limit = '100GB'",
    "SET GLOBAL enable_external_access = true",
    "RESET memory_limit",
    "SET VARIABLE x = 1",
    "PRAGMA threads = 100",
    "PRAGMA database_list",
    "CALL enable_logging()",
    "SELECT * FROM enable_logging()",
    # Changes
    "INSERT INTO runs SELECT * FROM runs",
    "UPDATE runs SET status = 'completed'",
    "DELETE FROM runs",
    "TRUNCATE runs",
    "MERGE INTO runs USING runs r ON true WHEN MATCHED THEN DELETE",
    "WITH gone AS (DELETE FROM runs RETURNING *) SELECT * FROM gone",
    "CREATE TABLE mine (a INTEGER)",
    "CREATE TEMP TABLE mine AS SELECT 1",
    "CREATE OR REPLACE TEMP VIEW runs AS SELECT 1",
    "CREATE MACRO lower(x) AS x",
    "DROP TABLE runs",
    "ALTER TABLE runs ADD COLUMN mine INTEGER",
    "COMMENT ON TABLE runs IS 'mine'",
    "VACUUM",
    "CHECKPOINT",
    "SELECT * FROM checkpoint()",
    "SELECT * FROM force_checkpoint()",
    # Statements that bring others in
    "SELECT 1; DELETE FROM runs",
    "SELECT 1; SELECT 2",
    "BEGIN",
    "COMMIT",
    "PREPARE p AS DELETE FROM runs",
    "EXECUTE p",
    "EXPLAIN ANALYZE DELETE FROM runs",
    "SELECT * FROM query('SELECT * FROM read_text(''/etc/passwd'')')",
    "SELECT * FROM query_table('runs')",
    "SELECT * FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))",
    "",
    "-- nothing",
]
ONLY_THE_FIRST_FENCE = [
    "SELECT * FROM arrow_scan(1, 2, 3)",
    "SELECT * FROM arrow_scan_dumb(1, 2, 3)",
    "SELECT * FROM python_arrow_scan(1)",
    "SELECT * FROM pandas_scan(1)",
    "SELECT * FROM python_map_function(1, 2)",
    "SELECT * FROM seq_scan(1)",
    "SELECT finalize('x'::blob)",
    "SELECT __internal_decompress_string('x')",
    "SELECT * FROM enable_profiling()",
    "ROLLBACK; DELETE FROM runs",
    "COMMIT; DROP TABLE runs",
]
"""What takes addresses in memory, or leaves the transaction."""
TOO_MUCH = [
    "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT count(*) FROM r",
    "SELECT count(*) FROM range(100000000000) a, range(100000000000) b",
    "SELECT range(1000000000)",
    "SELECT [x FOR x IN range(1000000000)]",
    "SELECT repeat('x', 3000000000)",
    "WITH RECURSIVE r(s) AS (SELECT 'x' UNION ALL SELECT s || s FROM r) SELECT max(length(s)) FROM r",
]


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Views]:
    """Give views of runs that the real core decided."""
    found = Views(tmp_path_factory.mktemp("sql") / "views.duckdb", TOPIC_IDS, PARTITIONS)
    found.apply(Batch(decisions=logs(5, 12, 0.3, BOTH).records()))
    yield found
    found.close()


def ask(views: Views, query: str, most: int = 1000, seconds: float = 10) -> list[dict[str, Any]]:
    """Answer a question as the API does."""
    with views.snapshot() as (db, _), answer(db, query, most, seconds=seconds).lines as lines:
        return [json.loads(line) for line in lines]


def test_a_question_is_answered_with_the_rows_that_the_views_hold(views: Views) -> None:
    """Given views of decided runs; when asked by joins, sub-queries and windows; then the answer is what their rows say."""
    with views.snapshot() as (db, _):
        expected = db.execute("SELECT run_id, count(*) FROM decisions GROUP BY 1 ORDER BY 1").fetchall()
    found = ask(views, "SELECT r.run_id, count(*) AS n FROM runs r JOIN decisions d USING (run_id) GROUP BY 1 ORDER BY 1")
    assert [(each["run_id"], each["n"]) for each in found] == expected
    assert len(found) > 5
    assert ask(views, "FROM (SELECT run_id, row_number() OVER (ORDER BY run_id) AS n FROM runs) WHERE n = 1")[0]["n"] == 1
    names = {each["name"] for each in ask(views, "SHOW TABLES")}
    assert {"runs", "steps", "decisions"} <= names
    assert {each["column_name"] for each in ask(views, "DESCRIBE runs")} >= {"run_id", "status"}
    assert ask(views, "SELECT unnest(effects) AS effect, count(*) AS n FROM decisions GROUP BY 1 ORDER BY 2 DESC LIMIT 1")


def test_values_of_every_kind_are_json(views: Views) -> None:
    """Given values of all kinds; when asked for; then times are UTC, bytes hexadecimal, and nothing is no JSON."""
    found = ask(
        views,
        "SELECT 'NaN'::DOUBLE AS nan, 1.5::DECIMAL(9, 2) AS money, 2::HUGEINT * 9000000000000000000 AS huge, 'a'::BLOB AS bytes, "
        "TIMESTAMP_MS '2026-01-02 03:04:05.678' AS at, TIMESTAMPTZ '2026-01-02 03:04:05+01' AS zoned, DATE '2026-01-02' AS day, "
        "MAP {'k': [1, 2]} AS map, {'a': NULL, 'b': true} AS struct, 1 AS twice, 2 AS twice, INTERVAL 1 DAY AS span",
    )
    assert found[0] == {
        "nan": "nan",
        "money": 1.5,
        "huge": 18000000000000000000,
        "bytes": "61",
        "at": "2026-01-02T03:04:05.678Z",
        "zoned": "2026-01-02T02:04:05.000Z",
        "day": "2026-01-02",
        "map": {"k": [1, 2]},
        "struct": {"a": None, "b": True},
        "twice": 1,
        "twice_2": 2,
        "span": "1 day, 0:00:00",
    }


@pytest.mark.parametrize("query", FORBIDDEN + ONLY_THE_FIRST_FENCE)
def test_what_is_no_question_is_refused(views: Views, query: str) -> None:
    """Given a statement that reads files, changes or tells what it must not; when asked; then it is refused with a reason."""
    with pytest.raises(QueryError) as caught:
        ask(views, query)
    assert caught.value.kind in ("refused", "wrong")
    assert str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("query", FORBIDDEN)
def test_a_statement_that_the_first_fence_lets_through_changes_nothing(
    views: Views, query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given no check of statements; when anything is asked; then the rows stay, and no file is read or written."""
    monkeypatch.setattr(sql, "check", lambda _db, _query: None)
    before = ask(views, "SELECT count(*) AS n, count(DISTINCT status) AS m FROM runs")
    try:
        rows = ask(views, query)
    except (QueryError, ViewsError, duckdb.Error):
        rows = []
    views.trouble = None
    assert "root:" not in json.dumps(rows)
    assert not Path("/tmp/stolen.csv").exists()  # noqa: S108
    assert ask(views, "SELECT count(*) AS n, count(DISTINCT status) AS m FROM runs") == before


@pytest.mark.parametrize("query", TOO_MUCH)
def test_a_question_that_takes_too_much_ends_and_the_next_is_answered(views: Views, query: str) -> None:
    """Given a question without end, or of gigabytes; when asked; then it ends in time with bounded memory, and others go on."""
    before, limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, resource.getrlimit(resource.RLIMIT_DATA)
    began = time.process_time()
    with pytest.raises(QueryError) as caught:
        ask(views, query, seconds=0.3)
    assert caught.value.kind == "too-much"
    assert time.process_time() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_300_000  # KB
    assert resource.getrlimit(resource.RLIMIT_DATA) == limit
    assert ask(views, "SELECT count(*) AS n FROM runs")[0]["n"] > 5


def test_rows_beyond_the_limit_are_left_out_and_that_is_said(views: Views) -> None:
    """Given more rows than asked for; when asked; then as many come, and the answer says that it isn't complete."""
    for rows, most, complete in ((10, 10, True), (11, 10, False), (0, 10, True), (5000, 2500, False), (2500, 2500, True)):
        with views.snapshot() as (db, _):
            found = answer(db, f"FROM range({rows}) t(i) ORDER BY i", most)
        with found.lines as lines:
            assert [json.loads(line)["i"] for line in lines] == list(range(min(rows, most)))
        assert (found.rows, found.complete, found.columns) == (min(rows, most), complete, [("i", "BIGINT")])


def test_an_answer_that_is_read_slowly_holds_nothing(views: Views) -> None:
    """Given an answer that nobody has read; when its snapshot is left; then it can still be read, and no reader is open."""
    with views.snapshot() as (db, _):
        found = answer(db, "SELECT i, repeat('x', 100) AS s FROM range(100000) t(i)", 100_000)
    assert not views._open
    with found.lines as lines:
        assert sum(1 for _ in lines) == 100_000


def test_mistakes_are_told_as_duckdb_tells_them(views: Views) -> None:
    """Given a misspelt column, table, or syntax; when asked; then the answer says what is wrong."""
    for query, said in (
        ("SELECT runid FROM runs", "run_id"),
        ("SELECT * FROM run", "runs"),
        ("SELEC 1", "syntax error"),
        ("SELECT 'a'::INTEGER", "Could not convert"),
        ("SELECT * FROM runs WHERE run_id = $1", "parameter"),
    ):
        with pytest.raises(QueryError, match=said) as caught:
            ask(views, query)
        assert caught.value.kind == "wrong"


def test_one_question_is_answered_at_a_time(views: Views, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a question under way; when another one comes; then it waits for a while and is then told to come again."""
    monkeypatch.setattr(sql, "_WAIT_S", 0.05)
    under_way, done = threading.Event(), threading.Event()

    def hold() -> None:
        with sql._one_at_a_time:
            under_way.set()
            done.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    under_way.wait(10)
    with pytest.raises(QueryError) as caught:
        ask(views, "SELECT 1")
    done.set()
    holder.join()
    assert caught.value.kind == "busy"
    assert ask(views, "SELECT 1 AS n") == [{"n": 1}]


def test_a_file_that_nobody_holds_is_asked_as_it_lies(tmp_path: Path) -> None:
    """Given the file of views whose process was ended; when opened; then it answers, can't be changed, and a held one is told."""
    path = tmp_path / "views.duckdb"
    held = Views(path, TOPIC_IDS, PARTITIONS)
    held.apply(Batch(decisions=logs(6, 4, 0.0, BOTH).records()))
    held.close()
    with sql.opened(path) as db, answer(db, "SELECT count(*) AS n FROM runs", 10).lines as lines:
        assert json.loads(lines.read())["n"] >= 4
    with sql.opened(path) as db, pytest.raises(QueryError):
        answer(db, "DELETE FROM runs", 10)
    with pytest.raises(FileNotFoundError), sql.opened(tmp_path / "none.duckdb"):
        pass
