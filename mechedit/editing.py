"""The protocol of an editor, and the one harness around every editor.

An editor is an object with a name and settings of a class of its own. It does three things:

    resolve(model, settings)   fill in what is left to the model: its preset, a layer, BOS
    prepare(model, settings)   make what is costly and shared by all facts: C, prefixes, trained networks
    find(model, facts, settings, prepared, state)   changes for these facts, and leave the model as it was

The harness (`edit`) does the rest, alike for all: checks; what the model says before; guards; what it says after; a roll back where
the numbers are out of their bands; where it all comes from. Independent edits are `find([fact])`, a batch is `find(facts)`, and
sequential edits are `find(part, state)` on the model with the parts before in it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from inspect import signature
from math import nan
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Float, Shaped
from torch import Tensor

from mechedit import applying, changes, generation, guards, models, prompts, provenance, scoring, weights, writing
from mechedit.cache import content_key, plain
from mechedit.changes import Change
from mechedit.edits import Edit, EditError, Measured
from mechedit.facts import Fact, FactError
from mechedit.guards import Band
from mechedit.models import HookedModel
from mechedit.progress import Progress, silent
from mechedit.settings import Bands, EditSettings, SettingsError, filled, given, shipped_bands

__all__ = [
    "EditWarning",
    "Editor",
    "Found",
    "Prepared",
    "check_facts",
    "described",
    "edit",
    "make_ready",
    "refusal",
    "refused",
]

OTHERS = 20  # tokens that are looked at for another answer than the target
WORD_TOKENS = 6  # of the model's own answer, of which the first word is taken
SITES = {"early": "MLP outputs at the subject's last token", "late": "attention outputs at the prompt's last token"}
PUNCTUATION = ".,;:!?\"')]}"


State = Mapping[str, Shaped[Tensor, "..."]]
"""What an edit of a sequence hands to the next: tensors by name, which are saved with the edit."""


class EditWarning(UserWarning):
    """An edit out of its bands that was asked for all the same (`guard="warn"`)."""


@runtime_checkable
class Prepared(Protocol):
    """What an editor prepared once for all facts. It can be pickled, and `key` changes when anything in it does."""

    @property
    def key(self) -> str:
        """A digest of all of it."""
        ...


@dataclass(frozen=True, eq=False)
class Found:
    """What `find` gives: changes; numbers for the report, which the editor's bands are of; details as JSON values; vectors such as
    k* and v*; what the next edits of a sequence are to know of this one (`Editor.joined`); and text that is to stand before every prompt, for editors that tell the
    model something."""

    changes: Sequence[Change]
    report: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    vectors: Mapping[str, Float[Tensor, ...]] = field(default_factory=dict)
    state: State = field(default_factory=dict)
    told: str = ""


class Editor:
    """What every editor is. Derive from it and write `find`; the rest has defaults.

    `settings` is the frozen dataclass of its options, each a `settings.knob`; `bands` says where the numbers of a sound edit lie;
    `grid` is what `tune` tries where nothing else is said; `strength` names the option that says how hard it may push, if one does,
    which suits one layer and not another. `site` says at which site of a trace its layer is looked for, by the name of the
    function of `sites` that finds it.
    """

    name: str
    settings: ClassVar[type[EditSettings]] = EditSettings
    bands: ClassVar[Mapping[str, Band]] = guards.BANDS
    grid: ClassVar[Mapping[str, Sequence[Any]]] = {}
    strength: ClassVar[str] = ""
    site: ClassVar[str] = "early"

    @property
    def of(self) -> str:
        """The editor whose presets it has: its own name, unless it is a variant of another."""
        return self.name

    @property
    def key(self) -> dict[str, Any]:
        """What results of the editor depend on beside its settings, as JSON values: its name and, of one that is not mechedit's own, its class and what
        it was made with: plain values that `__init__` takes and the editor has by the same names. `Prepared.key` is the place for all else."""
        place = f"{type(self).__module__}:{type(self).__qualname__}"
        taken = signature(type(self)).parameters.keys() & vars(self).keys()
        with_ = {name: plain(getattr(self, name)) for name in sorted(taken) if _is_plain(getattr(self, name))}
        return {"editor": self.name} | (
            {} if place.startswith("mechedit.") and not with_ else {"place": place, "with": with_}
        )

    def defaults(self, model: HookedModel) -> Any:
        """The model's preset for this editor, else the settings as they are."""
        preset = models.preset(model)
        own = preset.settings.get(self.of) if preset else None
        return own if own is not None else self.settings()

    def resolve(self, model: HookedModel, settings: Any = None) -> Any:
        """The settings with everything filled in: what was not given is as the model's preset for this editor has it, else the default.

        Raises:
            EditError: a layer is needed, none is given, and the model has no preset for this editor.
            SettingsError: settings of another editor.
        """
        own = self.defaults(model)
        settings = settings if settings is not None else self.settings()
        if not isinstance(settings, self.settings):
            raise SettingsError(
                f"the editor {self.name} takes {self.settings.__name__}; found {type(settings).__name__}."
            )
        chosen: Any = filled(settings, own)
        if getattr(chosen, "layer", None) == -1:
            chosen = replace(chosen, layer=getattr(own, "layer", -1))
            if chosen.layer == -1:
                preset = models.preset(model)
                other = f" (that of rome has layer {preset.rome.layer})" if preset else ""
                raise EditError(
                    f"no layer is given and {model.cfg.model_name} has no preset for the editor {self.of}{other}. Trace some facts, and "
                    f"edit where restoring {SITES[self.site]} helps most: "
                    f"{self.settings.__name__}(layer=...), --layer on the command line."
                )
        if getattr(chosen, "layer", None) is not None:
            models.check_layer(model, chosen.layer)
        bands = given(settings).get("bands", self._calibrated(model))
        guards.limits(self.bands, bands)
        return replace(chosen, bands=bands, prepend_bos=prompts.resolve_bos(model, chosen.prepend_bos))

    def _calibrated(self, model: HookedModel) -> Bands:
        """The bands that ship for the model."""
        name = str(model.cfg.model_name).rsplit("/", 1)[-1].lower()
        return shipped_bands(name, self.of) if models.preset(model) else ()

    def harmful(self, settings: Any) -> Mapping[str, tuple[str, Any]]:
        """Ways to edit that are expected to break a model, for calibration: by a name, an editor's name and its settings."""
        return {}

    def prepare(self, model: HookedModel, settings: Any, *, progress: Progress = silent) -> Prepared | None:
        """What all facts share, made from the model; None where there is nothing."""
        return None

    def ahead(self, model: HookedModel, settings: Any, layers: Sequence[int], *, progress: Progress = silent) -> None:
        """Make in one pass, into the cache, what `prepare` will need at each of these layers."""

    def check(self, model: HookedModel, facts: Sequence[Fact], settings: Any, prepared: Any) -> None:
        """Raise, before anything is computed, where these facts cannot be edited together, or what was prepared (None where it is
        not yet) does not belong to the model."""

    def joined(self, state: State, new: State, settings: Any = None, prepared: Any = None) -> State:
        """What the next edit of a sequence is to know, from what the latest one was given and what it hands on: that alone, by default,
        where it hands on anything. With the settings and what was prepared it may have what makes the next one quicker."""
        return new or state

    def find(
        self,
        model: HookedModel,
        facts: Sequence[Fact],
        settings: Any,
        prepared: Any,
        state: State,
        *,
        progress: Progress = silent,
    ) -> Found:
        """Changes after which the model says the new target of each fact. The model is left as it is."""
        raise NotImplementedError


def edit(
    model: HookedModel,
    facts: Fact | Sequence[Fact],
    editor: Editor,
    settings: Any = None,
    *,
    prepared: Prepared | None = None,
    state: State | None = None,
    progress: Progress = silent,
) -> Edit:
    """Find the changes that make the model complete each fact's prompt with its new target. The model is left as it is.

    The result is one edit for all of the facts, found on the model as it is, on top of the edits that stand in it. `prepared` is
    what `make_ready` gives, made here where it is not given.

    Raises:
        FactError: a fact has no new target, or does not fit the model; what else the editor does not take.
        EditError: the model already says a target, or the result is out of its bands.
    """
    began = time.perf_counter()
    if isinstance(facts, str):
        raise FactError(f"an edit needs a Fact, or several; found the text {facts!r}.")
    chosen = (facts,) if isinstance(facts, Fact) else tuple(facts)
    settings = editor.resolve(model, settings)
    with models.alone(model), models.plainly(model):  # values are sought by gradients
        origin = provenance.origin(model)
        check_facts(model, chosen, settings)
        editor.check(model, chosen, settings, prepared)
        chosen, before = _measured_before(model, chosen, settings)
        healthy = guards.of_unedited(model, [fact.subject for fact in chosen], prepend_bos=settings.prepend_bos)
        prepared = prepared if prepared is not None else make_ready(model, editor, settings, progress=progress)
        found = editor.find(model, chosen, settings, prepared, state or {}, progress=progress)
        report = dict(found.report) | {"update_norm": changes.norm(found.changes)}
        report["relative_norm"] = 0.0 if found.told and not found.changes else _relative_norm(model, found.changes)
        with applying.written(model, found.changes, found.told):
            after = _measured(model, chosen, settings)
            report |= guards.drift(
                healthy, guards.measure(model, list(healthy.essence), prepend_bos=settings.prepend_bos)
            )
    reasons = guards.reasons(report, guards.limits(editor.bands, settings.bands))
    _obey(editor, settings, reasons)
    rolled_back = bool(reasons) and settings.guard == "rollback"
    return Edit(
        editor=editor.name,
        changes=() if rolled_back else tuple(found.changes),
        facts=tuple(
            Measured(described(fact), was, was if rolled_back else now)
            for fact, was, now in zip(chosen, before, after, strict=True)
        ),
        report=report,
        reasons=tuple(reasons),
        origin=origin,
        settings=plain(asdict(settings)),
        versions=provenance.versions(),
        seconds=time.perf_counter() - began,
        details=dict(found.details) | ({"prepared": prepared.key} if prepared is not None else {}),
        vectors=dict(found.vectors),
        state={} if rolled_back else dict(found.state),
        told="" if rolled_back else found.told,
    )


def make_ready(
    model: HookedModel, editor: Editor, settings: Any = None, *, progress: Progress = silent
) -> Prepared | None:
    """What the editor prepares for all facts, on the model without the edits that stand in it; the latest is kept with the model."""
    settings = editor.resolve(model, settings)
    with models.alone(model), models.plainly(model), applying.underneath(model):
        of = f"{type(editor).__module__}.{type(editor).__qualname__}"
        key = ("prepared", of, models.identity(model).whole, content_key(settings, editor.key))
        return models.remembered(model, key, lambda: editor.prepare(model, settings, progress=progress), most=1)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, (str, int, float, type(None)))


def refusal(model: HookedModel, fact: Fact, editor: Editor, settings: Any) -> str:
    """Why a fact cannot be edited at all, for settings as `resolve` gives them; empty where it can."""
    try:
        check_facts(model, (fact,), settings)
        editor.check(model, (fact,), settings, None)
        _measured_before(model, (fact,), settings)
    except (EditError, FactError) as error:
        return str(error)
    return ""


def refused(model: HookedModel, facts: Sequence[Fact], editor: Editor, settings: Any, reason: str) -> Edit:
    """An edit without changes, which says why; nothing is measured."""
    return Edit(
        editor=editor.name,
        changes=(),
        facts=tuple(Measured(described(fact), {}, {}) for fact in facts),
        report={},
        origin=provenance.origin(model),
        settings=plain(asdict(settings)),
        versions=provenance.versions(),
        seconds=nan,
        reasons=(reason,),
    )


def described(fact: Fact) -> dict[str, Any]:
    """A fact as an edit keeps it."""
    said = {} if fact.target_new is None else {"joined": writing.joined(fact.prompt, fact.target_new, fact.join)}
    return dict(plain(asdict(fact))) | {"prompt": fact.prompt} | said


def check_facts(model: HookedModel, facts: Sequence[Fact], settings: Any) -> None:
    """Raise unless each fact has a new target and fits the model, and no two contradict each other.

    Raises:
        FactError: one does not.
    """
    if not facts:
        raise FactError("an edit needs at least one fact.")
    wanted: dict[str, str] = {}
    for fact in facts:
        if fact.target_new is None:
            raise FactError(f"the fact about {fact.subject!r} has no target_new to write.")
        if (other := wanted.setdefault(fact.prompt, fact.target_new)) != fact.target_new:
            raise FactError(
                f"facts contradict each other: {fact.prompt!r} is to become {other!r} and {fact.target_new!r}."
            )
        length = len(prompts.prepare(model, fact, prepend_bos=settings.prepend_bos).ids)
        target = prompts.continuation(model, fact.prompt, fact.target_new, fact.join)
        prompts.check_length(model, length + len(target) - 1)  # the last is not read


def _obey(editor: Editor, settings: Any, reasons: Sequence[str]) -> None:
    """Refuse or warn, as the settings say."""
    if not reasons:
        return
    place = f" of block {settings.layer}" if hasattr(settings, "layer") else ""
    text = f"the edit{place} by {editor.name} is out of its bands: " + " ".join(reasons)
    if settings.guard == "refuse":
        raise EditError(text + " guard='warn' keeps such an edit.")
    if settings.guard == "warn":
        warnings.warn(text, EditWarning, stacklevel=3)


def _relative_norm(model: HookedModel, found: Sequence[Change]) -> float:
    """The norm of the changes over that of the weights that they change."""
    own = changes.by_weight(found)
    size = sum(float(weights.value(model, weight).detach().cpu().double().square().sum()) for weight in own) ** 0.5
    return changes.norm(found) / size if size else nan


def _measured(model: HookedModel, facts: Sequence[Fact], settings: Any) -> list[dict[str, float]]:
    """Probability of each whole target after each prompt."""
    pairs = [(fact.prompt, str(target), fact.join) for fact in facts for target in (fact.target_new, fact.target_true)]
    scores = scoring.score(model, pairs, prepend_bos=settings.prepend_bos)
    return [{"p_new": new.p, "p_true": true.p} for new, true in zip(scores[::2], scores[1::2], strict=True)]


def _measured_before(
    model: HookedModel, facts: Sequence[Fact], settings: Any
) -> tuple[tuple[Fact, ...], list[dict[str, float]]]:
    """The facts, their true targets filled in by what the model says where they have none, and the probabilities now."""
    wanted = [(fact.prompt, str(fact.target_new), fact.join) for fact in facts]
    for fact, score in zip(facts, scoring.score(model, wanted, prepend_bos=settings.prepend_bos), strict=True):
        if all(score.first) and not settings.strengthen:
            raise EditError(
                f"the target {fact.target_new!r} is what {model.cfg.model_name} already says after {fact.prompt!r}: there is nothing to edit. "
                "strengthen=True (--strengthen) makes it surer of it."
            )
    filled = [fact if fact.target_true else replace(fact, target_true=_own_word(model, fact, settings)) for fact in facts]  # fmt: skip
    return tuple(filled), _measured(model, filled, settings)


def _own_word(model: HookedModel, fact: Fact, settings: Any) -> str:
    """The word that the model goes on with, its first token where that is none; where that is the new target, which is to be made surer, the
    most probable token that does not begin it.

    Raises:
        FactError: that token is blank.
    """
    (said, _, _), *others = scoring.top(model, fact.prompt, OTHERS, prepend_bos=settings.prepend_bos)
    if not said.strip():
        raise FactError(f"the model's own answer to {fact.prompt!r} is {said!r}; name the true target.")
    words = generation.complete(model, fact.prompt, WORD_TOKENS, prepend_bos=settings.prepend_bos).split()
    if words and not writing.is_spaceless(words[0][0]):  # else no space ends a word
        said = words[0].rstrip(PUNCTUATION) or said
    target = str(fact.target_new)
    if writing.same(said.strip(), target):
        said = next((text for text, _, _ in others if text.strip() and not target.startswith(text.strip())), said)
    return said.strip()
