"""ROME: rewrite one fact by a rank-one change of one MLP's `W_out` (Meng et al. 2022, section 3.1).

    k* = the subject's key, averaged over prefixes          mechedit.keys
    v* = the value that makes the model say the target      mechedit.values
    C  = the second moment of keys on text                  mechedit.moments
    W_out += outer(C^-1 k*, v* - (k* W_out + b_out)) / (k* C^-1 k*)        mechedit.rank_one

One key is used everywhere (`policy="averaged"`). The published code inserts at the bare prompt's key along the averaged
key's direction; that is `policy="published"`.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

import torch

from mechedit import keys, models, moments, prompts, provenance, rank_one, scoring, values
from mechedit.edits import Edit, EditError
from mechedit.facts import Fact, FactError
from mechedit.models import HookedModel
from mechedit.moments import Moment
from mechedit.progress import Progress, silent
from mechedit.settings import MomentSettings, RomeSettings

__all__ = ["edit", "resolve"]

MAX_CONDITION = 1e12  # beyond, float64 leaves fewer than four digits of C^-1 k*
MAX_RELATIVE_NORM = 0.5  # of W_out's norm; edits that work are an order of magnitude below
MIN_DIVISOR_SHARE = 0.05  # of u @ key for the averaged key; below, the two keys of the published policy disagree


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
    fact: Fact,
    settings: RomeSettings | None = None,
    moment: Moment | None = None,
    *,
    progress: Progress = silent,
) -> Edit:
    """Find the rank-one change that makes the model complete `fact.prompt` with `fact.target_new`. The model is left as it is.

    Without `moment`, C is estimated from text sampled from the model, once, and kept in the cache.

    Raises:
        FactError: the fact has no new target, or does not fit the model.
        EditError: the model already says the target; C is of another layer or model; or the result is out of range.
        ModelError: no such layer, or a block without `W_out`.
    """
    began = time.perf_counter()
    if fact.target_new is None:
        raise FactError(f"the fact about {fact.subject!r} has no target_new to write.")
    settings = resolve(model, settings)
    target = prompts.continuation(model, fact.prompt, fact.target_new)
    prompts.check_length(model, len(prompts.prepare(model, fact, prepend_bos=settings.prepend_bos).ids) + len(target))
    if moment is not None:
        _check_moment(model, moment, settings.layer)
    fact, before = _measure_before(model, fact, settings)
    moment = moment or moments.estimate(
        model, settings.layer, settings=MomentSettings(prepend_bos=settings.prepend_bos), progress=progress
    )
    change, report, details = _find(model, fact, target, moment, settings, progress)
    with rank_one.edited(model, change):
        after = _measure(model, fact, settings)
    return Edit(
        method="rome",
        changes=(change,),
        fact=_describe(fact),
        report=report,
        before=before,
        after=after,
        origin=provenance.origin(model),
        settings=asdict(settings),
        versions=provenance.versions(),
        seconds=time.perf_counter() - began,
        details=details,
    )


def _find(
    model: HookedModel, fact: Fact, target: list[int], moment: Moment, settings: RomeSettings, progress: Progress
) -> tuple[rank_one.RankOneEdit, dict[str, float], dict[str, Any]]:
    """The change, its numbers, found in range, and what it was made from."""
    before = keys.prefixes(model, settings)
    rows = keys.contexts(model, fact, before, prepend_bos=settings.prepend_bos)
    (essence,) = keys.contexts(model, Fact(fact.subject, "{} is a"), ("",), prepend_bos=settings.prepend_bos)
    *subject_keys, essence_key = keys.subject_keys(model, settings.layer, (*rows, essence)).cpu()
    W_out = models.W_out(model, settings.layer).detach().float().cpu()
    b_out = models.b_out(model, settings.layer).float().cpu()
    key = torch.stack(subject_keys).mean(0)
    u = rank_one.direction(key, moment.C).float()
    if settings.policy == "published":  # inserted at the bare prompt's key, along the averaged key's direction
        at, shares = subject_keys[0], torch.ones(len(rows) + 1)
    else:
        at, shares = key, torch.stack([*subject_keys, essence_key]) @ u / (key @ u)
    value = values.optimise(
        model, rows, essence, target, at @ W_out + b_out, shares, settings.layer, settings, progress=progress
    )
    change = rank_one.solve(settings.layer, W_out, b_out, key, value.value, moment.C, at=at)
    relative_norm = change.norm / float(W_out.double().norm())
    report = {
        "divisor": change.divisor,
        "update_norm": change.norm,
        "relative_norm": relative_norm,
        "cond_C": moment.cond,
    }
    _check_report(report, share=change.divisor / float(change.u @ key.double()), settings=settings)
    details = {
        "prefixes": list(before),
        "losses": [list(step) for step in value.losses],
        "shares": shares.tolist(),
        "moment": {
            "source": moment.source,
            "keys": moment.keys,
            "settings": asdict(moment.settings),
            "origin": moment.origin,
        },
    }
    return change, report, details


def _measure(model: HookedModel, fact: Fact, settings: RomeSettings) -> dict[str, float]:
    """Probability of each whole target after the prompt."""
    targets = [str(fact.target_new), str(fact.target_true)]
    new, true = scoring.score(model, [(fact.prompt, target) for target in targets], prepend_bos=settings.prepend_bos)
    return {"p_new": new.p, "p_true": true.p}


def _measure_before(model: HookedModel, fact: Fact, settings: RomeSettings) -> tuple[Fact, dict[str, float]]:
    """The fact, its true target filled in by what the model says where it has none, and the probabilities before the edit."""
    said, token, _ = scoring.top(model, fact.prompt, 1, prepend_bos=settings.prepend_bos)[0]
    target = prompts.continuation(model, fact.prompt, str(fact.target_new))
    if target == [token]:
        raise EditError(
            f"the target {fact.target_new!r} is what {model.cfg.model_name} already says after {fact.prompt!r}: there is nothing to edit."
        )
    if fact.target_true is None:
        if not said.strip():
            raise FactError(f"the model's own answer to {fact.prompt!r} is {said!r}; name the true target.")
        fact = replace(fact, target_true=said.strip())
    return fact, _measure(model, fact, settings)


def _check_moment(model: HookedModel, moment: Moment, layer: int) -> None:
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
    if moment.keys <= len(moment.C):
        raise EditError(
            f"C must come from more keys than d_mlp = {len(moment.C)}; this one has {moment.keys}. Ten times d_mlp is a good number."
        )
    if moment.origin["weight_hash"] != models.weight_hash(model):
        raise EditError(f"C was estimated on other weights ({moment.origin['name']}). Estimate it on this model.")


def _check_report(report: dict[str, float], *, share: float, settings: RomeSettings) -> None:
    """Refuse an edit whose numbers say that it would not be what was asked for."""
    if report["cond_C"] > MAX_CONDITION:
        raise EditError(
            f"cond(C) = {report['cond_C']:.2g} is above {MAX_CONDITION:.0e}: C^-1 k* would be noise. Estimate C from more keys."
        )
    if share < MIN_DIVISOR_SHARE:
        raise EditError(
            f"the divisor is {share:.2g} of what the averaged key gives: the two keys of the published policy disagree, and such an edit "
            "breaks the model. Use policy='averaged'."
        )
    if report["relative_norm"] > MAX_RELATIVE_NORM:
        raise EditError(
            f"the change is {report['relative_norm']:.0%} of W_out's norm, above {MAX_RELATIVE_NORM:.0%}, and would damage much else. "
            f"Lower the clamp (now {settings.clamp:g}), or edit another layer than {settings.layer}."
        )


def _describe(fact: Fact) -> dict[str, Any]:
    return asdict(fact) | {"prompt": fact.prompt}
