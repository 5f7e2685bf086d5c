"""What the API answers as an audit report. Its shape and its words are `projections/audit_document.py`'s."""

from pydantic import RootModel

from projections.audit_document import Report


class AuditReport(RootModel[Report]):
    """The audit report of one run. `version` grows when a reader of it would have to change."""
