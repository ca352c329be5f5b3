"""Tests of what the toolbox's commands say of ids and of outputs that cannot be written."""

import json

import pytest
from PIL import Image

from tests.common import run_tool


@pytest.fixture
def files(tmp_path):
    """Ground truth of two images with an object each, and proposals that are right."""
    images = [{"id": i, "file_name": f"00{i}.png", "height": 40, "width": 50} for i in (1, 2)]
    annotations = [{"id": i, "image_id": i, "bbox": [10, 5, 20, 30]} for i in (1, 2)]
    (tmp_path / "gt.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    Image.new("RGB", (50, 40)).save(tmp_path / "001.png")
    Image.new("RGB", (50, 40)).save(tmp_path / "002.png")

    def write(ids, name="p.json"):
        entries = [{"image_id": i, "bbox": [10, 5, 20, 30], "score": 0.5} for i in ids]
        (tmp_path / name).write_text(json.dumps(entries))
        return tmp_path / name

    return tmp_path, write


def test_stems_are_ids_and_one_id_for_all_is_named(files, capsys):
    folder, write = files
    run_tool("evaluate_proposals", "--gt", folder / "gt.json", "--proposals",
             write(["001", "002"]), "--strict")  # fmt: skip
    assert "100.00" in capsys.readouterr().out
    run_tool("evaluate_proposals", "--gt", folder / "gt.json", "--proposals", write([1, 1]))
    assert "All proposals are of image 1: is that meant?" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_one_line_before_the_work(files, capsys):
    folder, write = files
    taken = folder / "taken"
    taken.write_text("here")
    gt, path = folder / "gt.json", write([1, 2])
    for output in (taken, taken / "nowhere"):
        with pytest.raises(SystemExit, match=f"Error: {output} cannot be written"):
            run_tool("evaluate_proposals", "--gt", gt, "--proposals", path, "--output", output)
        assert "AR@100" not in capsys.readouterr().out
    for tool, arguments in [
        ("convert_proposals", [path, taken / "nowhere" / "x.json", "--to", "coco"]),
        ("visualize_proposals", ["--gt", gt, "--proposals", path, "--output", taken / "x.png"]),
        ("visualize_proposals", ["--gt", gt, "--proposals", path, "--gallery", taken / "x.html"]),
    ]:
        with pytest.raises(SystemExit, match=r"Error: .*/x\.\w+ cannot be written"):
            run_tool(tool, *arguments)
    assert taken.read_text() == "here"
