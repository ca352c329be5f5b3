"""Draw which objects the best proposals cover and which they miss, on images of a dataset.

From a model:

    python tools/visualize_proposals.py --config-file configs/shapes/zip_rpn_only.yaml \\
        --output proposals.png MODEL.WEIGHTS output/shapes/zip_rpn_only/model_final.pth

From a file of proposals in Detectron2's precomputed format, such as box_proposals.pkl of an
evaluation (the configuration then only names the dataset):

    python tools/visualize_proposals.py --config-file configs/shapes/zip_rpn_only.yaml \\
        --proposals output/shapes/zip_rpn_only/inference/box_proposals.pkl
"""

import argparse
import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from d2proposals.data.image_files import read_rgb_image
from d2proposals.data.mapper import ProposalDatasetMapper
from d2proposals.engine import (
    ProposalCheckpointer,
    bad_input_in_one_line,
    check_config,
    check_datasets,
    fit_to_device,
    load_config,
)
from d2proposals.evaluation.pictures import (
    ProposalPicture,
    object_boxes,
    spread_evenly,
    write_contact_sheet,
)
from d2proposals.proposals.file_formats import read_proposal_file

logger = logging.getLogger("d2proposals.visualize_proposals")

# From an image's dataset dictionary to its boxes (R, 4), best score first.
ProposalSource = Callable[[dict], np.ndarray]


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="configuration of the model")
    parser.add_argument("--dataset", help="registered dataset (default: first of DATASETS.TEST)")
    parser.add_argument("--proposals", help="file of proposals to draw instead of a model's")
    parser.add_argument("--num-images", type=int, default=8, help="evenly spread (default: 8)")
    parser.add_argument("--top", type=int, default=100, help="best proposals (default: 100)")
    parser.add_argument("--iou", type=float, default=0.5, help="IoU of a covered object")
    parser.add_argument("--output", default="proposals.png", help="PNG file to write")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides")
    return parser


def load_model_source(cfg: CfgNode) -> ProposalSource:
    """Proposals of the configuration's model with the weights of ``MODEL.WEIGHTS``."""
    fit_to_device(cfg)
    # A detector's proposals are those of the proposal network inside it.
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    check_config(cfg)
    model = build_model(cfg).eval()
    if not cfg.MODEL.WEIGHTS:
        logger.warning("Drawing proposals of random weights: name a checkpoint in MODEL.WEIGHTS.")
    ProposalCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    mapper = ProposalDatasetMapper(cfg, False)

    @torch.no_grad()
    def propose(record: dict) -> np.ndarray:
        proposals = model([mapper(record)])[0]["proposals"]
        order = proposals.objectness_logits.argsort(descending=True, stable=True)
        return proposals.proposal_boxes.tensor[order].cpu().numpy()

    return propose


def load_file_source(path: str) -> ProposalSource:
    """Proposals of a file; none of an image that the file does not list."""
    content = read_proposal_file(path)
    # Detectron2 compares ids as text.
    boxes_by_id = {
        str(image_id): boxes_i[np.argsort(-logits_i, kind="stable")]
        for image_id, boxes_i, logits_i in zip(*content, strict=True)
    }

    def look_up(record: dict) -> np.ndarray:
        image_id = str(record["image_id"])
        if image_id not in boxes_by_id:
            logger.warning(f"{path} has no proposals of image {image_id}.")
        return boxes_by_id.get(image_id, np.zeros((0, 4), np.float32))

    return look_up


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = build_parser()
    args = parser.parse_args(arguments)
    with bad_input_in_one_line():
        cfg = load_config(args)
        if not args.dataset and not cfg.DATASETS.TEST:
            parser.error("DATASETS.TEST is empty: name a dataset with --dataset")
        dataset = args.dataset or cfg.DATASETS.TEST[0]
        check_datasets([dataset])
        records = DatasetCatalog.get(dataset)
        chosen = [records[index] for index in spread_evenly(args.num_images, len(records))]
        source = load_file_source(args.proposals) if args.proposals else load_model_source(cfg)
        pictures = [
            ProposalPicture(
                name=str(record["image_id"]),
                image=read_rgb_image(record["file_name"]),
                gt_boxes=object_boxes(record),
                proposal_boxes=source(record),
            )
            for record in chosen
        ]
        write_contact_sheet(
            args.output, pictures, top=args.top, iou_threshold=args.iou, title=dataset
        )
    print(f"{args.output}: {len(pictures)} images of {dataset}")


if __name__ == "__main__":
    main()
