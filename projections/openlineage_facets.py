"""Facets of our own in OpenLineage events: what its facets have no word for. docs/openlineage-facets.json describes them."""

from typing import Final

import attr
from openlineage.client.facet_v2 import DatasetFacet, RunFacet

PRODUCER: Final = "urn:foldflow"
"""Who says it, in every event and facet. No version in it: the same decision is the same event, whatever code told it."""
FACETS: Final = "urn:foldflow:openlineage:1-0-0#/$defs/"
"""Where our own facets are described: docs/openlineage-facets.json has this name as its `$id`."""


@attr.define
class FoldflowRunRunFacet(RunFacet):
    """A run: which version of its workflow, who asked for it, and where it comes from."""

    digest: str
    requestId: str  # noqa: N815 - OpenLineage's spelling
    parentStep: str | None = None  # noqa: N815
    originRunId: str | None = None  # noqa: N815
    originSeq: int | None = None  # noqa: N815

    @staticmethod
    def _get_schema() -> str:
        return f"{FACETS}FoldflowRunRunFacet"


@attr.define
class FoldflowLedgerRunFacet(RunFacet):
    """Where the ledger says so: decision number `seq` of the run, whose hash is `decision`; `step`: by path, with numbers."""

    runId: str  # noqa: N815
    seq: int
    decision: str
    step: str | None = None
    attempt: int | None = None

    @staticmethod
    def _get_schema() -> str:
        return f"{FACETS}FoldflowLedgerRunFacet"


@attr.define
class FoldflowCallRunFacet(RunFacet):
    """What a call was made with, what it took and what it cost; tokens as in the event `Usage`, money in US dollars."""

    model: str | None = None
    provider: str | None = None
    finishReason: str | None = None  # noqa: N815
    tool: str | None = None
    toolVersion: str | None = None  # noqa: N815
    workflow: str | None = None
    signal: str | None = None
    by: str | None = None
    latencyMs: int | None = None  # noqa: N815
    inputTokens: int | None = None  # noqa: N815
    outputTokens: int | None = None  # noqa: N815
    cacheReadTokens: int | None = None  # noqa: N815
    cacheWriteTokens: int | None = None  # noqa: N815
    reasoningTokens: int | None = None  # noqa: N815
    costUsd: float | None = None  # noqa: N815
    prices: str | None = None
    paidFor: str | None = None  # noqa: N815

    @staticmethod
    def _get_schema() -> str:
        return f"{FACETS}FoldflowCallRunFacet"


@attr.define
class FoldflowFileDatasetFacet(DatasetFacet):
    """Which file or address it was in this run."""

    path: str
    at: str
    sha256: str | None = None

    @staticmethod
    def _get_schema() -> str:
        return f"{FACETS}FoldflowFileDatasetFacet"
