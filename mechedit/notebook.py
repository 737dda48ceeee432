"""What a notebook shows: results as their pages, and circuitsvis's views of a model before and after an edit. Nothing asks the network.

    notebook.start()                              once, at the top: circuitsvis's script, for all its views below
    notebook.view(result)                         the page of a result (`mechedit.viewer`), in a frame
    notebook.attention(model, prompt, 5, edit)    attention patterns, before and after
    notebook.effects(trace)                       tokens coloured by what restoring them brings back
    notebook.neurons(model, prompt, chosen)       activations of neurons, by token
    notebook.answers(model, prompt, " Paris")     what the model would say, token by token

circuitsvis's own widgets ask google.com whether there is a network each time that one is shown, carry its script of 1.3 MB each, put
text into that as it is, and make HTML of tokens, so that `<bos>` vanishes and worse could run. Here its script is in the notebook
once, props are JSON that no token can leave, and tokens have no `<` or `&` that begins anything. What cannot run scripts (a page on a
hosting site) says so, and shows the plain table below each view.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from html import escape
from importlib.metadata import distribution
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit import applying, prompts
from mechedit.edits import Edit
from mechedit.errors import MecheditError
from mechedit.interventions import intervened, read
from mechedit.models import HookedModel, check_layer, device_of
from mechedit.neurons import Neurons
from mechedit.tracing import Trace, measures
from mechedit.viewer import Viewable, page
from mechedit.viewer.contents import SHORT
from mechedit.viewer.pages import embedded
from mechedit.wording import visible

__all__ = ["NotebookError", "Shown", "answers", "attention", "effects", "neurons", "start", "view"]

HEIGHT = 860  # pixels of a page's frame
_MARKUP = re.compile("[<&]")
STILL = "No scripts run here: open the table below, which has the same numbers."
LACKING = "Run mechedit.notebook.start() above, once, to see this as a picture."


class NotebookError(MecheditError, ValueError):
    """What cannot be shown."""


@dataclass(frozen=True, repr=False)
class Shown:
    """Something that a notebook shows: as HTML, and as text where there is none."""

    html: str
    text: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def view(result: Viewable, other: Viewable | None = None, names: Sequence[str] = (), *, height: int = HEIGHT) -> Shown:
    """The page of a result, or of two evaluations side by side, in a frame of its own.

    Raises:
        ViewError: nothing that has a page.
    """
    inside = escape(page(result, other, names), quote=True)
    frame = (
        f'<iframe srcdoc="{inside}" title="result" sandbox="allow-scripts allow-downloads" allow="clipboard-write" '
        f'style="width:100%;height:{int(height)}px;border:1px solid #ddd;border-radius:8px"></iframe>'
    )
    return Shown(frame, f"the page of {visible(repr(result))[:200]}")


def start() -> Shown:
    """circuitsvis's script, which every view of it below needs: 1.3 MB, once in a notebook."""
    said = '<p style="color:#666;font-size:13px">The views below are drawn here, without a network.</p>'
    return Shown(f"<script>{_bundle()}</script>{said}", "the script of circuitsvis")


def attention(model: HookedModel, prompt: str, layer: int, edit: Edit | None = None, *, prepend_bos: bool | None = None) -> Shown:  # fmt: skip
    """The attention patterns of every head of a block, from each token to those before it; with an edit, before and after it.

    Raises:
        ModelError: no such block.
        InterventionError: the model does not compute patterns (one that attends by a fused kernel).
    """
    place = f"blocks.{check_layer(model, layer)}.attn.hook_pattern"
    found = [(title, tokens, kept[place][0]) for title, tokens, kept in _runs(model, prompt, [place], edit, prepend_bos)]  # fmt: skip
    heads = [f"{layer}.{head}" for head in range(len(found[0][2]))]
    parts = [
        _widget(title, "AttentionHeads", {"attention": pattern.tolist(), "tokens": _plain(tokens), "attentionHeadNames": heads})
        for title, tokens, pattern in found
    ]  # fmt: skip
    rows = [["head", *(f"{title}: most attended by the last token" for title, *_ in found)]]
    rows += [[name, *(_most(tokens, pattern[head, -1]) for _, tokens, pattern in found)] for head, name in enumerate(heads)]  # fmt: skip
    return _shown(parts, rows)


def effects(trace: Trace, kind: str | None = None) -> Shown:
    """Tokens coloured by how far restoring them brings the answer back: the best layer of each kind or, of one kind, each layer.

    Raises:
        NotebookError: the trace has no such kind.
    """
    if kind is not None and kind not in trace.effects:
        raise NotebookError(f"kind must be one that was traced, {', '.join(trace.effects)}; found {kind}.")
    if kind is None:
        labels = [SHORT.get(each, each) for each in trace.effects]
        values = torch.stack([grid.nan_to_num(-torch.inf).amax(0) for grid in trace.effects.values()], 1)
    else:
        labels = [f"layer {layer}" for layer in range(len(trace.effects[kind]))]
        values = trace.effects[kind].T
    gained = (values - trace.p_corrupted).nan_to_num(0.0, 0.0, 0.0)
    title = f"{trace.label} restored by each token, less {trace.p_corrupted:.3f} corrupted ({trace.p_clean:.3f} clean)"
    widget = _widget(title, "ColoredTokensMulti", {"tokens": _plain(trace.tokens), "values": gained.tolist(), "labels": labels})  # fmt: skip
    share = measures.of(trace.settings).share
    rows = [["token", *labels]] + [[token, *(f"{100 * each:.1f} %" if share else f"{each:.3f}" for each in own)] for token, own in zip(trace.tokens, gained.tolist(), strict=True)]  # fmt: skip
    return _shown([widget], rows)


def neurons(model: HookedModel, prompt: str, chosen: Neurons | Sequence[tuple[int, int]], edit: Edit | None = None, *, prepend_bos: bool | None = None) -> Shown:  # fmt: skip
    """What neurons, each a layer and a number, are at each token; with an edit, before and after it.

    Raises:
        NotebookError: none are named, or one that there is not.
    """
    named = [(each.layer, each.index) for each in chosen.chosen] if isinstance(chosen, Neurons) else _named(model, chosen)  # fmt: skip
    place = {layer: f"blocks.{layer}.mlp.hook_post" for layer, _ in named}
    found = _runs(model, prompt, list(place.values()), edit, prepend_bos)
    grids = [torch.stack([kept[place[layer]][0, :, index] for layer, index in named], 1) for *_, kept in found]
    tokens, labels = found[0][1], [f"{layer}.{index}" for layer, index in named]
    if len({len(tokens) for _, tokens, _ in found}) > 1:  # an edit that tells the model something
        grids = [grid[-min(map(len, grids)) :] for grid in grids]
        tokens = tokens[-len(grids[0]) :]
    props = {
        "tokens": _plain(tokens),
        "activations": torch.stack(grids, 1).tolist(),
        "firstDimensionName": "Model",
        "firstDimensionLabels": [title for title, *_ in found],
        "secondDimensionName": "Neuron",
        "secondDimensionLabels": labels,
    }
    rows = [["token", *(f"{label}, {title}" for title, *_ in found for label in labels)]]
    rows += [[token, *(f"{float(each):.3f}" for grid in grids for each in grid[at])] for at, token in enumerate(tokens)]
    return _shown([_widget("Activations of neurons", "TextNeuronActivations", props)], rows)


def answers(model: HookedModel, prompt: str, answer: str, edit: Edit | None = None, *, k: int = 10, prepend_bos: bool | None = None) -> Shown:  # fmt: skip
    """Prompt and answer, each token coloured by its log-probability after those before it, with the k most probable at the
    pointer; with an edit, before and after it.

    Raises:
        NotebookError: k is no number from 1 to that of all tokens.
    """
    if not isinstance(k, Integral) or not 1 <= k <= int(model.cfg.d_vocab):
        raise NotebookError(f"k must be a whole number from 1 to the {model.cfg.d_vocab} tokens that there are; found {k!r}.")  # fmt: skip
    bos = prompts.resolve_bos(model, prepend_bos)
    parts, rows = [], [["model", f"the {k} most probable tokens after the prompt"]]
    for title in _titles(edit):
        with _state(model, title, edit), torch.no_grad():
            before, after = prompts.joined(model, prompt, answer, prepend_bos=bos)
            ids = [*before, *after]
            _check_ids(model, before, len(ids))
            log_p = model(torch.tensor([ids], device=device_of(model)))[0, :-1].float().log_softmax(-1).cpu()
            parts.append(_widget(title, "TokenLogProbs", _guesses(model, ids, log_p, k)))
            best = log_p[len(before) - 1].topk(k)
            rows.append([title, ", ".join(f"{text} {100 * p:.1f} %" for text, p in zip(prompts.text_tokens(model, best.indices.tolist()), best.values.exp().tolist(), strict=True))])  # fmt: skip
    return _shown(parts, rows)


# --- running ----------------------------------------------------------------------------------------------------------


def _titles(edit: Edit | None) -> list[str]:
    return ["before"] if edit is None else ["before", "after"]


@contextmanager
def _state(model: HookedModel, title: str, edit: Edit | None) -> Iterator[None]:
    """The model as it is, or with the edit."""
    if title == "before" or edit is None:
        yield
        return
    with applying.edited(model, edit):
        yield


@torch.no_grad()
def _runs(model: HookedModel, prompt: str, places: list[str], edit: Edit | None, prepend_bos: bool | None) -> list[tuple[str, tuple[str, ...], dict[str, Tensor]]]:  # fmt: skip
    """Of the model before and after an edit: which, the tokens, and what is at each of the hook points."""
    bos, found = prompts.resolve_bos(model, prepend_bos), []
    for title in _titles(edit):
        with _state(model, title, edit):
            ids, _ = prompts.encode(model, prompt, prepend_bos=bos)
            _check_ids(model, ids, len(ids))
            kept: dict[str, Tensor] = {}
            reads = [read(place, partial(kept.__setitem__, place)) for place in dict.fromkeys(places)]
            with intervened(model, *reads):
                model(torch.tensor([ids], device=device_of(model)))
            found.append((title, prompts.text_tokens(model, ids), {place: each.float().cpu() for place, each in kept.items()}))  # fmt: skip
    return found


def _check_ids(model: HookedModel, prompt: list[int], length: int) -> None:
    """Raise for a prompt of no token, and for a text that the model cannot read whole."""
    if not prompt:
        raise NotebookError("the prompt gives no token; write a word, or let BOS stand before it (prepend_bos=True).")
    prompts.check_length(model, length)


def _named(model: HookedModel, chosen: Sequence[Any]) -> list[tuple[int, int]]:
    """Neurons that are named by pairs."""
    layers, width = int(model.cfg.n_layers), int(model.cfg.d_mlp)
    if not isinstance(chosen, Sequence) or not len(chosen):
        raise NotebookError(f"chosen must be pairs of a layer and a number, at least one; found {chosen!r}.")
    for each in chosen:
        pair = each if isinstance(each, (tuple, list)) and all(isinstance(part, Integral) for part in each) else ()
        if len(pair) != 2 or not 0 <= pair[0] < layers or not 0 <= pair[1] < width:
            raise NotebookError(f"a neuron is a layer below {layers} and a number below {width}, as (0, 5); found {each!r}.")  # fmt: skip
    return [(int(layer), int(index)) for layer, index in chosen]


def _guesses(model: HookedModel, ids: list[int], log_p: Float[Tensor, "pos d_vocab"], k: int) -> dict[str, Any]:
    """Props of circuitsvis's TokenLogProbs, which shows all tokens but the first."""
    best, own = log_p.topk(k), torch.tensor(ids[1:])[:, None]
    here = log_p.gather(1, own)
    return {
        "prompt": _plain(prompts.text_tokens(model, ids)),
        "topKLogProbs": best.values.tolist(),
        "topKTokens": [_plain(prompts.text_tokens(model, row)) for row in best.indices.tolist()],
        "correctTokenRank": (log_p > here).sum(1).tolist(),
        "correctTokenLogProb": here[:, 0].tolist(),
    }


def _most(tokens: Sequence[str], row: Float[Tensor, " pos"]) -> str:
    at = int(row.argmax())
    return f"{tokens[at]} {100 * float(row[at]):.0f} %"


# --- HTML -------------------------------------------------------------------------------------------------------------


@cache
def _bundle() -> str:
    """circuitsvis's script as it stands in a classic script element: `CircuitsVis` becomes a name of the page's."""
    path = next((each for each in distribution("circuitsvis").files or () if each.name == "iife.js"), None)
    if path is None:
        raise NotebookError("circuitsvis has no dist/cdn/iife.js; install it again (pip install --force-reinstall circuitsvis).")  # fmt: skip
    text = Path(str(path.locate())).read_text(encoding="utf-8").rpartition("//# sourceMappingURL")[0]
    return text.replace("</script", r"<\/script").replace("<!--", r"<\!--") + ";window.CircuitsVis=CircuitsVis;"


def _widget(title: str, name: str, props: dict[str, Any]) -> str:
    """One view: a place, and a script that draws into every such place that is not drawn yet, as soon as circuitsvis is there."""
    said = embedded(props)
    own = "mechedit-" + hashlib.sha256(f"{title} {name} {said}".encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return (
        f'<figure style="margin:0;flex:1 1 320px;min-width:0"><figcaption>{escape(visible(title))}</figcaption>'
        f'<div data-mechedit="{own}" style="overflow-x:auto">{STILL}</div></figure>'
        f"<script>(() => {{ const props = {said}; let left = 100; const draw = () => {{"
        f"const places = document.querySelectorAll('[data-mechedit=\"{own}\"]:not([id])');"
        f"if (!window.CircuitsVis) {{ for (const place of places) place.textContent = '{LACKING}'; if (left--) setTimeout(draw, 100); return; }}"
        f"for (const place of places) {{"
        f"place.id = '{own}-' + Math.random().toString(36).slice(2); place.textContent = '';"
        f"CircuitsVis.render(place.id, CircuitsVis.{name}, props); }} }}; draw(); }})();</script>"
    )


def _shown(widgets: Sequence[str], rows: Sequence[Sequence[str]]) -> Shown:
    """Widgets side by side, and the table below them."""
    head, *body = ([_short(cell) for cell in row] for row in rows)
    cells = "".join(f"<th>{escape(each)}</th>" for each in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(each)}</td>" for each in row) + "</tr>" for row in body)
    table = f"<details><summary>as a table</summary><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></details>"
    text = "\n".join("\t".join(row) for row in (head, *body))
    return Shown(f'<div style="display:flex;flex-wrap:wrap;gap:16px">{"".join(widgets)}</div>{table}', text)


def _plain(tokens: Iterable[str]) -> list[str]:
    """Tokens that circuitsvis shows as they are, whether it makes text of them or HTML: a mark of no width behind `<` and `&`, of
    which neither a tag nor an entity can begin."""
    return [_MARKUP.sub("\\g<0>\u2060", visible(each)) for each in tokens]


def _short(text: str) -> str:
    shown = visible(text)
    return shown if len(shown) <= 300 else shown[:299] + "…"
