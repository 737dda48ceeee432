"""What "corrupted" means: the embeddings of some tokens, with noise added, replaced by noise, or those of other tokens.

Corruption acts at `hook_embed`, before positions (Meng et al. 2022, section 2.1 and appendix B.4). It depends on (seed, fact)
alone: not on the place in a batch, not on what ran before, not on the device; every run of a fact shares it. The published
code draws the same noise for all subjects of equal shape; here facts differ.

A family of noise is a function of `Noise`; `FAMILIES` has the named ones, and a user's own is passed to `trace`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.errors import MecheditError, check_list
from mechedit.facts import Fact, FactError
from mechedit.models import HookedModel, device_of, embed, embedding_std
from mechedit.prompts import Prompt, bare, prepare
from mechedit.settings import TraceSettings

__all__ = [
    "FAMILIES",
    "CorruptionError",
    "Family",
    "Noise",
    "Statistics",
    "corrupt",
    "describe",
    "drawn_std",
    "gaussian",
    "generator",
    "has_fixed_std",
    "multivariate",
    "multivariate_published",
    "needed",
    "partner",
    "span",
    "statistics",
    "student_t",
    "student_t_published",
    "uniform",
]


class CorruptionError(MecheditError, ValueError):
    """A corruption that cannot be made for this prompt."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """What embeddings are like: the standard deviation of all their entries, their mean and covariance, and of which tokens."""

    sigma: float
    source: str
    mean: Float[Tensor, " d_model"] | None = None
    covariance: Float[Tensor, "d_model d_model"] | None = None

    @property
    def about_mean(self) -> float:
        """The root mean square of the entries of embeddings less their mean: sigma without what the mean's entries differ by."""
        return self.sigma if self.covariance is None else float(self.covariance.double().diagonal().mean()) ** 0.5


@dataclass(frozen=True)
class Noise:
    """What a family makes noise from: how much of it, its scale, and a seeded stream of random numbers on the CPU.

    `scale` is in the units of embeddings, sigma times what the settings say; noise of the embeddings' own covariance has
    the factor `scale / statistics.sigma`, which is 1 for noise just as large as embeddings are.
    """

    draws: int
    tokens: int
    d_model: int
    scale: float
    degrees: float
    statistics: Statistics
    stream: torch.Generator

    def normal(self) -> Float[Tensor, "draws tokens d_model"]:
        """Standard normal numbers."""
        return torch.randn(self.draws, self.tokens, self.d_model, generator=self.stream)


Family = Callable[[Noise], Tensor]
"""From `Noise` to noise [draws, tokens, d_model], float32 on the CPU."""


def gaussian(noise: Noise) -> Float[Tensor, "draws tokens d_model"]:
    """Normal, of standard deviation `scale`: the paper's corruption."""
    return noise.scale * noise.normal()


def uniform(noise: Noise) -> Float[Tensor, "draws tokens d_model"]:
    """Uniform between -`scale` and `scale`."""
    return noise.scale * (2 * torch.rand(noise.draws, noise.tokens, noise.d_model, generator=noise.stream) - 1)


def multivariate(noise: Noise) -> Float[Tensor, "draws tokens d_model"]:
    """Normal with mean zero and the embeddings' covariance, times (`scale` / sigma) squared."""
    return noise.scale / noise.statistics.sigma * noise.normal() @ _root(noise).T


def multivariate_published(noise: Noise) -> Float[Tensor, "draws tokens d_model"]:
    """As the published code has it: about the embeddings' mean, which also shifts what it is added to."""
    return multivariate(noise) + _moments(noise)[0]


def student_t(noise: Noise) -> Float[Tensor, "draws tokens d_model"]:
    """`multivariate` noise over the root of a chi-square by its `degrees`, drawn afresh for each token: Student-t.

    Its covariance is that of `multivariate`, times degrees / (degrees - 2) where there are more than two.
    """
    normal = multivariate(noise)
    gamma = torch.distributions.Gamma(noise.degrees / 2, 0.5)
    with torch.random.fork_rng(devices=[]):  # distributions take no generator
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=noise.stream)))
        chi_squared = gamma.sample((noise.draws, noise.tokens, 1))
    return normal / (chi_squared / noise.degrees).sqrt()


def student_t_published(noise: Noise) -> Float[Tensor, "draws tokens d_model"]:
    """As the published code has it: about the embeddings' mean."""
    return student_t(noise) + _moments(noise)[0]


FAMILIES: dict[str, Family] = {
    each.__name__: each
    for each in (gaussian, uniform, multivariate, multivariate_published, student_t, student_t_published)
}


def _moments(noise: Noise) -> tuple[Float[Tensor, " d_model"], Float[Tensor, "d_model d_model"]]:
    mean, covariance = noise.statistics.mean, noise.statistics.covariance
    if mean is None or covariance is None:
        raise CorruptionError(
            "this noise needs the embeddings' mean and covariance: pass `corruption.statistics(model)`."
        )
    return mean, covariance


def _root(noise: Noise) -> Float[Tensor, "d_model d_model"]:
    """A matrix R with R R^T the embeddings' covariance, which may be singular."""
    values, vectors = torch.linalg.eigh(_moments(noise)[1].double())
    return (vectors * values.clamp(min=0).sqrt()).float()


@torch.no_grad()
def statistics(model: HookedModel, texts: Iterable[str] | None = None, source: str = "") -> Statistics:
    """Of the whole vocabulary's embeddings, or of those of all tokens of `texts`, a subject each, say.

    The published code takes its standard deviation from the subjects of its facts, tokenised without a leading space.

    Raises:
        CorruptionError: fewer than two tokens.
    """
    check_list("texts", texts)
    if texts is None:
        ids, source = torch.arange(int(model.cfg.d_vocab)), source or "vocabulary"
    else:
        ids = torch.tensor([each for text in texts for each in bare(model, text, prepend_bos=False)[0]]).long()
        source = source or f"{len(ids)} tokens of given texts"
    if len(ids) < 2:
        raise CorruptionError(f"statistics of embeddings need at least 2 tokens; found {len(ids)}.")
    d_model = int(model.cfg.d_model)
    total, outer = torch.zeros(d_model, dtype=torch.float64), torch.zeros(d_model, d_model, dtype=torch.float64)
    for chunk in ids.to(device_of(model)).split(16384):
        values = embed(model, chunk[None])[0].cpu().double()
        total, outer = total + values.sum(0), outer + values.T @ values
    mean = total / len(ids)
    entries = len(ids) * d_model
    spread = float(outer.trace()) - float(total.sum()) ** 2 / entries
    covariance = (outer - len(ids) * torch.outer(mean, mean)) / (len(ids) - 1)
    return Statistics((spread / (entries - 1)) ** 0.5, source, mean.float(), covariance.float())


def needed(model: HookedModel, settings: TraceSettings) -> Statistics:
    """The vocabulary's statistics, as far as the settings' noise needs them."""
    if settings.corruption.startswith(("multivariate", "student_t")):
        return statistics(model)
    unit = 1.0 if settings.scale == "absolute" or settings.corruption == "tokens" else embedding_std(model)
    return Statistics(unit, "vocabulary")


def generator(seed: int, *labels: str) -> torch.Generator:
    """A CPU generator whose stream is fixed by the seed and the labels."""
    digest = hashlib.sha256("\x00".join([str(seed), *labels]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@torch.no_grad()
def corrupt(
    model: HookedModel,
    fact: Fact,
    prompt: Prompt,
    settings: TraceSettings,
    *,
    statistics: Statistics,
    family: Family | None = None,
    other: str | None = None,
) -> tuple[Float[Tensor, "draws pos d_model"], float]:
    """The embeddings of the prompt's corrupted runs, and the scale of the noise (0 where there is none).

    `statistics` says what embeddings are like (`needed` has the vocabulary's); `family` replaces the one that the settings name;
    `other` is the subject that takes the subject's place where `settings.corruption` is "tokens".

    Raises:
        CorruptionError: tokens to replace without an equally long `other`, or another subject without a corruption that
            takes it; noise of another shape than asked for.
    """
    if other is not None and (settings.corruption != "tokens" or family is not None):
        raise CorruptionError(
            f'another subject ({other!r}) takes the subject\'s place with corruption "tokens" alone; this is '
            f'{describe(settings, statistics, family, None)}. Leave `other` out, or set corruption to "tokens".'
        )
    clean = embed(model, torch.tensor([prompt.ids], device=device_of(model)))[0].float().cpu()
    if settings.corruption == "tokens" and family is None:
        return _replaced(model, fact, prompt, other), 0.0
    family = family or FAMILIES[settings.corruption]
    unit = 1.0 if settings.scale == "absolute" else statistics.sigma
    begin, end = span(prompt, settings)
    noise = family(
        Noise(
            draws=settings.draws,
            tokens=end - begin,
            d_model=clean.shape[1],
            scale=settings.noise * unit,
            degrees=settings.degrees,
            statistics=_of_scale(statistics, settings),
            stream=generator(settings.seed, "noise", fact.prompt, fact.subject),
        )
    )
    expected = (settings.draws, end - begin, clean.shape[1])
    if not isinstance(noise, Tensor):
        raise CorruptionError(f"noise must be a tensor; {getattr(family, '__name__', family)} gave {noise!r}.")
    if tuple(noise.shape) != expected or not noise.isfinite().all():
        raise CorruptionError(
            f"noise must be finite and of shape (draws, tokens, d_model) = {expected}; "
            f"{getattr(family, '__name__', family)} gave {tuple(noise.shape)}."
        )
    corrupted = clean.repeat(settings.draws, 1, 1)
    corrupted[:, begin:end] = noise if settings.replace else clean[begin:end] + noise
    return corrupted, settings.noise * unit


def span(prompt: Prompt, settings: TraceSettings) -> tuple[int, int]:
    """The range [begin, end) of positions that are corrupted."""
    return prompt.subject[0], min(prompt.subject[1] + settings.extra, len(prompt.ids))


def _of_scale(statistics: Statistics, settings: TraceSettings) -> Statistics:
    """What a factor of one stands for: covariance as embeddings have it or, in absolute units, of entries as large as one."""
    return replace(statistics, sigma=statistics.about_mean) if settings.scale == "absolute" else statistics


@torch.no_grad()
def drawn_std(
    model: HookedModel,
    prompt: Prompt,
    settings: TraceSettings,
    corrupted: Float[Tensor, "draws pos d_model"],
    *,
    statistics: Statistics,
    family: Family | None = None,
) -> float:
    """The standard deviation of the noise's entries; 0 where other tokens take the subject's place.

    It is the distribution's where a closed form says what was drawn: the scale of Gaussian noise, the scale over the root of
    three for uniform noise, the embeddings' own for multivariate noise. Student-t noise scatters too widely for that, and what
    a family of one's own draws is not known beforehand: theirs is the root mean square of what was drawn, about the
    embeddings' mean where that was added.
    """
    if settings.corruption == "tokens" and family is None:
        return 0.0
    scale = settings.noise * (1.0 if settings.scale == "absolute" else statistics.sigma)
    if family is None and settings.corruption in _CLOSED:
        return scale * _CLOSED[settings.corruption](_of_scale(statistics, settings))
    begin, end = span(prompt, settings)
    noise = corrupted[:, begin:end].double()
    if not settings.replace:
        noise = noise - embed(model, torch.tensor([prompt.ids], device=device_of(model)))[0, begin:end].cpu().double()
    if family is None and settings.corruption.endswith("_published") and statistics.mean is not None:
        noise = noise - statistics.mean.double()
    return float(noise.square().mean().sqrt())


def has_fixed_std(settings: TraceSettings, corrupted_by: str) -> bool:
    """Whether the settings and sigma alone say the noise's standard deviation, alike for all facts (`drawn_std`)."""
    return settings.corruption in _CLOSED and corrupted_by.startswith(f"{settings.corruption} noise,")


_CLOSED: dict[str, Callable[[Statistics], float]] = {
    "gaussian": lambda statistics: 1.0,
    "uniform": lambda statistics: 3**-0.5,
    "multivariate": lambda statistics: statistics.about_mean / statistics.sigma,
    "multivariate_published": lambda statistics: statistics.about_mean / statistics.sigma,
}
"""The standard deviation of an entry of noise of scale one."""


def describe(settings: TraceSettings, statistics: Statistics, family: Family | None, other: str | None) -> str:
    """What corrupted a fact, in words: the noise and whose sigma it has, or the other subject."""
    if settings.corruption == "tokens" and family is None:
        return f"the subject {other!r}"
    name = settings.corruption if family is None else getattr(family, "__qualname__", repr(family))
    return f"{name} noise, " + ("absolute scale" if settings.scale == "absolute" else f"sigma of {statistics.source}")


def _replaced(model: HookedModel, fact: Fact, prompt: Prompt, other: str | None) -> Float[Tensor, "one pos d_model"]:
    """The embeddings of the prompt about another subject of as many tokens: symmetric token replacement."""
    if not other:
        raise CorruptionError('corruption "tokens" needs another subject: pass `other`.')
    theirs = prepare(model, _about(fact, other), prepend_bos=prompt.prepend_bos)
    if not _same_but_subject(prompt, theirs):
        raise CorruptionError(
            f"{other!r} must have as many tokens as {fact.subject!r} in the prompt, {prompt.subject[1] - prompt.subject[0]}; "
            f"it has {theirs.subject[1] - theirs.subject[0]}. Choose another subject."
        )
    if theirs.ids == prompt.ids:
        raise CorruptionError(f"{other!r} is the subject itself, so nothing would be corrupted.")
    return embed(model, torch.tensor([theirs.ids], device=device_of(model))).float().cpu()


def _about(fact: Fact, subject: str) -> Fact:
    return Fact(subject, fact.template, join=fact.join)


def partner(model: HookedModel, fact: Fact, facts: Sequence[Fact], *, seed: int = 0) -> str | None:
    """A subject to put in this one's place: of a fact of the same relation with another answer, as many tokens long.

    None where there is none, as where the fact names no relation. The choice depends on the seed and the fact.
    """
    if fact.relation is None:
        return None
    own, others = prepare(model, fact), {each.subject for each in facts if each.relation == fact.relation and each.target_true != fact.target_true}  # fmt: skip
    fitting = sorted(each for each in others if _takes_its_place(model, fact, own, each))
    if not fitting:
        return None
    stream = generator(seed, "partner", fact.prompt, fact.subject)
    return fitting[int(torch.randint(len(fitting), (), generator=stream))]


def _takes_its_place(model: HookedModel, fact: Fact, own: Prompt, other: str) -> bool:
    """Whether another subject changes the subject's tokens and no others."""
    try:
        theirs = prepare(model, _about(fact, other), prepend_bos=own.prepend_bos)
    except FactError:  # too long for the context
        return False
    return _same_but_subject(own, theirs) and theirs.ids != own.ids


def _same_but_subject(own: Prompt, theirs: Prompt) -> bool:
    end = own.subject[1]
    return theirs.subject == own.subject and theirs.ids[end:] == own.ids[end:]
