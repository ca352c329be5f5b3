"""Write four photographs that scikit-image carries, with objects drawn by hand, as a dataset.

    python demo/photographs.py photographs
    python tools/visualize_proposals.py --gt photographs/objects.json \\
        --config-file configs/photos/rpn_mobilenet_v2.yaml --image-root photographs \\
        --gallery gallery.html MODEL.WEIGHTS model.pth

For a look at proposals where no dataset is at hand; too few objects to measure anything.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import skimage.data
from PIL import Image

from d2proposals.engine import bad_input_in_one_line
from d2proposals.files.atomic_files import atomic_write, write_json

# By photograph (a function of skimage.data) the objects: category and XYXY box in pixels.
OBJECTS: dict[str, list[tuple[str, tuple[int, int, int, int]]]] = {
    "astronaut": [
        ("person", (18, 14, 366, 512)),
        ("head", (152, 14, 300, 190)),
        ("helmet", (278, 344, 510, 512)),
        ("space shuttle", (350, 3, 472, 292)),
        ("flag", (0, 0, 125, 470)),
        ("badge", (137, 347, 210, 425)),
        ("badge", (278, 338, 332, 378)),
    ],
    "chelsea": [
        ("cat", (0, 0, 395, 300)),
        ("eye", (135, 85, 212, 150)),
        ("eye", (296, 108, 348, 165)),
        ("nose", (226, 222, 296, 268)),
    ],
    "coffee": [
        ("saucer", (78, 65, 480, 388)),
        ("cup", (172, 17, 412, 300)),
        ("spoon", (318, 68, 424, 330)),
    ],
    "rocket": [
        ("rocket", (308, 127, 340, 410)),
        ("tower", (0, 0, 88, 427)),
        ("tower", (170, 125, 207, 380)),
        ("tower", (440, 125, 475, 385)),
        ("tower", (560, 0, 640, 427)),
    ],
}


def write_photographs(folder: Path) -> None:
    """Write the photographs as PNG files and ``objects.json``, COCO-style, into a folder.

    Raises:
        OSError: in one line, if they cannot be written.
    """
    names = sorted({name for objects in OBJECTS.values() for name, _ in objects})
    images, annotations = [], []
    for image_id, (photograph, objects) in enumerate(OBJECTS.items(), 1):
        pixels = getattr(skimage.data, photograph)()
        height, width = pixels.shape[:2]
        file_name = f"{photograph}.png"
        with atomic_write(folder / file_name, "wb") as file:
            Image.fromarray(pixels).save(file, format="PNG")
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        annotations += [
            {"image_id": image_id, "category_id": 1 + names.index(name),
             "bbox": [x1, y1, x2 - x1, y2 - y1]}
            for name, (x1, y1, x2, y2) in objects
        ]  # fmt: skip
    for annotation_id, annotation in enumerate(annotations, 1):
        annotation["id"] = annotation_id
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_json(folder / "objects.json", content)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="to write into")
    folder = Path(parser.parse_args(arguments).folder)
    with bad_input_in_one_line():
        write_photographs(folder)
    print(f"{folder}: {len(OBJECTS)} photographs and objects.json")


if __name__ == "__main__":
    main()
