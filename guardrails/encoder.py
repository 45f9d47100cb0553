"""The one encoder behind the classifiers: all-MiniLM-L6-v2 in dynamic int8, run by onnxruntime off the event loop.

A text becomes windows of at most 128 tokens; each has a span of the text and a vector of 384 numbers (mean of the
tokens, length 1). `newel guard pull` puts the files where `folder` looks; nothing is read before the first text.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import regex
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from tokenizers import Tokenizer

NAME = "all-minilm-l6-v2-int8"
FILES = ("model.onnx", "tokenizer.json")
SIZE = 384
"""Numbers in a vector."""
TOKENS = 126
"""Tokens of the text in a window; with the two that frame it, 128."""
FIRST, LAST = 101, 102
"""The tokens that frame a window: [CLS], [SEP]."""
MOST = 8
"""Windows of a text. Of one that has more, the first, the last and an even sample of those between."""
LONG = 16_000
"""Characters up to which a text is tokenised whole; of a longer one only the places where its windows are."""
PIECE = 1200
"""Characters that are tokenised for one window of a long text."""
BATCH = 16
"""Windows that are computed together, at most."""
KEPT = 1024
"""Texts whose windows are remembered: at most 12 KB each."""

Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Windows:
    """A text as the classifiers see it: `vectors[i]` is what `text[slice(*spans[i])]` means."""

    spans: tuple[tuple[int, int], ...]
    vectors: Vectors


@dataclass(frozen=True, slots=True)
class _Cut:
    """One window before it is computed: its span, and its tokens with their frame."""

    span: tuple[int, int]
    ids: list[int]


def folder() -> Path:
    """Where the encoder's files are: NEWEL_ENCODER, or `models/` in NEWEL_HOME (~/.local/share/newel)."""
    if named := os.environ.get("NEWEL_ENCODER"):
        return Path(named).expanduser()
    home = os.environ.get("NEWEL_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".local" / "share" / "newel") / "models" / NAME


def require() -> Path:
    """The folder with the encoder's files; raises ValueError, with what to do, when one is missing."""
    where = folder()
    if missing := [name for name in FILES if not (where / name).is_file()]:
        raise ValueError(
            f"the encoder that the classifiers need is not there ({where} lacks {', '.join(missing)}); "
            "run: newel guard pull (or name its folder in NEWEL_ENCODER)"
        )
    return where


@cache
def encoder() -> Encoder:
    """The process's encoder; its files are read with the first text."""
    return Encoder()


class Encoder:
    """Turns texts into windows, in a thread of its own; texts that wait for it are computed together."""

    def __init__(self, where: Path | None = None, threads: int = 0):
        """`where` instead of `folder()`; `threads` computes one batch (NEWEL_ENCODER_THREADS, else 1)."""
        self._where = where
        self._threads = threads or int(os.environ.get("NEWEL_ENCODER_THREADS", "1"))
        self._pool = ThreadPoolExecutor(1, "encoder")
        self._model: tuple[Tokenizer, InferenceSession] | None = None
        self._lock = Lock()
        self._known: OrderedDict[bytes, Future[Windows]] = OrderedDict()
        self._waiting: deque[tuple[str, bytes, Future[Windows]]] = deque()
        self.passes = 0
        """Texts that were computed, for tests and measurements."""

    async def embed(self, text: str) -> Windows:
        """The windows of a text; the rules that read one text share one pass. Raises ValueError without files."""
        # the shield: one rule that ran out of time must not take the windows from the others
        return await asyncio.shield(asyncio.wrap_future(self._future(text)))

    def embed_all(self, texts: Sequence[str]) -> list[Windows]:
        """The windows of many texts, computed by the calling thread and not remembered."""
        return self._compute(texts)

    def _future(self, text: str) -> Future[Windows]:
        key = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        with self._lock:
            if known := self._known.get(key):
                self._known.move_to_end(key)
                return known
            future: Future[Windows] = Future()
            self._known[key] = future
            self._waiting.append((text, key, future))
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        self._pool.submit(self._work)
        return future

    def _work(self) -> None:
        """Computes whatever waits, in one go; a text that came meanwhile waits for the next."""
        with self._lock:
            work = list(self._waiting)
            self._waiting.clear()
        if not work:
            return
        try:
            results = self._compute([text for text, _, _ in work])
        except Exception as error:  # whatever it is belongs to those who wait
            with self._lock:
                for _, key, _ in work:
                    self._known.pop(key, None)
            for _, _, future in work:
                future.set_exception(error)
            return
        for (_, _, future), result in zip(work, results, strict=True):
            future.set_result(result)

    def _compute(self, texts: Sequence[str]) -> list[Windows]:
        tokenizer, session = self._model = self._model or _load(self._where or require(), self._threads)
        self.passes += len(texts)
        cuts = [_cut(tokenizer, text) for text in texts]
        flat = [one for cut in cuts for one in cut]
        vectors = np.zeros((len(flat), SIZE), np.float32)
        for batch in _batches([len(one.ids) for one in flat]):
            vectors[batch] = _run(session, [flat[i].ids for i in batch])
        found, at = [], 0
        for cut in cuts:
            found.append(Windows(tuple(one.span for one in cut), vectors[at : at + len(cut)]))
            at += len(cut)
        return found


def _load(where: Path, threads: int) -> tuple[Tokenizer, InferenceSession]:
    """The tokenizer and the model, ready; about 0.2 s and 60 MB."""
    from onnxruntime import InferenceSession, SessionOptions
    from tokenizers import Tokenizer

    options = SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    tokenizer = Tokenizer.from_file(str(where / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, InferenceSession(str(where / "model.onnx"), options, providers=["CPUExecutionProvider"])


_SURROGATES = regex.compile("[\ud800-\udfff]")


def _cut(tokenizer: Tokenizer, text: str) -> list[_Cut]:
    """The windows of a text, of even length where it is read whole; none where it has no token."""
    text = _SURROGATES.sub("\ufffd", text)
    if len(text) <= LONG:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        return [_frame(ids[a:b], offsets[a][0], offsets[b - 1][1]) for a, b in _places(len(ids))]
    cuts = []
    for i in range(MOST):
        start = round(i * (len(text) - PIECE) / (MOST - 1))
        encoding = tokenizer.encode(text[start : start + PIECE], add_special_tokens=False)
        part = slice(-TOKENS, None) if i == MOST - 1 else slice(TOKENS)
        if ids := encoding.ids[part]:
            offsets = encoding.offsets[part]
            cuts.append(_frame(ids, start + offsets[0][0], start + offsets[-1][1]))
    return cuts


def _frame(ids: list[int], start: int, end: int) -> _Cut:
    return _Cut((start, end), [FIRST, *ids, LAST])


def _places(tokens: int) -> list[tuple[int, int]]:
    """Where the windows of so many tokens begin and end."""
    count = -(-tokens // TOKENS)
    if count <= MOST:
        edges = [round(i * tokens / count) for i in range(count + 1)] if count else []
        return list(pairwise(edges))
    starts = [round(i * (tokens - TOKENS) / (MOST - 1)) for i in range(MOST)]
    return [(start, start + TOKENS) for start in starts]


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of windows that are computed together: of like lengths, for padding costs more than a batch saves."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches and len(batches[-1]) < BATCH and lengths[i] <= 1.1 * lengths[batches[-1][0]]:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _run(session: InferenceSession, rows: Sequence[list[int]]) -> Vectors:
    """The vectors of windows: (rows, SIZE)."""
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    hidden = np.asarray(session.run(None, feed)[0])  # (rows, tokens, SIZE)
    pooled = np.einsum("rts,rt->rs", hidden, mask.astype(np.float32))
    return np.asarray(pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12), np.float32)
