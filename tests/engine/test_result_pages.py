"""Tests of pages' tables, written from the results of experiments."""

import pytest

from d2proposals.engine.experiment_tables import read_table
from d2proposals.engine.experiments import write_result
from d2proposals.engine.result_pages import (
    Row,
    fill_page,
    format_rows,
    mean_and_spread,
    read_rows,
    write_pages,
)
from tests.common import ROOT
from tests.engine.experiment_results import result, row, write_table
from tools import run_table


def test_cells_of_a_table():
    rows = {"rpn": Row("RPN", results={1: result(1, 20.0), 2: result(2, 22.0, bbox={"AP": 3.14})})}
    columns = ["AR@100", "AR@7", "AP=bbox/AP", "iterations", "s/step", "MB", "seeds", "commit"]
    header, _, line = format_rows(rows, [*columns, "file=config"]).splitlines()
    assert header == "|  | AR@100 | AR@7 | AP | iterations | s/step | MB | seeds | commit | file |"
    # Sample standard deviation of 20 and 22.
    assert line == "| RPN | 21.0 ± 1.4 |  | 3.1 | 10,000 | 0.500 |  | 2 | abc1234 | `a.yaml` |"
    assert format_rows(rows, ["AR@100", "seed:2"]).splitlines()[2] == "| RPN | 22.0 |"
    assert mean_and_spread([1.25]) == "1.2"
    assert format_rows(rows, ["row", "data"]).splitlines()[2] == "| RPN | `rpn` | a, b |"
    # Nothing to show, as a method without masks in a table of masks.
    assert format_rows(rows, ["seg/AP", "AP=seg/AP"]) == ""


def test_differences_to_another_row_beside_the_paper_s():
    rows = {
        "a": Row(
            "A", None, {"AR@100": 50.0, "seg/AR@10": 7.0}, {1: result(1, 20.0), 2: result(2, 30.0)}
        ),
        "b": Row("B", "a", {"AR@100": 48.5}, {1: result(1, 21.0), 2: result(2, 30.5)}),
        # No result of the base has its seed.
        "c": Row("C", "b", {}, {3: result(3, 40.0)}),
        "d": Row("D", "c", {"AR@100": 61.0}),
        "e": Row("E", "a", {"AR@100": 51.0}, {2: result(2, 10.0)}),
    }
    (line,) = format_rows({"a": rows["a"]}, ["paper/seg/AR@10", "paper/bbox/AR@10"]).splitlines()[
        2:
    ]
    assert line == "| A | 7.0 |  |"
    columns = ["AR@100", "paper/AR@100", "Δ=ΔAR@100", "Δpaper/AR@100", "missing"]
    header, _, *lines = format_rows(rows, columns).splitlines()
    assert header == "|  | AR@100 | paper/AR@100 | Δ | Δpaper/AR@100 |"
    assert lines == [
        "| A | 25.0 ± 7.1 | 50.0 |  |  |",
        # Seed by seed: 1 and .5.
        "| B | 25.8 ± 6.7 | 48.5 | +0.8 ± 0.4 | -1.5 |",
        "| C | 40.0 |  |  |  |",
        "| E | 10.0 | 51.0 | -20.0 | +1.0 |",
        "",
        "Not trained yet: D.",
    ]
    assert format_rows({"d": rows["d"]}, columns) == "Not trained yet: D.\n"
    assert format_rows({"d": rows["d"]}, columns[:-1]) == ""
    lines = format_rows(rows, ["than=base"]).splitlines()[2:]
    assert lines == ["| B | A |", "| C | B |", "| E | A |"]


def test_a_line_for_each_task(tmp_path):
    paper = {"large_on_small/x": 8.0}
    rows = {
        "a": Row("A", None, paper, {1: result(1, large_on_small={"x": 3.0}, all={"x": 2.0})}),
        "b": Row("B", "a", {}, {1: result(1, large_on_small={"x": 5.0})}),
    }
    columns = ["x", "paper=paper/x", "Δ=Δx", "commit", "task:large_on_small", "task:all"]
    assert format_rows(rows, columns).splitlines() == [
        "|  | x | paper | Δ | commit |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| A: large on small | 3.0 | 8.0 |  | abc1234 |",
        "| A: all | 2.0 |  |  | abc1234 |",
        # None of the task "all", whose line would have the commit alone.
        "| B: large on small | 5.0 |  | +2.0 | abc1234 |",
    ]
    table = write_table(tmp_path / "t.yaml", [row()])
    write_result(table, read_table(table)[0], result(large={"x": 1.0}))
    mark = "<!-- results of t.yaml: {} task:large commit -->\n<!-- end of results -->"
    assert "| RPN: large | 1.0 |" in fill_page(mark.format("x"), tmp_path)
    for column in ("y", "paper/x"):
        with pytest.raises(ValueError, match=f"no result of t.yaml has the column '{column}'"):
            fill_page(mark.format(column), tmp_path)


def test_seeds_without_a_result_are_named(tmp_path):
    table = write_table(tmp_path / "t.yaml", [row(seeds=[1, 2, 3]), row("zip", seeds=[1, 2])])
    runs = {run.name: run for run in read_table(table)}
    write_result(table, runs["rpn-2"], result(2, 20.0))
    text = format_rows(read_rows(table), ["AR@100", "missing"])
    assert text.endswith("| RPN | 20.0 |\n\nNot trained yet: RPN (seeds 1, 3); ZIP.\n")
    write_result(table, runs["rpn-1"], result(1, 20.0))
    assert "RPN (seed 3); ZIP." in format_rows(read_rows(table), ["AR@100", "missing"])


@pytest.mark.parametrize(
    ("words", "trained", "missing"),
    [
        ([], ["A", "B"], "C; D"),
        (["only:zip*"], ["A"], "D"),
        (["only:zip", "only:rpn"], ["A", "B"], None),
        (["without:*rpn"], ["A"], "D"),
        (["only:*rpn", "without:sc_*"], ["B"], None),
    ],
)
def test_rows_are_chosen_by_their_names(words, trained, missing):
    result = {1: {"metrics": {"box_proposals": {"AR@100": 2.0}}}}
    rows = {"zip": Row("A", results=result), "rpn": Row("B", base="zip", results=result)}
    rows |= {"sc_rpn": Row("C"), "zip_voc": Row("D")}
    text = format_rows(rows, ["AR@100", "ΔAR@100", "missing", *words])
    # A row that is compared with stays known where it is not shown.
    cells = {"A": "| A | 2.0 |  |", "B": "| B | 2.0 | +0.0 |"}
    lines = text.splitlines()
    assert lines[0] == "|  | AR@100 | ΔAR@100 |"
    assert [line for line in lines[2:] if line[:1] == "|"] == [cells[label] for label in trained]
    assert lines[2 + len(trained) :] == (["", f"Not trained yet: {missing}."] if missing else [])


def test_a_page_s_tables_are_written_anew(tmp_path):
    table = write_table(tmp_path / "t.yaml", [row(paper={"AR@100": 50}), row("zip")])
    (run, _) = read_table(table)
    write_result(table, run, result())
    rows = read_rows(table)
    assert (rows["rpn"].paper, rows["zip"].base) == ({"AR@100": 50}, "rpn")
    assert [len(row.results) for row in rows.values()] == [1, 0]
    page = tmp_path / "page.md"
    mark = "<!-- results of t.yaml: AR@100 -->\n"
    page.write_text(f"before\n{mark}old\nolder\n<!-- end of results -->\nafter")
    other = tmp_path / "other.md"
    other.write_text("nothing")
    assert write_pages([page, other], tmp_path) == {str(page): 1}
    assert other.read_text() == "nothing"
    expected = "|  | AR@100 |\n| --- | ---: |\n| RPN | 20.0 |\n"
    assert page.read_text() == f"before\n{mark}{expected}<!-- end of results -->\nafter"
    assert fill_page(page.read_text(), tmp_path) == page.read_text()
    with pytest.raises(ValueError, match="other.md has no line"):
        write_pages([other], tmp_path)
    # A table without its end would swallow what stands before the next one.
    text = f"{mark}old\nwords\n{mark}old\n<!-- end of results -->\n"
    other.write_text(text)
    with pytest.raises(ValueError, match="other.md: 2 lines .*of which 1 are followed by"):
        write_pages([other], tmp_path)
    assert other.read_text() == text


def test_a_page_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"Error: the page .*nope\.md cannot be read: .*No such"):
        run_table.main(["--pages", str(tmp_path / "nope.md")])


@pytest.mark.parametrize("column", ["hourz", "AR@1OO", "ΔARR@100", "bbx/AP", "paper/AP"])
def test_a_misspelt_column_is_an_error(tmp_path, column):
    table = write_table(tmp_path / "t.yaml", [row(paper={"AR@100": 50}), row("zip")])
    known = "AR@100 X=paper/AR@100 Δ=ΔAR@100 hours base seeds bbox/AP missing"
    text = f"<!-- results of t.yaml: {known} {column} -->\n<!-- end of results -->"
    page = tmp_path / "page.md"
    page.write_text(text)
    # Without results nothing is known of their columns.
    assert write_pages([page], tmp_path) == {str(page): 1}
    write_result(table, read_table(table)[0], result(bbox={"AP": None}))
    page.write_text(text)
    with pytest.raises(ValueError, match=rf"page\.md: no result of t\.yaml has .*'{column}'"):
        write_pages([page], tmp_path)
    assert page.read_text() == text


@pytest.mark.parametrize(
    "page",
    [*sorted(ROOT.glob("docs/*.md")), ROOT / "README.md", ROOT / "MODEL_ZOO.md"],
    ids=lambda page: page.name,
)
def test_the_pages_say_what_the_result_files_say(page):
    text = page.read_text(encoding="utf-8")
    assert fill_page(text, ROOT) == text
