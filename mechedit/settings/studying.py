"""What a human study asks of whom."""

from __future__ import annotations

from dataclasses import dataclass

from mechedit.settings.base import Settings, check_each, knob, require

__all__ = ["UNEDITED", "StudySettings"]

UNEDITED = "unedited"
FEWEST, MOST = 2, 6  # texts on a page


@dataclass(frozen=True)
class StudySettings(Settings):
    """The study of `mechedit study make`; the defaults are the paper's (its appendix J)."""

    scenarios: int = knob(50, "new facts that are written about, drawn at random")
    raters: int = knob(3, "people who rate the texts about a fact")
    pages: int = knob(10, "facts that one person rates, a page each")
    editors: tuple[str, ...] = knob(
        ("rome", "ft-l", UNEDITED),
        f"whose texts are ranked: {FEWEST} to {MOST} editors by name or package.module:Class, and `{UNEDITED}` for the model as it is",
    )
    tokens: int = knob(100, "tokens of each text, its prompt's included")
    top_k: int = knob(5, "tokens that generation chooses among at each step")
    long_form: int = knob(
        0, "further pages a person, each with one editor's two passages and the nine items of long-form evaluation"
    )
    contact: str = knob("", "whom participants can ask or tell that they withdraw; shown with the consent")
    seed: int = knob(0, "seed of the facts, the texts and the design")

    def __post_init__(self) -> None:
        check_each(self)
        for name in ("scenarios", "raters", "pages", "tokens", "top_k"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1; found {getattr(self, name)}.")
        require(
            0 <= self.long_form <= self.pages,
            f"long_form must be from 0 to the {self.pages} pages of a person, whose facts it asks about; found {self.long_form}.",
        )
        require(
            FEWEST <= len(self.editors) <= MOST and len(set(self.editors)) == len(self.editors),
            f"editors must be {FEWEST} to {MOST} different ones, whose texts people can rank; found {', '.join(self.editors) or 'none'}.",
        )
        require(
            self.pages <= self.scenarios,
            f"pages must be at most the {self.scenarios} scenarios, since a page of a person is of another fact; found {self.pages}. Choose --pages {self.scenarios}, or more scenarios.",
        )
        if rest := self.scenarios * self.raters % self.pages:
            step = next(n for n in range(1, self.pages + 1) if n * self.raters % self.pages == 0)
            require(
                not rest,
                f"scenarios must make whole people: {self.scenarios} facts x {self.raters} raters are {self.scenarios * self.raters} pages, "
                f"which are no multiple of {self.pages} a person. Choose a multiple of {step} scenarios.",
            )

    @property
    def people(self) -> int:
        """Participants whom the study needs."""
        return self.scenarios * self.raters // self.pages
