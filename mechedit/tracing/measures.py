"""What of the answer a trace measures: which tokens are read in a run, and the number made of them.

A run is read as log P of next tokens (or logits, for their difference). With the answer's tokens a1, a2, … and the other answer's first token b1:
    p                 P(a1)
    p_answer          P(a1) P(a2 | a1) …, each token after the answer's own tokens before it
    log_p             log P(a1), the natural logarithm
    logit_difference  logit(a1) - logit(b1), which is log P(a1) - log P(b1): the normaliser is the same in both, and not computed

Some tokenizers (Gemma's, before a number) put the space that joins an answer to its prompt into a token of its own, whose
probability is alike for every year. Measures of the first token pass over such blank ones: they stand after the prompt in every
run, and a1 is the first token that is not blank. Labels say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mechedit.settings import TraceSettings
from mechedit.tracing.baseline import Read

__all__ = ["LOGIT_DIFFERENCE", "LOG_P", "MEASURES", "P_ANSWER", "Measure", "P", "measured", "of"]


@dataclass(frozen=True)
class Measure:
    """One measure. `value` makes it of the log-probabilities that were read, [*runs, targets] -> [*runs], differentiably.

    `whole` reads all tokens of the answer, not the first alone; `against` reads the other answer's first token as well. A
    `share` lies between 0 and 1, and people see it in percent. `title` is the label, with {answer} in it.
    """

    name: str
    title: str
    value: Callable[[Tensor], Tensor]
    share: bool
    whole: bool = False
    against: bool = False

    def label(self, answer: str, n_tokens: int, blanks: int = 0) -> str:
        """What is measured of an answer of so many tokens, of which so many blank ones are passed over: P(Seattle)."""
        part = n_tokens - blanks > 1 and not (self.whole or self.against)
        said = f"first token of {answer}" if part else answer
        return self.title.format(answer=f"{said}, after a blank" if blanks else said)

    def given(self, answer: Sequence[int], blanks: int = 0) -> tuple[int, ...]:
        """The tokens of the answer that stand after the prompt in every run, so that the next ones can be read."""
        return tuple(answer[:-1]) if self.whole else tuple(answer[:blanks])

    def reads(self, last: int, answer: Sequence[int], other: Sequence[int] = (), blanks: int = 0) -> tuple[Read, ...]:
        """What is read, for a prompt whose last position is `last`; `other` are the other answer's tokens, after its blanks."""
        if self.whole:
            return tuple(Read(last + step, (token,)) for step, token in enumerate(answer))
        first = answer[blanks]
        return (Read(last + blanks, (first, other[0]) if self.against else (first,), logits=self.against),)


def _first(log_p: Float[Tensor, "*runs targets"]) -> Float[Tensor, "*runs"]:
    return log_p[..., 0]


def _first_p(log_p: Float[Tensor, "*runs targets"]) -> Float[Tensor, "*runs"]:
    return log_p[..., 0].exp()


def _joint_p(log_p: Float[Tensor, "*runs targets"]) -> Float[Tensor, "*runs"]:
    return log_p.sum(-1).exp()


def _difference(log_p: Float[Tensor, "*runs targets"]) -> Float[Tensor, "*runs"]:
    return log_p[..., 0] - log_p[..., 1]


P = Measure("p", "P({answer})", _first_p, share=True)
P_ANSWER = Measure("p_answer", "P({answer})", _joint_p, share=True, whole=True)
LOG_P = Measure("log_p", "log P({answer})", _first, share=False)
LOGIT_DIFFERENCE = Measure(
    "logit_difference", "logit({answer}) less the other's", _difference, share=False, against=True
)
MEASURES = {each.name: each for each in (P, P_ANSWER, LOG_P, LOGIT_DIFFERENCE)}


def of(settings: TraceSettings) -> Measure:
    """The measure that the settings name."""
    return MEASURES[settings.measure]


def measured(settings: TraceSettings, log_p: Float[Tensor, "*runs targets"]) -> Float[Tensor, "*runs"]:
    """The settings' measure from the log-probabilities that were read."""
    return of(settings).value(log_p)
