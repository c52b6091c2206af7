"""The report as a page, a PDF and pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynascope.record import Record, RecordError
from dynascope.report import report


def opened(browser: Any, page_file: Path, **settings: Any) -> tuple[Any, list[str], list[str]]:
    """The page after every chart was drawn, what it said on the console, and what it asked the network for."""
    page = browser.new_page(**settings)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    for number in range(page.locator("figure").count()):
        page.locator("figure").nth(number).scroll_into_view_if_needed()
        page.wait_for_selector(f'figure[data-chart="{number}"][data-drawn]')
    return page, said, asked


def test_page_draws_every_chart_without_a_word_or_a_request(varied: Record, browser: Any, tmp_path: Path) -> None:
    written = report([varied.path], tmp_path / "report.html")
    page, said, asked = opened(browser, written)
    assert page.locator("figure canvas").count() == page.locator("figure").count() == 8
    assert said == []
    assert asked == [written.as_uri()]
    page.close()


def inked_columns(page: Any, number: int) -> int:
    """How many columns of a chart's pixels are not empty."""
    script = """(canvas) => {
        const { data, width } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        const middle = [...Array(width).keys()].filter((column) =>
            [...Array(canvas.height).keys()].some((row) => {
                const at = 4 * (row * width + column);
                return data[at] + data[at + 1] + data[at + 2] < 700;
            }));
        return middle.length;
    }"""
    return int(page.locator("figure canvas").nth(number).evaluate(script))


@pytest.mark.parametrize("width", [1280, 390])
def test_charts_take_the_width_they_have(varied: Record, browser: Any, tmp_path: Path, width: int) -> None:
    written = report([varied.path], tmp_path / "report.html")
    page, _, _ = opened(browser, written, viewport={"width": width, "height": 800})
    room = page.locator("figure").nth(0).evaluate("(figure) => figure.clientWidth")
    canvas = page.locator("figure canvas").nth(0)
    # 10 px: tick labels at the ends may come or go when the plot is stretched.
    assert abs(canvas.evaluate("(canvas) => canvas.width") - room) <= 10
    assert inked_columns(page, 0) > 0.8 * room
    page.close()


def test_hostile_names_are_text(varied: Record, browser: Any, tmp_path: Path) -> None:
    page, _, _ = opened(browser, report([varied.path], tmp_path / "report.html"))
    assert page.evaluate("window.hacked") is None
    assert page.locator("main img").count() == 0
    assert "<img src=x" in page.locator("#findings").inner_text()
    page.close()


def test_findings_come_worst_first_with_their_remedy(varied: Record, browser: Any, tmp_path: Path) -> None:
    page, _, _ = opened(browser, report([varied.path], tmp_path / "report.html"))
    classes = [card.get_attribute("class") for card in page.locator("article").all()]
    assert classes == ["finding critical", "finding warning"]
    assert page.locator("article pre").inner_text().startswith("lr = 1e-4")
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_phone(varied: Record, browser: Any, tmp_path: Path, scheme: str) -> None:
    written = report([varied.path], tmp_path / "report.html")
    page, said, _ = opened(browser, written, viewport={"width": 390, "height": 800}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert said == []
    page.close()


def test_several_runs_are_compared(make_run: Callable[..., Record], browser: Any, tmp_path: Path) -> None:
    first, second = (make_run({"loss": [2.0, value]}, name=name) for name, value in [("slow", 1.5), ("broken", np.nan)])
    page, said, _ = opened(browser, report([first.path, second.path], tmp_path / "both.html"))
    assert page.locator("table tr").count() == 3
    assert page.locator("table tr").nth(1).inner_text().split("\t")[:4] == ["slow", "1", "1.5", "1.5"]
    # The last loss is told as it is, the lowest one leaves out what is not finite.
    assert page.locator("table tr").nth(2).inner_text().split("\t")[:4] == ["broken", "1", "nan", "2"]
    assert said == []
    page.close()


def test_pdf_has_a_page_a_section_and_one_for_findings(varied: Record, tmp_path: Path) -> None:
    from pypdf import PdfReader

    book = PdfReader(report([varied.path], tmp_path / "report.pdf"))
    assert len(book.pages) == 1 + 7
    assert "Findings" in book.pages[0].extract_text()


def test_folder_has_two_pictures_a_chart(varied: Record, tmp_path: Path) -> None:
    folder = report([varied.path], tmp_path / "pictures")
    assert sorted(path.suffix for path in folder.iterdir()) == [".png"] * 8 + [".svg"] * 8
    assert (folder / "00-loss.png").read_bytes().startswith(b"\x89PNG")


def test_an_empty_run_makes_a_page(make_run: Callable[..., Record], browser: Any, tmp_path: Path) -> None:
    page, said, _ = opened(browser, report([make_run({}).path], tmp_path / "empty.html"))
    assert "Nothing was measured yet" in page.locator("main").inner_text()
    assert said == []
    page.close()


def test_wrong_wishes_are_refused(varied: Record, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="html"):
        report([varied.path], tmp_path / "report.docx")
    with pytest.raises(ValueError, match="twice"):
        report([varied.path, varied.path], tmp_path / "report.html")
    with pytest.raises(RecordError, match="does not exist"):
        report([tmp_path / "nowhere"], tmp_path / "report.html")
