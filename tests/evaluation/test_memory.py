"""Memory of an evaluation, which does not grow with the boxes that were measured."""

import gc
import pickle
import tracemalloc

import numpy as np
import pytest
from pycocotools import mask as mask_util

from d2proposals.evaluation import (
    ProposalEvaluator,
    evaluator,
    proposal_checks,
    proposal_spool,
    recall,
)
from d2proposals.evaluation.ground_truth import load_ground_truth
from d2proposals.evaluation.measurement import box_overlaps_of, measure
from d2proposals.evaluation.proposal_checks import ImageProposals, find_faults
from d2proposals.evaluation.proposal_runs import read_run
from d2proposals.evaluation.proposal_spool import OrderedProposals, ProposalSpool
from d2proposals.evaluation.simulation import simulate_dataset, simulate_outputs
from d2proposals.files import json_list
from d2proposals.files.conversion import read_proposals, write_proposals
from d2proposals.files.own_format import write_own_images
from d2proposals.files.precomputed_format import read_proposal_file, write_proposal_file
from d2proposals.files.proposal_set import ProposalSet

NUM_PROPOSALS = 1000
BYTES_OF_BOXES = NUM_PROPOSALS * 5 * 4


def random_proposals(number, generator, **fields):
    boxes = generator.random((number, 4), np.float32)
    boxes[:, 2:] += boxes[:, :2]
    return ImageProposals(boxes, generator.random(number, np.float32), (9, 9), **fields)


def peak_of_evaluation(register_dataset, num_images, folder):
    """Bytes at most in use beyond those from before, from the first output to the last file."""
    records = simulate_dataset(num_images, 2)
    name = register_dataset(records, f"of_{num_images}", thing_classes=list(map(str, range(80))))
    own = ProposalEvaluator(name, output_dir=str(folder / name))
    gc.collect()
    tracemalloc.start()
    try:
        for input_, output in simulate_outputs(records, NUM_PROPOSALS, 1):
            own.process([input_], [output])
        assert own.evaluate()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_grows_by_the_matches_of_an_image_not_by_its_boxes(
    register_dataset, tmp_path, monkeypatch
):
    monkeypatch.setattr(proposal_spool, "_BYTES_IN_MEMORY", 1 << 16)
    # Some images are matched at once, fewer here than either run has. No pictures.
    monkeypatch.setattr(recall, "_BLOCK_IMAGES", 8)
    monkeypatch.setattr(proposal_checks, "_IMAGES_AT_ONCE", 8)
    monkeypatch.setattr(evaluator, "plot_curves", lambda *arguments: None)
    few, many = (peak_of_evaluation(register_dataset, n, tmp_path) for n in (20, 100))
    assert (many - few) / 80 < BYTES_OF_BOXES / 4


def peak_of_written_masks(num_images, folder):
    """Bytes at most in use while an image after the other is written, and the file."""
    # Every second pixel: long runs of encodings.
    chequered = np.asfortranarray(np.indices((20, 20)).sum(axis=0) % 2, np.uint8)
    masks = [mask_util.encode(chequered)] * BOXES_OF_IMAGE
    proposals = random_proposals(BOXES_OF_IMAGE, np.random.default_rng(0))
    path = folder / f"{num_images}.json"
    images = (
        (image_id, proposals.boxes.copy(), proposals.objectness_logits.copy(), masks)
        for image_id in range(num_images)
    )
    gc.collect()
    tracemalloc.start()
    try:
        write_own_images(path, images)
        return tracemalloc.get_traced_memory()[1], path
    finally:
        tracemalloc.stop()


def test_masks_are_written_image_by_image(tmp_path):
    (few, _), (many, path) = (peak_of_written_masks(n, tmp_path) for n in (5, 50))
    assert many < 1.2 * few < path.stat().st_size / 4
    # As the file of all of them at once.
    written = read_proposals(path)
    write_proposals(tmp_path / "all.json", written, "d2proposals")
    assert (tmp_path / "all.json").read_bytes() == path.read_bytes()
    assert len(written.masks) == 50 and len(written.masks[49]) == BOXES_OF_IMAGE


# What a box of a file may take at most: coordinates and score are 24 bytes as they are kept,
# 20 as pickles have them and 40 to 110 as JSON's text has them.
BYTES_OF_BOX_IN_FILE = 40
BOXES_OF_IMAGE = 200


def peak_of_file(register_dataset, num_images, folder, format_name):
    """Bytes at most in use while a file is read, checked and measured."""
    records = simulate_dataset(num_images, 1, crowd_share=0)
    name = register_dataset(records, f"{format_name}_{num_images}", thing_classes=["a"] * 80)
    ground_truth = load_ground_truth(name)
    generator = np.random.default_rng(0)
    boxes = [100 * generator.random((BOXES_OF_IMAGE, 4), np.float32) for _ in records]
    scores = [generator.random(BOXES_OF_IMAGE) for _ in records]
    for boxes_i in boxes:
        boxes_i[:, 2:] += boxes_i[:, :2]
    path = folder / f"{name}.of"
    written = ProposalSet("d2proposals", ground_truth.image_ids, boxes, scores)
    is_lines = format_name == "lines"
    write_proposals(path, written, "coco" if is_lines else format_name, ground_truth.images)
    if is_lines:
        path.write_text(path.read_text().strip("[]\n").replace(",\n", "\n") + "\n")
    del written, boxes, scores
    gc.collect()
    tracemalloc.start()
    try:
        run = read_run(str(path), ground_truth)
        overlaps = box_overlaps_of(ground_truth, run.proposals, run.usable)
        assert measure(overlaps, ground_truth, (100,)).metrics
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "format_name", ["detectron2", "coco", "lines", "mmdet3", "mmdet2", "d2proposals"]
)
def test_a_file_is_in_memory_once(register_dataset, tmp_path, monkeypatch, format_name):
    monkeypatch.setattr(proposal_spool, "_BYTES_IN_MEMORY", 1 << 14)
    monkeypatch.setattr(json_list, "_CHARACTERS", 1 << 12)
    monkeypatch.setattr(recall, "_BLOCK_IMAGES", 4)
    monkeypatch.setattr(proposal_checks, "_IMAGES_AT_ONCE", 4)
    few, many = (peak_of_file(register_dataset, n, tmp_path, format_name) for n in (10, 50))
    assert (many - few) / (40 * BOXES_OF_IMAGE) < BYTES_OF_BOX_IN_FILE


@pytest.mark.parametrize("bytes_in_memory", [0, 1, 1 << 25])
def test_a_spool_gives_back_what_it_got(monkeypatch, bytes_in_memory):
    monkeypatch.setattr(proposal_spool, "_BYTES_IN_MEMORY", bytes_in_memory)
    generator = np.random.default_rng(0)
    spool, kept = ProposalSpool(), {}
    masks = [{"size": [9, 9], "counts": b"abc"}]
    for image_id, number in ((7, 3), ("x", 0), (8, 5), (7, 2)):
        kept[image_id] = random_proposals(number, generator)
        spool.add(image_id, kept[image_id])
        # Reading in between moves the place in the file.
        assert len(spool[image_id].boxes) == number
    assert not spool.has_masks
    kept[9] = random_proposals(1, generator, masks=masks)
    spool.add(9, kept[9])
    assert spool.has_masks and list(spool) == [7, "x", 8, 9] and len(spool) == 4
    ordered = OrderedProposals(spool, [8, "unseen", 7, "x", 9])
    assert ordered.numbers == [5, 0, 2, 0, 1]
    for proposals, image_id in zip(ordered, (8, None, 7, "x", 9), strict=True):
        expected = kept.get(image_id, proposal_spool.NO_PROPOSALS)
        assert proposals.boxes.flags.writeable
        np.testing.assert_array_equal(proposals.boxes, expected.boxes)
        np.testing.assert_array_equal(proposals.objectness_logits, expected.objectness_logits)
        assert proposals[2:] == expected[2:]


def test_faults_do_not_depend_on_how_many_images_are_checked_at_once(monkeypatch, register_dataset):
    records = simulate_dataset(11, 2)
    ground_truth = load_ground_truth(register_dataset(records))
    generator = np.random.default_rng(0)
    proposals = [random_proposals(number, generator) for number in range(10, 21)]
    proposals[3].boxes[:1] = np.nan
    proposals[4].boxes[:2, 2] = -1
    proposals[9].boxes[:1, 2] = 1e6
    found = []
    for number in (1, 4, 100):
        monkeypatch.setattr(proposal_checks, "_IMAGES_AT_ONCE", number)
        usable, faults = find_faults(proposals, ground_truth)
        found.append((np.concatenate(usable).tolist(), faults))
    assert found[0] == found[1] == found[2]
    names = [fault.name for fault in found[0][1]]
    assert names == [
        *("not-finite", "negative-side", "outside", "relative", "other-size", "one-shape")
    ]
    assert found[0][0].count(False) == 3


def test_the_file_is_that_of_one_dump(tmp_path):
    """Detectron2's reader and any other unpickle it; ids, types and layout are as ever."""
    generator = np.random.default_rng(0)
    arrays = [random_proposals(number, generator) for number in (3, 0, 2)]
    path = tmp_path / "a.pkl"
    # Generators, columns in memory, float64: what is asked for once and made fitting.
    boxes = (np.asfortranarray(x.boxes, np.float64) for x in arrays)
    write_proposal_file(path, [5, "b", 7], boxes, (x.objectness_logits for x in arrays))
    data = pickle.loads(path.read_bytes())
    assert list(data) == ["ids", "boxes", "objectness_logits", "bbox_mode"]
    assert data["ids"] == [5, "b", 7] and data["bbox_mode"] == 0
    for own, loaded in zip(arrays, data["boxes"], strict=True):
        assert loaded.dtype == np.float32
        np.testing.assert_array_equal(loaded, own.boxes)
    assert read_proposal_file(path).image_ids == [5, "b", 7]
    with pytest.raises(ValueError, match="image b has 1 boxes but 0 objectness logits"):
        write_proposal_file(
            path, [5, "b"], [arrays[0].boxes, arrays[0].boxes[:1]],
            [arrays[0].objectness_logits, np.zeros(0)],
        )  # fmt: skip
    assert len(pickle.loads(path.read_bytes())["ids"]) == 3  # the file from before
