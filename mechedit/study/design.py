"""Who rates which facts, in which order, and at which place each editor's text stands.

Facts and people are the two sides of a bipartite graph whose edges are pages.

- Every fact has as many raters as every other, every person as many pages, and no person sees a fact twice. Blocks are incomplete, so
  seeded exchanges make any two people share as many facts as any other two, as nearly as they find it; then facts share raters evenly
  too, since both matrices of concurrence have the same sum of squares.
- Places: a page shows the texts of a fact in that fact's base order, turned until the editor of the page's colour is first. Colours are an
  equitable colouring of the edges, which every bipartite graph has (de Werra 1971): of a fact's pages, and of a person's, each colour has
  as many as any other, or one more. So a fact's raters see each text at every place equally often, and so do all people together; a person
  sees each editor first equally often. Base orders, one for each way round, take turns over the facts, and are exchanged between facts
  until each person sees each editor at the other places as evenly as exchanges can make it.
- Page numbers are another such colouring: no two raters of a fact see it at the same point of their form, where there are pages enough.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

__all__ = ["Page", "Plan", "colour", "plan"]

EXCHANGES = 60  # that are tried for each page
Edge = tuple[int, int]


@dataclass(frozen=True)
class Page:
    """A fact, and which editor's text stands first, second, …, by their numbers."""

    fact: int
    order: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Each person's pages in order; and the pages of long-form evaluation, (fact, editor)."""

    people: tuple[tuple[Page, ...], ...]
    long_form: tuple[tuple[tuple[int, int], ...], ...]


def plan(facts: int, raters: int, pages: int, editors: int, long_form: int = 0, seed: int = 0) -> Plan:
    """A balanced design: `facts` x `raters` is a multiple of `pages`, which is at most `facts`."""
    rng = random.Random(f"mechedit study {seed}")  # noqa: S311 (a design, no secret)
    edges = [(fact, person) for person, own in enumerate(_blocks(facts, raters, pages, rng)) for fact in own]
    first, number = colour(edges, editors, rng), colour(edges, pages, rng)
    base = _bases(facts, editors, edges, first, rng)
    people: list[list[Page]] = [[Page(0, ())] * pages for _ in range(facts * raters // pages)]
    for (fact, person), editor, at in zip(edges, first, number, strict=True):
        people[person][at] = Page(fact, _turned(base[fact], editor))
    order = rng.sample(range(len(people)), len(people))
    further = [[(page.fact, (order[person] + at) % editors) for at, page in enumerate(rng.sample(own, long_form))] for person, own in enumerate(people)]  # fmt: skip
    return Plan(tuple(map(tuple, people)), tuple(map(tuple, further)))


def _turned(base: tuple[int, ...], first: int) -> tuple[int, ...]:
    at = base.index(first)
    return base[at:] + base[:at]


def _bases(
    facts: int, editors: int, edges: Sequence[Edge], first: Sequence[int], rng: random.Random
) -> list[tuple[int, ...]]:
    """An order of the editors for each fact: those that are no turn of each other, equally often."""
    every = [(0, *rest) for rest in permutations(range(1, editors))]
    rng.shuffle(every)
    found = [every[fact % len(every)] for fact in range(facts)]
    rng.shuffle(found)
    own: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for (fact, person), editor in zip(edges, first, strict=True):
        own[fact].append((person, editor))
    seen: Counter[tuple[int, int, int]] = Counter()  # of a person, at a place, an editor

    def put(fact: int, base: tuple[int, ...], by: int) -> int:
        """Count a fact's pages in or out; by how much the sum of squares grows."""
        grown = 0
        for person, editor in own[fact]:
            for place, each in enumerate(_turned(base, editor)):
                grown += 2 * by * seen[person, place, each] + 1  # (s + by)^2 - s^2
                seen[person, place, each] += by
        return grown

    def exchange(a: int, b: int) -> int:
        grown = sum(put(each, found[each], -1) for each in (a, b))
        found[a], found[b] = found[b], found[a]
        return grown + sum(put(each, found[each], 1) for each in (a, b))

    for fact, base in enumerate(found):
        put(fact, base, 1)
    for _ in range(EXCHANGES * facts if len(every) > 1 and facts > 1 else 0):
        a, b = rng.sample(range(facts), 2)
        if found[a] != found[b] and exchange(a, b) > 0:
            exchange(a, b)
    return found


def _blocks(facts: int, raters: int, pages: int, rng: random.Random) -> list[set[int]]:
    """Each person's facts."""
    names = rng.sample(range(facts), facts)
    dealt = [names[at % facts] for at in range(facts * raters)]
    blocks = [set(dealt[begin : begin + pages]) for begin in range(0, len(dealt), pages)]
    shared = [[len(one & other) for other in blocks] for one in blocks]
    for _ in range(EXCHANGES * len(dealt) if len(blocks) > 1 else 0):
        a, b = rng.sample(range(len(blocks)), 2)
        only_a, only_b = sorted(blocks[a] - blocks[b]), sorted(blocks[b] - blocks[a])
        if only_a and only_b:
            _exchange(blocks, shared, a, b, rng.choice(only_a), rng.choice(only_b))
    return blocks


def _exchange(blocks: list[set[int]], shared: list[list[int]], a: int, b: int, from_a: int, from_b: int) -> None:
    """Let two people exchange a fact each, unless shares become less even by it."""
    moved = {}
    for other, block in enumerate(blocks):
        step = (from_b in block) - (from_a in block)  # what `a` comes to share with this one, and `b` loses
        if other not in (a, b) and step:
            moved[other] = step
    worse = sum((shared[a][each] + step) ** 2 - shared[a][each] ** 2 + (shared[b][each] - step) ** 2 - shared[b][each] ** 2 for each, step in moved.items())  # fmt: skip
    if worse > 0:
        return
    blocks[a] ^= {from_a, from_b}
    blocks[b] ^= {from_a, from_b}
    for each, step in moved.items():
        for one, by in ((a, step), (b, -step)):
            shared[one][each] += by
            shared[each][one] += by


def colour(edges: Sequence[Edge], colours: int, rng: random.Random) -> list[int]:
    """A colour for each edge of a bipartite graph: those at a vertex have each colour equally often, or once more.

    A vertex is cut into parts of at most `colours` edges each, at whose edges colours differ: König's theorem, by the alternating paths
    of its proof.
    """
    order = rng.sample(range(len(edges)), len(edges))
    degree: dict[tuple[int, int], int] = defaultdict(int)  # (side, vertex)
    ends: dict[int, list[tuple[int, int, int]]] = {}
    for edge in order:
        ends[edge] = []
        for side, vertex in enumerate(edges[edge]):
            ends[edge].append((side, vertex, degree[side, vertex] // colours))
            degree[side, vertex] += 1
    found: dict[int, int] = {}
    at: dict[tuple[int, int, int], dict[int, int]] = defaultdict(dict)  # of each part of a vertex, the edge of a colour
    for edge in order:
        u, v = ends[edge]
        free_u, free_v = (rng.choice([each for each in range(colours) if each not in at[end]]) for end in (u, v))
        if free_u in at[v]:
            _turn(v, free_u, free_v, ends, found, at)
        found[edge] = free_u
        at[u][free_u] = at[v][free_u] = edge
    return [found[edge] for edge in range(len(edges))]


def _turn(
    begin: tuple[int, int, int],
    first: int,
    second: int,
    ends: dict[int, list[tuple[int, int, int]]],
    found: dict[int, int],
    at: dict[tuple[int, int, int], dict[int, int]],
) -> None:
    """Exchange two colours on the path from a vertex whose edges alternate between them; the vertex then lacks the first."""
    path, here, wanted = [], begin, first
    while wanted in at[here]:
        edge = at[here][wanted]
        path.append(edge)
        here = next(end for end in ends[edge] if end != here)
        wanted = second if wanted == first else first
    for edge in path:
        for end in ends[edge]:
            at[end].pop(found[edge], None)
    for edge in path:
        found[edge] = second if found[edge] == first else first
    for edge in path:
        for end in ends[edge]:
            at[end][found[edge]] = edge
