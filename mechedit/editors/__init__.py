"""Editors, one file a method, looked up by name where they are needed.

    rome.py          ROME (Meng et al. 2022)
    controls.py      ROME with a part taken out: rome-identity, rome-random-layer, rome-random-key
    many.py          memit, emmet, alphaedit, pmet and sequential: one solve for many facts
    spread.py        what several layers write of one change
    descent.py       gradient steps on weights of one block, which the next two take
    fine_tuning.py   ft and ft-l: on `W_out` (FT, FT+L)
    attention_edit.py  attention-edit: on the attention's weights
    told.py          told: the new fact in words before every prompt; no weight is changed
    knowledge_neurons.py   kn: the value rows of the neurons that carry the answer (Dai et al. 2022)
    trained/         mend and ke: a trained network makes an edit of one gradient (Mitchell et al. 2022, De Cao et al. 2021)

An editor from outside is named `package.module:Class`, or by the name of an entry point in the group `mechedit.editors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from mechedit import editing
from mechedit.editing import Editor
from mechedit.edits import Edit
from mechedit.errors import MecheditError
from mechedit.facts import Fact
from mechedit.models import HookedModel
from mechedit.progress import Progress, silent
from mechedit.wording import meant

__all__ = ["BUILT_IN", "GROUP", "EditorError", "edit", "named", "names"]

GROUP = "mechedit.editors"
BUILT_IN = {
    "rome": "mechedit.editors.rome:Rome",
    "rome-identity": "mechedit.editors.controls:Identity",
    "rome-random-layer": "mechedit.editors.controls:RandomLayer",
    "rome-random-key": "mechedit.editors.controls:RandomKey",
    "ft": "mechedit.editors.fine_tuning:FineTuning",
    "ft-l": "mechedit.editors.fine_tuning:Bounded",
    "attention-edit": "mechedit.editors.attention_edit:AttentionEdit",
    "memit": "mechedit.editors.many:Memit",
    "emmet": "mechedit.editors.many:Emmet",
    "alphaedit": "mechedit.editors.many:AlphaEdit",
    "pmet": "mechedit.editors.many:Pmet",
    "sequential": "mechedit.editors.many:Sequential",
    "told": "mechedit.editors.told:Told",
    "kn": "mechedit.editors.knowledge_neurons:KnowledgeNeurons",
    "mend": "mechedit.editors.trained.editor:MendEditor",
    "ke": "mechedit.editors.trained.editor:KeEditor",
}


class EditorError(MecheditError, ValueError):
    """A name that is no editor's."""


def names() -> list[str]:
    """The editors that can be named: mechedit's, and those that installed packages bring."""
    return [*BUILT_IN, *sorted(each.name for each in entry_points(group=GROUP))]


def named(editor: str | Editor) -> Editor:
    """The editor of this name, `package.module:Class` among them; an editor itself as it is.

    Raises:
        EditorError: there is none, or what there is is no editor.
    """
    if not isinstance(editor, str):
        _check(editor, repr(editor))
        return editor
    place = BUILT_IN.get(editor) or next(
        (each.value for each in entry_points(group=GROUP) if each.name == editor), editor
    )
    module, colon, attribute = place.partition(":")
    if not colon:
        raise EditorError(
            f"no editor is called {editor!r}{meant(editor, names())}; there are {', '.join(names())}, and package.module:Class."
        )
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise EditorError(f"the editor {editor} cannot be imported: {error}.") from error
    _check(found, editor)
    try:
        return found() if isinstance(found, type) else found
    except TypeError as error:
        raise EditorError(f"the editor {editor} cannot be made without arguments: {error}.") from error


def _check(found: Any, name: str) -> None:
    missing = [
        each
        for each in ("name", "settings", "bands", "resolve", "prepare", "check", "find")
        if not hasattr(found, each)
    ]
    if missing:
        raise EditorError(
            f"{name} is no editor: it has no {', '.join(missing)}. Derive it from mechedit.editing.Editor."
        )


def edit(
    model: HookedModel,
    facts: Fact | Sequence[Fact],
    editor: str | Editor = "rome",
    settings: Any = None,
    *,
    prepared: editing.Prepared | None = None,
    progress: Progress = silent,
) -> Edit:
    """`editing.edit` by an editor or its name."""
    return editing.edit(model, facts, named(editor), settings, prepared=prepared, progress=progress)
