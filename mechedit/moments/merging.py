"""One C from several: parts of a text, or different texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mechedit import cache, provenance
from mechedit.moments.moment import SAMPLED, Moment, MomentError, condition
from mechedit.settings import MomentSettings

__all__ = ["joined", "merge", "text_of"]

MERGED = "merged: "  # of several texts


def merge(moments: Sequence[Moment]) -> Moment:
    """One C from all parts of a text, or from different texts: each counts as much as it has keys.

    Raises:
        MomentError: another model, layer or window among them, the same text twice, or a part that is missing.
    """
    if not moments:
        raise MomentError("there is nothing to merge.")
    first = moments[0]
    for each in moments:
        for what, mine, theirs in (
            ("layer", first.layer, each.layer),
            ("model", _model(first), _model(each)),
            ("size of C", len(first.C), len(each.C)),
            ("window", first.settings.context, each.settings.context),
            ("BOS rule", first.settings.prepend_bos, each.settings.prepend_bos),
        ):
            if mine != theirs:
                raise MomentError(f"moments that are merged must have one {what}; found {mine} and {theirs}.")
    texts: dict[str, list[Moment]] = {}
    for each in moments:
        texts.setdefault(text_of(each.source, each.settings), []).append(each)
    for text, same in texts.items():
        if len({cache.content_key(replace(each.settings, part=0)) for each in same}) > 1:
            raise MomentError(f"the same text would count twice, in different numbers of keys or parts: {text}.")
        parts = sorted(each.settings.part for each in same)
        if parts != list(range(same[0].settings.parts)):
            raise MomentError(
                f"each of the {same[0].settings.parts} parts of a text must be there exactly once; found {parts} (counted from 0)."
            )
    every = joined([*texts])
    keys = sum(each.keys for each in moments)
    C = sum((each.C * each.keys for each in moments), torch.zeros_like(first.C)) / keys
    source = first.source if len(texts) == 1 else every
    settings = replace(first.settings, part=0, parts=1, tokens=keys)
    return Moment(first.layer, C, keys, condition(C), source, settings, first.origin, provenance.versions())


def joined(texts: Sequence[str]) -> str:
    """The source of what is merged of these (`text_of`).

    Raises:
        MomentError: a text would count twice.
    """
    parts = [part for text in texts for part in text.removeprefix(MERGED).split("; ")]
    names = [name for part in parts for name in (part.split()[1:] if part.startswith("texts ") else [part])]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise MomentError(f"the same text would count twice, as a part of several: {', '.join(twice)}.")
    return MERGED + "; ".join(sorted(parts))


def _model(moment: Moment) -> str:
    """What the keys are of."""
    return str(moment.origin.get("keys") or moment.origin.get("weight_hash"))


def text_of(source: str, settings: MomentSettings) -> str:
    """Which text C or G is of: its source, with the seed where that makes the text."""
    return f"{source} with seed {settings.seed}" if source == SAMPLED else source
