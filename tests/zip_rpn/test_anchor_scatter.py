"""Object sizes and anchors by level (Fig. 5)."""

import numpy as np
import pytest
from detectron2.structures import BoxMode

from d2proposals.zip_rpn.anchor_scatter import best_levels, object_sizes, write_anchor_picture
from tools.plot_anchor_sizes import main

ANCHORS = [np.array([[16.0, 16], [32, 32]]), np.array([[64.0, 64], [128, 32]])]


def make_records():
    box = {"bbox": [10, 20, 50, 100], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    crowd, empty = {**box, "iscrowd": 1}, {**box, "bbox": [10, 20, 0, 5]}
    return [
        {"height": 300, "width": 600, "annotations": [box, crowd, empty], "image_id": 0},
        {"height": 1000, "width": 2000, "annotations": [box], "image_id": 1},
        {"height": 10, "width": 10, "annotations": [], "image_id": 2},
    ]


def test_object_sizes_by_hand():
    # Twice as large; and .5: the longer side is bounded at 1,000.
    sizes = object_sizes(make_records(), 600, 1000)
    np.testing.assert_allclose(sizes, [[50 * 1000 / 600, 100 * 1000 / 600], [25, 50]])
    np.testing.assert_allclose(object_sizes(make_records(), 600, 9999)[0], [100, 200])
    np.testing.assert_allclose(object_sizes(make_records(), 0, 1000), [[50, 100]] * 2)
    assert object_sizes([], 600, 1000).shape == (0, 2)


def test_best_levels_by_hand():
    # 48 x 48: with 32 x 32 IoU .44, with 64 x 64 .56. 70 x 25: with 32 x 32 .39, with 128 x 32 .43.
    sizes = np.array([[4.0, 4], [20, 20], [48, 48], [44, 44], [70, 25], [500, 900]])
    assert best_levels(sizes, ANCHORS).tolist() == [0, 0, 1, 0, 1, 1]
    assert best_levels(np.zeros((0, 2)), ANCHORS).shape == (0,)


def test_dots_and_crosses_stand_at_logarithms(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(
        "d2proposals.zip_rpn.anchor_scatter.write_figure", lambda _, figure: figures.append(figure)
    )
    sizes = np.array([[20.0, 10.0], [500, 900]])
    write_anchor_picture(tmp_path / "picture.png", sizes, ANCHORS, "title")
    first, *_, last_anchors = figures[0].axes[0].collections
    np.testing.assert_allclose(first.get_offsets(), [np.log([20, 10])])
    np.testing.assert_allclose(last_anchors.get_offsets(), np.log(ANCHORS[1]))
    assert figures[0].axes[0].get_legend_handles_labels()[1] == ["level 1: 1", "level 2: 1"]


def test_command(tmp_path, capsys):
    from detectron2.data import DatasetCatalog

    DatasetCatalog.register("drawn_sizes", make_records)
    try:
        output = tmp_path / "anchors.png"
        main(["--config-file", "configs/zip_rpn_only.yaml", "--dataset", "drawn_sizes",
              "--output", str(output)])  # fmt: skip
        assert output.read_bytes().startswith(b"\x89PNG")
        # 83 x 167 is nearest an anchor of 128 pixels, 25 x 50 one of 32.
        assert "2 objects, by level 1, 1, 0" in capsys.readouterr().out
    finally:
        DatasetCatalog.remove("drawn_sizes")
    with pytest.raises(SystemExit):
        main(["--config-file", "configs/zip_rpn_only.yaml", "--dataset", "nowhere"])


def test_a_configuration_of_another_method_is_one_line(capsys):
    with pytest.raises(SystemExit):
        main(["--config-file", "configs/rpn_only.yaml"])
    assert "the anchors are ZIP's, the configuration has RPN" in capsys.readouterr().err
