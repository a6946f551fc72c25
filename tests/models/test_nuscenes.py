"""The nuScenes loader on a made-up folder of two keyframes, whose geometry is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from mmkv.models.toc3d import nuscenes
from mmkv.models.toc3d.nuscenes import CAMERAS, CLASSES, NuScenes, class_of, extents, rotation

SIDE = math.sqrt(0.5)
LEFT = [SIDE, 0, 0, SIDE]  # a quarter turn about z
FRONT_CAMERA = [0.5, -0.5, 0.5, -0.5]  # camera axes (right, down, forward) to ego axes, looking forward
EGO = ([100.0, 50.0, 0.0], [102.0, 50.0, 0.0])
CAR = ([110.0, 51.0, 1.0], [111.0, 51.0, 1.0])  # global, moves 1 m in 0.5 s


def tables() -> dict[str, list[dict]]:
    """Two keyframes 0.5 s apart; the ego looks along global x; front and back camera; a car, a walker, an animal."""
    both = ("a", "b")
    rows = {name: [] for name in nuscenes.TABLES}
    rows["scene"] = [dict(token="s", name="scene-0001", first_sample_token="a")]
    rows["sample"] = [
        dict(token="a", timestamp=1_000_000, prev="", next="b", scene_token="s"),
        dict(token="b", timestamp=1_500_000, prev="a", next="", scene_token="s"),
    ]
    for i, channel in enumerate((*CAMERAS[:2], "LIDAR_TOP")):
        rows["sensor"].append(dict(token=f"sensor{i}", channel=channel))
        rows["calibrated_sensor"].append(
            dict(
                token=f"calibrated{i}",
                sensor_token=f"sensor{i}",
                translation=[1.0, 0.0, 1.5],
                rotation=FRONT_CAMERA,
                camera_intrinsic=[[100.0, 0, 80], [0, 100.0, 45], [0, 0, 1]] if i < 2 else [],
            )
        )
        for k, token in enumerate(both):
            # The second camera fires when the ego is 0.5 m further.
            at = [EGO[k][0] + (0.5 if i == 1 else 0.0), EGO[k][1], EGO[k][2]]
            rows["ego_pose"].append(dict(token=f"ego{i}{token}", translation=at, rotation=[1, 0, 0, 0]))
            rows["sample_data"].append(
                dict(
                    token=f"data{i}{token}",
                    sample_token=token,
                    ego_pose_token=f"ego{i}{token}",
                    calibrated_sensor_token=f"calibrated{i}",
                    is_key_frame=True,
                    filename=f"samples/{channel}/{token}.jpg",
                )
            )
    for i, name in enumerate(("vehicle.car", "human.pedestrian.adult", "animal")):
        rows["category"].append(dict(token=f"category{i}", name=name))
        rows["instance"].append(dict(token=f"instance{i}", category_token=f"category{i}"))
    for k, token in enumerate(both):
        links = dict(prev="" if k == 0 else "{}a", next="b" if k == 1 else "{}b")
        for i, place in enumerate((CAR[k], [90.0, 50.0, 1.0], [105.0, 50.0, 0.0])):
            rows["sample_annotation"].append(
                dict(
                    token=f"object{i}{token}",
                    sample_token=token,
                    instance_token=f"instance{i}",
                    translation=place,
                    size=[2.0, 4.0, 1.5],
                    rotation=LEFT,
                    prev=links["prev"].format(f"object{i}"),
                    next="" if k == 1 else links["next"].format(f"object{i}"),
                )
            )
    return rows


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "v1.0-mini").mkdir()
    for name, rows in tables().items():
        (tmp_path / "v1.0-mini" / f"{name}.json").write_text(json.dumps(rows))
    for channel in CAMERAS[:2]:
        (tmp_path / "samples" / channel).mkdir(parents=True)
        for token in ("a", "b"):
            pixels = np.zeros((90, 160, 3), np.uint8)
            pixels[80:] = 255
            Image.fromarray(pixels).save(tmp_path / "samples" / channel / f"{token}.jpg", quality=100)
    return tmp_path


def load(folder, **options) -> NuScenes:
    return NuScenes(folder, image=(32, 80), cameras=CAMERAS[:2], **options)


def test_scenes_and_samples(folder):
    data = load(folder)
    assert data.scenes() == ["scene-0001"] and data.samples("scene-0001") == ["a", "b"]
    with pytest.raises(ValueError, match="no scene 'x'; possible are scene-0001"):
        data.samples("x")


def test_frames_by_hand(folder):
    """The car: 10 m ahead and 1 m to the left, turned left; 2 m/s forward. The walker stands behind. The animal is no class."""
    first, second = load(folder).frames("scene-0001")
    assert (first.time.item(), second.time.item()) == (0.0, 0.5)
    assert first.pose[:3, 3].tolist() == EGO[0]
    assert [CLASSES[i] for i in first.labels] == ["car", "pedestrian"]
    want = [10, 1, 1, 4, 2, 1.5, math.pi / 2, 2, 0]
    assert first.boxes[0].tolist() == pytest.approx(want, abs=1e-5)
    assert second.boxes[0].tolist() == pytest.approx([9, *want[1:]], abs=1e-5)
    assert first.boxes[1, :3].tolist() == [-10, 0, 1] and first.boxes[1, 7:].tolist() == [0, 0]


def test_cameras_by_hand(folder):
    """160 x 90 px to 80 wide, 45 tall, of which the lower 32 stay; the second camera took its picture 0.5 m further on."""
    frame = next(load(folder).frames("scene-0001"))
    assert frame.images.shape == (2, 3, 32, 80)
    assert frame.intrinsics[0].flatten().tolist() == pytest.approx([50, 0, 40, 0, 50, 22.5 - 13, 0, 0, 1])
    assert frame.camera[0, :3, 3].tolist() == [1, 0, 1.5] and frame.camera[1, :3, 3].tolist() == [1.5, 0, 1.5]
    assert frame.camera[0, :3, :3].round().tolist() == [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]
    assert frame.images[0, :, -1].min() > 0.9 and frame.images[0, :, 0].max() < -0.9  # white below, black above
    assert len(frame.boxes2d) == 2 and frame.boxes2d[0].shape == (1, 4)  # the walker is behind both


def test_2d_box_by_hand():
    """A cube of 2 m, 5 m ahead of a camera with focal 10: its near face, 4 m away, spans 10 / 4 px around the centre."""
    box = np.array([[0.0, 0, 5, 2, 2, 2, 0, 0, 0]])
    intrinsics = np.array([[10.0, 0, 8], [0, 10, 4], [0, 0, 1]])
    assert extents(box, intrinsics, np.eye(4), (8, 16)).tolist() == [[5.5, 1.5, 10.5, 6.5]]
    assert extents(-box, intrinsics, np.eye(4), (8, 16)).shape == (0, 4)


def test_rotation_by_hand():
    assert rotation(*LEFT).round(6).tolist() == [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    assert rotation(2, 0, 0, 0).tolist() == np.eye(3).tolist()


def test_classes():
    names = {
        "vehicle.bus.rigid": "bus",
        "vehicle.construction": "construction_vehicle",
        "movable_object.trafficcone": "traffic_cone",
        "human.pedestrian.police_officer": "pedestrian",
    }
    assert {name: CLASSES[class_of(name)] for name in names} == names
    assert class_of("human.pedestrian.stroller") == class_of("animal") == -1


def test_frames_fit_the_detector(folder):
    """A batch of one through a small detector, history and all."""
    from mmkv.models.toc3d.backbone import Backbone
    from mmkv.models.toc3d.detector import Detector
    from mmkv.models.toc3d.losses import detection_loss
    from mmkv.models.toc3d.scenes import batch
    from mmkv.tokens import ToC3D

    span = (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0)
    method = ToC3D(ratios=(0.5,), scoring=(1,), queries=4)
    backbone = Backbone((32, 80), 16, 16, 2, 2, window=2, global_blocks=(), toc3d=method, query_dim=16, pc_range=span)
    detector, history = Detector(backbone, 16, 4, 4, 4, classes=len(CLASSES), pc_range=span), None
    for frame in load(folder).frames("scene-0001"):
        found, history = detector(batch([frame]), history)
        assert torch.isfinite(detection_loss(found, batch([frame])))


def test_refuses_what_is_missing(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no nuScenes folder at /nowhere; download") as caught:
        load("/nowhere")
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"no table .*v1.0-trainval/scene.json"):
        load(folder, version="v1.0-trainval")
    (folder / "samples" / CAMERAS[0] / "b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"no image at .*b.jpg"):
        list(load(folder).frames("scene-0001"))
    with pytest.raises(ValueError, match="sample a has no keyframe of CAM_BACK; it has CAM_FRONT"):
        NuScenes(folder, image=(32, 80), cameras=("CAM_BACK",)).frame("a")


@pytest.mark.parametrize("content", ["{}", "[1]", '[{"name": "x"}]'])
def test_refuses_what_is_no_table(folder, content):
    (folder / "v1.0-mini" / "sample.json").write_text(content)
    with pytest.raises(ValueError, match=r"sample.json is no table"):
        load(folder)


def test_refuses_tables_that_do_not_fit(folder):
    (folder / "v1.0-mini" / "sensor.json").write_text("[]")
    with pytest.raises(ValueError, match=r"sensor\.json has no row 'sensor0'"):
        load(folder)
