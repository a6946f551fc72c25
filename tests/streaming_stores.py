"""What the tests of the store share: small shapes, random chunks, a naive memory of them."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import resource
import signal

import torch

from mmkv.streaming.store import Chunk, Key, open_store

SHAPE = dict(layers=3, heads=2, dim=16, value_dim=24, tokens_per_frame=12)
KEY = Key("model-a", "pictures-a", "video-a")
ROW = 2 * 12 * (16 + 24) * 4  # bytes of a frame of one layer in fp32; a multiple of 16


def opened(where, key=KEY, **options):
    return open_store(str(where), key, **dict(SHAPE, dtype=torch.float32, device="cpu") | options)


def chunk(first: int, frames: int, dtype=torch.float32, shape=SHAPE, device="cpu") -> Chunk:
    """Frames `first` on; their numbers depend on the first frame alone."""
    g = torch.Generator().manual_seed(first)
    size = shape["heads"], frames * shape["tokens_per_frame"]
    keys, values = (
        [torch.randn(*size, shape[d], generator=g).to(device, dtype) for _ in range(shape["layers"])]
        for d in ("dim", "value_dim")
    )
    index = torch.randn(shape["layers"], frames, shape["heads"] * shape["dim"], generator=g)
    return Chunk(keys, values, index.to(device), [2.0 * (first + i) for i in range(frames)])


def fill(store, *sizes: int) -> list[Chunk]:
    """Append chunks of so many frames each."""
    out = []
    for size in sizes:
        out.append(chunk(store.frames, size, shape=SHAPE))
        store.append(out[-1])
    return out


def frame(chunks: list[Chunk], layer: int, number: int, tokens: int = 12):
    """Keys and values of one frame, taken from the chunks that were appended."""
    for c in chunks:
        if number < len(c.times):
            cut = slice(number * tokens, (number + 1) * tokens)
            return c.keys[layer][:, cut], c.values[layer][:, cut]
        number -= len(c.times)
    raise IndexError(number)


def same(store, chunks, layer: int, frames) -> bool:
    """Whether a fetch gives these frames bit for bit."""
    keys, values = store.fetch(layer, frames)
    want = [frame(chunks, layer, f, store.tokens_per_frame) for f in frames]
    return torch.equal(keys.cpu(), torch.cat([k for k, _ in want], 1).cpu()) and torch.equal(
        values.cpu(), torch.cat([v for _, v in want], 1).cpu()
    )


def files(path):
    return sorted(p for p in path.iterdir() if p.suffix == ".safetensors")


# ---- what other processes do: started from a server that has everything imported, so each costs milliseconds

_others = multiprocessing.get_context("forkserver")
_others.set_forkserver_preload(["mmkv.streaming.store"])


def process(act, where, *args):
    """Another process that runs `act(pipe, where, *args)`: the process, and this end of the pipe."""
    here, there = _others.Pipe()
    child = _others.Process(target=act, args=(there, where, *args))
    child.start()
    there.close()
    return child, here


def append_for_ever(pipe, where):
    store = opened(where)
    while True:
        pipe.send(store.append(chunk(store.frames, 2)) + 2)


def die_before(pipe, where, module, name):
    """Store 4 frames; die in place of a call that the next append makes."""
    store = opened(where)
    fill(store, 2, 2)
    setattr(importlib.import_module(module), name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    fill(store, 2)


def append_beyond(pipe, where, limit: int):
    """Append more than the system lets a file hold, then what it does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    store = opened(where)
    fill(store, 1)
    try:
        store.append(chunk(1, 40))
    except OSError as e:
        pipe.send(e.strerror)
    pipe.send((store.frames, store.append(chunk(1, 1)), same(store, [chunk(0, 1), chunk(1, 1)], 1, [0, 1])))


def hold(pipe, where):
    """Write two frames and keep the store open."""
    store = opened(where)
    fill(store, 2)
    pipe.send("open")
    pipe.recv()


def look(pipe, where):
    """Read what there is whenever told to."""
    reader = opened(where, mode="read")
    while pipe.recv():
        new, last = reader.refresh(), reader.frames - 1
        pipe.send((new, reader.frames, [t.tolist() for t in reader.fetch(1, [last])]))
