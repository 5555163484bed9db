"""Requests to a served model: the forms it takes, and which layer refuses the others, and how."""

import base64
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow import pyfunc
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server

from shufflenet_mlflow.export.requests import RequestError, images_in
from tests.support.serving_requests import FORMS, malformed
from tests.test_export import png, written

__all__ = ["written"]  # a fixture

PICTURE = base64.b64encode(png()).decode()
COLUMN = ["image"]


@pytest.fixture
def served(written: Path) -> Any:
    return pyfunc.load_model(str(written))


@pytest.fixture
def in_server(written: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Load the model as the process of `mlflow models serve` does: its code finds the server being set up."""
    monkeypatch.setitem(sys.modules, "mlflow.pyfunc.scoring_server.app", scoring_server)
    before = scoring_server.invocations
    yield pyfunc.load_model(str(written))
    scoring_server.invocations = before


def ask(served: Any, body: str | bytes, content_type: str | None = "application/json") -> Any:
    data = body.encode() if isinstance(body, str) else body
    return scoring_server.invocations(data, content_type, served, served.metadata.get_input_schema())


def split(columns: list[str], *rows: Any) -> str:
    return json.dumps({"dataframe_split": {"columns": columns, "data": rows}})


REQUESTS = {
    "a number": split(COLUMN, [PICTURE], [7]),
    "null": split(COLUMN, [PICTURE], [None]),
    "a list": split(COLUMN, [PICTURE], [[[PICTURE]]]),
    "an object": split(COLUMN, [{"a": PICTURE}]),
    "no base64": split(COLUMN, ["no base64!"]),
    "five million letters": split(COLUMN, ["A" * 5_000_000]),
    "another column": split(["picture"], [PICTURE]),
    "too few values": split(["image", "other"], [PICTURE]),
    "no JSON": "{",
    "no keys": "{}",
    "a bare list": "[1]",
}


@pytest.mark.parametrize("what", REQUESTS)
def test_malformed_requests_are_the_clients_fault(what: str, served: Any) -> None:
    """Also where MLflow parses them, as other servers than `mlflow models serve` do."""
    with pytest.raises(MlflowException) as caught:
        ask(served, REQUESTS[what])
    assert caught.value.get_http_status_code() == 400


def test_no_rows(served: Any, in_server: Any) -> None:
    assert json.loads(ask(served, split(COLUMN)).response) == {"predictions": []}
    assert json.loads(ask(in_server, split(COLUMN)).response) == {"predictions": []}


def test_the_model_says_which_entry_is_wrong(served: Any) -> None:
    model = served.unwrap_python_model()
    for value in (7, None, [png()], "no base64!", {"a": 1}, b"", "A" * 1000):
        with pytest.raises(MlflowException, match="image 1 is not a readable image") as caught:
            model.predict(None, pd.DataFrame({"image": [png(), value]}))
        assert "\n" not in str(caught.value)
        assert caught.value.get_http_status_code() == 400
    with pytest.raises(MlflowException, match="there is no column 'image'"):
        model.predict(None, pd.DataFrame({"picture": [png()]}))
    assert model.predict(None, pd.DataFrame({"image": []})).empty


@pytest.mark.parametrize("form", FORMS)
def test_every_form_takes_base64_and_data_urls(form: str, served: Any, in_server: Any) -> None:
    pictures = [png(1), png(2)]
    texts = [base64.b64encode(picture).decode() for picture in pictures]
    expected = served.predict(pd.DataFrame({"image": pictures})).to_dict("records")
    as_lines = [base64.encodebytes(picture).decode() for picture in pictures]
    for values in (texts, as_lines, [f"data:image/png;base64,{text}" for text in texts], [{"b64": t} for t in texts]):
        answer = ask(in_server, json.dumps(FORMS[form](values)))
        assert (answer.status, json.loads(answer.response)) == (200, {"predictions": expected})


def test_one_image_without_a_list(in_server: Any) -> None:
    answers = [ask(in_server, json.dumps({"inputs": value})).response for value in (PICTURE, {"image": PICTURE})]
    assert answers[0] == answers[1]
    assert len(json.loads(answers[0])["predictions"]) == 1


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ([1], "the request is a list, not a JSON object with dataframe_split or"),
        (7, "the request is a number, not"),
        ({}, "and has none of them"),
        ({"inputs": [], "instances": []}, "has instances and inputs together"),
        ({"instances": "x"}, "instances is text, not a list of images"),
        ({"instances": [PICTURE, {"picture": PICTURE}]}, "image 1 has no 'image', only ['picture']"),
        ({"dataframe_records": [{"image": PICTURE}, 7]}, "row 1 is a number, not an object with 'image'"),
        ({"dataframe_split": {"columns": COLUMN, "data": [[PICTURE], []]}}, "row 1 does not have one value for each"),
        ({"dataframe_split": {"columns": ["x" * 10_000], "data": []}}, "there is no column 'image' in ['xxx"),
        ({"dataframe_split": {"columns": 3}}, "needs a list of columns"),
        ({"dataframe_split": []}, "dataframe_split is a list, not an object with columns"),
        ({"inputs": {"picture": []}}, "inputs has no 'image', only ['picture']"),
    ],
)
def test_errors_of_a_request_name_what_is_wrong(document: Any, expected: str) -> None:
    with pytest.raises(RequestError) as caught:
        images_in(json.dumps(document))
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 200


def test_what_no_parser_takes() -> None:
    texts = ("{", "[" * 200_000, b"\xff{}", '{"inputs": ' + "9" * 5000 + "}", "")
    for text in texts:
        with pytest.raises(RequestError, match=r"^the request (is|holds) .{1,80}$"):
            images_in(text)


def test_a_server_refuses_with_one_short_line(in_server: Any, written: Path) -> None:
    seen = set()
    for body in malformed(png(), 120):
        with pytest.raises(MlflowException) as caught:
            ask(in_server, body)
        answer = json.loads(caught.value.serialize_as_json())
        assert (caught.value.get_http_status_code(), "stack_trace" in answer) == (400, False)
        message = answer["message"]
        assert "\n" not in message
        assert len(message) < 250, message
        assert not any(path in message for path in (str(written), sys.prefix, str(Path.cwd()))), message
        seen.add(message[:20])
    assert len(seen) > 10  # each says what is wrong


def test_other_content_types(in_server: Any) -> None:
    text = f"image\n{PICTURE}\n"
    assert len(json.loads(ask(in_server, text, "text/csv").response)["predictions"]) == 1
    for kind in ("text/csv", scoring_server.CONTENT_TYPE_PARQUET, None):
        with pytest.raises(MlflowException) as caught:
            ask(in_server, b"\xffnothing of that kind" * 10, kind)
        assert caught.value.get_http_status_code() == 400
        assert "\n" not in caught.value.message
        assert len(caught.value.message) < 200
    assert ask(in_server, text, "image/png").status == 415
