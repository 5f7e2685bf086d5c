"""A projector that is killed in the middle of its work goes on as if nothing had happened."""

import pickle
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from projection_histories import PARTITIONS, TOPIC_IDS, logs  # type: ignore[import-not-found]

from projections import database
from projections.ledger import Record
from projections.views import Batch, Views

WORKER = """
import pickle, sys
from pathlib import Path
from projections.views import Batch, Views
path, ids, partitions, records = pickle.loads(Path(sys.argv[1]).read_bytes())
views = Views(path, ids, partitions)
left = [record for record in records if record.offset >= views.positions.get(("decisions", record.partition), 0)]
for start in range(0, len(left), 7):
    views.apply(Batch(left[start : start + 7]))
    print(flush=True)
"""


def rows_of(views: Views) -> dict[str, list[str]]:
    """Return the rows of all tables."""
    with views.snapshot() as (db, _):
        return {table.name: sorted(map(repr, db.table(table.name).fetchall())) for table in database.TABLES}


@pytest.mark.thorough
def test_killed_again_and_again_it_ends_with_the_same_rows(tmp_path: Path) -> None:
    """SIGKILL at any moment, also during a commit: no batch is lost, none is taken twice."""
    records: list[Record] = logs(1, 20, 0.2).records()
    with tempfile.TemporaryDirectory() as folder:
        whole = Views(Path(folder) / "v", TOPIC_IDS, PARTITIONS)
        whole.apply(Batch(records))
        expected = rows_of(whole)
        whole.close()
    task = tmp_path / "task"
    task.write_bytes(pickle.dumps((tmp_path / "v", TOPIC_IDS, PARTITIONS, records)))
    kills = 0
    while True:
        with subprocess.Popen(
            [sys.executable, "-c", WORKER, task], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
        ) as worker:
            assert worker.stdout
            for _ in range(8):
                worker.stdout.readline()
            time.sleep(0.002 * kills)  # a moment of its own for each kill; nothing waits for it
            worker.send_signal(signal.SIGKILL)
        if worker.returncode == 0:
            break
        kills += 1
    assert kills > 5
    views = Views(tmp_path / "v", TOPIC_IDS, PARTITIONS)
    assert rows_of(views) == expected
    views.close()
