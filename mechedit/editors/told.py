"""The baseline that costs nothing: the new fact is told to the model, in words before every prompt.

    Imagine that <prompt> <new target>. <query>
    <question> <new target>. <query>                    where the prompt is a question

No weight is changed. While the edit stands in the model, every prompt that mechedit reads is read behind this text, BOS first; that of
several facts is a sentence each, in their order. What an editor changes is worth what it does beyond this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from mechedit import prompts, writing
from mechedit.editing import Editor, Found, State
from mechedit.facts import Fact
from mechedit.models import HookedModel
from mechedit.progress import Progress, silent
from mechedit.settings import ToldSettings

__all__ = ["Told", "sentences"]


class Told(Editor):
    """Telling as an editor."""

    name = "told"
    settings: ClassVar[type[ToldSettings]] = ToldSettings
    grid: ClassVar[dict[str, tuple[str, ...]]] = {"sentence": ("Imagine that {fact}. ", "{fact}. ")}

    def check(self, model: HookedModel, facts: Sequence[Fact], settings: ToldSettings, prepared: None) -> None:
        text = sentences(model, facts, settings)
        for fact in facts:
            ids, _ = prompts.encode(model, prompts.behind(model, text, fact)[0], prepend_bos=bool(settings.prepend_bos))
            target = prompts.continuation(model, fact.prompt, str(fact.target_new), fact.join)
            prompts.check_length(model, len(ids) + len(target) - 1)  # the last is not read

    def find(
        self,
        model: HookedModel,
        facts: Sequence[Fact],
        settings: ToldSettings,
        prepared: None,
        state: State,
        *,
        progress: Progress = silent,
    ) -> Found:
        return Found((), told=sentences(model, facts, settings))


def sentences(model: HookedModel, facts: Sequence[Fact], settings: ToldSettings) -> str:
    """What the model is told: each fact in the words of the settings, apart from what follows by white space."""
    return "".join(_sentence(model, fact, settings) for fact in facts)


def _sentence(model: HookedModel, fact: Fact, settings: ToldSettings) -> str:
    prompt = fact.prompt.removeprefix(model.tokenizer.bos_token or "")
    said = "".join(writing.seam(prompt, str(fact.target_new), fact.join))
    asks = prompt.rstrip().endswith(("?", "？"))
    before, after = (settings.question if asks else settings.sentence).split("{fact}")
    ends = said.endswith(tuple(".!?。！？")) and after.startswith(".")
    said = before + said + (after[1:] if ends else after)
    return said if said[-1].isspace() else said + " "
