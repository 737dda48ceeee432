"""Every knob of the method, with its default and the reason for it.

    base.py         knobs and their checks
    bands.py        where the numbers of sound edits lie: files of `mechedit calibrate`
    tracing.py      TraceSettings
    moments.py      MomentSettings
    editor.py       EditSettings, of which every editor's derive
    rome.py, many.py, editors.py   those of each editor, with the constants that have names
    evaluating.py   EvaluateSettings, SweepSettings, TuneSettings
    sequences.py    SequenceSettings
    training.py     MendTraining, KeTraining
    presets.py      what suits which model, by editor
    studying.py     StudySettings

Python, the command line and the experiments share these frozen dataclasses; a result carries the ones that made it. Nothing heavy
is imported here, so that `mechedit --help` answers at once.
"""

from mechedit.settings.bands import NO_EDGE, Bands, read_bands, shipped_bands
from mechedit.settings.base import Settings, SettingsError, check_each, filled, from_json, given, knob, knobs, require
from mechedit.settings.editor import GUARDS, PREFIXES, EditSettings
from mechedit.settings.editors import (
    ATTENTION_WEIGHTS,
    DESCENT_POLICIES,
    EDITOR_SETTINGS,
    LOSSES,
    NEURON_ACTIONS,
    NEURON_POLICIES,
    AttentionEditSettings,
    BoundedSettings,
    DescentSettings,
    FineTuningSettings,
    KeSettings,
    KnowledgeNeuronsSettings,
    MendSettings,
    ToldSettings,
    TrainedSettings,
)
from mechedit.settings.evaluating import MODES, CalibrateSettings, EvaluateSettings, SweepSettings, TuneSettings
from mechedit.settings.many import (
    AVERAGES,
    MANY_CONSTANTS,
    MANY_POLICIES,
    MEASURED,
    SOUGHT_IN,
    SPREADS,
    AlphaEditSettings,
    EmmetSettings,
    MemitSettings,
    PmetSettings,
    SequentialSettings,
)
from mechedit.settings.moments import MomentSettings
from mechedit.settings.presets import PRESETS, Preset
from mechedit.settings.rome import CONSTANTS, POLICIES, SEARCHES, SHARES, STOPS, WHOSE_KEY, RomeSettings
from mechedit.settings.sequences import ON_COLLAPSE, SequenceSettings
from mechedit.settings.studying import UNEDITED, StudySettings
from mechedit.settings.tracing import (
    CENTRES,
    CORRUPTIONS,
    FACT_TOKENS,
    KINDS,
    KNOWN_KINDS,
    MEASURES,
    PRECISIONS,
    ROLE_TITLES,
    ROLES,
    SCALES,
    SEVERED_TITLES,
    STATE_KINDS,
    TraceSettings,
)
from mechedit.settings.training import (
    FORMS,
    KE_POLICIES,
    MEND_POLICIES,
    TRAINING,
    KeTraining,
    MendTraining,
    TrainingSettings,
)

__all__ = [
    "ATTENTION_WEIGHTS",
    "AVERAGES",
    "CENTRES",
    "CONSTANTS",
    "CORRUPTIONS",
    "DESCENT_POLICIES",
    "EDITOR_SETTINGS",
    "FACT_TOKENS",
    "FORMS",
    "GUARDS",
    "KE_POLICIES",
    "KINDS",
    "KNOWN_KINDS",
    "LOSSES",
    "MANY_CONSTANTS",
    "MANY_POLICIES",
    "MEASURED",
    "MEASURES",
    "MEND_POLICIES",
    "MODES",
    "NEURON_ACTIONS",
    "NEURON_POLICIES",
    "NO_EDGE",
    "ON_COLLAPSE",
    "POLICIES",
    "PRECISIONS",
    "PREFIXES",
    "PRESETS",
    "ROLES",
    "ROLE_TITLES",
    "SCALES",
    "SEARCHES",
    "SEVERED_TITLES",
    "SHARES",
    "SOUGHT_IN",
    "SPREADS",
    "STATE_KINDS",
    "STOPS",
    "TRAINING",
    "UNEDITED",
    "WHOSE_KEY",
    "AlphaEditSettings",
    "AttentionEditSettings",
    "Bands",
    "BoundedSettings",
    "CalibrateSettings",
    "DescentSettings",
    "EditSettings",
    "EmmetSettings",
    "EvaluateSettings",
    "FineTuningSettings",
    "KeSettings",
    "KeTraining",
    "KnowledgeNeuronsSettings",
    "MemitSettings",
    "MendSettings",
    "MendTraining",
    "MomentSettings",
    "PmetSettings",
    "Preset",
    "RomeSettings",
    "SequenceSettings",
    "SequentialSettings",
    "Settings",
    "SettingsError",
    "StudySettings",
    "SweepSettings",
    "ToldSettings",
    "TraceSettings",
    "TrainedSettings",
    "TrainingSettings",
    "TuneSettings",
    "check_each",
    "filled",
    "from_json",
    "given",
    "knob",
    "knobs",
    "read_bands",
    "require",
    "shipped_bands",
]
