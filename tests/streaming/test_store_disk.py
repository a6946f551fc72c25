"""The store on disk: kills, damage, a full disk, other videos, two processes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from streaming_stores import (
    KEY,
    ROW,
    append_beyond,
    append_for_ever,
    chunk,
    die_before,
    files,
    fill,
    frame,
    hold,
    look,
    opened,
    process,
    same,
)  # fmt: skip

from mmkv.streaming.store import DamagedFrames, Key, folder, peek


@pytest.fixture
def path(tmp_path):
    return tmp_path / "s"


def at(path):
    return f"disk:{path}"


def flip(file: Path, byte: int) -> None:
    data = bytearray(file.read_bytes())
    data[byte] ^= 1
    file.write_bytes(data)


def spans(file: Path) -> dict[str, tuple[int, int]]:
    """Bytes of each tensor in a file, by the format's definition."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + length])
    return {k: tuple(8 + length + o for o in v["data_offsets"]) for k, v in head.items() if k != "__metadata__"}


# ---- what was acknowledged is there


@pytest.mark.parametrize("packed", [None, "int4"])
def test_a_store_is_reopened_as_it_was(path, packed):
    with opened(at(path), packed=packed) as store:
        chunks = fill(store, 3, 2)
        held = [store.fetch(layer, range(5)) for layer in range(3)]
        store.append(chunk(5, 1), content="abc")
    with opened(at(path), packed=packed) as store:
        assert store.frames == 6 and store.times == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0] and store.damaged == []
        assert all(torch.equal(a, b) for layer in range(3) for a, b in zip(store.fetch(layer, range(5)), held[layer]))
        assert torch.equal(store.index[:, :5], torch.cat([c.index for c in chunks], 1))
        assert (store.content, store.content_at(6), store.content_at(5), store.content_at(4)) == (
            "abc",
            "abc",
            "",
            None,
        )
        assert store.append(chunk(6, 2)) == 6
    with pytest.raises(ValueError, match="holds frames already and resume=False"):
        opened(at(path), packed=packed, resume=False)
    with opened(f"disk:{path}2", resume=False) as store:
        assert store.frames == 0


def test_any_safetensors_reader_opens_a_chunk(path):
    with opened(at(path)) as store:
        chunks = fill(store, 3)
    (file,) = files(path)
    with safe_open(file, "pt") as found:
        assert set(found.keys()) == {"layer.0", "layer.1", "layer.2", "index", "crc"}
        rows = found.get_tensor("layer.1")
        assert rows.shape == (3, ROW) and json.loads(found.metadata()["mmkv"])["times"] == [0.0, 2.0, 4.0]
        keys = rows[2, : 2 * 12 * 16 * 4].view(torch.float32).view(2, 12, 16)
        assert torch.equal(keys, frame(chunks, 1, 2)[0]) and torch.equal(found.get_tensor("index"), chunks[0].index)


def test_a_fetch_reads_its_own_rows_alone(path, monkeypatch):
    with opened(at(path), ram_bytes=0) as store:
        chunks = fill(store, 4, 4)
        read, real = [], os.preadv
        monkeypatch.setattr(os, "preadv", lambda fd, to, at: read.append(real(fd, to, at)) or read[-1])
        assert same(store, chunks, 1, [2, 6]) and sum(read) == 2 * ROW == store.counters()["bytes_from_disk"]


def test_nothing_acknowledged_is_lost_to_a_kill(path):
    """A process appends and tells what was acknowledged, until it is killed: in the middle of whatever it does."""
    child, pipe = process(append_for_ever, at(path))
    told = [pipe.recv() for _ in range(5)]
    child.kill()
    child.join()
    with contextlib.suppress(EOFError):
        while True:
            told.append(pipe.recv())
    assert child.exitcode == -signal.SIGKILL
    with opened(at(path)) as store:
        assert store.frames in (told[-1], told[-1] + 2)  # the one after may have been synced and not told
        assert store.damaged == [] and not list(path.glob("*.tmp"))
        chunks = [chunk(i, 2) for i in range(0, store.frames, 2)]
        assert all(same(store, chunks, layer, range(store.frames)) for layer in range(3))
        assert store.append(chunk(store.frames, 2)) == 2 * len(chunks)


@pytest.mark.parametrize(
    ("module", "name"), [("os", "fsync"), ("os", "replace"), ("mmkv.streaming.store.folder", "sync")]
)
def test_a_kill_at_any_step_leaves_a_whole_store(path, module, name):
    """The process dies right before it syncs a file, renames it, or syncs the folder."""
    child, _ = process(die_before, at(path), module, name)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    left = list(path.glob("*.tmp"))
    assert bool(left) == (name != "sync")
    with opened(at(path), mode="read") as store:
        assert store.frames == (4 if left else 6) and list(path.glob("*.tmp")) == left  # a reader changes nothing
    with opened(at(path)) as store:
        assert store.frames == (4 if left else 6) and not list(path.glob("*.tmp"))
        assert same(store, [chunk(0, 2), chunk(2, 2)], 0, range(4))


def test_file_and_folder_are_synced_before_append_returns(path, monkeypatch):
    with opened(at(path)) as store:
        done = []
        real_sync, real_replace = os.fsync, os.replace

        def fsync(fd):
            done.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
            real_sync(fd)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "replace", lambda a, b: done.append("rename") or real_replace(a, b))
        fill(store, 2)
        assert done == ["file", "rename", "folder"]


def test_files_have_the_users_umask_and_names_without_content(path):
    before = os.umask(0o027)
    try:
        with opened(at(path)) as store:
            fill(store, 2, 1)
    finally:
        os.umask(before)
    assert sorted(p.name for p in path.iterdir()) == [
        "00000000-0002.safetensors", "00000002-0001.safetensors", "lock", "store.json",
    ]  # fmt: skip
    assert {stat.S_IMODE(p.stat().st_mode) for p in path.iterdir()} == {0o640}


# ---- damage


def test_a_flipped_byte_costs_one_frame(path):
    with opened(at(path)) as store:
        chunks = fill(store, 4, 4)
    flip(files(path)[1], spans(files(path)[1])["layer.1"][0] + 2 * ROW + 100)  # frame 6 of layer 1
    with opened(at(path), ram_bytes=0) as store:
        assert store.damaged == []
        assert same(store, chunks, 0, range(8))
        why = r"frame 6 cannot be read \(its checksum differs\); left out"
        with pytest.warns(UserWarning, match=why) as said, pytest.raises(DamagedFrames, match="choose without") as e:
            store.fetch(1, [5, 6, 7])
        assert len(said) == 1 and "\n" not in str(said[0].message) and e.value.frames == [6] and store.damaged == [6]
        with pytest.raises(DamagedFrames):  # and no second warning
            store.fetch(0, [6])
        assert same(store, chunks, 1, [0, 1, 2, 3, 4, 5, 7])
        assert store.append(chunk(8, 1)) == 8


def test_damage_found_ahead_is_raised_by_the_fetch(path):
    with opened(at(path)) as store:
        chunks = fill(store, 4)
    flip(files(path)[0], spans(files(path)[0])["layer.2"][1] - 1)
    with opened(at(path)) as store:
        store.prefetch(2, [1, 3])
        with pytest.warns(UserWarning, match="frame 3 cannot be read"):
            found = same(store, chunks, 2, [1])  # what is not wanted does not hinder
        assert found
        store.prefetch(2, [1, 3])
        with pytest.raises(DamagedFrames):
            store.fetch(2, [1, 3])


def _truncate(file):
    os.truncate(file, file.stat().st_size - 1)


def _empty(file):
    os.truncate(file, 0)


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (_truncate, "it is truncated"),
        (_empty, "it is truncated"),
        (lambda f: os.truncate(f, 100), "it is truncated"),
        (lambda f: flip(f, 7), "it is truncated"),  # the header's length
        (lambda f: flip(f, 8), "its header is damaged"),
        (lambda f: flip(f, f.read_bytes().index(b"times") + 12), "its header is damaged"),
        (lambda f: flip(f, spans(f)["index"][0]), "its index is damaged"),
        (lambda f: flip(f, spans(f)["crc"][0]), "its crc is damaged"),
        (lambda f: f.unlink(), "the file is missing"),
    ],
)
def test_a_chunk_that_cannot_be_read_is_reported_and_the_rest_answers(path, harm, why):
    with opened(at(path)) as store:
        chunks = fill(store, 2, 3, 2)
    harm(files(path)[1])
    with pytest.warns(UserWarning, match=rf"frames 2 to 4 cannot be read \({why}\); left out") as said:
        store = opened(at(path))
    with store:
        assert len(said) == 1 and "\n" not in str(said[0].message)
        assert store.frames == 7 and store.damaged == [2, 3, 4] and store.times == [0, 2, 2, 2, 2, 10, 12]
        assert all(same(store, chunks, layer, [0, 1, 5, 6]) for layer in range(3))
        assert torch.equal(store.index[:, 5:], chunks[2].index) and not store.index[:, 2:5].any()
        with pytest.raises(DamagedFrames) as e:
            store.fetch(0, [1, 4, 2])
        assert e.value.frames == [4, 2]
        assert store.append(chunk(7, 1)) == 7


def test_a_file_that_is_cut_or_lost_while_open_is_reported(path):
    with opened(at(path), ram_bytes=0) as store:
        chunks = fill(store, 2, 2)
        _truncate(files(path)[0])
        last = max(range(3), key=lambda layer: spans(files(path)[0])[f"layer.{layer}"])
        with pytest.warns(UserWarning, match="frame 1 cannot be read"), pytest.raises(DamagedFrames):
            store.fetch(last, [0, 1])
        files(path)[1].unlink()
        with pytest.warns(UserWarning, match="frame 3 cannot be read .No such file"), pytest.raises(DamagedFrames):
            store.fetch(0, [0, 3])
        assert same(store, chunks, last, [0]) and store.damaged == [1, 3]


def test_a_chunk_of_another_store_is_not_taken_for_ones_own(path, tmp_path):
    for place in (path, tmp_path / "t"):
        with opened(at(place)) as store:
            fill(store, 2)
    shutil.copy(files(tmp_path / "t")[0], files(path)[0])
    with pytest.warns(UserWarning, match="it belongs to another store"), opened(at(path)) as store:
        assert store.damaged == [0, 1]


def test_two_files_of_one_frame_are_refused(path):
    with opened(at(path)) as store:
        fill(store, 2)
    shutil.copy(files(path)[0], path / "00000001-0002.safetensors")
    with pytest.raises(ValueError, match="two files hold frame 1"):
        opened(at(path))
    (path / "00000001-0002.safetensors").unlink()
    opened(at(path)).close()  # a refused one holds no lock


# ---- a full disk


def test_a_full_disk_leaves_everything_before_intact(path, monkeypatch):
    with opened(at(path), ram_bytes=0) as store:
        chunks = fill(store, 2)
        real, left = os.write, [3 * ROW]

        def write(fd, data):
            if left[0] <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left[0] -= (done := real(fd, memoryview(data)[: left[0]]))
            return done

        with monkeypatch.context() as m:
            m.setattr(os, "write", write)
            with pytest.raises(
                OSError, match=r"2 frames could not be stored in .* \(No space left on device\); the 2"
            ) as e:
                store.append(chunk(2, 2))
        assert e.value.errno == errno.ENOSPC and "\n" not in str(e.value)
        assert not list(path.glob("*.tmp")) and len(files(path)) == 1
        assert store.frames == 2 and store.times == [0.0, 2.0] and same(store, chunks, 1, [1, 0])
        chunks += fill(store, 2)  # there is room again
        assert same(store, chunks, 0, range(4))


@pytest.mark.parametrize("step", ["fsync", "replace", "folder"])
def test_a_sync_that_fails_is_no_acknowledgement(path, monkeypatch, step):
    with opened(at(path), ram_bytes=0) as store:
        chunks = fill(store, 2)

        def fails(*_):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as m:
            m.setattr(*((folder, "sync") if step == "folder" else (os, step)), fails)
            with pytest.raises(OSError, match="Input/output error"):
                store.append(chunk(2, 2))
        assert [p.name for p in files(path)] == ["00000000-0002.safetensors"] and not list(path.glob("*.tmp"))
        chunks += fill(store, 3)
        assert same(store, chunks, 2, range(5))


def test_a_real_limit_of_file_size(path):
    """The system itself refuses to write on: RLIMIT_FSIZE, in a process of its own."""
    child, pipe = process(append_beyond, at(path), 20 * ROW)
    assert "(File too large); the 1 before are intact" in pipe.recv()
    assert pipe.recv() == (1, 1, True)
    child.join()
    assert not list(path.glob("*.tmp"))


# ---- other videos, other sizes


@pytest.mark.parametrize(
    ("key", "what"),
    [
        (Key("model-b", "pictures-a", "video-a"), r"another model \(model 'model-a', not 'model-b'\)"),
        (Key("model-a", "pictures-b", "video-a"), r"another preprocessing \(.*\)"),
        (Key("model-a", "pictures-a", "video-b"), r"another video \(video 'video-a', not 'video-b'\)"),
        (Key("model-a", "pictures-a", ""), r"another video \(video 'video-a', not ''\)"),
        (Key("model-b", "pictures-a", "v" * 99), r"another model and video \(.*, not 'vvvvvvvvvvvvvvvvvvvvvvvv...'\)"),
    ],
)
@pytest.mark.parametrize("mode", ["write", "read"])
def test_another_videos_memory_is_refused(path, key, what, mode):
    with opened(at(path)) as store:
        fill(store, 2)
    with pytest.raises(ValueError, match=f"is the memory of {what}; use another folder") as e:
        opened(at(path), key, mode=mode)
    assert "\n" not in str(e.value)
    with opened(at(path)) as store:
        assert store.frames == 2


def test_a_reader_may_take_any_video_a_writer_may_not(path):
    anything = Key(KEY.model, KEY.preprocessing, None)
    with pytest.raises(ValueError, match="video is None, which is for reading"):
        opened(at(path), anything)
    assert not path.exists()
    with opened(at(path)) as store:
        chunks = fill(store, 2)
    with opened(at(path), anything, mode="read") as store:
        assert same(store, chunks, 0, [1])


@pytest.mark.parametrize(
    "other", [dict(tokens_per_frame=13), dict(dtype=torch.float16), dict(packed="int2"), dict(layers=4)]
)
def test_other_sizes_are_refused(path, other):
    opened(at(path)).close()
    (name,) = {dict(tokens_per_frame="tokens").get(k, k) for k in other}
    with pytest.raises(ValueError, match=rf"holds another kind of memory \({name} .*, not "):
        opened(at(path), **other)


def test_a_stream_resumes_only_behind_its_own_frames(path):
    with opened(at(path), Key("m", "p")) as store:
        store.append(chunk(0, 2), content="hash of 2")
    with opened(at(path), Key("m", "p")) as store:
        store.check_content("hash of 2")
        with pytest.raises(ValueError, match="the first 2 frames are not those that this store remembers"):
            store.check_content("hash of another 2")


def test_peek_tells_what_a_store_is(path):
    with pytest.raises(ValueError, match="holds no store; watch a video"):
        peek(at(path))
    opened(at(path), packed="int4").close()
    found = peek(at(path))
    assert found["key"] == dict(model="model-a", preprocessing="pictures-a", video="video-a")
    assert found["shape"] == dict(
        layers=3, heads=2, dim=16, value_dim=24, tokens=12, dtype="float32", packed="int4"
    )  # fmt: skip
    for text in ("", "{", "[]", '{"version": 2}', "\xff"):
        (path / "store.json").write_bytes(text.encode("latin-1"))
        for ask in (lambda: peek(at(path)), lambda: opened(at(path))):
            with pytest.raises(ValueError, match=r"store\.json is damaged"):
                ask()
    (path / "store.json").write_text('{"version": 99}')
    with pytest.raises(ValueError, match="a store of version 99"):
        peek(at(path))


def test_a_folder_of_something_else_is_left_alone(path):
    path.mkdir()
    (path / "holiday.tmp").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no store"):
        opened(at(path))
    assert [p.name for p in path.iterdir()] == ["holiday.tmp"]
    with pytest.raises(ValueError, match="holds no store"):
        opened(at(path), mode="read")


# ---- two processes


def test_a_reader_sees_what_a_writer_has_stored(path):
    with opened(at(path)) as writer:
        chunks = fill(writer, 2)
        with opened(at(path), mode="read") as reader, opened(at(path), mode="read") as second:
            assert reader.frames == 2
            chunks += fill(writer, 3, 1)
            assert reader.frames == 2 and reader.refresh() == 4 and reader.refresh() == 0
            assert same(reader, chunks, 1, range(6)) and torch.equal(reader.index, writer.index)
            with pytest.raises(ValueError, match="opened for reading"):
                reader.append(chunk(6, 1))
            assert second.refresh() == 4 and writer.refresh() == 0


def test_another_process_reads_while_one_writes(path):
    with opened(at(path)) as writer:
        chunks = fill(writer, 2)
        child, pipe = process(look, at(path))
        for _ in range(3):
            chunks += fill(writer, 2)
            pipe.send(True)
            new, frames, found = pipe.recv()
            assert frames == writer.frames and new <= 4
            assert found == [t.tolist() for t in frame(chunks, 1, frames - 1)]
        pipe.send(False)
        child.join()
        assert child.exitcode == 0 and frames == 8


def test_a_second_writer_is_refused_and_a_dead_ones_lock_does_not_block(path):
    child, pipe = process(hold, at(path))
    assert pipe.recv() == "open"
    with pytest.raises(ValueError, match="is being written by another process or stream; read it, or use another") as e:
        opened(at(path))
    assert "\n" not in str(e.value)
    with opened(at(path), mode="read") as store:
        assert store.frames == 2
    child.kill()
    child.join()
    with opened(at(path)) as store:
        assert store.frames == 2 and (path / "lock").exists()
        with pytest.raises(ValueError, match="is being written"):
            opened(at(path))  # in the same process, too
    opened(at(path)).close()
