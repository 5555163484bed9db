"""Tables in any width: a pipe gets everything, and a terminal gets lines that fit."""

from rich.cells import cell_len

from shufflenet_mlflow.cli.tables import fitted

TITLES = ("run_id", "name", "loss", "status")
ROWS = [
    ("0123456789abcdef0123456789abcdef", "shufflenet_v2_x1_0 pets 224px, the third seed", "0.1234", "FINISHED"),
    ("fedcba9876543210fedcba9876543210", "猫と犬", "12.5", "FAILED"),
]


def test_a_pipe_gets_everything() -> None:
    lines, left_out = fitted(TITLES, ROWS, None, spare=("status",))
    assert left_out == []
    for row, line in zip(ROWS, lines[1:], strict=True):
        assert all(text in line for text in row)
    assert lines[0].index("loss") + len("loss") == lines[1].index("0.1234") + len("0.1234")  # numbers end together
    assert not any(line.endswith(" ") for line in lines)


def test_a_terminal_gets_what_fits() -> None:
    for width in (120, 100, 80, 60, 50, 40):
        lines, left_out = fitted(TITLES, ROWS, width, spare=("status", "loss"))
        assert max(map(cell_len, lines)) <= width, (width, lines)
        assert all("01234567" in line or "fedcba98" in line for line in lines[1:])
        assert left_out == [title for title in ("status", "loss") if title not in lines[0]]
    wide, _ = fitted(TITLES, ROWS, 120, spare=("status",))
    assert ROWS[0][0] in wide[1]  # whole where there is room
    narrow, left_out = fitted(TITLES, ROWS, 60, spare=("status", "loss"))
    assert (ROWS[0][0][:12] in narrow[1], ROWS[0][0][:13] in narrow[1], left_out) == (True, False, ["status", "loss"])
    assert "…" in fitted(TITLES, ROWS, 50, spare=("status", "loss"))[0][1]


def test_columns_of_one_title_and_texts_that_look_like_markup() -> None:
    lines, _ = fitted(["", "ms", ""], [["data", "3.10", "[bold]"], ["iteration", "12.00", ":cat: [/]"]], 80)
    assert lines == ["              ms", "data        3.10  [bold]", "iteration  12.00  :cat: [/]"]


def test_an_empty_table() -> None:
    assert fitted(TITLES, [], 80) == (["run_id  name  loss  status"], [])
