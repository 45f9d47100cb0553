"""The one encoder behind the classifiers: all-MiniLM-L6-v2 in dynamic int8, run by onnxruntime off the event loop.

A text becomes windows of at most 128 tokens; each has a span of the text and a vector of 384 numbers (mean of the
tokens, length 1). `newel guard pull` puts the files where `folder` looks; nothing is read before the first text.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, TypeAlias

import regex

if TYPE_CHECKING:  # what only classifiers need takes 30 MB: a gateway without them does not have it in memory
    import numpy as np
    from numpy.typing import NDArray
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
KEPT = 1024
"""Texts whose windows are remembered: at most 12 KB each."""

Vectors: TypeAlias = "NDArray[np.float32]"


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


_homes: list[Path] = []


def look_in(home: Path) -> None:
    """Has the encoder looked for in `models/` of this folder, before all others."""
    if home not in _homes:
        _homes.insert(0, home)


def folder() -> Path:
    """Where the encoder's files are: NEWEL_ENCODER; else the first `models/` that has them of the homes that were
    named, of NEWEL_HOME and the folder around it (where the home of a demo is), and of ~/.local/share/newel."""
    if named := os.environ.get("NEWEL_ENCODER"):
        return Path(named).expanduser()
    usual = Path.home() / ".local" / "share" / "newel"
    home = Path(os.environ.get("NEWEL_HOME") or usual).expanduser()
    places = [one / "models" / NAME for one in (*_homes, home, home.parent, usual)]
    return next((one for one in places if all((one / name).is_file() for name in FILES)), places[0])


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
    """Turns texts into windows, in threads of its own.

    Each window is computed alone: dynamic int8 scales by what is in the batch, and a verdict must not depend on who
    else is asking. On one core a batch is hardly faster.
    """

    def __init__(self, where: Path | None = None, threads: int = 0):
        """`where` instead of `folder()`; `threads` compute a text each (NEWEL_ENCODER_THREADS, else 1)."""
        self._where = where
        self._pool = ThreadPoolExecutor(threads or int(os.environ.get("NEWEL_ENCODER_THREADS", "1")), "encoder")
        self._model: tuple[Tokenizer, InferenceSession] | None = None
        self._loading, self._lock = Lock(), Lock()
        self._known: OrderedDict[bytes, Future[Windows]] = OrderedDict()
        self.passes = 0
        """Texts that were computed, for tests and measurements."""

    async def embed(self, text: str) -> Windows:
        """The windows of a text; the rules that read one text share one pass. Raises ValueError without files."""
        # the shield: one rule that ran out of time must not take the windows from the others
        return await asyncio.shield(asyncio.wrap_future(self._future(text)))

    def _future(self, text: str) -> Future[Windows]:
        key = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        with self._lock:
            known = self._known.get(key)
            if known is None or (known.done() and known.exception()):
                known = self._known[key] = self._pool.submit(self.windows, text)
            self._known.move_to_end(key)
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        return known

    def windows(self, text: str) -> Windows:
        """The windows of a text, computed by the calling thread and not remembered."""
        import numpy as np

        with self._loading:
            tokenizer, session = self._model = self._model or _load(self._where or require())
        self.passes += 1
        cuts = _cut(tokenizer, text)
        vectors = np.zeros((len(cuts), SIZE), np.float32)
        for i, cut in enumerate(cuts):
            vectors[i] = _run(session, cut.ids)
        return Windows(tuple(cut.span for cut in cuts), vectors)


def _load(where: Path) -> tuple[Tokenizer, InferenceSession]:
    """The tokenizer and the model, ready; about 0.2 s and 60 MB."""
    from onnxruntime import InferenceSession, SessionOptions
    from tokenizers import Tokenizer

    options = SessionOptions()
    options.intra_op_num_threads = 1
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


def _run(session: InferenceSession, tokens: list[int]) -> Vectors:
    """The vector of one window: (SIZE,)."""
    import numpy as np

    ids = np.array([tokens], np.int64)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    mean = np.asarray(session.run(None, feed)[0], np.float32)[0].mean(axis=0)  # of (tokens, SIZE)
    return np.asarray(mean / max(float(np.linalg.norm(mean)), 1e-12), np.float32)
