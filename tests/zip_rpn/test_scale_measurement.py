"""What is measured of dyTrainScale, and the command that prints it."""

import numpy as np
import pytest
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_proposal_generator
from detectron2.structures import BoxMode

from d2proposals.data.mapper import ProposalDatasetMapper
from d2proposals.zip_rpn import scale_measurement as measured
from tests.common import make_cfg
from tools.measure_training_scale import main

SIZES = [(320, 640), (100, 100), (330, 650), (110, 90), (640, 320), (300, 600)]


def test_pixels_by_hand():
    # Landscapes and the rest apart, two by two.
    in_order = measured.batches_in_order(SIZES, 2)
    expected = [[(320, 640), (330, 650)], [(100, 100), (110, 90)]]
    assert [sorted(map(tuple, batch.tolist())) for batch in in_order[:2]] == [
        sorted(expected[0]),
        sorted(expected[1]),
    ]
    computed = 2 * 352 * 672 + 2 * 128 * 128
    pixels = 320 * 640 + 330 * 650 + 100 * 100 + 110 * 90
    assert len(in_order) == 2
    assert measured.pixels_per_image_pixel(in_order) == pytest.approx(computed / pixels)
    assert measured.computed_per_image(in_order) == computed / 4


def test_batches_of_like_sizes_hold_less_padding():
    rng = np.random.default_rng(0)
    sizes = [(int(h), int(w)) for h, w in rng.integers(100, 1000, (400, 2))]
    in_order = measured.pixels_per_image_pixel(measured.batches_in_order(sizes, 4))
    grouped = measured.pixels_per_image_pixel(measured.batches_of_like_sizes(sizes, 4, 16))
    assert 1 < grouped < 1.3 < in_order


def make_records(number):
    def record(i):
        box = {"bbox": [40, 40, 40, 10], "bbox_mode": BoxMode.XYWH_ABS, "category_id": i % 2}
        crowd = {**box, "iscrowd": 1, "bbox": [0, 0, 90, 90]}
        return {"height": 100, "width": 200, "annotations": [box, crowd], "image_id": i}

    return [record(i) for i in range(number)]


def test_draws_are_of_the_mapper_s_rule():
    np.random.seed(0)
    mapper = ProposalDatasetMapper(
        make_cfg(
            "zip_rpn_only.yaml", "INPUT.DY_TRAIN_SCALE.RULE", "area",
            "INPUT.DY_TRAIN_SCALE.AREA_TOLERANCE", 0.0, "INPUT.MIN_SIZE_TRAIN", (50,),
        ),
        True,
    )  # fmt: skip
    drawn, fixed = measured.draw_training_sizes(make_records(3), mapper, 20)
    # The object's area is that of 20 x 20 pixels; crowd is none of the boxes.
    assert {draw.size for draw in drawn} == {(320, 640), (500, 1000)}  # bounded at 1,000
    small = next(draw for draw in drawn if draw.size == (320, 640))
    np.testing.assert_allclose(small.boxes, [[128, 128, 256, 160]])
    assert {draw.size for draw in fixed} == {(50, 100)} and len(fixed) == 20


def test_a_draw_has_positives_where_an_anchor_fits():
    shapes = {f"zoom{i}": ShapeSpec(channels=8, stride=s) for i, s in ((1, 8), (2, 16), (3, 32))}
    cfg = make_cfg("zip_rpn_only.yaml")
    generator = build_proposal_generator(cfg, shapes)
    fits = np.array([[64, 64, 128, 128]], np.float32)  # about the cell at (96, 96)
    too_flat = np.array([[0, 64, 300, 70]], np.float32)
    nothing = np.zeros((0, 4), np.float32)
    assert measured.has_positives(generator, measured.Draw((300, 310), fits))
    assert not measured.has_positives(generator, measured.Draw((300, 310), too_flat))
    assert not measured.has_positives(generator, measured.Draw((300, 310), nothing))
    assert measured.has_positives(
        generator, measured.Draw((300, 310), np.concatenate([too_flat, fits]))
    )


def test_command(tmp_path, monkeypatch, capsys):
    from detectron2.data import DatasetCatalog, MetadataCatalog

    DatasetCatalog.register("measured_scale", lambda: make_records(5))
    MetadataCatalog.get("measured_scale").thing_classes = ["even", "odd"]
    try:
        arguments = ["--config-file", "configs/zip_rpn_only.yaml", "--draws", "8"]
        main([*arguments, "DATASETS.TRAIN", "('measured_scale',)", "OUTPUT_DIR", str(tmp_path)])
        out = capsys.readouterr().out
        assert "5 images, 8 draws, rule shorter_side, batches of 4" in out
        assert "batches of like sizes: 1." in out and "without a positive anchor: " in out
        # What a training of some categories reads.
        main([*arguments, "DATASETS.TRAIN", "('measured_scale',)", "OUTPUT_DIR", str(tmp_path),
              "DATASETS.CATEGORIES", "('odd',)"])  # fmt: skip
        assert "2 images, 8 draws" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            main([*arguments[:-1], "3"])
        assert "at least 7 for batches of 4" in capsys.readouterr().err
    finally:
        DatasetCatalog.remove("measured_scale")
        MetadataCatalog.remove("measured_scale")
