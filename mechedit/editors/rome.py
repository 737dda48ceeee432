"""ROME: rewrite one fact by a rank-one change of one MLP's `W_out` (Meng et al. 2022, section 3.1).

    k* = the subject's key, averaged over prefixes          mechedit.keys
    v* = the value that makes the model say the target      mechedit.values
    C  = the second moment of keys on text                  mechedit.moments
    W_out += outer(C^-1 k*, v* - (k* W_out + b_out)) / (k* C^-1 k*)        mechedit.rank_one

One key is used everywhere (`policy="averaged"`, or the bare prompt's, `"prompt"`). The published code inserts at the bare
prompt's key along the averaged key's direction; that is `policy="published"`. Several prompts about one subject, each with
its own target, are one edit: their keys are averaged, and v* answers them all.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from mechedit import generation, guards, keys, models, moments, prompts, provenance, rank_one, scoring, values
from mechedit.edits import Edit, EditError
from mechedit.facts import Fact, FactError
from mechedit.models import HookedModel
from mechedit.moments import Moment
from mechedit.progress import Progress, silent
from mechedit.settings import MomentSettings, RomeSettings

__all__ = ["EditWarning", "check_moment", "edit", "resolve"]

WORD_TOKENS = 6  # of the model's own answer, of which the first word is taken
PUNCTUATION = ".,;:!?\"')]}"


class EditWarning(UserWarning):
    """An edit out of its bands that was asked for all the same (`guard="warn"`)."""


def resolve(model: HookedModel, settings: RomeSettings | None = None) -> RomeSettings:
    """The settings with layer and BOS filled in: the model's preset where none are given, its layer where none is.

    Raises:
        EditError: no layer is given and the model has no preset.
        ModelError: no such layer, or its block has no `W_out`.
    """
    preset = models.preset(model)
    settings = settings or (preset.rome if preset else RomeSettings())
    layer = settings.layer if settings.layer != -1 else (preset.rome.layer if preset else -1)
    if layer == -1:
        raise EditError(
            f"no layer is given and {model.cfg.model_name} has no preset. Trace some facts, and edit where restoring MLP outputs "
            "at the subject's last token helps most: RomeSettings(layer=...), --layer on the command line."
        )
    models.mlp_module(model, layer)
    return replace(settings, layer=layer, prepend_bos=prompts.resolve_bos(model, settings.prepend_bos))


def edit(
    model: HookedModel,
    fact: Fact | Sequence[Fact],
    settings: RomeSettings | None = None,
    moment: Moment | None = None,
    *,
    prefixes: Sequence[str] | None = None,
    progress: Progress = silent,
) -> Edit:
    """Find the rank-one change that makes the model complete `fact.prompt` with `fact.target_new`. The model is left as it is.

    Several facts must have one subject; the result's `fact`, `before` and `after` are the first's, `details["also"]` has the
    others'. Without `moment`, C is estimated from text sampled from the model, once, and kept in the cache. `prefixes`, "" the
    first of them, stand before the prompt in place of those that the settings sample.

    Raises:
        FactError: a fact has no new target, or does not fit the model, or several have different subjects.
        EditError: the model already says the target; C is of another layer or model; or the result is out of its bands.
        ModelError: no such layer, or a block without `W_out`.
    """
    began = time.perf_counter()
    if isinstance(fact, str):
        raise FactError(f"an edit needs a Fact, or several of one subject; found the text {fact!r}.")
    facts = (fact,) if isinstance(fact, Fact) else tuple(fact)
    settings = resolve(model, settings)
    targets = _check_facts(model, facts, settings)
    if moment is not None:
        check_moment(model, moment, settings)
    facts, before = _measure_before(model, facts, targets, settings)
    healthy = guards.measure(model, facts[0].subject, prepend_bos=settings.prepend_bos)
    moment = moment or moments.estimate(
        model, settings.layer, settings=MomentSettings(prepend_bos=settings.prepend_bos), progress=progress
    )
    before_prompt = keys.prefixes(model, settings) if prefixes is None else tuple(prefixes)
    change, report, details = _find(model, facts, targets, moment, before_prompt, settings, progress)
    with rank_one.edited(model, change):
        after = _measure(model, facts, settings)
        report |= guards.drift(healthy, guards.measure(model, facts[0].subject, prepend_bos=settings.prepend_bos))
    reasons = guards.reasons(report)
    _obey(settings, reasons)
    kept: tuple[rank_one.RankOneEdit, ...] = (change,)
    if reasons and settings.guard == "rollback":
        kept, after = (), before
    also = zip(facts[1:], before[1:], after[1:], strict=True)
    details["also"] = [_describe(fact) | {"before": was, "after": now} for fact, was, now in also]
    return Edit(
        method="rome",
        changes=kept,
        fact=_describe(facts[0]),
        report=report,
        reasons=tuple(reasons),
        before=before[0],
        after=after[0],
        origin=provenance.origin(model),
        settings=asdict(settings),
        versions=provenance.versions(),
        seconds=time.perf_counter() - began,
        details=details,
    )


def _check_facts(model: HookedModel, facts: tuple[Fact, ...], settings: RomeSettings) -> list[list[int]]:
    """The ids of each new target, if the facts make one edit."""
    if not facts:
        raise FactError("an edit needs at least one fact.")
    if len(subjects := sorted({fact.subject for fact in facts})) > 1:
        raise FactError(
            f"one edit is about one subject; these facts are about {', '.join(subjects)}. Edit them one by one."
        )
    targets = []
    for fact in facts:
        if fact.target_new is None:
            raise FactError(f"the fact about {fact.subject!r} has no target_new to write.")
        targets.append(prompts.continuation(model, fact.prompt, fact.target_new))
        length = len(prompts.prepare(model, fact, prepend_bos=settings.prepend_bos).ids)
        prompts.check_length(model, length + len(targets[-1]))
    return targets


def _obey(settings: RomeSettings, reasons: list[str]) -> None:
    """Refuse or warn, as the settings say."""
    if not reasons:
        return
    text = f"the edit of block {settings.layer} is out of its bands (clamp {settings.clamp:g}): " + " ".join(reasons)
    if settings.guard == "refuse":
        raise EditError(text + " guard='warn' keeps such an edit.")
    if settings.guard == "warn":
        warnings.warn(text, EditWarning, stacklevel=3)


def _find(
    model: HookedModel,
    facts: tuple[Fact, ...],
    targets: list[list[int]],
    moment: Moment,
    before: tuple[str, ...],
    settings: RomeSettings,
    progress: Progress,
) -> tuple[rank_one.RankOneEdit, dict[str, float], dict[str, Any]]:
    """The change, its numbers, and what it was made from."""
    bos, token = settings.prepend_bos, settings.fact_token
    rows = [row for fact in facts for row in keys.contexts(model, fact, before, token, prepend_bos=bos)]
    wanted = [target for target in targets for _ in before]
    (essence,) = keys.contexts(model, Fact(facts[0].subject, "{} is a"), ("",), token, prepend_bos=bos)
    found = keys.subject_keys(model, settings.layer, (*rows, essence)).cpu()
    bare, averaged = found[: len(rows) : len(before)].mean(0), found[: len(rows)].mean(0)  # "" is the first prefix
    W_out = models.W_out(model, settings.layer).detach().float().cpu()
    b_out = models.b_out(model, settings.layer).float().cpu()
    C = rank_one.regularised(moment.C, settings.ridge)
    key = bare if settings.policy == "prompt" else averaged
    u = rank_one.direction(key, C)
    if settings.policy == "published":  # inserted at the bare prompt's key, along the averaged key's direction
        at, shares = bare, torch.ones(len(found))
    else:
        at, shares = key, (found.double() @ u / (key.double() @ u)).float()
    for row, target in zip(rows, wanted, strict=True):
        prompts.check_length(model, len(row.ids) + len(target) - 1)
    value = values.optimise(
        model, rows, essence, wanted, at @ W_out + b_out, shares, settings.layer, settings, progress=progress
    )
    change = rank_one.insert(settings.layer, W_out, b_out, u, at, value.value)
    report = {
        "divisor": change.divisor,
        "divisor_share": change.divisor / float(change.u @ key.double()),
        "update_norm": change.norm,
        "relative_norm": change.norm / float(W_out.double().norm()),
        "cond_C": moments.condition(C) if settings.ridge else moment.cond,
    }
    details = {
        "prefixes": list(before),
        "losses": [list(step) for step in value.losses],
        "shares": shares.tolist(),
        "moment": {
            "hash": moment.hash,
            "source": moment.source,
            "keys": moment.keys,
            "settings": asdict(moment.settings),
            "origin": moment.origin,
        },
    }
    return change, report, details


def _measure(model: HookedModel, facts: tuple[Fact, ...], settings: RomeSettings) -> list[dict[str, float]]:
    """Probability of each whole target after each prompt."""
    pairs = [(fact.prompt, str(target)) for fact in facts for target in (fact.target_new, fact.target_true)]
    scores = scoring.score(model, pairs, prepend_bos=settings.prepend_bos)
    return [{"p_new": new.p, "p_true": true.p} for new, true in zip(scores[::2], scores[1::2], strict=True)]


def _measure_before(
    model: HookedModel, facts: tuple[Fact, ...], targets: list[list[int]], settings: RomeSettings
) -> tuple[tuple[Fact, ...], list[dict[str, float]]]:
    """The facts, their true targets filled in by what the model says where they have none, and the probabilities now."""
    filled = []
    for fact, target in zip(facts, targets, strict=True):
        said, token, _ = scoring.top(model, fact.prompt, 1, prepend_bos=settings.prepend_bos)[0]
        if target == [token]:
            raise EditError(
                f"the target {fact.target_new!r} is what {model.cfg.model_name} already says after {fact.prompt!r}: there is nothing to edit."
            )
        if fact.target_true is None and not said.strip():
            raise FactError(f"the model's own answer to {fact.prompt!r} is {said!r}; name the true target.")
        filled.append(fact if fact.target_true else replace(fact, target_true=_own_word(model, fact, settings, said)))
    return tuple(filled), _measure(model, tuple(filled), settings)


def _own_word(model: HookedModel, fact: Fact, settings: RomeSettings, said: str) -> str:
    """The word that the model goes on with; its first token, `said`, where that is none."""
    words = generation.complete(model, fact.prompt, WORD_TOKENS, prepend_bos=settings.prepend_bos).split()
    return (words[0].rstrip(PUNCTUATION) if words else "") or said.strip()


def check_moment(model: HookedModel, moment: Moment, settings: RomeSettings) -> None:
    """Raise unless C is of the layer, model and kind of text that the (resolved) settings need.

    Raises:
        EditError: it is not.
    """
    layer = settings.layer
    if not isinstance(moment, Moment):
        raise EditError(
            f"C is given as a Moment (moments.estimate, Moment.load, moments.read_published); found a {type(moment).__name__}."
        )
    if moment.layer != layer:
        raise EditError(
            f"C must be of the edited layer {layer}; this one is of layer {moment.layer}. Estimate it for layer {layer}."
        )
    if len(moment.C) != models.W_out(model, layer).shape[0]:
        raise EditError(
            f"C must be [d_mlp, d_mlp] with d_mlp = {models.W_out(model, layer).shape[0]}; it is {list(moment.C.shape)}, of another model."
        )
    if not bool(moment.C.isfinite().all()):
        raise EditError(
            "C must be finite, but it holds NaN or infinity. Estimate it again; in float16, load the model in float32."
        )
    if moment.settings.parts > 1:
        raise EditError(
            f"C is part {moment.settings.part} of {moment.settings.parts} of a text; put all together with moments.merge (`mechedit merge`)."
        )
    if moment.keys <= len(moment.C):
        raise EditError(
            f"C must come from more keys than d_mlp = {len(moment.C)}; this one has {moment.keys}. Ten times d_mlp is a good number."
        )
    if moment.origin["weight_hash"] != models.weight_hash(model):
        raise EditError(f"C was estimated on other weights ({moment.origin['name']}). Estimate it on this model.")
    if moment.settings.prepend_bos != settings.prepend_bos:
        raise EditError(
            f"C was estimated {'with' if moment.settings.prepend_bos else 'without'} BOS, and the edit reads its prompts "
            f"{'with' if settings.prepend_bos else 'without'} it: keys of the two differ. Give both the same prepend_bos."
        )


def _describe(fact: Fact) -> dict[str, Any]:
    return asdict(fact) | {"prompt": fact.prompt}
