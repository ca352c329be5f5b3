"""The zoom network under RetinaNet (Sec. 5.6): levels made alike, learning, evaluation."""

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import pairwise_iou
from detectron2.utils.events import EventStorage
from torch.nn import functional as F

from d2proposals.engine import Trainer, check_config
from d2proposals.zip_rpn.zoom_network import IMAGE_SIZES
from tests.common import make_cfg, make_images, make_instances

SMALL = ["MODEL.BN_INCEPTION.WIDTH_FACTOR", 0.125, "MODEL.ZOOM_NETWORK.OUT_CHANNELS", 32,
         "MODEL.RETINANET.NUM_CONVS", 1, "MODEL.RETINANET.NORM", ""]  # fmt: skip


def test_levels_are_made_alike_by_a_convolution_each_and_stay_zero_in_the_padding():
    torch.manual_seed(0)
    network = build_backbone(make_cfg("shapes/zip_single_stage.yaml", *SMALL)).eval()
    for layer in network.projections:
        torch.nn.init.uniform_(layer.norm.bias, 0.1, 0.5)  # nothing inside the image is zero
    images = make_images((75, 100), (128, 160))
    with torch.no_grad():
        outputs = network(images.tensor)
        sizes = outputs.pop(IMAGE_SIZES)
        features = network.bottom_up(images.tensor)
        merged = network.zoom_maps([features[name] for name in network.in_features], sizes)
        for level, (name, y) in enumerate(outputs.items()):
            layer, x = network.projections[level], merged["attended"][level]
            expected = torch.einsum("oc,nchw->nohw", layer.weight[:, :, 0, 0], x)
            stride = 2 ** (3 + level)
            rows, columns = -(-75 // stride), -(-100 // stride)
            part = expected[:1, :, :rows, :columns]
            part = F.relu(F.group_norm(part, layer.norm.num_groups, layer.norm.weight,
                                       layer.norm.bias, layer.norm.eps))  # fmt: skip
            torch.testing.assert_close(y[:1, :, :rows, :columns], part, rtol=1e-4, atol=1e-5)
            assert y.shape[1] == 32 == network.output_shape()[name].channels
            assert not y[0, :, rows:].any() and not y[0, :, :, columns:].any()
    assert list(outputs) == ["zoom1", "zoom2", "zoom3"]


def test_without_the_key_the_maps_are_as_they_were_and_retinanet_says_what_it_needs():
    network = build_backbone(make_cfg("shapes/zip_rpn_only.yaml", *SMALL[:2]))
    assert len(network.projections) == 0
    cfg = make_cfg("zip_single_stage.yaml", "MODEL.ZOOM_NETWORK.OUT_CHANNELS", 0)
    with pytest.raises(ValueError, match="set MODEL.ZOOM_NETWORK.OUT_CHANNELS .256 in"):
        check_config(cfg)
    check_config(make_cfg("zip_single_stage.yaml"))
    check_config(make_cfg("zip_rpn_only.yaml"))


def make_input(seed):
    """A noise image with a bright and a dark object, of class 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(90, 160, (3, 96, 128), generator=generator).float()
    boxes = [[10 + 8 * seed, 12, 42 + 8 * seed, 44], [70, 20 + 8 * seed, 118, 68 + 8 * seed]]
    for value, (x1, y1, x2, y2) in zip((255.0, 0.0), boxes, strict=True):
        image[:, y1:y2, x1:x2] = value
    instances = make_instances((96, 128), boxes)
    instances.gt_classes = torch.tensor([0, 1])
    return {"image": image, "instances": instances, "height": 96, "width": 128}


@pytest.mark.slow
def test_learns_two_images():
    torch.manual_seed(0)
    model = build_model(make_cfg("shapes/zip_single_stage.yaml", *SMALL)).train()
    inputs = [make_input(0), make_input(1)]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    totals = []
    with EventStorage():
        for _ in range(60):
            losses = sum(model(inputs).values())
            optimizer.zero_grad()
            losses.backward()
            optimizer.step()
            totals.append(float(losses.detach()))
    assert totals[-1] < 0.3 * totals[0]
    with torch.no_grad():
        outputs = model.eval()(inputs)
    for output, x in zip(outputs, inputs, strict=True):
        found, objects = output["instances"], x["instances"]
        iou = pairwise_iou(objects.gt_boxes, found.pred_boxes)
        is_of_class = objects.gt_classes[:, None] == found.pred_classes
        best = (iou * is_of_class * (found.scores > 0.3)).amax(dim=1)
        assert best.min() > 0.6, best


def test_trains_and_evaluates_a_dataset(tiny_coco, tmp_path):
    num_classes = len(MetadataCatalog.get("coco_2017_train").thing_classes)
    cfg = make_cfg(
        "shapes/zip_single_stage.yaml", *SMALL, "MODEL.RETINANET.NUM_CLASSES", num_classes,
        "DATASETS.TRAIN", ("tiny_train",), "DATASETS.TEST", ("tiny_val",),
        "INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64, "SOLVER.IMS_PER_BATCH", 2,
        "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (), "DATALOADER.NUM_WORKERS", 0,
        "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0, "OUTPUT_DIR", str(tmp_path / "out"),
    )  # fmt: skip
    (tmp_path / "out").mkdir()
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert set(trainer._last_eval_results) == {"bbox"}
    assert 0 <= trainer._last_eval_results["bbox"]["AP50"] <= 100
