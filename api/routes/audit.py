"""The audit report of a run, as JSON and as a page."""

from typing import Any, Final

from fastapi import APIRouter, Response

from api.models_audit import AuditReport
from api.routes.runs import RunId, the_run
from api.views import TheProjector, TheViewBesideTheLog, View
from projections.audit import report
from projections.audit_check import ledger_of
from projections.audit_document import Report
from projections.audit_page import POLICY, page
from projections.picture import picture
from projections.projector import Projector

router = APIRouter(tags=["runs"])

VERDICT: Final = "Foldflow-Integrity"
_HEADERS: Final = {
    VERDICT: {"description": "Whether the record is `intact`, `partly` checked or `damaged`.", "schema": {"type": "string"}}
}
_PAGE: Final = {"schema": {"type": "string"}, "example": "<!doctype html><title>Audit report</title>…"}


@router.get("/runs/{run_id}/audit", responses={200: {"headers": _HEADERS}})
def show_report(view: TheViewBesideTheLog, projector: TheProjector, run_id: RunId, response: Response) -> AuditReport:
    """Report on a run: who asked what, each step, who decided, prompts, data, cost, and whether the record is intact.

    The run's decisions are read again from the log for it, checked, and decided again: a run of many items takes seconds. Lists
    and texts that are long are shortened, and say so. For auditors.
    """
    made, _ = _report(view, projector, run_id)
    response.headers[VERDICT] = made.integrity.verdict
    return AuditReport(made)


@router.get(
    "/runs/{run_id}/audit.html",
    response_class=Response,
    responses={200: {"description": "The page.", "headers": _HEADERS, "content": {"text/html": _PAGE}}},
)
def show_page(view: TheViewBesideTheLog, projector: TheProjector, run_id: RunId) -> Response:
    """Report on a run as a page for people who know nothing of the system: one file, without scripts, to be kept and printed.

    For auditors.
    """
    made, row = _report(view, projector, run_id)
    headers = {VERDICT: made.integrity.verdict, "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
    return Response(page(made, picture(view.db, row)), media_type="text/html", headers=headers)


def _report(view: View, projector: Projector, run_id: str) -> tuple[Report, dict[str, Any]]:
    """Return the report on a run, and its row of `runs`."""
    row = the_run(view, run_id)
    return report(view.db, row, ledger_of(projector.settings, row)), row
