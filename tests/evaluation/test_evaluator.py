"""Tests of the evaluator: inputs, files, warnings and several processes."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.evaluation import COCOEvaluator, print_csv_format, verify_results
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import comm
from PIL import Image

from d2proposals.engine import launch_processes
from d2proposals.evaluation import ProposalEvaluator
from d2proposals.evaluation import evaluator as evaluator_module
from d2proposals.evaluation.simulation import simulate_dataset, simulate_outputs
from d2proposals.files.precomputed_format import read_proposal_file
from tests.common import make_cfg

SIZE = (100, 120)
GT_BOX = [10, 10, 60, 70]  # XYXY, large for neither side: 3000 square pixels


def make_records(number=2, boxes=(GT_BOX,), **extra):
    return [
        {
            "image_id": index,
            "height": SIZE[0],
            "width": SIZE[1],
            "annotations": [
                {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, **extra}
                for box in boxes
            ],
        }
        for index in range(number)
    ]


def make_output(boxes, logits=None, size=SIZE):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    logits = torch.zeros(len(boxes)) if logits is None else torch.tensor(logits)
    return {"proposals": Instances(size, proposal_boxes=Boxes(boxes), objectness_logits=logits)}


def evaluate(name, records, outputs, **arguments):
    evaluator = ProposalEvaluator(name, **arguments)
    evaluator.process(records, outputs)
    return evaluator.evaluate()


def evaluate_one(register_dataset, boxes, logits=None, limits=(1,), **extra):
    """Measures of one image with the ground truth GT_BOX."""
    records = make_records(1, **extra)
    output = make_output(boxes, logits)
    return evaluate(register_dataset(records), records, [output], limits=limits)["box_proposals"]


def test_equals_detectron2s_evaluator(register_dataset, tmp_path):
    records = simulate_dataset(12, 10)
    for record in records:
        for item in record["annotations"]:
            # Its conversion to COCO takes the area of the mask, or of the box without one.
            del item["area"]
    name = register_dataset(records, thing_classes=[str(index) for index in range(80)])
    evaluators = [
        ProposalEvaluator(name, limits=(100, 1000)),
        COCOEvaluator(name, tasks=("bbox",), output_dir=str(tmp_path)),
    ]
    for evaluator in evaluators:
        evaluator.reset()
        for input_, output in simulate_outputs(records, 200):
            evaluator.process([input_], [output])
    ours, theirs = (evaluator.evaluate()["box_proposals"] for evaluator in evaluators)
    assert set(theirs) == {f"AR{suffix}@{k}" for suffix in ("", "s", "m", "l") for k in (100, 1000)}
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, abs=1e-4)


def test_files(register_dataset, tmp_path):
    records = simulate_dataset(6, 8)
    name = register_dataset(records)
    outputs = [output for _, output in simulate_outputs(records, 50)]
    outputs[2] = make_output([], size=(480, 640))
    folder = tmp_path / "new" / "inference"
    results = evaluate(name, records, outputs, output_dir=str(folder))["box_proposals"]
    files = {"box_proposals.pkl", "proposal_results.json", "proposal_curves.png"}
    assert {path.name for path in folder.iterdir()} == files

    ids, boxes, logits = read_proposal_file(folder / "box_proposals.pkl")
    assert ids == list(range(6))
    assert boxes[2].shape == (0, 4) and logits[2].shape == (0,)
    for boxes_i, logits_i, output in zip(boxes, logits, outputs, strict=True):
        order = output["proposals"].objectness_logits.sort(descending=True)
        np.testing.assert_array_equal(logits_i, order.values)
        expected = output["proposals"].proposal_boxes.tensor[order.indices]
        np.testing.assert_array_equal(boxes_i, expected)

    content = json.loads((folder / "proposal_results.json").read_text())
    assert content["dataset"] == name and content["num_images"] == 6
    assert content["limits"] == [1, 10, 100, 300, 500, 1000]
    assert content["metrics_in_percent"] == results
    by_number = content["curves_in_percent"]["ar_by_num_proposals"]
    assert by_number["num_proposals"][-1] == 1000
    assert by_number["all"][-1] == pytest.approx(results["AR@1000"])
    by_iou = content["curves_in_percent"]["recall_by_iou"]
    assert by_iou["100"][0] == pytest.approx(results["Recall-IoU50@100"])
    assert by_iou["100"] == sorted(by_iou["100"], reverse=True)
    assert by_iou["iou"][0] == 0.5 and by_iou["iou"][-1] == 1
    assert len(by_iou["iou"]) == len(by_iou["100"])
    with Image.open(folder / "proposal_curves.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300


def test_results_are_what_detectron2_expects(register_dataset, caplog):
    cfg = make_cfg(None, "TEST.PROPOSALS.LIMITS", (10, 100))
    records = make_records()
    evaluator = ProposalEvaluator(cfg, register_dataset(records), output_dir="")
    evaluator.process(records, [make_output([GT_BOX]), make_output([])])
    results = evaluator.evaluate()
    cfg.TEST.EXPECTED_RESULTS = [["box_proposals", "AR@100", 50.0, 0.01]]
    assert verify_results(cfg, results)
    with caplog.at_level(logging.INFO, "detectron2"):
        caplog.clear()  # earlier tests may have set the loggers to levels that fill it before
        print_csv_format(results)
    names = caplog.messages[1].removeprefix("copypaste: ").split(",")
    assert names == "AR@10,ARm@10,AR@100,ARm@100,AUC,AUCm,ABO@10,ABO@100,MABO@10,MABO@100".split(
        ","
    )


def test_output_folder_of_a_configuration(register_dataset):
    cfg = make_cfg(None, "OUTPUT_DIR", "out", "DATASETS.TEST", ("one",))
    arguments = ProposalEvaluator.from_config(cfg, "one")
    assert arguments["output_dir"] == str(Path("out", "inference"))
    cfg.DATASETS.TEST = ("one", "two")
    assert ProposalEvaluator.from_config(cfg, "two")["output_dir"].endswith(
        str(Path("inference", "two"))
    )


def test_table_and_empty_area_ranges_are_logged(register_dataset, caplog):
    with caplog.at_level(logging.INFO, "d2proposals"):
        metrics = evaluate_one(register_dataset, [GT_BOX])
    assert "proposals |     AR |" in caplog.text
    assert "no ground truth for: small, large" in caplog.text
    assert metrics["ARm@1"] == 100 and "ARs@1" not in metrics and "ARl@1" not in metrics


@pytest.mark.parametrize("boxes", [(), (GT_BOX,)])
def test_without_ground_truth_there_are_no_measures(register_dataset, caplog, tmp_path, boxes):
    """No objects, and nothing but crowd."""
    records = make_records(boxes=boxes, iscrowd=1)
    outputs = [make_output([GT_BOX])] * 2
    with caplog.at_level(logging.INFO, "d2proposals"):
        results = evaluate(register_dataset(records), records, outputs, output_dir=str(tmp_path))
    assert results == {"box_proposals": {}}
    assert "no ground truth for: all, small, medium, large" in caplog.text
    content = json.loads((tmp_path / "proposal_results.json").read_text())
    assert content["curves_in_percent"]["ar_by_num_proposals"]["all"] is None


def test_dataset_without_annotations_is_only_written(register_dataset, tmp_path):
    records = [{"image_id": 5}]
    outputs = [make_output([GT_BOX])]
    assert evaluate(register_dataset(records), records, outputs, output_dir=str(tmp_path)) == {}
    assert read_proposal_file(tmp_path / "box_proposals.pkl").image_ids == [5]


def test_best_scores_count_and_equal_scores_keep_their_order(register_dataset):
    away = [70, 80, 100, 99]
    assert evaluate_one(register_dataset, [away, GT_BOX], [0.0, 1.0])["AR@1"] == 100


@pytest.mark.parametrize(("first", "expected"), [(GT_BOX, 100), ([70, 80, 100, 99], 0)])
def test_equal_scores_keep_their_order(register_dataset, first, expected):
    second = [70, 80, 100, 99] if first == GT_BOX else GT_BOX
    # Every other score is the highest one.
    boxes = [second, first, *[second] * 498]
    assert evaluate_one(register_dataset, boxes, [1.0, 2.0] * 250)["AR@1"] == expected


def test_categories_do_not_matter_for_average_recall(register_dataset):
    records = make_records(1, boxes=[GT_BOX, [70, 80, 100, 99]])
    records[0]["annotations"][1]["category_id"] = 7
    name = register_dataset(records)
    metrics = evaluate(name, records, [make_output([GT_BOX])], limits=(1,))["box_proposals"]
    assert metrics["AR@1"] == 50 and metrics["MABO@1"] == 50


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[0, 0, float("nan"), 5]], "1 of 2 proposals, in 1 images, are not finite"),
        ([[0, 0, float("inf"), 5]], "1 of 2 proposals, in 1 images, are not finite"),
        ([[50, 50, 10, 10]], "1 of 2 proposals, in 1 images, have a negative side"),
        ([[0, 0, 500, 500]], "1 of 2 proposals, in 1 images, reach outside"),
        ([[-50, 0, 50, 50]], "1 of 2 proposals, in 1 images, reach outside"),
    ],
)
def test_odd_boxes_are_named_and_keep_their_place(register_dataset, caplog, boxes, message):
    metrics = evaluate_one(register_dataset, [*boxes, GT_BOX], [1.0, 0.0], limits=(1, 2))
    assert caplog.text.count(message) == 1
    assert len(caplog.records) == 1
    assert metrics["AR@1"] == 0 and metrics["AR@2"] == 100


def test_score_that_is_not_a_number_goes_last(register_dataset, caplog):
    boxes = [[0, 0, 5, 5], GT_BOX]
    assert evaluate_one(register_dataset, boxes, [float("nan"), -9.0])["AR@1"] == 100
    assert "1 of 2 proposals, in 1 images, are not finite" in caplog.text


def test_unusable_boxes_are_not_written(register_dataset, tmp_path):
    records = make_records(1)
    output = make_output([[0, 0, float("nan"), 5], GT_BOX], [1.0, 0.0])
    evaluate(register_dataset(records), records, [output], output_dir=str(tmp_path))
    content = read_proposal_file(tmp_path / "box_proposals.pkl")
    assert content.boxes[0].tolist() == [GT_BOX] and content.objectness_logits[0].tolist() == [0]


def test_relative_boxes_are_named(register_dataset, caplog):
    evaluate_one(register_dataset, [[0.1, 0.1, 0.5, 0.7], [0, 0, 1, 1]])
    assert "2 of 2 proposals, in 1 images, lie within 2 pixels of the corner" in caplog.text


def test_good_boxes_raise_no_warning(register_dataset, caplog):
    # The second image has no proposals, the third has one at the corner among others.
    records = make_records(3)
    corner = [0, 0, 1, 1]
    outputs = [make_output([GT_BOX]), make_output([]), make_output([corner, [0, 0, 120.5, 100]])]
    name = register_dataset(records)
    evaluate(name, records, outputs, limits=(1, 2))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    evaluate(name, records, outputs, limits=(1, 2, 5))
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "the figures at 5 repeat those at 2" in warning.getMessage()


@pytest.mark.parametrize(
    ("name", "key", "is_advised"),
    [
        ("RPN", "MODEL.RPN.POST_NMS_TOPK_TEST", True),
        ("SPOP", "MODEL.SPOP.POST_NMS_TOPK_TEST", True),
        ("SPOP", None, False),  # which found fewer than it may
        ("DetectorNet", "MODEL.DETECTORNET.TOPK_PER_SCALE", True),
        ("PrecomputedProposals", "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST", True),
        ("SlidingWindows", None, False),
    ],
)
def test_a_limit_that_gave_no_more_proposals_is_named(
    register_dataset, caplog, name, key, is_advised
):
    records = make_records(1)
    outputs = [make_output([GT_BOX, [5, 5, 90, 80]])]
    cfg = make_cfg(None, "TEST.PROPOSALS.LIMITS", (1, 2, 5), "MODEL.PROPOSAL_GENERATOR.NAME", name)
    if key is not None:
        cfg.merge_from_list([key, 2])
    dataset = register_dataset(records)
    evaluator = ProposalEvaluator(cfg, dataset, distributed=False, output_dir="")
    evaluator.process(records, outputs)
    evaluator.evaluate()
    (message,) = [x.getMessage() for x in caplog.records if "repeat those" in x.getMessage()]
    assert message.endswith(f"; for more raise {key}") == is_advised
    assert is_advised or message.endswith("(TEST.PROPOSALS.LIMITS)")


def grid_boxes(num, sides=(30, 20)):
    """Boxes of one shape beside each other, the last two cut at the image's border."""
    left = np.arange(num) * 1.5
    boxes = np.stack([left, left * 0 + 5, left + sides[0], left * 0 + 5 + sides[1]], axis=1)
    boxes[-2:, 2] -= 12
    return boxes.tolist()


@pytest.mark.parametrize(
    ("num", "scores", "widened", "messages"),
    [
        (20, "equal", 0, ["all 40 proposals have the same score", "one width and height"]),
        (20, "equal", 1, ["all 40 proposals have the same score"]),
        (20, "one differs", 0, ["one width and height"]),
        # Too few to tell.
        (19, "equal", 0, []),
    ],
)
def test_a_collapse_is_named(register_dataset, caplog, num, scores, widened, messages):
    records = make_records(2)
    outputs = []
    for _ in records:
        boxes, logits = grid_boxes(num), [0.5] * num
        # With the two that are cut, more than a tenth.
        for box in boxes[:widened]:
            box[3] += 3
        logits[3] += scores == "one differs"
        outputs.append(make_output(boxes, logits))
    evaluate(register_dataset(records), records, outputs, limits=(1, 2))
    warnings = [r.getMessage() for r in caplog.records if "collapsed" in r.getMessage()]
    assert len(warnings) == len(messages)
    assert all(m in w for m, w in zip(messages, warnings, strict=True))


def test_proposals_of_another_frame_are_named(register_dataset, caplog):
    records = make_records(1)
    evaluate(register_dataset(records), records, [make_output([GT_BOX], size=(800, 960))])
    assert "the proposals of 1 images are for another size" in caplog.text


def test_images_that_were_not_seen_are_named_and_count(register_dataset, caplog):
    records = make_records(8)
    outputs = [make_output([GT_BOX])] * 2
    metrics = evaluate(register_dataset(records), records[:2], outputs)["box_proposals"]
    assert metrics["AR@100"] == 25
    assert "6 of 8 images" in caplog.text and "2, 3, 4, 5, 6, ..." in caplog.text


def test_images_of_another_dataset_are_named(register_dataset, caplog):
    records = make_records(1)
    inputs = [*records, {"image_id": "other"}]
    outputs = [make_output([GT_BOX])] * 2
    assert evaluate(register_dataset(records), inputs, outputs)["box_proposals"]["AR@1"] == 100
    assert "1 evaluated images do not belong to evaluated_dataset and are left out: other" in (
        caplog.text
    )


def test_outputs_without_proposals_are_named(register_dataset):
    records = make_records(1)
    evaluator = ProposalEvaluator(register_dataset(records))
    with pytest.raises(ValueError, match=r"they have \['instances'\]; set MODEL.META_ARCHITECTURE"):
        evaluator.process(records, [{"instances": Instances(SIZE)}])


def test_reset_and_no_outputs(register_dataset, caplog):
    records = make_records(1)
    evaluator = ProposalEvaluator(register_dataset(records))
    evaluator.process(records, [make_output([GT_BOX])])
    evaluator.reset()
    evaluator.process([], [])
    assert evaluator.evaluate() == {}
    assert "did not receive any outputs" in caplog.text


def test_half_precision_outputs(register_dataset):
    records = make_records(1)
    output = make_output([GT_BOX])
    proposals = output["proposals"]
    proposals.proposal_boxes.tensor = proposals.proposal_boxes.tensor.half()
    proposals.objectness_logits = proposals.objectness_logits.half().requires_grad_()
    assert evaluate(register_dataset(records), records, [output])["box_proposals"]["AR@1"] == 100


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_outputs_on_a_gpu(register_dataset):
    records = make_records()
    outputs = [{"proposals": make_output([GT_BOX])["proposals"].to("cuda")} for _ in records]
    assert evaluate(register_dataset(records), records, outputs)["box_proposals"]["AR@1"] == 100


def test_wrong_limits_are_named(register_dataset):
    with pytest.raises(ValueError, match="TEST.PROPOSALS.LIMITS"):
        ProposalEvaluator(register_dataset(make_records(1)), limits=(0,))


def evaluate_in_processes(folder):
    """Each process evaluates every other image and the first one."""
    from detectron2.data import DatasetCatalog

    records = simulate_dataset(5, 6)
    DatasetCatalog.register("evaluated_in_processes", lambda: records)
    rank, number = comm.get_rank(), comm.get_world_size()
    evaluator = ProposalEvaluator("evaluated_in_processes", limits=(10, 100))
    for index, (input_, output) in enumerate(simulate_outputs(records, 40)):
        if index % number == rank or index == 0:
            evaluator.process([input_], [output])
    results = evaluator.evaluate()
    Path(folder, f"{number}_{rank}.json").write_text(json.dumps(results))


@pytest.mark.slow
def test_several_processes_give_the_results_of_one(tmp_path):
    for number in (1, 2):
        launch_processes(evaluate_in_processes, str(tmp_path), number, dist_url="auto")
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert results["1_0"]["box_proposals"]["AR@100"] > 10
    assert results["2_0"] == results["1_0"]
    assert results["2_1"] == {}


def test_neither_a_picture_nor_a_full_disk_loses_the_numbers(
    register_dataset, tmp_path, monkeypatch, caplog
):
    def fails(*args, **kwargs):
        raise RuntimeError("no font\nanywhere")

    def is_full(*args, **kwargs):
        raise OSError("box_proposals.pkl cannot be written (No space left on device)")

    monkeypatch.setattr(evaluator_module, "plot_curves", fails)
    monkeypatch.setattr(evaluator_module, "write_proposal_file", is_full)
    records = make_records(1)
    name = register_dataset(records)
    with caplog.at_level(logging.WARNING):
        results = evaluate(name, records, [make_output([GT_BOX])], output_dir=str(tmp_path))
    assert results["box_proposals"]["AR@100"] == 100
    assert [path.name for path in tmp_path.iterdir()] == ["proposal_results.json"]
    assert "proposals are not kept: box_proposals.pkl cannot be written" in caplog.text
    assert "proposal_curves.png is not drawn (no font anywhere)" in caplog.text


def test_an_unwritable_folder_does_not_lose_the_numbers(register_dataset, tmp_path, caplog):
    (tmp_path / "file").write_text("here")
    records = make_records(1)
    name = register_dataset(records)
    folder = str(tmp_path / "file" / "inference")
    results = evaluate(name, records, [make_output([GT_BOX])], output_dir=folder)
    assert results["box_proposals"]["AR@100"] == 100
    for what in ("proposals", "results"):
        assert f"The {what} are not kept: {folder}" in caplog.text
