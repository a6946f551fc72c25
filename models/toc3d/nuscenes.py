"""Frames of a nuScenes folder, read from its JSON tables and images without the devkit; for those who have the data."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mmkv.models.toc3d.scenes import Frame

TABLES = (
    "scene",
    "sample",
    "sample_data",
    "sample_annotation",
    "ego_pose",
    "calibrated_sensor",
    "sensor",
    "instance",
    "category",
)
CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
PREFIXES = {  # the ten classes of the detection task, by the start of the category's name
    "car": ("vehicle.car",),
    "truck": ("vehicle.truck",),
    "construction_vehicle": ("vehicle.construction",),
    "bus": ("vehicle.bus.",),
    "trailer": ("vehicle.trailer",),
    "barrier": ("movable_object.barrier",),
    "motorcycle": ("vehicle.motorcycle",),
    "bicycle": ("vehicle.bicycle",),
    "pedestrian": tuple(
        f"human.pedestrian.{who}" for who in ("adult", "child", "construction_worker", "police_officer")
    ),
    "traffic_cone": ("movable_object.trafficcone",),
}
CLASSES = tuple(PREFIXES)
LONGEST = 1.5  # s between two keyframes from which a velocity is taken


def class_of(category: str) -> int:
    """Index in CLASSES of a category's name, -1 for those outside the detection task."""
    found = [i for i, starts in enumerate(PREFIXES.values()) if category.startswith(starts)]
    return found[0] if found else -1


def rotation(w: float, x: float, y: float, z: float) -> np.ndarray:
    """`[3, 3]` of a quaternion in nuScenes' order; normalised."""
    w, x, y, z = np.array([w, x, y, z], dtype=float) / np.linalg.norm([w, x, y, z])
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def rigid(row: dict) -> np.ndarray:
    """`[4, 4]` of a table row with `rotation` and `translation`."""
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation(*row["rotation"]), row["translation"]
    return pose


class NuScenes:
    """Scenes of a nuScenes folder as frames for `Detector`.

    Args:
        root: folder with the tables' folder, `samples` and so on.
        version: name of the tables' folder.
        image: height, width in px: images are resized to this width and lose rows at the top.
        cameras: channels, in the order of the views.
        mean, std: of pixels in [0, 1], per channel or one.

    Raises:
        FileNotFoundError: the folder, a table or an image is missing.
        ValueError: a table is not a list of rows, or a sample lacks a camera.
    """

    def __init__(
        self,
        root: str | Path,
        version: str = "v1.0-mini",
        image: tuple[int, int] = (320, 800),
        cameras: tuple[str, ...] = CAMERAS,
        mean=0.5,
        std=0.5,
    ):
        self.root, self.image, self.cameras, self.mean, self.std = Path(root), image, cameras, mean, std
        if not self.root.is_dir():
            raise FileNotFoundError(f"no nuScenes folder at {root}; download one from nuscenes.org and give its path")
        tables = {name: _table(self.root / version, name) for name in TABLES}
        self._rows = {name: {row["token"]: row for row in rows} for name, rows in tables.items()}
        self._data = defaultdict(dict)
        for row in tables["sample_data"]:
            if row["is_key_frame"]:
                calibrated = self._row("calibrated_sensor", row["calibrated_sensor_token"])
                channel = self._row("sensor", calibrated["sensor_token"])["channel"]
                self._data[row["sample_token"]][channel] = row
        self._objects = defaultdict(list)
        for row in tables["sample_annotation"]:
            self._objects[row["sample_token"]].append(row)

    def scenes(self) -> list[str]:
        """Names."""
        return [row["name"] for row in self._rows["scene"].values()]

    def samples(self, scene: str) -> list[str]:
        """Tokens of a scene's keyframes, in order of time."""
        rows = [row for row in self._rows["scene"].values() if row["name"] == scene]
        if not rows:
            raise ValueError(f"no scene {scene!r}; possible are {', '.join(self.scenes()[:10])}")
        token, found = rows[0]["first_sample_token"], []
        while token:
            found.append(token)
            token = self._row("sample", token)["next"]
        return found

    def frames(self, scene: str):
        """Yields each keyframe of a scene as a `Frame`; the scene's first has time 0."""
        samples = self.samples(scene)
        start = self._row("sample", samples[0])["timestamp"]
        for token in samples:
            yield self.frame(token, start)

    def frame(self, sample: str, start: int = 0) -> Frame:
        """One keyframe; time in s since `start`, in microseconds as in the tables.

        Boxes have the size order of `Frame` (length, width, height), velocity 0 where the tables tell none.
        """
        data = self._data[sample]
        missing = [channel for channel in self.cameras if channel not in data]
        if missing:
            raise ValueError(f"sample {sample} has no keyframe of {missing[0]}; it has {', '.join(sorted(data))}")
        pose = rigid(self._row("ego_pose", data.get("LIDAR_TOP", data[self.cameras[0]])["ego_pose_token"]))
        images, intrinsics, camera = zip(*(self._view(data[channel], pose) for channel in self.cameras))
        boxes, labels = self._boxes(sample, pose)
        intrinsics, camera = np.stack(intrinsics), np.stack(camera)
        time = (self._row("sample", sample)["timestamp"] - start) / 1e6

        def tensor(x):
            return torch.tensor(x, dtype=torch.float32)

        return Frame(
            torch.stack(images),
            tensor(intrinsics),
            tensor(camera),
            tensor(pose),
            tensor(time),
            tensor(boxes),
            torch.tensor(labels, dtype=torch.int64),
            [tensor(extents(boxes, k, c, self.image)) for k, c in zip(intrinsics, camera)],
        )

    def _row(self, table: str, token: str) -> dict:
        try:
            return self._rows[table][token]
        except KeyError:
            raise ValueError(f"{table}.json has no row {token!r}; the folder's tables do not fit together") from None

    def _view(self, row: dict, pose: np.ndarray):
        """Image `[3, h, w]`, intrinsics of it, camera to the sample's ego."""
        path = self.root / row["filename"]
        if not path.is_file():
            raise FileNotFoundError(f"no image at {path}; the tables name it, unpack the samples as well")
        calibrated = self._row("calibrated_sensor", row["calibrated_sensor_token"])
        # Each camera fires at its own time, when the ego is elsewhere.
        own = rigid(self._row("ego_pose", row["ego_pose_token"])) @ rigid(calibrated)
        height, width = self.image
        with Image.open(path) as file:
            scale = width / file.width
            tall = max(height, round(file.height * scale))
            picture = file.convert("RGB").resize((width, tall), Image.Resampling.BILINEAR)
            rows = np.array([1, tall / file.height, 1])
        pixels = torch.from_numpy(np.array(picture)[tall - height :]).permute(2, 0, 1) / 255
        mean, std = (torch.as_tensor(v, dtype=torch.float32).reshape(-1, 1, 1) for v in (self.mean, self.std))
        intrinsics = np.array(calibrated["camera_intrinsic"], dtype=float) * rows[:, None]
        intrinsics[0] *= scale
        intrinsics[1, 2] -= tall - height
        return (pixels - mean) / std, intrinsics, np.linalg.inv(pose) @ own

    def _boxes(self, sample: str, pose: np.ndarray) -> tuple[np.ndarray, list[int]]:
        to_ego, boxes, labels = np.linalg.inv(pose), [], []
        for row in self._objects[sample]:
            instance = self._row("instance", row["instance_token"])
            label = class_of(self._row("category", instance["category_token"])["name"])
            if label < 0:
                continue
            own = to_ego @ rigid(row)
            width, length, height = row["size"]
            velocity = to_ego[:2, :3] @ self._velocity(row)
            yaw = np.arctan2(own[1, 0], own[0, 0])
            boxes.append([*own[:3, 3], length, width, height, yaw, *velocity])
            labels.append(label)
        return np.array(boxes, dtype=float).reshape(-1, 9), labels

    def _velocity(self, row: dict) -> np.ndarray:
        """m/s in global axes: between the keyframes before and after, or one of them and this."""
        ends = [self._row("sample_annotation", row[side]) if row[side] else row for side in ("prev", "next")]
        first, last = (self._row("sample", end["sample_token"])["timestamp"] / 1e6 for end in ends)
        steps = sum(end is not row for end in ends)
        if not 0 < last - first <= LONGEST * max(1, steps):
            return np.zeros(3)
        return (np.array(ends[1]["translation"]) - ends[0]["translation"]) / (last - first)


def extents(boxes: np.ndarray, intrinsics: np.ndarray, camera: np.ndarray, image: tuple[int, int]) -> np.ndarray:
    """`[m, 4]`: left, top, right, bottom, px, of the corners in front of a camera, cut to the image; see `Frame` for boxes."""
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) / 2
    found = []
    for box in boxes:
        c, s = np.cos(box[6]), np.sin(box[6])
        corners = signs * box[3:6] @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]) + box[:3]
        to_camera = np.linalg.inv(camera)
        at = corners @ to_camera[:3, :3].T + to_camera[:3, 3]
        at = at[at[:, 2] > 0.1] @ intrinsics.T
        if not len(at):
            continue
        at = np.clip(at[:, :2] / at[:, 2:], 0, [image[1], image[0]])
        (left, top), (right, bottom) = at.min(0), at.max(0)
        if right > left and bottom > top:
            found.append([left, top, right, bottom])
    return np.array(found, dtype=float).reshape(-1, 4)


def _table(folder: Path, name: str) -> list[dict]:
    path = folder / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"no table {path}; a nuScenes folder holds {', '.join(TABLES)} in its version's folder")
    rows = json.loads(path.read_text())
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "token" in row for row in rows):
        raise ValueError(f"{path} is no table: it must be a list of rows with a token")
    return rows
