"""What Schemathesis checks besides its own: a request that fits the document is never refused for its form.

It may be refused for what it means, with 400 or 422: no JSON Schema says which workflows there are, or what a cursor looks like.
"""

from typing import Any

import schemathesis


@schemathesis.check
def refused_for_its_meaning_only(_context: Any, response: Any, case: Any) -> None:
    """Given a request that the document allows, no answer says that it isn't valid."""
    if case.meta is not None and case.meta.generation.mode.is_positive and response.status_code in {400, 422}:
        assert response.json()["type"] not in {"urn:foldflow:invalid-request", "about:blank"}
