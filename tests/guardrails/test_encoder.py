"""The encoder: windows and their spans, one pass for many rules, bounded work, missing files."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from guardrails import encoder as module
from guardrails.encoder import MOST, SIZE, TOKENS, Encoder, folder, require

WORDS = "The report on the northern region is due on Friday and nobody has read it yet. "


@pytest.fixture
def encoder(encoder_dir: Path) -> Encoder:
    return Encoder(encoder_dir)


@pytest.mark.parametrize(
    ("text", "windows"),
    [("", 0), (" \n\t", 0), ("ok", 1), (WORDS, 1), (WORDS * 8, 2), (WORDS * 100, MOST), (WORDS * 9000, MOST)],
)
async def test_a_text_has_as_many_windows_as_it_needs_and_never_more_than_the_most(
    encoder: Encoder, text: str, windows: int
) -> None:
    found = await encoder.embed(text)
    assert len(found.spans) == windows
    assert found.vectors.shape == (windows, SIZE)
    assert np.allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-5)


async def test_windows_of_a_text_that_is_read_whole_cover_all_its_words(encoder: Encoder) -> None:
    text = WORDS * 8
    spans = (await encoder.embed(text)).spans
    assert (spans[0][0], spans[-1][1]) == (0, len(text.rstrip()))
    assert all(not text[end:start].strip() for (_, end), (start, _) in pairwise(spans))


@pytest.mark.parametrize("times", [200, 4000])
async def test_of_a_long_text_the_beginning_and_the_end_are_read(encoder: Encoder, times: int) -> None:
    text = f"First words. {WORDS * times}Last words."
    spans = (await encoder.embed(text)).spans
    assert (spans[0][0], spans[-1][1]) == (0, len(text))
    assert list(spans) == sorted(spans)


@pytest.mark.parametrize(
    "text",
    [
        "\ud800 lone surrogates \udfff",
        "a" * 100_000,
        "\u0000\u200b",
        "漢字" * 3000,
        "🏳️‍🌈" * 500,
        "\u202eabc",
        "[CLS] [SEP]",
    ],
)
async def test_strange_texts_have_windows_inside_them(encoder: Encoder, text: str) -> None:
    found = await encoder.embed(text)
    assert all(0 <= start <= end <= len(text) for start, end in found.spans)
    assert np.isfinite(found.vectors).all()


async def test_spans_count_code_points(encoder: Encoder) -> None:
    text = "😀😀 Please reset my password."
    ((start, end),) = (await encoder.embed(text)).spans
    assert text[start:end].endswith("my password.")
    assert end == len(text)


async def test_what_means_the_same_is_near_and_what_does_not_is_far(encoder: Encoder) -> None:
    texts = ["How do I reset my password?", "I forgot my password.", "Which herbs go with fish?"]
    one, same, other = [(await encoder.embed(text)).vectors[0] for text in texts]
    assert one @ same > 0.6 > 0.2 > one @ other


async def test_a_window_does_not_depend_on_what_is_computed_beside_it(encoder: Encoder, encoder_dir: Path) -> None:
    texts = [WORDS[: 5 + 3 * i] for i in range(24)]
    busy = Encoder(encoder_dir, threads=3)
    together = await asyncio.gather(*(busy.embed(text) for text in texts))
    for text, found in zip(texts, together, strict=True):
        assert np.array_equal(encoder.windows(text).vectors, found.vectors)


async def test_rules_that_read_one_text_share_one_pass(encoder: Encoder) -> None:
    await asyncio.gather(*(encoder.embed("How many days of leave do I have?") for _ in range(5)))
    await encoder.embed("How many days of leave do I have?")
    assert encoder.passes == 1
    await encoder.embed("How many days of leave do you have?")
    assert encoder.passes == 2


async def test_a_rule_that_gives_up_does_not_take_the_windows_from_the_others(encoder: Encoder) -> None:
    first = asyncio.ensure_future(encoder.embed(WORDS))
    second = asyncio.ensure_future(encoder.embed(WORDS))
    await asyncio.sleep(0)
    first.cancel()
    assert len((await second).spans) == 1


async def test_the_oldest_texts_are_forgotten(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 2)
    for text in ("one", "two", "three", "three", "one"):
        await encoder.embed(text)
    assert encoder.passes == 4


async def test_a_failure_is_not_remembered(encoder_dir: Path, tmp_path: Path) -> None:
    encoder = Encoder(tmp_path)
    for name in module.FILES:
        (tmp_path / name).write_bytes(b"no model")
    with pytest.raises(Exception, match="expected ident"):
        await encoder.embed(WORDS)
    for name in module.FILES:
        (tmp_path / name).write_bytes((encoder_dir / name).read_bytes())
    assert len((await encoder.embed(WORDS)).spans) == 1


def test_places_are_even_and_within_a_window() -> None:
    for tokens in (0, 1, TOKENS, TOKENS + 1, 500, MOST * TOKENS, MOST * TOKENS + 1, 9999):
        places = module._places(tokens)
        assert all(0 < end - start <= TOKENS for start, end in places)
        assert len(places) <= MOST
        assert not tokens or (places[0][0], places[-1][1]) == (0, tokens)


def test_files_are_looked_for_in_the_named_folder_then_in_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def filled(home: Path) -> Path:
        there = home / "models" / module.NAME
        there.mkdir(parents=True)
        for name in module.FILES:
            (there / name).touch()
        return there

    monkeypatch.setattr(module, "_homes", [])
    monkeypatch.setenv("HOME", str(tmp_path / "person"))
    monkeypatch.setenv("NEWEL_HOME", str(tmp_path / "gateway" / "demo"))
    monkeypatch.delenv("NEWEL_ENCODER", raising=False)
    assert folder() == tmp_path / "gateway" / "demo" / "models" / module.NAME
    for home in ("person/.local/share/newel", "gateway", "gateway/demo"):
        there = filled(tmp_path / home)
        assert folder() == there
    module.look_in(tmp_path / "named")
    assert folder() == tmp_path / "gateway" / "demo" / "models" / module.NAME
    there = filled(tmp_path / "named")
    assert folder() == there
    monkeypatch.setenv("NEWEL_ENCODER", str(tmp_path / "own"))
    assert folder() == tmp_path / "own"
    with pytest.raises(ValueError, match=r"own lacks model\.onnx, tokenizer\.json\); run: newel guard pull"):
        require()


def test_nothing_is_loaded_on_import() -> None:
    code = (
        "import sys, json, guardrails.encoder, guardrails.heads, guardrails.validators.harm\n"
        "print(json.dumps([m for m in ('onnxruntime', 'tokenizers', 'torch') if m in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == []
