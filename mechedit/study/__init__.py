"""A human study of what edited models write: which editor's texts people find more consistent with the new fact, and which more fluent.

    design.py      who rates which facts, and in which order the texts stand: balanced
    texts.py       what each editor makes the model write about each fact, kept as it is written
    making.py      the folder of a study: texts, key, and a form a participant
    forms.py       one form: an HTML file that needs nothing else (form.html, form.css, form.js)
    responses.py   what came back: accepted, or refused with a reason
    judged.py      what was judged, once the key is applied
    agreement.py   whether raters agree
    clusters.py    intervals over facts and raters
    report.py      the numbers, beside the paper's

The study is that of Meng et al. 2022, section 3.6 and appendix J: 50 new facts, three texts about each, 15 people with 10 pages each.
"""

from mechedit.study.making import Study, StudyError, load, make
from mechedit.study.report import Report, report
from mechedit.study.responses import Read, Response, read
from mechedit.study.texts import Scenario, read_scenarios, sampled, write_scenarios

__all__ = [
    "Read",
    "Report",
    "Response",
    "Scenario",
    "Study",
    "StudyError",
    "load",
    "make",
    "read",
    "read_scenarios",
    "report",
    "sampled",
    "write_scenarios",
]
