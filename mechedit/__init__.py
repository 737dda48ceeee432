"""mechedit: find where a transformer recalls a fact, and rewrite it there.

The pipeline is models.load -> facts.Fact -> tracing.trace -> sites.early -> editors.edit -> applying.apply. Each step is one module
or one package and may touch only what this table says; nothing is left changed except by `applying.apply`, `applying.revert` and the
functions whose names end in `_`.

| step               | forward | backward | weights           | disk  | randomness            |
|--------------------|---------|----------|-------------------|-------|-----------------------|
| models.load        | yes     | no       | makes them        | cache | no                    |
| models.identity    | no      | no       | no                | no    | no                    |
| weights.restored   | no      | no       | and puts them back| no    | no                    |
| prompts.audit      | no      | no       | no                | no    | no                    |
| tracing.trace      | yes     | no       | no                | no    | own generator         |
| tracing.severed    | yes     | no       | no                | no    | own generator         |
| tracing.attribution| yes     | yes      | no                | no    | own generator         |
| runs.trace_facts   | yes     | no       | no                | folder| own generator         |
| moments.estimate   | yes     | no       | no                | cache | own generator         |
| keys               | yes     | no       | no                | cache | own generator         |
| neurons.find       | yes     | yes      | no                | cache | own generator         |
| above.prepare      | yes     | no       | no                | no    | no                    |
| values.optimise    | yes     | yes      | no                | no    | no                    |
| rank_one.solve     | no      | no       | no                | no    | no                    |
| closed_form.Metric | no      | no       | no                | no    | no                    |
| recursive.least_squares | no | no       | no                | no    | no                    |
| rank_one.edited    | no      | no       | and puts them back| no    | no                    |
| changes.total      | no      | no       | no                | no    | no                    |
| editing.make_ready | yes     | no       | and puts them back| cache | own generator         |
| editing.edit       | yes     | yes      | and puts them back| cache | own generator         |
| editors.fine_tuning| yes     | yes      | and puts them back| no    | no                    |
| editors.attention_edit| yes  | yes      | and puts them back| no    | no                    |
| editors.told       | no      | no       | no                | no    | no                    |
| editors.knowledge_neurons | yes | yes    | no                | cache | no                    |
| editors.trained    | yes     | yes      | no                | no    | no                    |
| guards.measure     | yes     | no       | no                | no    | no                    |
| runs.edit_facts    | yes     | yes      | and puts them back| folder| own generator         |
| applying.apply     | no      | no       | yes, until undone | no    | no                    |
| applying.edited    | no      | no       | and puts them back| no    | no                    |
| applying.compose   | no      | no       | no                | no    | no                    |
| tuning.tune        | yes     | yes      | and puts them back| folder, cache | own generator |
| calibration.calibrate | yes  | yes      | and puts them back| folder, cache | own generator |
| export.checkpoint  | no      | no       | and puts them back| folder| no                    |
| scoring.score      | yes     | no       | no                | no    | no                    |
| counterfact.scores | yes     | no       | no                | no    | no                    |
| runs.evaluate      | yes     | yes      | and puts them back| folder, cache | own generator |
| runs.sequence      | yes     | yes      | and puts them back| folder, cache | own generator |
| runs.sweep         | yes     | yes      | and puts them back| folder, cache | own generator |
| study.write_scenarios | yes  | yes      | and puts them back| folder, cache | own generator |
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_MODULES = (
    "above",
    "applying",
    "benchmarks",
    "calibration",
    "changes",
    "closed_form",
    "corruption",
    "editing",
    "editors",
    "edits",
    "export",
    "facts",
    "figures",
    "generation",
    "guards",
    "interventions",
    "keys",
    "models",
    "moments",
    "neurons",
    "notebook",
    "organism",
    "prompts",
    "rank_one",
    "recursive",
    "runs",
    "scoring",
    "settings",
    "sites",
    "sources",
    "statistics",
    "study",
    "tracing",
    "tuning",
    "values",
    "viewer",
    "weights",
)

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"mechedit.{name}")
    raise AttributeError(f"module 'mechedit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
