"""The OpenAPI document of the API and of the gateway."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from api import models
from api.app import create
from api.examples import EXAMPLES
from api.models_audit import AuditReport
from api.times import point
from infra.gateway import app as gateway
from projections.feed import Place
from streams.settings import Settings


@pytest.fixture(params=["api", "gateway"])
def document(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Return the document of one of the two."""
    settings = Settings(data_dir=tmp_path)
    made = create(settings) if request.param == "api" else gateway.create(settings)
    return made.openapi()


def test_every_operation_is_described(document: dict[str, Any]) -> None:
    """Each has a summary that is a sentence, a description, a tag that is described, problems, and an example of its answer."""
    described = {tag["name"] for tag in document["tags"] if tag["description"]}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert operation["summary"]
            assert " " in operation["summary"], path
            assert operation["description"], path
            assert set(operation["tags"]) <= described, path
            assert {"4XX", "5XX"} <= operation["responses"].keys(), path
            for status, answer in operation["responses"].items():
                for kind, content in answer.get("content", {}).items():
                    assert content.get("example"), (path, status, kind)
            assert all(each.get("description") or each["schema"].get("examples") for each in operation.get("parameters", ())), (
                path
            )


def test_every_model_has_an_example_that_is_one() -> None:
    """Each answer of `api.models`, and each model of the gateway, has an example, which it takes."""
    ours = dict(EXAMPLES)
    report = ours.pop(AuditReport.__name__)
    assert AuditReport.model_validate(report).model_dump(mode="json") == report
    for source, examples in ((models, ours), (gateway, gateway.EXAMPLES)):
        kinds = {name: kind for name, kind in vars(source).items() if isinstance(kind, type) and issubclass(kind, BaseModel)}
        assert kinds.keys() - {"Answer", "Accepted", "BaseModel", "Settings"} == examples.keys()
        for name, example in examples.items():
            assert kinds[name].model_validate(example)


def test_the_example_of_a_stream_is_one(tmp_path: Path) -> None:
    """Its events are as clients of Server-Sent Events read them: where it is, then a decision."""
    answer = create(Settings(data_dir=tmp_path)).openapi()["paths"]["/stream"]["get"]["responses"]["200"]
    retry, here, event, end = answer["content"]["text/event-stream"]["example"].split("\n\n")
    assert (retry, end) == ("retry: 1000", "")
    assert [line.partition(": ")[0] for line in here.splitlines()] == ["", "id"]
    fields = dict(line.split(": ", 1) for line in event.splitlines())
    assert fields.keys() == {"event", "id", "data"}
    assert models.StreamedDecision.model_validate_json(fields["data"])
    assert all(Place.read(each) for each in (fields["id"], here.rpartition("id: ")[2]))


@pytest.mark.parametrize("text", ["7d", "90m", "1.5h", "2026-11-21", "2026-11-21T09:30:00Z", "2026-11-21 09:30+01:00"])
def test_points_in_time_are_read(text: str) -> None:
    """A time, a day, and how long ago."""
    assert point(text) is not None


@pytest.mark.parametrize(
    "text", ["", "yesterday", "7", "7w", "2026-13-01", "2026-11-21T09:30:00", "99999999d", "0000-01-01", "9" * 40 + "d"]
)
def test_what_is_no_point_in_time_is_refused(text: str) -> None:
    """Nothing is guessed: without an offset nobody knows where a time would be meant."""
    with pytest.raises(ValueError, match=r".+"):
        point(text)
