"""The windows of many texts, computed once and kept in one file: retraining then takes seconds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from guardrails.encoder import SIZE, Encoder, Windows, require

CHUNK = 512
"""Texts that are computed between two reports."""

Report = Callable[[str], None]


class Embeddings:
    """A file of windows by the hash of their text; another encoder's file is not read.

    Vectors are kept as float16: 768 bytes and 8 for the span of each window. Never the text.
    """

    def __init__(self, path: Path, encoder: Encoder | None = None):
        self.path, self._encoder = path, encoder or Encoder()
        self._known: dict[bytes, Windows] | None = None

    def of(self, texts: Sequence[str], report: Report = print) -> list[Windows]:
        """The windows of these texts in their order; what is new is computed, and the file written again."""
        self._known = self._read() if self._known is None else self._known
        keys = [_key(text) for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._known}
        order = sorted(new, key=lambda key: len(new[key]))
        for start in range(0, len(order), CHUNK):
            part = order[start : start + CHUNK]
            for key in part:
                windows = self._encoder.windows(new[key])
                self._known[key] = Windows(windows.spans, windows.vectors.astype(np.float16).astype(np.float32))
            report(f"encoded {min(start + CHUNK, len(order))} of {len(order)} new texts")
        if new:
            self._write()
        return [self._known[key] for key in keys]

    def _read(self) -> dict[bytes, Windows]:
        if not self.path.is_file():
            return {}
        with np.load(self.path, allow_pickle=False) as file:
            if bytes(file["encoder"].tobytes()) != _encoder():
                return {}
            keys, counts = file["keys"], file["counts"]
            spans, vectors = file["spans"], file["vectors"].astype(np.float32)
        ends = np.cumsum(counts)
        return {
            keys[i].tobytes(): Windows(
                tuple((int(a), int(b)) for a, b in spans[end - count : end]), vectors[end - count : end]
            )
            for i, (count, end) in enumerate(zip(counts, ends, strict=True))
        }

    def _write(self) -> None:
        known = self._known or {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f".{self.path.name}.part")
        with part.open("wb") as file:
            np.savez(
                file,
                encoder=np.frombuffer(_encoder(), np.uint8),
                keys=np.frombuffer(b"".join(known), np.uint8).reshape(-1, 16),
                counts=np.array([len(one.spans) for one in known.values()], np.int32),
                spans=np.array([span for one in known.values() for span in one.spans], np.int32).reshape(-1, 2),
                vectors=np.concatenate([np.zeros((0, SIZE)), *(one.vectors for one in known.values())]).astype(
                    np.float16
                ),
            )
        part.replace(self.path)


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _encoder() -> bytes:
    """What tells one encoder from another: the hash of its model."""
    with (require() / "model.onnx").open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
