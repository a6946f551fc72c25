"""What one process does: load the model, then answer the samples of one group after another by every method."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from mmkv._inputs import load
from mmkv.eval.asker import Asker
from mmkv.eval.media import Media
from mmkv.eval.task import Sample, SkipSample
from mmkv.eval.work import Job, Work, head_of


class Worker:
    """A loaded model that turns jobs into rows.

    Args:
        work: what to run.
        loaded: (model, processor), where they are there already.
    """

    def __init__(self, work: Work, loaded: tuple[Any, Any] | None = None):
        if work.threads is not None:
            torch.set_num_threads(work.threads)
        self.work, self.task = work, work.task
        self.model, self.processor = loaded or load(work.model, work.device, work.dtype)
        self.task.begin(self.model, self.processor)

    def rows(self, job: Job) -> Iterator[dict[str, Any]]:
        """A row for each pending (method, sample) of a job, as it is answered."""
        runnable = []
        for sample in job.samples:
            if sample.skipped is None:
                runnable.append(sample)
            else:
                yield from self._skipped(job, [sample], sample.skipped)
        if self.task.follows:
            yield from self._in_turn(job, runnable)
        elif self.task.shares_media:
            yield from self._together(job, runnable)
        else:
            for sample in runnable:
                yield from self._together(job, [sample])

    def _in_turn(self, job: Job, samples: list[Sample]) -> Iterator[dict[str, Any]]:
        """Samples whose prompts hold the same method's responses to the ones before: `data["past"]`, by id.

        What an earlier run has answered is answered again where a later sample is pending, without a second row.
        """
        for name, ids in job.pending.items():
            last = max((i for i, sample in enumerate(samples) if sample.id in ids), default=-1)
            past: dict[str, str] = {}
            for sample in samples[: last + 1]:
                told = replace(sample, data={**sample.data, "past": dict(past)})
                for row in self._together(Job(job.group, (told,), {name: (sample.id,)}), [told]):
                    past |= {sample.id: row["response"]} if "response" in row else {}
                    if sample.id in ids:
                        yield row

    def _together(self, job: Job, samples: list[Sample]) -> Iterator[dict[str, Any]]:
        """Samples that show the same media."""
        if not any(job.wanted(sample) for sample in samples):
            return
        begun = time.perf_counter()
        try:
            media = self.task.media(samples[0])
        except (SkipSample, FileNotFoundError, ValueError) as error:
            yield from self._skipped(job, samples, _reason(error))
            return
        seconds = time.perf_counter() - begun
        for method in self.work.methods:
            mine = [sample for sample in samples if method.name in job.wanted(sample)]
            if mine:
                with Asker(self.model, self.processor, method, self.task.shares_media) as asker:
                    for sample in mine:
                        yield self._row(asker, sample, media, seconds)

    def _row(self, asker: Asker, sample: Sample, media: Media, seconds: float) -> dict[str, Any]:
        head = head_of(asker.method.name, sample)
        try:
            prompt = self.task.prompt(sample, media)
        except (SkipSample, FileNotFoundError, ValueError) as error:
            return head | dict(skipped=_reason(error))
        likely = self.task.answer_mode == "likelihood"
        try:
            told = asker.answer(prompt, media, likely, self.task.max_new_tokens)
        except SkipSample as error:
            return head | dict(skipped=_reason(error))
        except torch.OutOfMemoryError as error:
            asker.forget()
            torch.cuda.empty_cache()
            return head | dict(skipped=f"out of memory: {_reason(error)}")
        shown: dict[str, Any] = dict(media_seconds=round(seconds, 4))
        if media.clip is not None:
            clip = media.clip
            shown |= dict(frames=len(clip.frames), video_frames=clip.frame_count, fps=round(clip.fps, 4))
            shown |= dict(pixels=list(clip.frames.shape[1:3]), decoder=clip.reader, short_video=clip.short)
        return head | self.task.score(sample, told["response"]) | told | shown

    def _skipped(self, job: Job, samples: list[Sample], reason: str) -> Iterator[dict[str, Any]]:
        for sample in samples:
            for name in job.wanted(sample):
                yield head_of(name, sample) | dict(skipped=reason)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
