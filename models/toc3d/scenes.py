"""Synthetic multi-camera scenes: boxes and balls that move on a ground plane around a moving ego, with exact 3D and 2D boxes.

Ego axes: x forward, y left, z up, origin on the ground; cameras: x right, y down, z forward. Lengths in m, time in s.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

CLASSES = ("box", "ball")
PC_RANGE = (-14.0, -14.0, -1.0, 14.0, 14.0, 3.0)
STEP = 0.5  # between frames
SEEN = 6  # pixels from which on an object counts
CAMERA_HEIGHT = 1.6


@dataclass(eq=False)
class Frame:
    """One moment of a scene, or of a batch of B scenes (then each tensor has B in front, and lists are one per scene).

    Args:
        images: `[V, 3, h, w]`, in [-1, 1].
        intrinsics: `[V, 3, 3]`, px.
        camera: `[V, 4, 4]`, camera to ego.
        pose: `[4, 4]`, ego to global.
        time: scalar.
        boxes: `[n, 9]` of the visible objects: centre x, y, z, size along x, y, z of the object, yaw, velocity x, y; ego axes.
        labels: int64 `[n]`, in CLASSES.
        boxes2d: per view `[m, 4]`, left, top, right, bottom of the visible part, px.
    """

    images: torch.Tensor
    intrinsics: torch.Tensor
    camera: torch.Tensor
    pose: torch.Tensor
    time: torch.Tensor
    boxes: torch.Tensor | list[torch.Tensor]
    labels: torch.Tensor | list[torch.Tensor]
    boxes2d: list

    def to(self, device) -> Frame:
        """On another device."""

        def move(value):
            return [move(v) for v in value] if isinstance(value, list) else value.to(device)

        return Frame(**{name: move(value) for name, value in vars(self).items()})


def batch(frames: list[Frame]) -> Frame:
    """The same moment of several scenes."""
    stacked = {
        n: torch.stack([getattr(f, n) for f in frames]) for n in ("images", "intrinsics", "camera", "pose", "time")
    }
    lists = {n: [getattr(f, n) for f in frames] for n in ("boxes", "labels", "boxes2d")}
    return Frame(**stacked, **lists)


def make_scene(seed: int, frames: int = 4, cameras: int = 4, height: int = 48, width: int = 96) -> list[Frame]:
    """A scene of 3 to 6 objects, seen by 2 to 6 cameras all around, of height x width px; the same for the same seed."""
    if not 2 <= cameras <= 6:
        raise ValueError(f"{cameras} cameras; possible are 2 to 6")
    rng = np.random.default_rng([seed, 409])
    world = _World(rng)
    intrinsics, camera = _rig(cameras, height, width)
    start, yaw = rng.uniform(-50, 50, 2), rng.uniform(-np.pi, np.pi)
    speed, turn = rng.uniform(0, 3), rng.uniform(-0.2, 0.2)
    world.place(rng, start, yaw)
    made = []
    for i in range(frames):
        pose = np.eye(4)
        pose[:3, :3] = _about_z(yaw)
        pose[:2, 3] = start
        made.append(_frame(world, intrinsics, camera, pose, i * STEP, height, width))
        yaw += turn * STEP
        start = start + speed * STEP * np.array([np.cos(yaw), np.sin(yaw)])
    return made


class _World:
    """Objects in global coordinates, and marks painted on the ground, which look alike and are none."""

    def __init__(self, rng):
        self.count, self.marks = rng.integers(3, 7), 4
        self.label = rng.integers(0, 2, self.count)
        self.size = rng.uniform([1.2, 0.8, 0.8], [2.4, 1.4, 1.6], (self.count, 3))
        self.size[self.label == 1] = self.size[self.label == 1, 1:2]  # balls
        self.yaw = rng.uniform(-np.pi, np.pi, self.count) * (self.label == 0)
        self.speed = rng.uniform(0, 2, self.count)
        self.colour = rng.uniform(0.1, 1, (self.count + self.marks, 3))
        self.phase = rng.uniform(0, 6, 4)

    def place(self, rng, ego, yaw) -> None:
        """Objects and marks around the ego, none in another."""
        spots: list[np.ndarray] = []
        while len(spots) < self.count + self.marks:
            angle, far = rng.uniform(-np.pi, np.pi), rng.uniform(3, 11)
            spot = ego + far * np.array([np.cos(angle), np.sin(angle)])
            if all(np.linalg.norm(spot - other) > 2.2 for other in spots):
                spots.append(spot)
        self.spot, self.mark = np.array(spots[: self.count]), np.array(spots[self.count :])
        heading = np.where(self.label == 0, self.yaw, rng.uniform(-np.pi, np.pi, self.count))
        self.velocity = self.speed[:, None] * np.stack([np.cos(heading), np.sin(heading)], 1)

    def centres(self, time: float) -> np.ndarray:
        """`[n, 3]` at a time."""
        return np.concatenate([self.spot + time * self.velocity, self.size[:, 2:] / 2], 1)


def _about_z(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def _rig(count: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Intrinsics `[V, 3, 3]` and camera-to-ego `[V, 4, 4]` of cameras all around, 10 degrees of overlap, more ground than sky."""
    focal = width / 2 / np.tan(min(np.radians(360 / count + 10), np.radians(140)) / 2)
    intrinsics = np.tile(np.array([[focal, 0, width / 2], [0, focal, height / 3], [0, 0, 1]]), (count, 1, 1))
    camera = np.tile(np.eye(4), (count, 1, 1))
    for i in range(count):
        turn = _about_z(2 * np.pi * i / count)
        camera[i, :3, :3] = turn @ np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])
        camera[i, :3, 3] = turn @ np.array([0.3, 0, CAMERA_HEIGHT])
    return intrinsics, camera


def _frame(world, intrinsics, camera, pose, time, height, width) -> Frame:
    to_global = pose @ camera
    rows, cols = np.mgrid[:height, :width] + 0.5
    pixels = np.stack([cols, rows, np.ones_like(cols)], -1)
    rays = np.einsum("vij,vjk,hwk->vhwi", to_global[:, :3, :3], np.linalg.inv(intrinsics), pixels)
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    image, which = _render(world, to_global[:, None, None, :3, 3], rays, time)
    seen = np.bincount(which[which >= 0], minlength=world.count) >= SEEN
    to_ego = np.linalg.inv(pose)
    centre = world.centres(time) @ to_ego[:3, :3].T + to_ego[:3, 3]
    velocity = world.velocity @ to_ego[:2, :2].T
    ego_yaw = np.arctan2(pose[1, 0], pose[0, 0])
    yaw = (world.yaw - ego_yaw) * (world.label == 0)
    seen &= (np.abs(centre[:, :2]) < PC_RANGE[3]).all(1)
    boxes = np.concatenate([centre, world.size, yaw[:, None], velocity], 1)[seen]

    def tensor(x):
        return torch.tensor(x, dtype=torch.float32)

    return Frame(
        tensor(image.transpose(0, 3, 1, 2) * 2 - 1),
        tensor(intrinsics),
        tensor(camera),
        tensor(pose),
        tensor(time),
        tensor(boxes),
        torch.tensor(world.label[seen]),
        [_extents(view, np.flatnonzero(seen)) for view in which],
    )


def _extents(which: np.ndarray, objects) -> torch.Tensor:
    boxes = []
    for i in objects:
        rows, cols = np.nonzero(which == i)
        if len(rows):
            boxes.append([cols.min(), rows.min(), cols.max() + 1, rows.max() + 1])
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def _render(world, origin, rays, time) -> tuple[np.ndarray, np.ndarray]:
    """Colours `[V, h, w, 3]` in [0, 1], and the index of the object in each pixel, -1 for none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        depth = np.where(rays[..., 2] < -1e-6, -origin[..., 2] / rays[..., 2], np.inf)
    at = origin[..., :2] + np.where(np.isfinite(depth), depth, 0)[..., None] * rays[..., :2]
    waves = sum(np.sin(at @ d + p) for d, p in zip(([1.1, 0.4], [-0.5, 1.3], [2.9, -1.7], [0.2, 3.7]), world.phase))
    ground = 0.4 + 0.06 * waves
    image = np.where(np.isfinite(depth)[..., None], ground[..., None], np.array([0.55, 0.65, 0.8]))
    for mark, colour in zip(world.mark, world.colour[world.count :]):
        image = np.where(
            (((at - mark) ** 2).sum(-1) < 0.8**2)[..., None] & np.isfinite(depth)[..., None], colour, image
        )
    which = np.full(depth.shape, -1)
    for i, centre in enumerate(world.centres(time)):
        hit, normal = (_hit_ball if world.label[i] else _hit_box)(
            origin - centre, rays, world.size[i], _about_z(world.yaw[i])
        )
        nearer = hit < depth
        shade = 0.55 + 0.45 * np.clip(normal @ np.array([0.4, 0.3, 0.866]), 0, 1)
        image = np.where(nearer[..., None], world.colour[i] * shade[..., None], image)
        depth, which = np.where(nearer, hit, depth), np.where(nearer, i, which)
    return image, which


def _hit_box(origin, rays, size, turn) -> tuple[np.ndarray, np.ndarray]:
    """Distance along each ray, infinite for a miss, and the surface's normal."""
    origin, local = origin @ turn, rays @ turn
    local = np.where(np.abs(local) < 1e-9, 1e-9, local)
    one, two = (-size / 2 - origin) / local, (size / 2 - origin) / local
    near, far = np.minimum(one, two), np.maximum(one, two).min(-1)
    side, enter = near.argmax(-1), near.max(-1)
    normal = -np.take_along_axis(np.sign(local), side[..., None], -1) * np.eye(3)[side]
    return np.where((enter < far) & (enter > 0), enter, np.inf), normal @ turn.T


def _hit_ball(origin, rays, size, turn) -> tuple[np.ndarray, np.ndarray]:
    along = (origin * rays).sum(-1)
    inside = along**2 - (origin**2).sum(-1) + (size[0] / 2) ** 2
    hit = np.where(inside > 0, -along - np.sqrt(np.maximum(inside, 0)), np.inf)
    hit = np.where(hit > 0, hit, np.inf)
    return hit, (origin + np.where(np.isfinite(hit), hit, 0)[..., None] * rays) / (size[0] / 2)
