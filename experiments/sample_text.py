"""The text that C of the packaged Gemma is estimated on.  python -m experiments.sample_text   -> mechedit/data/gemma-3-270m/

It is sampled from the model itself, as C's estimation would do (about four minutes on two cores), and ships with mechedit.
"""

from __future__ import annotations

from dataclasses import dataclass

from experiments.common import parse, say
from mechedit import models
from mechedit.moments import corpus, packaged
from mechedit.progress import silent
from mechedit.prompts import resolve_bos
from mechedit.settings import MomentSettings


@dataclass(frozen=True)
class SampleText:
    """Settings of the experiment."""

    model: str = "gemma-3-270m"
    seed: int = 0
    times_d_mlp: int = 10  # keys, as C's estimation takes them by default


def main(settings: SampleText) -> None:
    """Sample the batches and write them; what ships already, or is in the cache, is taken from there."""
    model = models.load(settings.model)
    tokens = settings.times_d_mlp * int(model.cfg.d_mlp)
    wanted = MomentSettings(tokens=tokens, seed=settings.seed, prepend_bos=resolve_bos(model, None))
    batches = {
        str(index): batch()[:, bool(wanted.prepend_bos) :]
        for index, (_, batch) in enumerate(corpus.batches(model, (), wanted, silent))
    }
    say(str(packaged.write(model, batches, settings.seed, corpus.PURPOSE)))


if __name__ == "__main__":
    main(parse(SampleText))
