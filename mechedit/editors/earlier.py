"""What an edit of a sequence knows of those before it, and what it need not compute again.

A state has, of each block, `earlier`, the sum P of k k^T over the keys written so far, and `factor`, M's where an update brought it from that of
fewer keys (`closed_form.Metric.plus`): so a run that goes on from its state solves with the same bits as one that was never stopped. Of
several blocks the names end in the block's number (`earlier.5`). An edit hands on its own `keys`.

What follows from C alone, the basis of its null space, and the factor of an M that comes again, are used again from the latest solve with what was
prepared (`latest`).
"""

from __future__ import annotations

from collections.abc import Sequence

from mechedit.closed_form import Metric, Terms
from mechedit.editing import State
from mechedit.editors.rome import Prepared
from mechedit.edits import EditError
from mechedit.settings import MemitSettings

__all__ = ["EARLIER", "FACTOR", "KEYS", "grown", "latest", "metric_of", "names_of", "terms_of"]

KEYS, EARLIER, FACTOR = "keys", "earlier", "factor"


def terms_of(settings: MemitSettings) -> Terms:
    """What the settings weigh a change by."""
    return Terms(settings.a, settings.b, settings.c, settings.slack, settings.null or None, settings.loose)


def names_of(settings: MemitSettings) -> list[str]:
    """What stands behind the names of a block's tensors in a state."""
    return [f".{layer}" for layer in settings.layers] or [""]


def latest(own: Prepared, settings: MemitSettings) -> Metric:
    """M of the latest solve with what was prepared for a block, else one without earlier keys: for `Metric.at`."""
    found = own.made["metric"] if "metric" in own.made else Metric(terms_of(settings), own.moment.C)
    return found.at(terms_of(settings), found.earlier)


def metric_of(own: Prepared, settings: MemitSettings, state: State, name: str = "") -> Metric:
    """M of a block, for a state.

    Raises:
        EditError: the state weighs earlier keys, and has no sum of this block's.
    """
    if state and settings.b and EARLIER + name not in state:
        raise EditError(
            f"the state of earlier edits has no {EARLIER + name}; found {', '.join(sorted(state))}. What an edit hands on is joined to what stood before: "
            "state = editor.joined(state, edit.state, settings, prepared)."
        )
    found = latest(own, settings).at(terms_of(settings), state.get(EARLIER + name), state.get(FACTOR + name))
    own.made["metric"] = found
    return found


def grown(
    state: State, new: State, settings: MemitSettings | None = None, ready: Sequence[Prepared] | None = None
) -> State:
    """The state after an edit that hands on these keys; without settings and what was prepared for the blocks, without factors."""
    known = dict(state)
    if not new:
        return known
    if settings is None or ready is None:
        for name in (each.removeprefix(KEYS) for each in new if each.startswith(KEYS)):
            keys = new[KEYS + name].double()
            known[EARLIER + name] = known[EARLIER + name] + keys.T @ keys if EARLIER + name in known else keys.T @ keys
            known.pop(FACTOR + name, None)
        return known
    for own, name in zip(ready, names_of(settings), strict=True):
        metric = metric_of(own, settings, state, name).plus(new[KEYS + name])
        assert metric.earlier is not None
        known[EARLIER + name] = metric.earlier
        known.pop(FACTOR + name, None)
        if metric.is_updated:
            known[FACTOR + name] = metric.factor
    return known
