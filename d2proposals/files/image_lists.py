"""Lists of image ids, and the part of a COCO-style annotation file that one names."""

import json
import os
from pathlib import Path
from typing import Any


def read_ids(path: str | os.PathLike, name: str | None) -> set[int | str]:
    """The image ids of a file.

    Raises:
        ValueError: it has no such list.
    """
    content = read_json(path)
    if isinstance(content, dict):
        if name not in content:
            raise ValueError(f"{path} has the lists {', '.join(content)}: name one by --list.")
        content = content[name]
    if not isinstance(content, list):
        raise ValueError(f"{path} has no list of image ids.")
    return set(content)


def read_json(path: str | os.PathLike) -> Any:
    """The content of a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing.")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def select_images(content: Any, ids: set[int | str]) -> dict[str, Any]:
    """A COCO-style file's content with the chosen images and their annotations.

    Raises:
        ValueError: it lacks the lists ``images`` and ``annotations``, ids in them, or a chosen
            image.
    """
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise ValueError("the annotations have no lists 'images' and 'annotations'.")
    for name, key in (("images", "id"), ("annotations", "image_id")):
        if not all(isinstance(item, dict) and key in item for item in content[name]):
            raise ValueError(f"one of the {name} has no '{key}'.")
    images = [image for image in content["images"] if image["id"] in ids]
    if missing := ids - {image["id"] for image in images}:
        raise ValueError(
            f"{len(missing)} of {len(ids)} images are not in the annotations, for example "
            f"{min(missing, key=str)}."
        )
    annotations = [item for item in content["annotations"] if item["image_id"] in ids]
    return {**content, "images": images, "annotations": annotations}
