"""A fact becomes tokens: where its subject stands, which ids its targets have, and what looks wrong about them.

Positions come from the fast tokenizer's character offsets on the whole text, so that subjects are found whatever the
tokenizer merges. A target's ids are what follows the prompt's ids when prompt and target are encoded together; nothing is
ever decoded and encoded again. Whether BOS stands first is said, not left to the tokenizer. Where an edit tells the model
something (`Edit.told`), every prompt is read behind that text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from mechedit import writing
from mechedit.facts import Fact, FactError
from mechedit.models import HookedModel, device_of, told

__all__ = [
    "Audit",
    "Prompt",
    "audit",
    "bare",
    "behind",
    "continuation",
    "decoded",
    "doubts",
    "encode",
    "joined",
    "own_tokens",
    "pad",
    "prepare",
    "resolve_bos",
    "subject_span",
    "text_tokens",
    "told_tokens",
]

TOLD = (-1, -1)  # where tokens stand that are before the text


@dataclass(frozen=True)
class Prompt:
    """A fact's prompt as the model reads it. `subject` is the range [begin, end) of token positions, BOS counted."""

    text: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    subject: tuple[int, int]
    prepend_bos: bool

    @property
    def last_subject(self) -> int:
        """The position of the subject's last token."""
        return self.subject[1] - 1


def resolve_bos(model: HookedModel, prepend_bos: bool | None) -> bool:
    """Whether BOS goes first: as asked, else as the model was made for."""
    wanted = bool(model.cfg.default_prepend_bos) if prepend_bos is None else prepend_bos
    if wanted and model.tokenizer.bos_token_id is None:
        raise FactError(f"{model.cfg.model_name} has no beginning-of-sequence token; set prepend_bos to false.")
    return wanted


def encode(model: HookedModel, text: str, *, prepend_bos: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a text as the model reads it, and the range of characters that each stands for (empty for BOS). A text that begins
    with BOS itself, as a chat's may, gets no second one.

    An edit that tells the model something puts its text first (`Edit.told`), behind BOS; `told_tokens` counts the tokens of that.

    Raises:
        FactError: as `bare`.
    """
    if not (before := told(model)):
        return bare(model, text, prepend_bos=prepend_bos)
    bos = model.tokenizer.bos_token or ""
    head = len(bos) if bos and text.startswith(bos) else 0
    ids, offsets = bare(model, text[:head] + before + text[head:], prepend_bos=prepend_bos)
    return ids, [_counted(begin, end, head, head + len(before)) for begin, end in offsets]


def _counted(begin: int, end: int, first: int, after: int) -> tuple[int, int]:
    """A token's characters in a text into which others were put, from `first` on and before `after`; `TOLD` if it has no other."""
    if end <= first:
        return begin, end
    return TOLD if end <= after else (max(begin, after) - after + first, end - after + first)


def told_tokens(offsets: list[tuple[int, int]]) -> int:
    """How many of a text's tokens belong to what stands before it alone."""
    return offsets.count(TOLD)


def own_tokens(model: HookedModel, text: str, *, prepend_bos: bool) -> tuple[list[int], int]:
    """A text's ids as it has them alone, behind those of what the model is told, and how many those are. So models that are told
    different things are compared on the same tokens; where `encode` would merge the two texts, this does not."""
    ids, _ = bare(model, text, prepend_bos=prepend_bos)
    if not (before := told(model)) or not ids:
        return ids, 0
    at = int(ids[0] == model.tokenizer.bos_token_id)
    first = model.tokenizer.convert_ids_to_tokens(ids[at : at + 1])
    spaced = bool(first) and first[0].startswith(("Ġ", "▁"))  # as tokenizers write the space that a token begins with
    more, _ = bare(model, before.removesuffix(" ") if spaced else before, prepend_bos=False)
    return [*ids[:at], *more, *ids[at:]], len(more)


def bare(model: HookedModel, text: str, *, prepend_bos: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """`encode` of the text by itself, whatever the model is told.

    Raises:
        FactError: a token that the model has no embedding for, because its tokenizer has more tokens than it has rows.
    """
    encoded = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), [(int(begin), int(end)) for begin, end in encoded["offset_mapping"]]
    bos = model.tokenizer.bos_token_id
    if prepend_bos and ids[:1] != [bos]:
        ids, offsets = [bos, *ids], [(0, 0), *offsets]
    if (highest := max(ids, default=0)) >= (rows := int(model.cfg.d_vocab)):
        raise FactError(
            f"{model.tokenizer.decode([highest])!r} is token {highest} of the tokenizer, and {model.cfg.model_name} has embeddings for "
            f"{rows} tokens alone. The tokenizer is another model's, or the text has to do without this token."
        )
    return ids, offsets


def text_tokens(model: HookedModel, ids: list[int] | tuple[int, ...]) -> tuple[str, ...]:
    """Each token as text, for people; with its space, if it has one."""
    return tuple(decoded(model, [each]) for each in ids)


def decoded(model: HookedModel, ids: list[int] | tuple[int, ...], after: list[int] | tuple[int, ...] = ()) -> str:
    """The text of ids that follow others (their own first one, where none are given).

    Decoded alone, sentence pieces lose the space that they begin with.
    """
    before = list(after or ids[:1])
    head, whole = (_text(model, each) for each in (before, [*before, *ids]))
    return whole[len(head) :] if whole.startswith(head) else _text(model, ids)


def _text(model: HookedModel, ids: list[int] | tuple[int, ...]) -> str:
    return str(model.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def subject_span(offsets: list[tuple[int, int]], begin: int, end: int) -> tuple[int, int]:
    """The range of tokens that cover any of the characters [begin, end), white space before the subject aside."""
    inside = [index for index, (first, last) in enumerate(offsets) if first < end and last > begin]
    if not inside:
        raise FactError(f"no token covers the subject at characters {begin} to {end}.")
    return inside[0], inside[-1] + 1


def prepare(model: HookedModel, fact: Fact, *, prepend_bos: bool | None = None) -> Prompt:
    """The fact's prompt as tokens.

    Raises:
        FactError: the prompt is longer than the model's context.
    """
    bos = resolve_bos(model, prepend_bos)
    ids, offsets = encode(model, fact.prompt, prepend_bos=bos)
    check_length(model, len(ids))
    begin = fact.subject_start
    span = subject_span(offsets, begin, begin + len(fact.subject))
    return Prompt(fact.prompt, tuple(ids), text_tokens(model, ids), span, bos)


def behind(model: HookedModel, prefix: str, fact: Fact) -> tuple[str, int]:
    """The fact's prompt with other text before it, and the character at which its subject begins there. BOS stays first."""
    bos = model.tokenizer.bos_token or ""
    head = bos if fact.prompt.startswith(bos) and fact.subject_start >= len(bos) else ""
    return head + prefix + fact.prompt[len(head) :], len(prefix) + fact.subject_start


def check_length(model: HookedModel, length: int) -> None:
    """Raise where a text of so many tokens does not fit the model's context."""
    if length > (limit := int(model.cfg.n_ctx)):
        raise FactError(
            f"a prompt must fit the context of {limit} tokens of {model.cfg.model_name}; with what is put before it, it has {length}. Shorten it."
        )


def check_read(model: HookedModel, prompt: str, ids: Sequence[int]) -> None:
    """Raise where a prompt's ids leave the model nothing to go on from, or do not fit its context."""
    if not ids:
        raise FactError(f"a prompt must have a token to go on from; without BOS, {prompt!r} has none. Write one.")
    check_length(model, len(ids))


def continuation(model: HookedModel, prompt: str, target: str, join: str = "auto") -> list[int]:
    """The ids of a target after a prompt: the second part of `joined`, which raises what this does."""
    return joined(model, prompt, target, join, prepend_bos=False)[1]


def joined(
    model: HookedModel,
    prompt: str,
    target: str,
    join: str = "auto",
    *,
    prepend_bos: bool,
    known: dict[str, list[int]] | None = None,
) -> tuple[list[int], list[int]]:
    """The ids of a prompt and of a target after it, joined as `writing.seam` has it: what both together have beyond the prompt's own.

    Where the tokenizer merges across the seam, the target's ids are those it has on its own; `audit` says so. The ids of prompts that are asked
    for more than once may be `known`, where they are put.

    Raises:
        FactError: the target is empty, or gives no token.
    """
    if not target.strip():
        raise FactError(f"a target must be a word or more; it is {target!r}.")
    prompt, text = writing.seam(prompt, target, join)
    known = {} if known is None else known
    if prompt not in known:
        known[prompt], _ = encode(model, prompt, prepend_bos=prepend_bos)
    alone = known[prompt]
    both, _ = encode(model, prompt + text, prepend_bos=prepend_bos)
    ids = both[len(alone) :] if both[: len(alone)] == alone else _alone(model, text)
    if not ids:
        raise FactError(f"the target {target!r} gives no token after {prompt!r}.")
    return alone, ids


def _alone(model: HookedModel, text: str) -> list[int]:
    """The ids of a text that goes on: behind a line break, for tokenizers that put a space before all that begins."""
    start, _ = bare(model, "\n", prepend_bos=False)
    whole, _ = bare(model, "\n" + text, prepend_bos=False)
    return whole[len(start) :] if whole[: len(start)] == start else bare(model, text, prepend_bos=False)[0]


def pad(model: HookedModel, rows: list[list[int]]) -> Int[Tensor, "rows pos"]:
    """Rows of ids, filled on the right; under causal attention what is filled changes no position before it."""
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device_of(model))


@dataclass(frozen=True)
class Audit:
    """What a fact is to a model's tokenizer, and what looks wrong about it."""

    prompt: Prompt
    target_true: tuple[tuple[int, str], ...]
    target_new: tuple[tuple[int, str], ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines)

    @property
    def lines(self) -> tuple[str, ...]:
        """A line for each token, each target and each note."""
        begin, end = self.prompt.subject
        lines = [
            f"{index:3d}  {token_id:7d}  {token!r}{'  *' if begin <= index < end else ''}"
            for index, (token_id, token) in enumerate(zip(self.prompt.ids, self.prompt.tokens, strict=True))
        ]
        for name, target in (("true", self.target_true), ("new", self.target_new)):
            if target:
                lines.append(f"{name:>4}  " + ", ".join(f"{token_id} {token!r}" for token_id, token in target))
        return (*lines, *(f"note: {note}" for note in self.notes))


def audit(model: HookedModel, fact: Fact, *, prepend_bos: bool | None = None) -> Audit:
    """The fact's tokens, subject span and target ids, and notes on what may surprise. The model is not run."""
    prompt = prepare(model, fact, prepend_bos=prepend_bos)
    targets: dict[str, tuple[tuple[int, str], ...]] = {}
    notes: list[str] = []
    for name, target in (("target_true", fact.target_true), ("target_new", fact.target_new)):
        ids = continuation(model, fact.prompt, target, fact.join) if target else []
        targets[name] = tuple(zip(ids, text_tokens(model, ids), strict=True))
        if len(ids) > 1:
            notes.append(
                f"{name} {target!r} is {len(ids)} tokens; a trace measures the first (measure p_answer: all), an edit learns all."
            )
        if target and not _seam_is_clean(model, fact, target):
            notes.append(
                f"the tokenizer merges the end of the prompt with {name} {target!r}; the target is encoded on its own."
            )
    if targets["target_true"] and targets["target_new"] and targets["target_true"][0] == targets["target_new"][0]:
        notes.append(
            "both targets begin with the same token; probabilities of their first tokens cannot tell them apart."
        )
    if prompt.subject[1] == len(prompt.ids):
        notes.append("the subject ends the prompt: its last token is also the prompt's last.")
    if fact.target_true and writing.folded(fact.target_true) in writing.folded(fact.prompt):
        notes.append(f"the prompt contains the answer {fact.target_true!r}.")
    notes += doubts(model, fact, prepend_bos=prepend_bos)
    return Audit(prompt, targets["target_true"], targets["target_new"], tuple(notes))


def doubts(model: HookedModel, fact: Fact, *, prepend_bos: bool | None = None) -> list[str]:
    """What is likely a mistake of who wrote the fact down. The model is not run."""
    notes = []
    for name, target in (("target_true", fact.target_true), ("target_new", fact.target_new)):
        if target and model.tokenizer.unk_token_id in continuation(model, fact.prompt, target, fact.join):
            notes.append(f"{name} {target!r} has a token the vocabulary does not know.")
    prompt = prepare(model, fact, prepend_bos=prepend_bos)
    return notes + _chat_notes(model, fact, prompt) + _subject_notes(model, fact, prompt)


def _chat_notes(model: HookedModel, fact: Fact, prompt: Prompt) -> list[str]:
    """What to know of a prompt that is written as a chat is: with marks of its turns, or a line break at its end."""
    notes, bos = [], model.tokenizer.bos_token
    if bos and fact.prompt.startswith(bos):
        notes.append(f"the prompt begins with {bos!r} itself; no second one is put before it.")
    if any(mark in fact.prompt for mark in "<["):
        ids = prompt.ids[1:] if prompt.ids[0] == model.tokenizer.bos_token_id else prompt.ids
        marks = dict.fromkeys(token for each, token in zip(ids, text_tokens(model, ids), strict=True) if _is_mark(model, each))  # fmt: skip
        if marks:
            notes.append(f"the prompt holds special tokens, {', '.join(map(repr, marks))}, as a chat's does; an edit puts other text before them all.")  # fmt: skip
        unknown = [mark for mark in dict.fromkeys(_MARK.findall(fact.prompt)) if mark not in (*marks, bos)]
        if unknown:
            notes.append(f"{', '.join(map(repr, unknown))} is no token of {model.cfg.model_name}: it is read in pieces, as text.")  # fmt: skip
    if fact.prompt[-1] in "\r\n":
        notes.append("the prompt ends in a line break, which is kept; targets follow it at once.")
    return notes


_MARK = re.compile(
    r"<\|[^<>|\s]+\|>|<(?:start_of_turn|end_of_turn|bos|eos|s|/s)>|\[/?INST\]"
)  # of turns, in models' chats


def _is_mark(model: HookedModel, token: int) -> bool:
    """Whether a token is one of the vocabulary's special ones."""
    return bool(_text(model, [token])) and not model.tokenizer.decode([token], skip_special_tokens=True)


def _seam_is_clean(model: HookedModel, fact: Fact, target: str) -> bool:
    prompt, text = writing.seam(fact.prompt, target, fact.join)
    alone, _ = encode(model, prompt, prepend_bos=False)
    both, _ = encode(model, prompt + text, prepend_bos=False)
    return both[: len(alone)] == alone


def _word_around(text: str, begin: int, end: int) -> str:
    """The part from `begin` to `end`, with the letters and digits that go on before and behind it, in scripts with spaces."""

    def goes_on(letter: str) -> bool:
        return letter.isdigit() or letter.lower() != letter.upper()

    while begin > 0 and goes_on(text[begin]) and goes_on(text[begin - 1]):
        begin -= 1
    while end < len(text) and goes_on(text[end - 1]) and goes_on(text[end]):
        end += 1
    return text[begin:end]


def _subject_notes(model: HookedModel, fact: Fact, prompt: Prompt) -> list[str]:
    notes = []
    _, offsets = encode(model, fact.prompt, prepend_bos=prompt.prepend_bos)
    begin, end = fact.subject_start, fact.subject_start + len(fact.subject)
    first, last = offsets[prompt.subject[0]], offsets[prompt.last_subject]
    if fact.prompt[first[0] : begin].strip() or last[1] > end:
        notes.append("a token holds a part of the subject together with other text; the whole token counts as subject.")
    word = _word_around(fact.prompt, begin, end)
    if word != fact.subject:
        notes.append(f"the subject {fact.subject!r} stands inside a longer word, {word!r}.")
    if (n := len(writing.find(fact.prompt, fact.subject))) > 1:
        notes.append(f"the subject appears {n} times; only the one in the template's {{}} counts.")
    for paraphrase in fact.paraphrases:
        if not writing.find(paraphrase, fact.subject):
            notes.append(f"a paraphrase does not name the subject: {paraphrase!r}.")
    return notes
