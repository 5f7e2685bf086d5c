"""Breaks everything while runs are under way, and then looks whether anything was lost.

    make chaos                                                   # 10 minutes, 10,000 runs, 62 kills
    python tests/chaos/chaos.py --seconds 90 --runs 1500 --kills 12 --seed 7

1. Everything is started, each process for itself: Kafka, the model, the roles, the API; and a witness outside of Foldflow.
2. A steady load of six workflows begins, and a schedule of kills, stops, terminations and new processes, both from the seed.
3. When both are over, everything is started again, and all runs must end.
4. A checker that reads the topics alone says whether what must hold of every history holds, and the witness bears it out.

Exit code 0: everything holds; 1: something doesn't, see the end of the output; the folder stays then.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import report as reports  # noqa: E402
import schedule  # noqa: E402
from farm import Farm  # noqa: E402
from ledger_watch import LedgerWatch  # noqa: E402
from load import Load  # noqa: E402
from ports import free_port, free_ports  # noqa: E402
from processes import views_behind  # noqa: E402
from report import Report  # noqa: E402
from schedule import Disruption  # noqa: E402
from sending import Sender  # noqa: E402

from events import topics  # noqa: E402
from events.decisions import Effect  # noqa: E402
from streams import kafka  # noqa: E402
from streams.settings import Settings  # noqa: E402

SESSION_TIMEOUT_S: Final = 6.0
RECOVERY_S: Final = 10.0
"""What a recovery may take beyond the session time-out before it is remarked."""
END_PATIENCE_S: Final = 120.0
"""How long nothing may happen at the end before the runs that are open count as stuck; attempts have 60 s."""


@dataclass(frozen=True)
class Options:
    """What is asked for; see `--help`."""

    seconds: float = 600.0
    runs: int = 10_000
    kills: int = 62
    seed: int = 1
    brokers: int = 1
    folder: Path | None = None
    keep: bool = False

    @property
    def command(self) -> str:
        """What does the same again."""
        numbers = (
            f"--seconds {self.seconds:g} --runs {self.runs} --kills {self.kills} --seed {self.seed} --brokers {self.brokers}"
        )
        return f"python tests/chaos/chaos.py {numbers}"


class Chaos:
    """One chaos run in a folder."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options, self.folder, self.report = options, folder, Report()
        self.load = Load(options.seed, options.runs, options.seconds)
        self.plan = schedule.plan(options.seed, options.seconds, options.kills, SESSION_TIMEOUT_S, options.brokers)
        self.settings = _settings(folder, options.brokers)
        self.in_flight: Counter[str] = Counter()

    def run(self) -> Report:
        """Do it all. Whatever it started has ended when this returns."""
        began = time.monotonic()
        with self._witness() as witness, self._farm(witness) as self.farm:
            self._begin()
            load_s = self._break_everything()
            self._wait_for_the_end()
            self._settle(time.monotonic() - began, load_s)
            self._check()
        return self.report

    # --- 1. Everything is started ---

    @contextmanager
    def _witness(self) -> Iterator[str]:
        """Run the witness, and give its address."""
        command = [sys.executable, str(HERE / "witness.py"), "--file", str(self.folder / "witness.jsonl")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
            assert process.stdout is not None
            try:
                yield f"http://127.0.0.1:{int(process.stdout.readline())}/"
            finally:
                process.terminate()

    @contextmanager
    def _farm(self, witness: str) -> Iterator[Farm]:
        farm = Farm(self.settings, self.folder, self.options.brokers, witness)
        try:
            yield farm
        finally:
            farm.down()

    def _begin(self) -> None:
        self._say("starting everything")
        self.farm.supervisor.up(frozenset({"model"}))
        self.farm.start("kafka")
        cluster = kafka.connect(self.settings)
        self.farm.start("intake", "orchestrator", "tool", "llm", "api")
        self.sender = Sender(self.settings, cluster.ids[topics.REQUESTS.name], self.folder / "requests.jsonl")
        self.watch = LedgerWatch(self.settings, cluster.partitions[topics.DECISIONS.name], self._hear)
        self.watch.start()

    def _hear(self, run: str, effect: Effect) -> None:
        for answer in self.load.answers(run, effect):
            self.sender.answer(answer)

    # --- 2. The load begins, and so does the breaking ---

    def _break_everything(self) -> float:
        """Follow the schedule while the load is produced; return how many seconds the load took."""
        self._say(f"{self.options.runs} runs in {self.options.seconds:g} s, {len(self.plan)} disruptions")
        began, self.began_ms = time.monotonic(), time.time_ns() // 1_000_000
        self.sender.start(self.load.messages)
        at_work: list[threading.Thread] = []
        ahead, told = list(self.plan), began
        while ahead or not self.sender.counts["all_sent"] or any(thread.is_alive() for thread in at_work):
            now = time.monotonic()
            while ahead and ahead[0].at_s <= now - began:
                at_work.append(threading.Thread(target=self._disrupt, args=(ahead.pop(0), began), daemon=True))
                at_work[-1].start()
            if now - told > 10:
                told = now
                self._say(f"{now - began:.0f} s: {self._standing()}")
            self._look()
            time.sleep(0.1)
        return time.monotonic() - began

    def _disrupt(self, what: Disruption, began: float) -> None:
        self._say(f"{time.monotonic() - began:.0f} s: {what.kind} {what.name} ({what.for_s} s)")
        if what.kind == "kill" and what.role in {"tool", "llm"}:
            self.in_flight[what.role] += Counter(list(self.watch.calls_open.values()))[what.role]
        self.farm.disrupt(what)

    def _look(self) -> None:
        before = len(self.farm.deaths)
        self.farm.watch()
        for death in self.farm.deaths[before:]:
            self._say(f"{death.name}: {death.what}")
        for failure in (self.watch.failure, self.sender.failure):
            if failure is not None:
                raise failure

    # --- 3. Everything is started again, and all must end ---

    def _wait_for_the_end(self) -> None:
        self._say("all is sent and broken; waiting for the runs to end")
        self.farm.restore()
        seen, since = -1, time.monotonic()
        while not self._all_ended() and time.monotonic() - since < END_PATIENCE_S:
            self._look()
            if self.watch.verdicts["accepted"] != seen:
                seen, since = self.watch.verdicts["accepted"], time.monotonic()
            time.sleep(0.2)
        self.sender.stop()

    def _all_ended(self) -> bool:
        asked = list(self.sender.asked)
        return all((run := self.watch.runs.get(name)) and run.outcome for name in asked) and not self.watch.open_runs()

    def _settle(self, seconds: float, load_s: float) -> None:
        """Let the views catch up, end all but Kafka in order, and count."""
        self._say(f"{self._standing()}; ending all but Kafka")
        self._wait_for_views()
        self.farm.stop("intake", "orchestrator", "tool", "llm", "api")
        self.watch.stop()
        reports.load_figures(self.report, self.sender, self.watch, seconds, load_s)
        reports.ledger_figures(self.report, self.watch, self.folder / "witness.jsonl")
        reports.fault_figures(self.report, self.farm, self.in_flight)
        span = (self.began_ms + round(1000 * schedule.WARM_UP_S), self.began_ms + round(1000 * self.options.seconds))
        limit_ms = round(1000 * (SESSION_TIMEOUT_S + RECOVERY_S))
        reports.standstill_figures(self.report, self.watch, span, limit_ms, self.folder / "disruptions.jsonl")
        reports.dead_letters(self.report, self.settings)
        reports.log_remarks(self.report, self.folder)

    def _wait_for_views(self) -> None:
        deadline = time.monotonic() + 60
        lag: int | Exception = -1
        while time.monotonic() < deadline:
            try:
                lag = views_behind(self.settings)
            except (OSError, kafka.KafkaUnreachableError) as error:
                lag = error
            if lag == 0:
                return
            time.sleep(0.2)
        self.report.violations.append(f"the views did not catch up within 60 s: {lag}")

    # --- 4. The checker reads the topics ---

    def _check(self) -> None:
        command = [sys.executable, str(HERE / "checker.py"), "--json", "--folder", str(self.folder)]
        command += ["--bootstrap-servers", self.settings.bootstrap_servers, "--topic-prefix", self.settings.topic_prefix]
        command += ["--views", str(self.settings.data_dir / "views.duckdb")]
        self._say("checking the topics")
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parents[1])
        _, brace, rest = f"\n{done.stdout}".partition("\n{")  # what the projector logs comes first
        try:
            reports.checked(self.report, json.loads(brace + rest))
        except ValueError:
            self.report.violations.append(f"the checker ended with exit code {done.returncode}: {done.stderr[-2000:]}")
        (self.folder / "checker.json").write_text(done.stdout)

    def _standing(self) -> str:
        ended = sum(run.outcome is not None for run in list(self.watch.runs.values()))
        deaths = f", {len(self.farm.deaths)} DEATHS" if self.farm.deaths else ""
        return f"{len(self.sender.asked)} asked for, {ended} ended, {len(self.watch.open_runs())} open{deaths}"

    @staticmethod
    def _say(what: str) -> None:
        sys.stderr.write(f"chaos: {what}\n")


def _settings(folder: Path, brokers: int) -> Settings:
    return Settings(
        bootstrap_servers=",".join(f"127.0.0.1:{port}" for port in free_ports(brokers)),
        replication_factor=3 if brokers >= 3 else 1,
        topic_prefix="chaos.",
        session_timeout_ms=round(1000 * SESSION_TIMEOUT_S),
        idle_after_s=2.0,  # runs that wait leave memory within the run, and come back
        data_dir=folder / "data",
        model="local/smollm2",
        local_model_url=f"http://127.0.0.1:{free_port()}",
        api_host="127.0.0.1",
        api_port=free_port(),
        tool_paths=(HERE / "chaos_tools.py",),
        workflow_paths=(HERE / "workflows",),
    )


def run(options: Options) -> Report:
    """Do a chaos run and return what it found; its folder is deleted if everything holds, unless it is to be kept."""
    folder = options.folder or Path(tempfile.mkdtemp(prefix="foldflow-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    report = Chaos(options, folder).run()
    (folder / "report.json").write_text(
        json.dumps({"figures": report.figures, "violations": report.violations, "remarks": report.remarks})
    )
    if report.holds and not options.keep and options.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        sys.stderr.write(f"chaos: everything about it is in {folder}\n")
    return report


def main() -> int:
    """Run, print the figures, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=Options.seconds, help="how long the load and the breaking last")
    parser.add_argument("--runs", type=int, default=Options.runs)
    parser.add_argument("--kills", type=int, default=Options.kills, help="a third as many of each other kind come on top")
    parser.add_argument("--seed", type=int, default=Options.seed, help="the same seed is the same load and the same schedule")
    parser.add_argument("--brokers", type=int, choices=(1, 3), default=Options.brokers)
    parser.add_argument("--folder", type=Path, help="where everything is kept; a temporary one without it")
    parser.add_argument("--keep", action="store_true", help="keep the temporary folder even if everything holds")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    given = vars(parser.parse_args())
    as_json = given.pop("json")
    options = Options(**given)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    sys.stderr.write(f"chaos: seed {options.seed}\n")
    report = run(options)
    said = {"holds": report.holds, "figures": report.figures, "violations": report.violations, "remarks": report.remarks}
    sys.stdout.write((json.dumps(said) if as_json else report.markdown()) + "\n")
    if report.remarks:
        sys.stderr.write(f"\nRemarks:\n{reports.lines(report.remarks)}\n")
    if not report.holds:
        sys.stderr.write(f"\nVIOLATIONS ({len(report.violations)}):\n{reports.lines(report.violations)}\n")
        sys.stderr.write(f"\nThe same again: {options.command}\n")
    return 0 if report.holds else 1


if __name__ == "__main__":
    sys.exit(main())
