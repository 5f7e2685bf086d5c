"""Which OpenLineage datasets a run's steps read and write: the nodes of data lineage, by the names that OpenLineage gives them.

    input of a run             NAMESPACE  market-analysis.input
    output of a run            NAMESPACE  market-analysis.output
    output of a step           NAMESPACE  market-analysis.fetch.output, market-analysis.check[].ask.output
    output of a step `run: w`  NAMESPACE  w.output: it is that run's output; what the step gives it is w.input
    file, address              file /data/prices.csv, s3://bucket prices.csv, https://example.org /prices.csv

Names are those of the definition, so all runs of a workflow, and all items of a list, share their datasets: a dataset is what
recurs. Which step reads what is read off the expressions, as `lineage_data` does it, and as far as the run has come.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Final
from urllib.parse import urlsplit

from openlineage.client.event_v2 import InputDataset, OutputDataset
from openlineage.client.facet_v2 import DatasetFacet, column_lineage_dataset, dataset_version_dataset

from projections.lineage_data import DataOfRun, Definition
from projections.lineage_files import File, files
from projections.lineage_graph import FEEDS, Edge, node_id, path_of
from projections.openlineage_facets import PRODUCER, FoldflowFileDatasetFacet
from streams.workflow.plan import Place
from streams.workflow.references import of_value
from streams.workflow.spec import ChildRun
from streams.workflow.state import StepStatus

RUN_FOLDER: Final = "{run}"
"""Stands for the run's id in the name of a file in the run's own folder: a name that no other run has would say nothing."""
_LARGEST_OUTPUT: Final = 300_000
_COMPUTED: Final = ("transform", "output")
"""Uses whose value is the output itself, so that a key of it is a column."""


class Flow(DataOfRun):
    """The data lineage of a run as far as it was told, decision by decision; the steps of a list are one, `check[]`.

    It asks no database: what `DataOfRun` reads from the views is what `saw` was told.
    """

    def __init__(self, run_id: str, workflow: str, known: Definition | None) -> None:
        self.run_id, self.known, self._workflow = run_id, known, workflow
        self._paths: dict[str, dict[str, Any]] = {}
        self._many = False

    def saw(self, path: str, status: StepStatus | None = None, source: str | None = None) -> None:
        """Take that something was decided about a step; `status`: that it is settled; `source`: whose output it has."""
        row = self._paths.setdefault(self.folded(path), {"statuses": {}, "source": None})
        if status is not None:
            row["statuses"][status.value] = 1
        row["source"] = source or row["source"]

    def read(self, path: str) -> list[Edge]:
        """Return what feeds a step that is under way."""
        if self.known is None:
            return []
        before = self._paths.get(path, {"source": None})
        row = {"path": path, "statuses": {"running": 1}, "times": 1, "child_run_id": None, "source": before["source"]}
        return self._feeding(self._of_step(self.known.plan, row))

    def read_by_output(self) -> list[Edge]:
        """Return what feeds the run's output."""
        if self.known is None:
            return []
        spec, result = self.known.spec, node_id("output", self.run_id)
        written = spec.output if spec.output is not None else f"=steps.{spec.steps[-1].name}.output"
        found = []
        for ref in of_value("output", written):
            if ref.step is not None and ref.step in self._paths and self._has(self._id(ref.step), ref.of):
                found.append(Edge(self._id(ref.step), result, FEEDS, ref.of, ref.into))
            elif ref.root == "input":
                found.append(Edge(node_id("input", self.run_id), result, FEEDS, ref.of, ref.into))
        return self._feeding(found)

    def _feeding(self, edges: Iterable[Edge]) -> list[Edge]:
        """Return the edges that carry data of a dataset: how a step ended, or why it failed, is none."""
        return [
            edge
            for edge in edges
            if edge.kind == FEEDS and (path_of(edge.source) is None or edge.of.startswith("output") or not edge.of)
        ]

    def source_of(self, edge: Edge) -> str:
        """Return the name of the dataset that an edge comes from."""
        path = path_of(edge.source)
        return f"{self._workflow}.input" if path is None else self.output_of(path)

    def output_of(self, path: str) -> str:
        """Return the name of the dataset that a step's output is."""
        child = self._child(path)
        return f"{self._workflow}.{path}.output" if child is None or child.detached else f"{child.workflow}.output"

    def written(self, path: str) -> str:
        """Return the name of the dataset that a step writes: its output, or the input of the run that it starts."""
        child = self._child(path)
        return self.output_of(path) if child is None else f"{child.workflow}.input"

    def _child(self, path: str) -> ChildRun | None:
        place = self._place(path)
        return None if place is None or place.repeats else place.plan.step.run

    def _place(self, path: str) -> Place | None:
        return None if self.known is None else self.known.plan.place(path.replace("[]", "[0]"))

    def kind(self, path: str) -> str:
        """Return a step's kind as the definition says it, "" if that isn't known."""
        place = self._place(path)
        return "" if place is None else place.plan.kind


def inputs(namespace: str, flow: Flow, edges: Iterable[Edge]) -> list[InputDataset]:
    """Return the datasets that edges come from, each once."""
    return [InputDataset(namespace, name) for name in dict.fromkeys(map(flow.source_of, edges))]


def output(namespace: str, name: str, flow: Flow, edges: Iterable[Edge]) -> OutputDataset:
    """Return the dataset of an output, with the columns that its expressions make of others' columns, and of nothing else."""
    fields: dict[str, dict[tuple[str, str], None]] = {}
    for edge in edges:
        root, _, key = edge.into.partition(".")
        if root in _COMPUTED and (column := _column(key)):
            of = edge.of.removeprefix("output").lstrip(".") if path_of(edge.source) else edge.of
            fields.setdefault(column, {})[flow.source_of(edge), _column(of)] = None
    lineage = {
        column: column_lineage_dataset.Fields([column_lineage_dataset.InputField(namespace, *each) for each in sources])
        for column, sources in fields.items()
        if all(of for _, of in sources)
    }
    facets: dict[str, DatasetFacet] = {}
    if lineage:
        facets["columnLineage"] = column_lineage_dataset.ColumnLineageDatasetFacet(lineage, producer=PRODUCER)
    return OutputDataset(namespace, name, facets=facets)


def _column(keys: str) -> str:
    return keys.partition(".")[0].partition("[")[0]


# --- Files ---


def read_and_written(said: str, run_id: str) -> tuple[list[InputDataset], list[OutputDataset]]:
    """Return the files that a tool's output (JSON) says it has read, and those that it has written."""
    found = files(said, run_id) if len(said) < _LARGEST_OUTPUT and ("sha256" in said or run_id in said) else []
    return (
        [InputDataset(*_named(each, run_id), facets=_facets(each)) for each in _once(found, run_id, written=False)],
        [OutputDataset(*_named(each, run_id), facets=_facets(each)) for each in _once(found, run_id, written=True)],
    )


def _once(found: Iterable[File], run_id: str, *, written: bool) -> Iterator[File]:
    named = {_named(each, run_id): each for each in found if each.written is written}
    yield from named.values()


def _facets(file: File) -> dict[str, DatasetFacet]:
    facets: dict[str, DatasetFacet] = {
        "foldflow_file": FoldflowFileDatasetFacet(_shown(file.path), file.at, file.sha256, producer=PRODUCER)
    }
    if file.sha256 is not None:
        version = f"sha256:{file.sha256}"
        facets["version"] = dataset_version_dataset.DatasetVersionDatasetFacet(version, producer=PRODUCER)
    return facets


def _named(file: File, run_id: str) -> tuple[str, str]:
    """Return a file's namespace and name, as OpenLineage's naming wants them."""
    path = file.path.replace(f"/{run_id}/", f"/{RUN_FOLDER}/")
    try:
        found = urlsplit(path)
    except ValueError:  # no address, though it looks like one
        return "file", path
    if len(found.scheme) < 2:  # noqa: PLR2004 - none, or a drive's letter
        return "file", path
    if found.scheme == "file":
        return f"file://{found.netloc}" if found.netloc else "file", found.path or path
    host = found.netloc if found.scheme == "abfss" else found.netloc.rpartition("@")[2]
    is_web = found.scheme in ("http", "https")
    return f"{found.scheme}://{host}", (found.path or "/") if is_web else found.path.lstrip("/") or path


def _shown(path: str) -> str:
    """Return a path or address without what may be secret in it: a password, and what signs an address."""
    try:
        found = urlsplit(path)
    except ValueError:
        return path
    if not found.netloc or found.scheme == "abfss":
        return path
    return found._replace(netloc=found.netloc.rpartition("@")[2], query="", fragment="").geturl()


__all__ = ["Flow", "inputs", "output", "read_and_written"]
