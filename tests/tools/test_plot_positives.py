"""The picture of positives per object reads a training's log, and names what is wrong with it."""

import json

import pytest

from d2proposals.sc_rpn.positives_picture import COUNT, IOU, read_positives
from tools.plot_positives import main


def write_log(folder, lines) -> str:
    folder.mkdir()
    (folder / "metrics.json").write_text("".join(line + "\n" for line in lines))
    return str(folder)


def entry(iteration: int, count: float, iou: float) -> str:
    return json.dumps({"iteration": iteration, COUNT: count, IOU: iou, "lr": 0.1})


def test_entries_by_hand(tmp_path):
    other = json.dumps({"iteration": 59, "box_proposals/AR@100": 1.0})
    # Also of a training that was killed while it wrote.
    log = [entry(19, 6.5, 0.25), other, '{"iteration": 6', entry(79, 7.0, 0.5), "3"]
    values = read_positives(write_log(tmp_path / "run", log))
    assert values.tolist() == [[19, 6.5, 0.25], [79, 7.0, 0.5]]


def test_a_picture_is_written(tmp_path, capsys):
    runs = [write_log(tmp_path / name, [entry(19, 6, 0.2), entry(39, 6, 0.4)]) for name in "ab"]
    output = tmp_path / "positives.png"
    main([*runs, "--labels", "SADS", "without", "--output", str(output)])
    assert output.read_bytes().startswith(b"\x89PNG") and output.stat().st_size > 10_000
    assert "SADS, without" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["{", '{"iteration": 3}'])
def test_logs_that_do_not_help_are_named(tmp_path, line):
    with pytest.raises(ValueError, match="no entry scrpn/num_pos"):
        read_positives(write_log(tmp_path / "run", [line]))


def test_a_missing_log_and_equal_labels_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="There is no .*metrics.json"):
        main([str(tmp_path)])
    with pytest.raises(SystemExit):
        main(["a/x", "b/x"])
    assert "different --labels" in capsys.readouterr().err
