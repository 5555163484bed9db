"""The page that `compare --out` writes: the verdict, the results that matter, and curves that answer to the pointer."""

import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from shufflenet_mlflow.compare import Curve, GroupComparison, compare_runs
from shufflenet_mlflow.compare.charts import highest_shown
from shufflenet_mlflow.compare.groups import GroupDifference
from shufflenet_mlflow.compare.paired import Change, mixed
from shufflenet_mlflow.compare.results import NONE, UNBROKEN, main_rows, shown
from shufflenet_mlflow.compare.verdict import Verdict, verdict_of
from shufflenet_mlflow.evaluation.significance import bootstrap_interval
from tests.support.browser import Browser, why_no_browser
from tests.support.command_line import Invoke
from tests.support.images import write_images
from tests.support.recorded_runs import record_evaluation, record_run

CLASSES = ("blue", "green", "red")


def verdict(client: MlflowClient, *ids: str) -> Verdict:
    return verdict_of(compare_runs(client, [client.get_run(run_id) for run_id in ids]))


def pets(folder: Path, per_class: int) -> tuple[Path, list[str]]:
    """Write images, and return their folder and paths, with the classes taking turns."""
    root = write_images(folder / "pets", CLASSES, per_class)
    names = sorted(path.name for path in (root / "red").iterdir())
    return root, [f"{label}/{name}" for name in names for label in CLASSES]


@pytest.fixture
def evaluated(client: MlflowClient, tmp_path: Path) -> tuple[str, str]:
    """Two runs, evaluated on the same 36 images: one gets 12 of them wrong, the other 2 of others."""
    root, paths = pets(tmp_path, 12)
    params = {"lr": 0.1}
    first = record_run(client, "slow", accuracy=0.8, params=params)
    second = record_run(client, "fast", accuracy=0.9, params={"lr": 0.4})
    record_evaluation(client, first, root, dict.fromkeys(paths[:12], "none"))
    record_evaluation(client, second, root, dict.fromkeys(paths[30:32], "none"))
    return first, second


# ---------------------------------------------------------------- verdict


def test_the_same_images_decide(client: MlflowClient, evaluated: tuple[str, str]) -> None:
    found = verdict(client, *evaluated)
    assert found.headline == (
        f"“fast” is better than “slow”: it gets 94.4{UNBROKEN}% of the same 36 images of pets right, "
        f"not 66.7{UNBROKEN}%"
    )
    [reason] = found.reasons
    assert reason.startswith("2 images only “slow” gets right, 12 only “fast”. The difference is more than chance")
    assert f"p{UNBROKEN}={UNBROKEN}0.013" in reason
    assert verdict(client, *reversed(evaluated)).headline == found.headline


def test_a_difference_that_may_be_chance_has_no_winner(client: MlflowClient, tmp_path: Path) -> None:
    root, paths = pets(tmp_path, 12)
    ids = [record_run(client, "same name", accuracy=0.9) for _ in range(2)]
    for count, run_id in enumerate(ids, start=1):
        record_evaluation(client, run_id, root, dict.fromkeys(paths[count : 2 * count], "none"))
    found = verdict(client, *ids)
    assert found.headline.startswith(f"No clear winner: “same name ({ids[0][:8]})” gets 97.2{UNBROKEN}% of the same 36")
    assert "may be chance" in found.reasons[0]


def test_of_three_the_best_is_named(client: MlflowClient, evaluated: tuple[str, str], tmp_path: Path) -> None:
    third = record_run(client, "third", accuracy=0.7)
    record_evaluation(client, third, tmp_path / "pets", {})
    found = verdict(client, *evaluated, third)
    assert found.headline == f"“third” gets the most of the same 36 images of pets right: 100.0{UNBROKEN}%"
    assert len(found.reasons) == 2


def test_validation_alone_leaves_it_open(client: MlflowClient) -> None:
    ids = [record_run(client, name, accuracy=value) for name, value in (("a", 0.8), ("b", 0.9))]
    found = verdict(client, *ids)
    assert found.headline == f"“b” has the highest validation accuracy: 90.0{UNBROKEN}% (“a” 80.0{UNBROKEN}%)"
    assert found.is_open
    equal = verdict(client, ids[0], record_run(client, "c", accuracy=0.8))
    assert equal.headline.startswith("“a” and “c” have the same highest validation accuracy")
    nothing = client.create_run(client.get_run(ids[0]).info.experiment_id).info.run_id
    assert verdict(client, ids[0], nothing).headline.startswith("Nothing to rank yet")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ((0.1, 0.11, 0.12), "“b” is better than “a” over 3 seeds"),
        ((-0.1, -0.11, -0.12), "“a” is better than “b” over 3 seeds"),
        ((0.1, -0.11, 0.02), "No clear winner between “a” and “b” over 3 seeds"),
        ((0.1,), "No clear winner between “a” and “b” over 1 seed"),
    ],
)
def test_groups_of_seeds_decide(client: MlflowClient, changes: tuple[float, ...], expected: str) -> None:
    ids = [record_run(client, name, accuracy=0.8) for name in "ab"]
    difference = GroupDifference("val/top1", *ids, tuple(range(len(changes))), bootstrap_interval(changes))
    groups = GroupComparison((), (difference,))
    comparison = compare_runs(client, [client.get_run(run_id) for run_id in ids])
    assert verdict_of(replace(comparison, groups=groups)).headline == expected


# ---------------------------------------------------------------- results


def test_results_that_matter(client: MlflowClient, evaluated: tuple[str, str]) -> None:
    comparison = compare_runs(client, [client.get_run(run_id) for run_id in evaluated])
    rows = {row.label: row for row in main_rows(comparison)}
    assert list(rows) == [
        "Accuracy on pets",
        "Validation accuracy, best",
        "Loss on validation",
        "Multiply-accumulates",
        "Time, pauses included",
    ]
    assert [text.replace(UNBROKEN, " ") for text in rows["Accuracy on pets"].values] == ["66.7 %", "94.4 %"]
    assert rows["Loss on validation"].values == ("1.200", "1.100")
    assert rows["Loss on validation"].best == rows["Accuracy on pets"].best == (1,)
    assert rows["Time, pauses included"].values == ("3 min", "3 min")
    best = {row.metric: row.best for row in comparison.results}
    assert best["train/loss"] == best["train/top1"] == best["train/images_per_second"] == best["loss"] == ()
    order = [row.metric for row in comparison.results]
    assert order.index("best/val_top1") < order.index("val/loss") < order.index("macs") < order.index("train/loss")


@pytest.mark.parametrize(
    ("metric", "values", "expected"),
    [
        ("val/top1", (0.9, 0.8), ("90.0 %", "80.0 %")),
        ("val/top1", (0.9001, 0.9004), ("90.01 %", "90.04 %")),
        ("val/top1", (0.9, 0.9, None), ("90.0 %", "90.0 %", NONE)),
        ("val/loss", (1.23456, math.nan, 1.79e308), ("1.235", "not a number", "infinite")),
        ("val/loss", (0.12341, 0.12312), ("0.1234", "0.1231")),
        ("macs", (41_234_567, 1.5e9), ("41.2 M", "1.5 G")),
        ("parameters", (999, 352_042), ("999", "352.0 k")),
    ],
)
def test_digits(metric: str, values: tuple[float | None, ...], expected: tuple[str, ...]) -> None:
    assert tuple(text.replace(UNBROKEN, " ") for text in shown(metric, values)) == expected


def test_flipped_images_of_all_classes_are_mixed() -> None:
    labels = "aaaabbc"
    changes = [Change(f"{place}.png", label, "x", "y") for place, label in enumerate(labels)]
    assert "".join(change.label for change in mixed(changes)) == "abcabaa"
    assert sorted(change.path for change in mixed(changes)) == [change.path for change in changes]


def test_a_first_loss_that_is_far_off_leaves_room_for_the_others() -> None:
    def of(*values: float) -> Curve:
        return Curve("val/loss", 0, tuple(range(len(values))), None, (0.0,) * len(values), values)

    usual = (2.0, *(1.0 - 0.01 * place for place in range(20)))
    assert highest_shown([of(*usual)]) is None
    assert highest_shown([of(54.0, *usual)]) == pytest.approx(1.5, abs=0.1)
    assert highest_shown([of(1.79e308, *usual)]) is None  # infinity is not drawn
    assert highest_shown([]) is None


# ---------------------------------------------------------------- page


def written(shufflenet: Invoke, ids: tuple[str, ...], out: Path) -> str:
    result = shufflenet("compare", *ids, "--out", out)
    assert result.exit_code == 0, result.output
    return (out if out.suffix else out / "compare.html").read_text()


def test_one_file_or_a_folder(shufflenet: Invoke, evaluated: tuple[str, str], tmp_path: Path) -> None:
    page = written(shufflenet, evaluated, tmp_path / "new" / "page.html")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]
    written(shufflenet, evaluated, tmp_path / "folder")
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"compare.html", "compare.json"}
    (tmp_path / "odd.html").mkdir()
    shufflenet("compare", *evaluated, "--out", tmp_path / "odd.html")
    assert {path.name for path in (tmp_path / "odd.html").iterdir()} == {"compare.html", "compare.json"}
    assert page.index("“fast” is better") < page.index(">Results<") < page.index(">Curves<") < page.index("disagree")
    assert len(page) < 2_000_000


def test_the_page_loads_nothing(shufflenet: Invoke, evaluated: tuple[str, str], tmp_path: Path) -> None:
    page = written(shufflenet, evaluated, tmp_path / "page.html")
    assert "default-src 'none'" in page
    assert not re.search(r"<(link|iframe|script src|img src=.http)", page)


def test_runs_without_curves(shufflenet: Invoke, client: MlflowClient, tmp_path: Path) -> None:
    experiment = client.create_experiment("empty")
    ids = tuple(client.create_run(experiment).info.run_id for _ in range(2))
    page = written(shufflenet, ids, tmp_path / "page.html")
    assert "Nothing to rank yet" in page
    assert "Bokeh" not in page


# ---------------------------------------------------------------- in a browser

HOSTILE = "<img src=x onerror=document.title='broken'></script>`${1}' \\ \""


@pytest.fixture
def open_page(shufflenet: Invoke, tmp_path: Path) -> Iterator[Callable[..., Browser]]:
    opened: list[Browser] = []

    def open_(*ids: str, width: int = 1280) -> Browser:
        page = tmp_path / "page.html"
        written(shufflenet, ids, page)
        opened.append(Browser(page.as_uri(), width=width))
        opened[-1].wait_for("at the end", "%")
        return opened[-1]

    yield open_
    for browser in opened:
        browser.close()


needs_browser = pytest.mark.skipif(why_no_browser() is not None, reason=str(why_no_browser()))


def readout(browser: Browser) -> list[list[str]]:
    rows: list[list[str]] = browser.driver.execute_script(
        "return [...document.querySelectorAll('.readout tr')].map(row => [...row.cells].map(cell => cell.innerText))"
    )
    return rows


def point_at(browser: Browser, share: float) -> None:
    """Move the pointer to a place in the first chart, as a share of its width."""
    from selenium.webdriver.common.action_chains import ActionChains

    chart = browser.driver.find_elements("css selector", ".chart")[0]
    browser.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    offset = round((share - 0.5) * chart.size["width"])
    ActionChains(browser.driver).move_to_element_with_offset(chart, offset, 0).perform()


def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.1)


@pytest.mark.long
@needs_browser
def test_curves_answer_to_the_pointer(client: MlflowClient, open_page: Callable[..., Browser]) -> None:
    """Two runs, one in steps of 100 iterations, the other of 50; an epoch is 100 of the first, 50 of the second."""
    first = record_run(client, "slow", accuracy=0.8)
    second = record_run(
        client, HOSTILE, accuracy=0.4, params={"epochs": 8}, iterations=(50, 100, 150, 200, 250, 300, 350, 400)
    )
    browser = open_page(first, second)
    assert readout(browser)[1] == ["slow", "80.0 %", "70.0 %", "1.200", "1.000"]
    assert readout(browser)[2] == [HOSTILE, "40.0 %", "30.0 %", "1.600", "1.000"]
    point_at(browser, 0.3)
    until(lambda: readout(browser)[0][0].startswith("near iteration"))
    assert readout(browser)[1][1] in ("20.0 %", "40.0 %")
    browser.click("epoch")
    until(lambda: readout(browser)[0][0] == "at the end")
    point_at(browser, 0.99)
    until(lambda: re.match("near epoch [78]", readout(browser)[0][0]))
    assert [row[1] for row in readout(browser)[1:]] == ["80.0 %", "40.0 %"]
    point_at(browser, 0.55)
    until(lambda: re.match("near epoch [34]", readout(browser)[0][0]))
    assert readout(browser)[1][1] in ("60.0 %", "80.0 %")  # its end is at epoch 4
    assert readout(browser)[2][1] in ("15.0 %", "20.0 %")  # which is half of this one
    browser.click("time")
    point_at(browser, 0.99)
    until(lambda: re.match(r"near 3\.\d min", readout(browser)[0][0]))
    assert browser.driver.title != "broken"
    visible = "return Bokeh.documents[0].roots().flatMap(r => r.renderers).map(r => r.visible)"
    shown_before = browser.driver.execute_script(visible)
    browser.driver.find_element("css selector", "[data-shows='0']").click()
    until(lambda: sum(browser.driver.execute_script(visible)) == sum(shown_before) / 2)
    browser.driver.find_element("id", "training").click()
    until(lambda: sum(browser.driver.execute_script(visible)) == 4)  # line and points of one run's validation, twice
    assert [entry for entry in browser.driver.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.long
@needs_browser
def test_on_a_phone_and_in_the_dark(evaluated: tuple[str, str], open_page: Callable[..., Browser]) -> None:
    browser = open_page(*evaluated)
    driver = browser.driver
    axis = "return Bokeh.documents[0].roots()[0].below[0].axis_label_text_color"
    light = driver.execute_script(axis)
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    until(lambda: driver.execute_script(axis) != light)
    assert driver.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 29)"
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    driver.refresh()
    browser.wait_for("at the end", "%")
    assert driver.execute_script("return document.documentElement.scrollWidth") == 390
    chart = driver.find_elements("css selector", ".chart")[0]
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    top = driver.execute_script("return arguments[0].getBoundingClientRect().y", chart)
    finger = [{"x": 220, "y": top + 120}]
    driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": finger})
    driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    until(lambda: readout(browser)[0][0].startswith("near iteration"))
