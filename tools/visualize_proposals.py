"""Draw which objects the best proposals cover and which they miss, on images of a dataset.

From a model:

    python tools/visualize_proposals.py --config-file configs/shapes/zip_rpn_only.yaml \\
        --output proposals.png MODEL.WEIGHTS output/shapes/zip_rpn_only/model_final.pth

From a file of proposals in any known format (see evaluate_proposals.py), with masks if it has any:

    python tools/visualize_proposals.py --dataset coco_2017_val --proposals mask_proposals.json
    python tools/visualize_proposals.py --gt annotations.json --image-root images/ \\
        --proposals results.json --gallery gallery.html --num-images 100

--output is one sheet of all images as PNG; --gallery is one HTML file that needs no network.
"""

import argparse
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from detectron2.config import CfgNode

from d2proposals.data.dataset_reading import read_dataset
from d2proposals.data.mapper import ProposalDatasetMapper
from d2proposals.engine import check_datasets, load_config, load_trained_model
from d2proposals.engine.model_command import (
    PROPOSALS_ONLY,
    command_config,
    model_parser,
    running_command,
)
from d2proposals.evaluation.ground_truth import (
    GroundTruth,
    encode_segmentation,
    load_ground_truth,
    warn_of_faults,
)
from d2proposals.evaluation.proposal_alignment import align_to_dataset
from d2proposals.files.annotation_file import register_annotation_file
from d2proposals.files.conversion import read_proposals
from d2proposals.files.image_files import read_rgb_image
from d2proposals.pictures.coverage import ProposalPicture, spread_evenly, write_contact_sheet
from d2proposals.pictures.gallery import write_gallery

logger = logging.getLogger("d2proposals.visualize_proposals")


class Proposals(NamedTuple):
    """Proposals of an image, best score first.

    Attributes:
        boxes: (R, 4) XYXY in pixels of the original image.
        masks: R run-length encodings, None without masks.
    """

    boxes: np.ndarray
    masks: list[dict[str, Any]] | None


# From an image's dataset dictionary to its proposals.
ProposalSource = Callable[[dict], Proposals]


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = model_parser(__doc__, "configuration of the model, or of the dataset", required=False)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--dataset", help="registered dataset (default: first of DATASETS.TEST)")
    source.add_argument("--gt", metavar="FILE.json", help="COCO-style annotations instead")
    parser.add_argument("--image-root", help="folder of the images of --gt (default: its own)")
    parser.add_argument("--proposals", help="file of proposals to draw instead of a model's")
    parser.add_argument("--num-images", type=int, default=8, help="evenly spread (default: 8)")
    parser.add_argument("--top", type=int, default=100, help="best proposals (default: 100)")
    parser.add_argument("--iou", type=float, default=0.5, help="IoU of a covered object")
    parser.add_argument("--output", help="PNG file to write (default: proposals.png)")
    parser.add_argument("--gallery", metavar="FILE.html", help="HTML file to write")
    return parser


def load_model_source(cfg: CfgNode) -> ProposalSource:
    """Proposals of the configuration's model with the weights of ``MODEL.WEIGHTS``."""
    model = load_trained_model(cfg)
    mapper = ProposalDatasetMapper(cfg, False)

    @torch.no_grad()
    def propose(record: dict) -> Proposals:
        proposals = model([mapper(record)])[0]["proposals"]
        order = proposals.objectness_logits.argsort(descending=True, stable=True)
        masks = None
        if proposals.has("proposal_masks"):
            masks = proposals.proposal_masks[order].to_rle(*proposals.image_size)
        return Proposals(proposals.proposal_boxes.tensor[order].cpu().numpy(), masks)

    return propose


def load_file_source(path: str, ground_truth: GroundTruth) -> ProposalSource:
    """Proposals of a file; none of an image that the file does not list."""
    aligned, faults = align_to_dataset(read_proposals(path, ground_truth.images), ground_truth)
    for fault in faults:
        logger.warning(f"{path}: [{fault.name}] {fault.message}")
    by_id = dict(zip(ground_truth.image_ids, aligned, strict=True))

    def look_up(record: dict) -> Proposals:
        proposals = by_id[record["image_id"]]
        # What is not finite or has a negative side can be neither matched nor drawn.
        usable = np.isfinite(proposals.boxes).all(axis=1)
        usable &= (proposals.boxes[:, 2:] >= proposals.boxes[:, :2]).all(axis=1)
        masks = proposals.masks
        if masks is not None:
            masks = [mask for mask, is_usable in zip(masks, usable, strict=True) if is_usable]
        return Proposals(proposals.boxes[usable], masks)

    return look_up


def make_pictures(
    ground_truth: GroundTruth, records: Sequence[dict], source: ProposalSource
) -> Iterator[ProposalPicture]:
    """The pictures of some of the dataset's images, one at a time."""
    index_of = {image_id: index for index, image_id in enumerate(ground_truth.image_ids)}
    boxes = ground_truth.boxes_by_image()
    for record in records:
        index = index_of[record["image_id"]]
        proposals = source(record)
        gt_masks = None
        if proposals.masks is not None and ground_truth.segmentations is not None:
            size, image_id = ground_truth.image_sizes[index], record["image_id"]
            segmentations = ground_truth.segmentations[index]
            # Where an object has no mask, coverage is by boxes.
            if all(item is not None for item in segmentations):
                gt_masks = [encode_segmentation(item, size, image_id) for item in segmentations]
        yield ProposalPicture(
            name=str(record["image_id"]),
            image=_read_image(record, ground_truth.image_sizes[index]),
            gt_boxes=boxes[index],
            proposal_boxes=proposals.boxes,
            gt_masks=gt_masks,
            proposal_masks=proposals.masks,
        )


def _read_image(record: dict, size: tuple[int, int] | None) -> np.ndarray:
    """The image of a dataset dictionary, in the frame of its boxes."""
    if "file_name" not in record:
        raise ValueError(f"image {record['image_id']} has no 'file_name', which a picture needs")
    return read_rgb_image(record["file_name"], size)


def find_dataset(args: argparse.Namespace, cfg: CfgNode) -> str:
    """Name of the dataset that the arguments or the configuration name."""
    if args.gt:
        return register_annotation_file(args.gt, args.image_root)
    if not args.dataset and not (args.config_file and cfg.DATASETS.TEST):
        raise SystemExit(
            "Error: name a dataset: --dataset, --gt, or DATASETS.TEST of --config-file"
        )
    dataset = args.dataset or cfg.DATASETS.TEST[0]
    check_datasets([dataset])
    return dataset


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    parser = build_parser()
    with running_command(parser, arguments) as args:
        if not args.config_file and not args.proposals:
            parser.error("name a model (--config-file) or a file of proposals (--proposals)")
        cfg = load_config(args)
        dataset = find_dataset(args, cfg)
        ground_truth = load_ground_truth(dataset, with_masks=True)
        warn_of_faults(ground_truth, dataset)
        records = read_dataset(dataset).records
        chosen = [records[index] for index in spread_evenly(args.num_images, len(records))]
        if args.proposals:
            source = load_file_source(args.proposals, ground_truth)
        else:
            source = load_model_source(command_config(args, *PROPOSALS_ONLY))
        title = args.gt or dataset
        settings = {"top": args.top, "iou_threshold": args.iou, "title": title}
        output = args.output or (None if args.gallery else "proposals.png")
        pictures = make_pictures(ground_truth, chosen, source)
        if output:
            pictures = list(pictures)
            write_contact_sheet(output, pictures, **settings)
            print(f"{output}: {len(chosen)} images of {title}")
        if args.gallery:
            write_gallery(args.gallery, pictures, **settings)
            print(f"{args.gallery}: {len(chosen)} images of {title}")


if __name__ == "__main__":
    main()
