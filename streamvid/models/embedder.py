"""Embeds frames and questions into one space, so that a question can be searched for among frames."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from streamvid.errors import UnsupportedError
from streamvid.models.fingerprint import fingerprint


class Embedder(ABC):
    """Frames and texts to unit vectors; similarity is their dot product, higher is better."""

    name: str
    fingerprint: str
    """Changes whenever the vectors would."""

    width: int
    """Dk"""

    @abstractmethod
    def frames(self, pixels: Tensor) -> Tensor:
        """(F, H, W, 3) uint8 -> (F, Dk) float32, unit length."""

    @abstractmethod
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (n, Dk) float32, unit length."""


class DualEncoder(Embedder):
    """Any transformers model with an image and a text tower (SigLIP, SigLIP 2, CLIP)."""

    FRAMES_AT_ONCE = 32

    def __init__(self, model: Any, tokenizer: Any, image: dict[str, Any], *, name: str, fingerprint: str) -> None:
        """Wrap a loaded model; ``load`` is the usual way in."""
        self.model, self.tokenizer, self.name, self.fingerprint = model.eval(), tokenizer, name, fingerprint
        size = image.get("size") or {}
        side = model.config.vision_config.image_size
        self.height = int(size.get("height") or size.get("shortest_edge") or side)
        self.width_pixels = int(size.get("width") or size.get("shortest_edge") or side)
        self.mean = torch.tensor(image.get("image_mean") or (0.5, 0.5, 0.5)) * 255
        self.std = torch.tensor(image.get("image_std") or (0.5, 0.5, 0.5)) * 255
        text = model.config.text_config
        self.length = int(text.max_position_embeddings)
        self.pads_to_length = "siglip" in str(model.config.model_type)
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.width = int(getattr(model.config, "projection_dim", 0) or text.hidden_size)

    @classmethod
    def load(cls, folder: Path, *, name: str, device: str = "cpu") -> DualEncoder:
        """Load a checkpoint folder in the Hugging Face layout.

        Raises:
            UnsupportedError: if it is not a dual encoder.
        """
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
            raise UnsupportedError(f"{name} has no image and text tower; use a SigLIP or CLIP checkpoint for retrieval")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        path = folder / "preprocessor_config.json"
        image = json.loads(path.read_text()) if path.is_file() else {}
        return cls(model.to(device), tokenizer, image, name=name, fingerprint=fingerprint(folder))

    def frames(self, pixels: Tensor) -> Tensor:
        """Frames -> (F, Dk) float32, unit length; frames are stretched to the tower's square."""
        out = []
        for part in torch.split(pixels, self.FRAMES_AT_ONCE):
            image = part.to(self.device).permute(0, 3, 1, 2).contiguous()
            image = F.interpolate(image, (self.height, self.width_pixels), mode="bicubic", antialias=True)
            mean, std = self.mean.to(self.device), self.std.to(self.device)
            image = (image.float() - mean[:, None, None]) / std[:, None, None]
            out.append(_pooled(self.model.get_image_features(pixel_values=image.to(self.dtype))))
        return F.normalize(torch.cat(out).float().cpu(), dim=-1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (n, Dk) float32, unit length; what exceeds the tower's length is cut."""
        inputs = self.tokenizer(
            [text.lower() for text in texts],
            padding="max_length" if self.pads_to_length else True,
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        ).to(self.device)
        wanted = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
        return F.normalize(_pooled(self.model.get_text_features(**wanted)).float().cpu(), dim=-1)


def _pooled(output: Any) -> Tensor:
    """The vector out of what ``get_*_features`` returned: a tensor, or an output object that carries it."""
    if isinstance(output, Tensor):
        return output
    pooled: Tensor = output.pooler_output
    return pooled
