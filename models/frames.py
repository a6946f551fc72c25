"""`FramesReader`: pictures of a stream to frames of the decoder, and the prompt around a video, for each family."""

from __future__ import annotations

import torch


class FramesReader:
    """Encodes pictures in groups that do not depend on one another.

    Args:
        model: the top-level model.
        processor: its processor.
    """

    pictures = 1  # that make one frame of the decoder

    def __init__(self, model: torch.nn.Module, processor):
        self.model, self.processor = model, processor

    @torch.no_grad()
    def encode(self, pictures: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Features `[F, n, C]` of uint8 pictures `[F * self.pictures, H, W, 3]`, and rows and columns of a frame's n tokens."""
        raise NotImplementedError

    def step(self, seconds: float) -> float:
        """Positions between frames that many seconds apart, on the time axis."""
        return 1.0

    def prompt(self, question: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids int64 `[T]` of the chat template before a video, and after it with the question and the cue to answer.

        Raises:
            ValueError: the template has no place for a video.
        """
        parts = [{"type": "video"}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": parts}]
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        token = self.processor.video_token
        before, found, after = text.partition(token)
        if not found:
            raise ValueError(f"the chat template has no {token}; a template for video is needed")
        while after.startswith(token):
            after = after.removeprefix(token)
        return self.ids(before), self.ids(after)

    def ids(self, text: str) -> torch.Tensor:
        """Ids int64 `[T]` of plain text."""
        ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)

    def pixels(self, pictures: torch.Tensor):
        """What the family's video processor makes of one video."""
        given = dict(videos=[pictures.permute(0, 3, 1, 2)], do_sample_frames=False, return_tensors="pt")
        return self.processor.video_processor(**given).to(self.model.device)


class QwenFrames(FramesReader):
    """Two pictures make a frame; the tower attends within a frame, so that frames do not depend on their group."""

    pictures = 2

    @torch.no_grad()
    def encode(self, pictures: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        given = self.pixels(pictures)
        t, h, w = given["video_grid_thw"][0].tolist()
        merge = self.model.config.vision_config.spatial_merge_size
        pixels = given["pixel_values_videos"].to(self.model.dtype)
        out = self.model.model.get_video_features(pixels, given["video_grid_thw"], return_dict=True)
        return torch.cat(list(out.pooler_output)).view(t, (h // merge) * (w // merge), -1), (h // merge, w // merge)

    def step(self, seconds: float) -> float:
        return seconds * getattr(self.model.config.vision_config, "tokens_per_second", 1 / seconds)


class LlavaOnevisionFrames(FramesReader):
    """One picture is a frame of half the patches' side; the newline behind a whole video is left out, as ReKV's code does."""

    @torch.no_grad()
    def encode(self, pictures: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        pixels = self.pixels(pictures)["pixel_values_videos"].to(self.model.dtype)
        out = self.model.model.get_video_features(pixels, return_dict=True).pooler_output
        vision = self.model.config.vision_config
        side = -(-(vision.image_size // vision.patch_size) // 2)
        tokens = pixels.shape[1] * side**2
        return out[0][:tokens].view(pixels.shape[1], side**2, -1), (side, side)


class LongVAFrames(FramesReader):
    """One picture is a frame of half the patches' side; frames are encoded one by one."""

    @torch.no_grad()
    def encode(self, pictures: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        given = self.pixels(pictures)
        out = self.model.model.get_video_features(given["pixel_values_videos"], given["video_frames"])
        side = self.model.config.video_side
        return out.pooler_output[0].view(len(pictures), side**2, -1), (side, side)
