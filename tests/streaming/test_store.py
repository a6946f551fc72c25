"""The store of a stream: what comes back, from which tier, what is counted, what is refused."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from streaming_stores import KEY, ROW, SHAPE, chunk, fill, opened, same

from mmkv.streaming.store import Chunk, Key, advance, open_store

gpu = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
DEVICES = ["cpu", gpu]


@pytest.fixture(params=["ram", "disk"])
def where(request, tmp_path):
    return "ram" if request.param == "ram" else f"disk:{tmp_path / 's'}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_what_is_appended_comes_back_bit_for_bit(where, dtype, device):
    with opened(where, dtype=dtype, device=device) as store:
        chunks = []
        for size in (3, 1, 4):
            chunks.append(chunk(store.frames, size, dtype, device=device))
            first = store.frames
            assert store.append(chunks[-1]) == first
        assert store.frames == 8 and store.times == [2.0 * i for i in range(8)]
        for layer in range(3):
            assert same(store, chunks, layer, range(8))
            assert same(store, chunks, layer, [7, 0, 3, 3, 2])  # in the order given, twice where asked twice
        assert torch.equal(store.index, torch.cat([c.index for c in chunks], 1))
        keys, values = store.fetch(0, [])
        assert keys.shape == (2, 0, 16) and values.shape == (2, 0, 24) and keys.dtype == dtype


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ram_rows", [0, 5, 1000])
def test_every_tier_gives_the_same(tmp_path, device, ram_rows):
    where = f"disk:{tmp_path / 's'}"
    with opened(where, device=device, ram_bytes=ram_rows * ROW, device_bytes=4 * ROW) as store:
        chunks = fill(store, 4, 4)
        for frames in ([1, 6], [6, 1, 0], list(range(8)), [2, 6]):
            for layer in range(3):
                assert same(store, chunks, layer, frames)
        assert store.bytes()["ram"] <= max(ram_rows, 0) * ROW + store.index.untyped_storage().nbytes()


def test_a_fetch_is_the_callers_own():
    with opened("ram") as store:
        chunks = fill(store, 3)
        keys, values = store.fetch(1, [1])
        keys.zero_(), values.zero_()
        chunks[0].index.zero_()
        assert same(store, chunks, 1, [1]) and store.index.abs().min() > 0


def test_least_recently_used_rows_go_first(tmp_path):
    with opened(f"disk:{tmp_path / 's'}", ram_bytes=4 * ROW) as store:
        chunks = fill(store, 8)  # 24 rows: too large for RAM, so on disk alone
        assert store.counters() == dict(hits=0, misses=0, bytes_to_device=0, bytes_from_disk=0)
        store.fetch(0, [0, 1, 2, 3])
        assert store.counters()["misses"] == 4 and store.counters()["bytes_from_disk"] == 4 * ROW
        store.fetch(0, [0, 4])  # 4 takes the place of 1
        assert store.counters() == dict(hits=1, misses=5, bytes_to_device=0, bytes_from_disk=5 * ROW)
        store.fetch(0, [2, 3, 0, 4])
        assert store.counters()["hits"] == 5 and store.counters()["misses"] == 5
        store.fetch(0, [1])  # in place of 2
        store.fetch(0, [2])
        assert store.counters()["misses"] == 7
        assert same(store, chunks, 0, [2, 1, 4, 0])


def test_a_fetch_never_evicts_what_it_needs_itself(tmp_path):
    with opened(f"disk:{tmp_path / 's'}", ram_bytes=4 * ROW) as store:
        chunks = fill(store, 8)
        store.fetch(0, [0, 1, 2, 3])
        assert same(store, chunks, 0, [4, 5, 0, 1])  # 2 and 3 go, though 0 and 1 were used before them
        assert store.counters()["hits"] == 2
        assert same(store, chunks, 0, [0, 1, 4, 5]) and store.counters()["hits"] == 6
        assert same(store, chunks, 0, list(range(8)))  # more than RAM may hold


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_keeps_what_was_used_last():
    with opened("ram", device="cuda", device_bytes=4 * ROW) as store:
        chunks = fill(store, 8)
        store.fetch(0, [0, 1, 2, 3])
        store.fetch(0, [0, 4])
        assert store.counters() == dict(hits=1, misses=5, bytes_to_device=5 * ROW, bytes_from_disk=0)
        assert store.bytes()["device"] <= 4 * ROW + 2 * store.index.numel() * 4
        assert same(store, chunks, 0, [4, 0, 1, 7]) and store.fetch(0, [7])[0].is_cuda
        assert store.bytes()["ram"] >= 24 * ROW


def test_bytes_are_those_of_storages_and_files(tmp_path):
    with opened("ram") as store:
        fill(store, 4, 2)
        assert store.bytes() == dict(device=0, ram=18 * ROW + 3 * 6 * 32 * 4, disk=0)
    with opened(f"disk:{tmp_path / 's'}", ram_bytes=0) as store:
        fill(store, 4, 2)
        held = store.bytes()
        on_disk = sum(p.stat().st_blocks * 512 for p in (tmp_path / "s").glob("*.safetensors"))
        assert held == dict(device=0, ram=3 * 6 * 32 * 4, disk=on_disk)
        assert 18 * ROW < on_disk < 18 * ROW + 20000


def test_the_index_grows_without_copying_all_each_time(monkeypatch):
    with opened("ram", layers=1, heads=1, dim=2, value_dim=2, tokens_per_frame=1) as store:
        shape = dict(layers=1, heads=1, dim=2, value_dim=2, tokens_per_frame=1)
        moved, places = 0, set()
        for i in range(1000):
            store.append(chunk(i, 1, shape=shape))
            at = store.index.data_ptr()
            moved += i * (at not in places)
            places.add(at)
        assert len(places) < 25 and moved < 4000  # n^2 / 2 would be 500,000
        assert store.index.shape == (1, 1000, 2)
        assert torch.equal(store.index[:, 777], chunk(777, 1, shape=shape).index[:, 0])


@pytest.mark.parametrize("device", DEVICES)
def test_prefetch_gives_what_fetch_gives(where, device):
    with opened(where, device=device, ram_bytes=None if where == "ram" else 2 * ROW, device_bytes=2 * ROW) as store:
        chunks = fill(store, 8)
        for layer in range(3):
            store.prefetch(layer, [5, 1, 7])
        for layer in range(3):
            assert same(store, chunks, layer, [1, 5, 6, 7])  # one more than was foreseen
        store.prefetch(0, [1, 2])
        store.prefetch(0, [3])  # another thought
        assert same(store, chunks, 0, [2, 3])
        store.prefetch(1, [0])  # never fetched
        before = store.counters()
        store.fetch(2, [])
        assert store.counters()["hits"] == before["hits"]


def test_a_prefetched_row_is_read_once(tmp_path):
    with opened(f"disk:{tmp_path / 's'}", ram_bytes=0) as store:
        chunks = fill(store, 8)
        store.prefetch(1, [2, 3])
        assert same(store, chunks, 1, [2, 3])
        assert store.counters() == dict(hits=0, misses=2, bytes_to_device=0, bytes_from_disk=2 * ROW)


def test_threads_append_and_fetch_at_once(tmp_path):
    with opened(f"disk:{tmp_path / 's'}", ram_bytes=7 * ROW) as store:
        chunks, wrong = fill(store, 6), []

        def ask(layer):
            for i in range(30):
                store.prefetch(layer, [i % 6, (i + 3) % 6])
                if not same(store, chunks, layer, [i % 6, (i + 2) % 6, (i + 3) % 6]):
                    wrong.append(i)

        askers = [threading.Thread(target=ask, args=(layer,)) for layer in range(3)]
        for t in askers:
            t.start()
        more = fill(store, *[1] * 10)
        for t in askers:
            t.join()
        assert not wrong and store.frames == 16 and same(store, chunks + more, 2, range(16))


def test_ram_that_is_full_says_so_and_stays_as_it_is():
    with opened("ram", ram_bytes=12 * ROW) as store:
        chunks = fill(store, 3)
        with pytest.raises(
            MemoryError, match=r"^2 more frames beside 3 take .* ram_bytes is \d+: raise it, pack, or"
        ) as e:
            store.append(chunk(3, 2))
        assert "\n" not in str(e.value)
        assert store.frames == 3 and store.index.shape[1] == 3 and same(store, chunks, 2, [0, 1, 2])
        chunks += fill(store, 1)  # one still fits
        assert same(store, chunks, 0, [3, 0])


def changed(**parts) -> Chunk:
    good = chunk(4, 2)
    return dataclasses.replace(good, **{k: v(good) for k, v in parts.items()})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (changed(times=lambda c: []), "without frames"),
        (changed(times=lambda c: [8.0, 8.0]), r"a frame at 8.0 s after one at 8.0 s; times have to ascend"),
        (changed(times=lambda c: [6.0, 8.0]), r"a frame at 6.0 s after one at 6.0 s"),  # the store's last
        (changed(times=lambda c: [8.0, float("nan")]), "a frame at nan s"),
        (changed(times=lambda c: [8.0]), r"keys of layer 0 are torch.float32 \(2, 24, 16\); .* \(2, 12, 16\) is needed"),
        (changed(keys=lambda c: c.keys[:2]), "keys of 2 layers; this store holds 3"),
        (changed(values=lambda c: c.keys), r"values of layer 0 are .* \(2, 24, 24\) is needed"),
        (changed(keys=lambda c: [k.half() for k in c.keys]), "keys of layer 0 are torch.float16"),
        (changed(index=lambda c: c.index[:, :1]), r"index is torch.float32 \(3, 1, 32\)"),
        (changed(index=lambda c: c.index.double()), "index is torch.float64"),
    ],
)  # fmt: skip
def test_a_chunk_that_does_not_fit_is_refused(where, bad, message):
    with opened(where) as store:
        chunks = fill(store, 4)
        with pytest.raises(ValueError, match=message) as e:
            store.append(bad)
        assert "\n" not in str(e.value)
        assert store.frames == 4 and same(store, chunks, 1, range(4))
        assert store.append(chunk(4, 2)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(where="disk"), "possible are 'ram', 'disk:PATH'"),
        (dict(where="disk:"), "possible are 'ram', 'disk:PATH'"),
        (dict(where="ram", mode="read"), "to read, possible is 'disk:PATH'"),
        (dict(mode="append"), "mode 'append': possible are 'write', 'read'"),
        (dict(packed="int3"), "packed 'int3': possible are None, 'int8', 'int4', 'int2', 'vidkv'"),
        (dict(layers=0), "layers 0: possible are integers from 1"),
        (dict(heads=True), "heads True"),
        (dict(dtype=torch.float64), "dtype 'float64': possible are float32, float16, bfloat16"),
        (dict(ram_bytes=-1), "ram_bytes -1"),
        (dict(device_bytes=1.5), "device_bytes 1.5"),
        (dict(device="meta"), "device 'meta': possible are 'cpu' and 'cuda'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as e:
        open_store(**dict(SHAPE, where="ram", key=KEY, dtype=torch.float32, device="cpu") | options)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("part", ["model", "preprocessing"])
def test_a_key_has_strings(part):
    with pytest.raises(ValueError, match=f"key: {part} is None; give a string"):
        Key(**dict(model="m", preprocessing="p") | {part: None})


@pytest.mark.parametrize(("layer", "frames"), [(3, [0]), (-1, [0]), (0, [0, 4]), (0, [-1])])
def test_what_is_not_there_cannot_be_fetched(layer, frames):
    with opened("ram") as store:
        fill(store, 4)
        for ask in (store.fetch, store.prefetch):
            with pytest.raises(ValueError, match=r"there are 0 to 2|4 are stored, counted from 0"):
                ask(layer, frames)


def test_a_closed_store_says_so(where):
    store = opened(where)
    fill(store, 2)
    store.prefetch(0, [1])
    store.close()
    store.close()
    for ask in (lambda: store.fetch(0, [0]), lambda: store.append(chunk(2, 1)), store.refresh):
        with pytest.raises(ValueError, match="the store is closed"):
            ask()
    assert store.bytes()["ram"] == 0


def test_the_running_hash_depends_on_every_frame_before():
    def of(*frames):
        content = ""
        for f in frames:
            content = advance(content, f)
        return content

    assert of(b"a", b"b") == of(b"a", b"b") == advance(of(b"a"), b"b")
    assert len({of(), of(b"a"), of(b"b"), of(b"a", b"b"), of(b"b", b"a"), of(b"ab"), of(b"a", b"b", b"")}) == 7
