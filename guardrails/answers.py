"""What a guard model's answer says: the probabilities of its labels, read from the token that decides.

Nothing is parsed out of prose. The first word after a marker decides; what counts is how probable each label was in its
place, so an answer is a number that can be calibrated, and an answer in which no label was likely is an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import regex

from guardrails.types import Token

DECORATION = " \n\r\t▁ĠĊ\"'`*_.,:;()[]<>"
"""Around a word it means nothing: white space (also as byte-level and SentencePiece tokens write it), quotes, marks."""

LEAST = 0.5
"""The share that the labels must have together: a guard model that does what it was trained for gives them 0.99."""

SPLIT = 2
"""Letters from which on the beginning of a label stands for it: Qwen's tokens for Controversial begin with ` Cont`."""


class Undecided(ValueError):
    """An answer whose deciding token is none of the labels, or that has no probabilities."""


def shares(tokens: Sequence[Token], labels: Sequence[str], after: str = "", least: float = LEAST) -> dict[str, float]:
    """How probable each label (in small letters) was at the first word after the marker `after`, as parts of 1.

    Raises Undecided where there is no such word, or where the labels together were less probable than `least`.
    """
    place, cut = _deciding(tokens, after)
    deciding = tokens[place]
    begun = deciding.text[:cut]
    return weighed([(text[cut:], log) for text, log in deciding.alternatives if text.startswith(begun)], labels, least)


def weighed(alternatives: Iterable[tuple[str, float]], labels: Sequence[str], least: float = LEAST) -> dict[str, float]:
    """How probable each label (in small letters) is among these words, as parts of 1; raises Undecided."""
    mass = dict.fromkeys(labels, 0.0)
    for text, logprob in alternatives:
        if label := _label(text, labels):
            mass[label] += math.exp(logprob)
    total = sum(mass.values())
    if not math.isfinite(total) or total <= 0 or total < least:
        raise Undecided(
            f"the model's answer is none of {', '.join(labels)} (together {total:.2g} probable, not {least:g}): "
            "is it the model that this kind of question is made for?"
        )
    return {label: chance / total for label, chance in mass.items()}


def following(tokens: Sequence[Token], after: str = "") -> str:
    """The answer's text behind the deciding token's beginning: the label itself and what was said about it."""
    place, cut = _deciding(tokens, after)
    return "".join(token.text for token in tokens[place:])[cut:]


def risk(mass: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The probability that the text is not safe: each label's share times how much it counts, in 0..1."""
    return sum(weights[label] * share for label, share in mass.items())


def calibrated(probability: float, scale: float, shift: float) -> float:
    """The logistic function of `scale * logit(probability) + shift` (Platt 1999), in 0..1; ends stay ends."""
    if probability <= 0.0 or probability >= 1.0 or (scale, shift) == (1.0, 0.0):
        return min(max(probability, 0.0), 1.0)
    score = scale * math.log(probability / (1.0 - probability)) + shift
    return 1.0 / (1.0 + math.exp(-score)) if score >= 0 else math.exp(score) / (1.0 + math.exp(score))


def _deciding(tokens: Sequence[Token], after: str) -> tuple[int, int]:
    """(place of the token with the first word after the marker, how many of its characters belong before it)."""
    if not any(token.alternatives for token in tokens):
        raise Undecided("the engine returned no log-probabilities; it must support `logprobs`")
    text = "".join(token.text for token in tokens)
    begin = text.rfind(after) + len(after) if after else 0
    if after not in text:
        raise Undecided(f"the model's answer has no {after!r} within its {len(tokens)} tokens")
    end = 0
    for place, token in enumerate(tokens):
        start, end = end, end + len(token.text)
        cut = max(0, begin - start)
        if end > begin and token.text[cut:].strip(DECORATION):
            return place, cut
    raise Undecided("the model's answer has no word that decides")


def _label(text: str, labels: Sequence[str]) -> str:
    """The label that a token stands for, whole or by its beginning, or empty."""
    found = regex.match(r"[^\W_]+", text.strip(DECORATION).lower())
    word = found.group() if found else ""
    if word in labels:
        return word
    begun = [label for label in labels if label.startswith(word)] if len(word) >= SPLIT else []
    return begun[0] if len(begun) == 1 else ""
