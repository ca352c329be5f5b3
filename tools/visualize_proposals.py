"""Draw which objects the best proposals cover and which they miss, on images of a dataset.

From a model:

    python tools/visualize_proposals.py --config-file configs/shapes/zip_rpn_only.yaml \\
        --output proposals.png MODEL.WEIGHTS output/shapes/zip_rpn_only/model_final.pth

From a file of proposals in any known format (see evaluate_proposals.py), with masks if it has any:

    python tools/visualize_proposals.py --dataset coco_2017_val --proposals mask_proposals.json
    python tools/visualize_proposals.py --gt annotations.json --image-root images/ \\
        --proposals ours=results.json theirs=proposals.pkl --gallery gallery.html

--output is one sheet of all images as PNG. --gallery is one HTML file that needs no network: with
sliders for the number of proposals and the IoU, counts and recall as they move, several files side
by side, and a choice of objects by size, category and outcome (docs/toolbox.md).
"""

import argparse
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from detectron2.config import CfgNode

from d2proposals.data.dataset_reading import read_dataset
from d2proposals.data.mapper import ProposalDatasetMapper
from d2proposals.engine import check_datasets, load_config, load_trained_model
from d2proposals.engine.dataset_source import add_dataset_source, named_datasets
from d2proposals.engine.model_command import (
    PROPOSALS_ONLY,
    command_config,
    model_parser,
    running_command,
)
from d2proposals.evaluation.collection import to_cpu
from d2proposals.evaluation.ground_truth import (
    GroundTruth,
    encode_segmentation,
    load_ground_truth,
    warn_of_faults,
)
from d2proposals.evaluation.proposal_checks import ImageProposals, usable_of
from d2proposals.evaluation.proposal_runs import name_runs, read_run
from d2proposals.evaluation.unseen_categories import choose_unseen
from d2proposals.files.atomic_files import check_output_file
from d2proposals.files.image_files import read_rgb_image
from d2proposals.pictures.coverage import ProposalPicture, spread_evenly, write_contact_sheet
from d2proposals.pictures.gallery import write_gallery
from d2proposals.pictures.gallery_entries import GalleryImage, Objects

logger = logging.getLogger("d2proposals.visualize_proposals")


# From an image's dataset dictionary to its proposals, by descending score.
ProposalSource = Callable[[dict], ImageProposals]


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = model_parser(__doc__, "configuration of the model, or of the dataset", required=False)
    add_dataset_source(
        parser, "registered dataset (default: first of DATASETS.TEST)", required=False
    )
    parser.add_argument("--image-root", help="folder of the images of --gt (default: its own)")
    parser.add_argument(
        "--proposals", nargs="+", metavar="[NAME=]PATH",
        help="files of proposals instead of a model's; several are for the gallery",
    )  # fmt: skip
    unseen = parser.add_mutually_exclusive_group()
    unseen.add_argument(
        "--unseen", nargs="+", metavar="CATEGORY", help="in the gallery: not trained on"
    )
    unseen.add_argument("--seen", nargs="+", metavar="CATEGORY", help="or those trained on")
    parser.add_argument(
        "--num-images", type=int, help="evenly spread (default: 8, of a gallery 100)"
    )
    parser.add_argument(
        "--top", type=int, default=100, help="best proposals, where a gallery begins (default: 100)"
    )
    parser.add_argument(
        "--keep", type=int, default=1000, help="best proposals in a gallery (default: 1000)"
    )
    parser.add_argument("--iou", type=float, default=0.5, help="IoU of a covered object")
    parser.add_argument("--output", help="PNG file to write (default: proposals.png)")
    parser.add_argument("--gallery", metavar="FILE.html", help="HTML file to write")
    return parser


def load_model_source(cfg: CfgNode) -> ProposalSource:
    """Proposals of the configuration's model with the weights of ``MODEL.WEIGHTS``."""
    model = load_trained_model(cfg)
    mapper = ProposalDatasetMapper(cfg, False)

    @torch.no_grad()
    def propose(record: dict) -> ImageProposals:
        return to_cpu([model([mapper(record)])[0]["proposals"]])[0]

    return propose


def load_file_source(path: str, ground_truth: GroundTruth) -> ProposalSource:
    """Proposals of a file; none of an image that the file does not list."""
    run = read_run(path, ground_truth)
    for fault in run.faults:
        logger.warning(f"{path}: [{fault.name}] {fault.message}")
    place = {image_id: index for index, image_id in enumerate(ground_truth.image_ids)}
    return lambda record: run.proposals[place[record["image_id"]]]


def make_images(
    ground_truth: GroundTruth, records: Sequence[dict], sources: Sequence[ProposalSource]
) -> Iterator[GalleryImage]:
    """Some of the dataset's images with objects and proposals, one at a time."""
    index_of = {image_id: index for index, image_id in enumerate(ground_truth.image_ids)}
    ends = np.cumsum(ground_truth.num_per_image)
    for record in records:
        index = index_of[record["image_id"]]
        own = slice(ends[index] - ground_truth.num_per_image[index], ends[index])
        proposals = [source(record) for source in sources]
        size, gt_masks = ground_truth.image_sizes[index], None
        if ground_truth.segmentations is not None and any(x.masks is not None for x in proposals):
            gt_masks = [
                None if item is None else encode_segmentation(item, size, record["image_id"])
                for item in ground_truth.segmentations[index]
            ]
        yield GalleryImage(
            name=str(record["image_id"]),
            image=_read_image(record, size),
            proposals=proposals,
            objects=Objects(
                ground_truth.boxes[own],
                ground_truth.areas[own],
                ground_truth.categories[own],
                gt_masks,
            ),
        )


def picture_of(image: GalleryImage) -> ProposalPicture:
    """The first source's proposals of an image, for the sheet."""
    proposals, objects = image.proposals[0], image.objects
    # What is not finite or has a negative side can be neither matched nor drawn.
    usable = usable_of(proposals)
    masks, gt_masks = proposals.masks, objects.masks
    if masks is not None:
        masks = list(itertools.compress(masks, usable))
    # Where an object has no mask, coverage is by boxes.
    if gt_masks is not None and None in gt_masks:
        gt_masks = None
    return ProposalPicture(
        image.name, image.image, objects.boxes, proposals.boxes[usable], gt_masks, masks
    )


def _read_image(record: dict, size: tuple[int, int] | None) -> np.ndarray:
    """The image of a dataset dictionary, in the frame of its boxes."""
    if "file_name" not in record:
        raise SystemExit(f"Error: image {record['image_id']} has no 'file_name' to be drawn on.")
    if not os.path.isfile(record["file_name"]):
        raise SystemExit(
            f"Error: There is no image file {record['file_name']}: name the folder of the images "
            "with --image-root, or mend the dataset's."
        )
    return read_rgb_image(record["file_name"], size)


def find_dataset(args: argparse.Namespace, cfg: CfgNode) -> str:
    """Name of the dataset that the arguments or the configuration name."""
    names = named_datasets(args, args.image_root)
    if names:
        return names[0]
    if not (args.config_file and cfg.DATASETS.TEST):
        raise SystemExit(
            "Error: name a dataset: --dataset, --gt, or DATASETS.TEST of --config-file"
        )
    check_datasets([cfg.DATASETS.TEST[0]])
    return cfg.DATASETS.TEST[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    parser = build_parser()
    with running_command(parser, arguments) as args:
        if not args.config_file and not args.proposals:
            parser.error("name a model (--config-file) or a file of proposals (--proposals)")
        output = args.output or (None if args.gallery else "proposals.png")
        for path in filter(None, (output, args.gallery)):
            check_output_file(path)
        cfg = load_config(args)
        dataset = find_dataset(args, cfg)
        ground_truth = load_ground_truth(dataset, with_masks=True)
        warn_of_faults(ground_truth, dataset)
        records = read_dataset(dataset).records
        number = args.num_images
        if number is None:
            number = 8 if args.output or not args.gallery else 100
        chosen = [records[index] for index in spread_evenly(number, len(records))]
        title = args.gt or dataset
        if args.proposals:
            paths = name_runs(args.proposals)
            sources = {name: load_file_source(path, ground_truth) for name, path in paths.items()}
        else:
            cfg = command_config(args, *PROPOSALS_ONLY)
            sources = {Path(args.config_file).stem: load_model_source(cfg)}
        if output and len(sources) > 1:
            parser.error("the sheet shows one file of proposals; several are for --gallery alone")
        unseen = choose_unseen(ground_truth, args.unseen, args.seen)
        images = make_images(ground_truth, chosen, list(sources.values()))
        if output:
            images = list(images)
            pictures = [picture_of(image) for image in images]
            some = f", {len(chosen)} of {len(records)} images"
            sheet_title = f"{title}{some if len(chosen) < len(records) else ''}"
            write_contact_sheet(
                output, pictures, top=args.top, iou_threshold=args.iou, title=sheet_title
            )
            print(f"{output}: {len(chosen)} images of {title}")
        if args.gallery:
            if not ground_truth.is_annotated:
                images = (image._replace(objects=None) for image in images)
            write_gallery(
                args.gallery,
                images,
                runs=list(sources),
                title=f"Proposals on {os.path.basename(title)}",
                about=f"{len(chosen)} of the {len(records)} images of {title}",
                category_names=ground_truth.category_names,
                unseen=unseen,
                top=args.top,
                iou_threshold=args.iou,
                keep=args.keep,
            )
            print(f"{args.gallery}: {len(chosen)} images of {title}")


if __name__ == "__main__":
    main()
