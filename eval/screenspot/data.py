"""The files of ScreenSpot-v2 and ScreenSpot-Pro.

Spec: key layout of the data sets OS-Copilot/ScreenSpot-v2 (`screenspot_{mobile,desktop,web}_v2.json`, boxes x, y, width, height
in pixels) and likaixin/ScreenSpot-Pro (a JSON file per application, boxes left, top, right, bottom in pixels).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KINDS = ("text", "icon")
IMAGE_FOLDERS = ("images", "screenspotv2_image", "ScreenSpot-v2_image", ".")

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Element:
    """One element to be found.

    Args:
        id: unique in the set.
        image: the screenshot's path.
        instruction: what to click.
        box: left, top, right, bottom in pixels of the screenshot, edges included.
        kind: "text" or "icon".
        platform: mobile, desktop or web; of Pro windows, macos or linux.
        facts: of Pro application, group and instruction_style; of v2 data_source.
        problem: why it cannot be asked; empty where it can.
    """

    id: str
    image: Path = Path()
    instruction: str = ""
    box: Box = (0.0, 0.0, 0.0, 0.0)
    kind: str = ""
    platform: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    problem: str = ""


def read_v2(folder: str | Path, images: str | Path | None = None) -> list[Element]:
    """All elements of ScreenSpot-v2; raises as `read_pro`."""
    return _read(Path(folder), images, "screenspot_*_v2.json", _v2)


def read_pro(folder: str | Path, images: str | Path | None = None) -> list[Element]:
    """All elements of ScreenSpot-Pro; records and files that cannot be used are among them, with their reason.

    Args:
        folder: holds the `*.json` files, or a folder `annotations` that does.
        images: holds the screenshots; by default the first of `images`, `screenspotv2_image` ... beside the files.

    Raises:
        FileNotFoundError: no such folder, or no annotation in it.
    """
    folder = Path(folder)
    inside = folder / "annotations"
    images = images if images is not None or not inside.is_dir() else _images(folder)
    return _read(inside if inside.is_dir() else folder, images, "*.json", _pro)


def _images(folder: Path) -> Path:
    return next(folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir())


def _read(
    folder: Path, images: str | Path | None, pattern: str, one: Callable[[Path, dict, Path], Element]
) -> list[Element]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}; give the one that holds {pattern}")
    files = sorted(folder.glob(pattern))
    if not files:
        raise FileNotFoundError(f"no file {pattern} in {str(folder)!r}; give the folder of the annotations")
    place = Path(images) if images is not None else _images(folder)
    out: list[Element] = []
    for file in files:
        try:
            records = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            out.append(Element(file.stem, problem=f"{file.name}: not readable as JSON: {error}"))
            continue
        if not isinstance(records, list):
            out.append(Element(file.stem, problem=f"{file.name}: no list of records"))
            continue
        out += [_checked(file, number, record, place, one) for number, record in enumerate(records)]
    return out


def _checked(file: Path, number: int, record: Any, images: Path, one: Callable[[Path, dict, Path], Element]) -> Element:
    name = f"{file.stem}/{number}"
    try:
        element = one(file, record, images)
    except (KeyError, TypeError, ValueError) as error:
        return Element(name, problem=f"{file.name}, record {number}: {type(error).__name__} {error}")
    problem = "" if element.image.is_file() else f"image missing: {element.image.name!r}"
    if element.kind not in KINDS:
        problem = f"type {element.kind!r}; possible are {', '.join(KINDS)}"
    return Element(**{**vars(element), "id": name, "problem": problem})


def _v2(file: Path, record: dict[str, Any], images: Path) -> Element:
    left, top, wide, high = map(float, record["bbox"])
    return Element(
        "",
        images / record["img_filename"],
        str(record["instruction"]),
        (left, top, left + wide, top + high),
        record["data_type"],
        file.stem.removeprefix("screenspot_").removesuffix("_v2"),
        dict(data_source=str(record.get("data_source", ""))),
    )


def _pro(file: Path, record: dict[str, Any], images: Path) -> Element:
    left, top, right, bottom = map(float, record["bbox"])
    told = ("application", "group", "instruction_style")
    return Element(
        "",
        images / record["img_filename"],
        str(record["instruction"]),
        (left, top, right, bottom),
        record["ui_type"],
        str(record.get("platform", "")),
        {key: str(record[key]) for key in told if record.get(key)},
    )
