"""How large objects are: Fig. 2 and 4."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2proposals.spop.object_sizes import size_distribution, write_size_picture
from tests.common import CONFIGS
from tests.engine.tiny_coco import registered, write_tiny_coco

TOOL = Path(__file__).resolve().parents[2] / "tools" / "plot_object_sizes.py"


def test_by_hand():
    areas = [100, 1999, 2000, 5000, 90000, 901]
    sizes = size_distribution(areas, boundary=2000, bin_width=1000, num_bins=4)
    assert sizes.edges.tolist() == [0, 1000, 2000, 3000]
    assert sizes.objects.tolist() == pytest.approx([2 / 6, 1 / 6, 1 / 6, 2 / 6])
    assert sizes.pixels.tolist() == pytest.approx([1001e-5, 1999e-5, 0.02, 0.95])
    # 2,000 pixels are large.
    assert (sizes.num_objects, sizes.small_objects) == (6, 0.5)
    assert sizes.small_pixels == pytest.approx(0.03)


@pytest.mark.parametrize("areas", [[], [0.0]])
def test_nothing_to_count(areas):
    with pytest.raises(ValueError, match="no objects"):
        size_distribution(areas)


def test_picture(tmp_path):
    write_size_picture(tmp_path / "a.png", size_distribution(np.arange(1, 9000.0)), "some")
    with Image.open(tmp_path / "a.png") as image:
        image.load()
        assert image.size[0] > 1000


def test_the_command(tmp_path, capsys):
    coco = write_tiny_coco(tmp_path / "datasets") / "coco"
    main = runpy.run_path(str(TOOL))["main"]
    arguments = ["--config-file", str(CONFIGS / "spop_rpn_only.yaml"), "--output",
                 str(tmp_path / "a.png")]  # fmt: skip
    with registered(coco):
        main([*arguments, "MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "('tiny_train',)"])
        assert "tiny_train: " in capsys.readouterr().out and (tmp_path / "a.png").is_file()
        with pytest.raises(SystemExit):
            main([*arguments, "MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "()"])
