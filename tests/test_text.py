"""Text in messages."""

from shufflenet_mlflow.runtime.text import counted, name_some


def test_name_some() -> None:
    assert name_some([]) == ""
    assert name_some(["a", "b"], most=2) == "a, b"
    assert name_some(("a", "b", "c"), most=2) == "a, b and 1 more"
    assert name_some("abcde", shown_as=repr) == "'a', 'b', 'c' and 2 more"


def test_counted() -> None:
    assert counted(0, "file") == "0 files"
    assert counted(1, "file") == "1 file"
    assert counted(12_000, "entry", "entries") == "12,000 entries"
