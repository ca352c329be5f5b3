"""Tables II and III: by hand, and the command."""

import runpy
from pathlib import Path

import pytest
import torch
from detectron2.structures import ImageList

from d2proposals.proposals.native_size import ImageSizes, given_sizes
from d2proposals.spop.localization_error import (
    LocalizationErrors,
    add_localization_errors,
    find_spop,
)
from tests.common import CONFIGS
from tests.engine.tiny_coco import registered, write_tiny_coco
from tests.spop.ground_truth import make_gt
from tests.spop.test_spop_generator import build_generator, perfect_generator

TOOL = Path(__file__).resolve().parents[2] / "tools" / "evaluate_localization.py"


class Shifted(torch.nn.Module):
    """Predicts every cell's coordinates as the truth of one box, shifted."""

    def __init__(self, box, shift, normalizer):
        super().__init__()
        self.value = (torch.tensor(box) + torch.tensor(shift)) / normalizer
        self.normalizer = normalizer

    def forward(self, x):
        cells = (-(-x.shape[-2] // 8) + 1, -(-x.shape[-1] // 8) + 1)
        return self.value[:, None, None].expand(4, *cells)[None]


def test_by_hand():
    # One large object in 48 x 96 pixels; the large-size network is off by 9.6 px in x_min and by
    # 4.8 px in y_max: a tenth of the width and of the height. The small-size network is right.
    box = [0.0, 0.0, 64.0, 40.0]
    generator = perfect_generator([box], (48, 96), normalizer=100.0)
    generator.networks.localization["large_size"] = Shifted(box, [9.6, 0.0, 0.0, 4.8], 100.0)
    generator.networks.localization["small_size"] = Shifted(box, [0.0] * 4, 100.0)
    errors = LocalizationErrors()
    images = ImageList.from_tensors([torch.zeros(3, 48, 96)])
    for _ in range(2):  # sums and counts go together
        add_localization_errors(errors, generator, images, [make_gt((48, 96), [box], [2560.0])])
    means = errors.means()
    assert errors.num_cells == {"large": 2 * 5 * 8, "small": 0}
    expected = [0.01, 0.0, 0.0, 0.01]
    assert means["large_size", "large"].tolist() == pytest.approx(expected, abs=1e-6)
    assert means["small_size", "large"].tolist() == pytest.approx([0.0] * 4, abs=1e-6)
    # The confidence is right that the object is large: the fusion is the large-size network.
    assert means["fused", "large"].tolist() == pytest.approx(expected, abs=1e-6)
    assert means["large_size", "small"].isnan().all()
    # In ten-thousandths, with the mean of the four sides.
    metrics = errors.metrics()["large_size_on_large"]
    assert metrics.pop("cells") == 80
    expected = {"x_min": 100, "y_min": 0, "x_max": 0, "y_max": 100, "mean": 50}
    assert metrics == pytest.approx(expected, abs=0.01)
    assert "| large_size" in errors.table() and "0.010000" in errors.table()


def test_each_size_has_its_own_mean():
    errors = LocalizationErrors()
    errors.num_cells = {"large": 4, "small": 2}
    for size in ("large", "small"):
        errors.add("fused", size, torch.tensor([[1.0, 2, 3, 4], [3, 2, 1, 0]]))
    assert errors.means()["fused", "large"].tolist() == [1, 1, 1, 1]
    assert errors.means()["fused", "small"].tolist() == [2, 2, 2, 2]


def test_images_of_several_sizes():
    generator = build_generator().eval()
    sizes = [(40, 64), (64, 33)]
    images = ImageList.from_tensors([torch.randn(3, *size) for size in sizes])
    areas = (900.0, 3000.0)
    gt = [make_gt(s, [[0, 0, 32, 32]], [a]) for s, a in zip(sizes, areas, strict=True)]
    together, apart = LocalizationErrors(), LocalizationErrors()
    add_localization_errors(together, generator, images, gt)
    for i, size in enumerate(sizes):
        single = ImageList(images.tensor[i : i + 1, :, : size[0], : size[1]], [size])
        add_localization_errors(apart, generator, single, gt[i : i + 1])
    assert together.num_cells == apart.num_cells == {"large": 16, "small": 16}
    assert len(together.squared) == 6
    for key, mean in together.means().items():
        assert torch.allclose(mean, apart.means()[key], rtol=1e-4)


def test_at_the_size_that_the_networks_learn_from():
    # 40 x 64 pixels, enlarged threefold: as many cells as the image itself has.
    gt = make_gt((120, 192), [[0, 0, 96, 96]], [900.0])
    images = ImageList.from_tensors([torch.randn(3, 120, 192)])
    for at_native_size, num_cells in ((True, 16), (False, 144)):
        generator = build_generator("MODEL.SPOP.TRAIN_AT_NATIVE_SIZE", at_native_size).eval()
        errors = LocalizationErrors()
        with given_sizes([ImageSizes((120, 192), (40, 64), (120, 192))]):
            add_localization_errors(errors, generator, images, [gt])
        assert errors.num_cells["small"] == num_cells
        # In widths and heights of that size, not off by its factor.
        assert errors.means()["small_size", "small"].max() < 4


def test_the_single_network():
    generator = build_generator("MODEL.SPOP.SCALE_AWARE", False).eval()
    errors = LocalizationErrors()
    images = ImageList.from_tensors([torch.zeros(3, 32, 32)])
    add_localization_errors(
        errors, generator, images, [make_gt((32, 32), [[0, 0, 20, 20]], [400.0])]
    )
    assert set(errors.squared) == {("all_sizes", "large"), ("all_sizes", "small")}


def test_another_generator_is_named():
    with pytest.raises(ValueError, match="needs 'SPOP'"):
        find_spop(torch.nn.Module())


def run(*arguments):
    config = str(CONFIGS / "shapes" / "spop_rpn_only.yaml")
    runpy.run_path(str(TOOL))["main"](["--config-file", config, *arguments])


def test_the_command(tmp_path, capsys):
    coco = write_tiny_coco(tmp_path / "datasets") / "coco"
    with registered(coco):
        run("--max-images", "2", "MODEL.DEVICE", "cpu", "DATASETS.TEST", "('tiny_val',)",
            "INPUT.WARP_SIZE", "(64, 64)", "INPUT.MASK_FORMAT", "polygon")  # fmt: skip
        lines = capsys.readouterr().out.splitlines()
        assert "x_min error" in lines[0] and len(lines) == 2 + 6
        with pytest.raises(SystemExit, match="Error: Unknown dataset 'no_such_set'"):
            run("MODEL.DEVICE", "cpu", "DATASETS.TEST", "('no_such_set',)")
