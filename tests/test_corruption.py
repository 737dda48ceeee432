from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mechedit import corruption, models, prompts
from mechedit.corruption import CorruptionError, Noise, Statistics, corrupt, generator, needed, partner, statistics
from mechedit.facts import Fact
from mechedit.settings import CORRUPTIONS, SCALES, TraceSettings
from mechedit.tracing import prepare, trace
from mechedit.tracing.averages import AverageError, average
from tests.conftest import FACT

SMALL = TraceSettings(draws=3)
COVARIANCE = torch.tensor([[4.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]])
GIVEN = Statistics(2 / 3, "by hand", torch.tensor([5.0, -3.0, 1.0]), COVARIANCE)


def draw(family, draws=40_000, degrees=8.0):
    noise = Noise(draws, 1, 3, 2.0, degrees, GIVEN, corruption.generator(0, "test"))
    return family(noise)[:, 0]


def corrupted(model, fact=FACT, settings=SMALL, **given):
    prompt = prompts.prepare(model, fact)
    given.setdefault("statistics", needed(model, settings))
    return corrupt(model, fact, prompt, settings, **given), prompt


@pytest.mark.parametrize(
    ("family", "mean", "covariance"),
    [
        (corruption.gaussian, torch.zeros(3), 4 * torch.eye(3)),
        (corruption.uniform, torch.zeros(3), 4 / 3 * torch.eye(3)),
        (corruption.multivariate, torch.zeros(3), 9 * COVARIANCE),
        (corruption.multivariate_published, GIVEN.mean, 9 * COVARIANCE),
        (corruption.student_t, torch.zeros(3), 9 * COVARIANCE * 8 / 6),
        (corruption.student_t_published, GIVEN.mean, 9 * COVARIANCE * 8 / 6),
    ],
)
def test_families_have_the_mean_and_covariance_of_their_distributions(family, mean, covariance):
    """The published noise is N(mean, covariance of embeddings) for a factor of one, and sigma is the unit of the factor: the
    scale is three of them here, of the covariance's nine, and four is the variance of noise of that scale in all directions."""
    sample = draw(family)
    torch.testing.assert_close(sample.mean(0), mean, atol=0.06, rtol=0)
    torch.testing.assert_close(sample.T.cov(), covariance, atol=0.6, rtol=0.08)


NAMED = [each for each in CORRUPTIONS if each != "tokens"]


def added(model, settings, **given):
    """The noise that a fact's embeddings got, [draw * token, d_model], and what the trace says of it."""
    prompt = prompts.prepare(model, FACT, prepend_bos=True)
    found = prepare(model, FACT, replace(settings, prepend_bos=True), **given)
    begin, end = prompt.subject
    clean = models.embed(model, torch.tensor([prompt.ids]))[0, begin:end]
    return (found.corrupted[:, begin:end] - clean).flatten(0, 1), found.noise_std


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", NAMED)
def test_noise_is_as_large_as_asked_for_and_as_the_trace_says(model, name, scale):
    """The size of the noise, against what the embeddings' own covariance and the distribution's formula give."""
    everything = models.embed(model, torch.arange(int(model.cfg.d_vocab))[None])[0].double()
    unit = 1.0 if scale == "absolute" else float(everything.std())
    about_mean = float((everything - everything.mean(0)).square().mean().sqrt())
    wanted = 0.5 * unit
    if name.startswith(("multivariate", "student_t")):
        wanted *= 1.0 if scale == "absolute" else about_mean / unit
    wanted *= {"uniform": 3**-0.5, "student_t": (9 / 7) ** 0.5, "student_t_published": (9 / 7) ** 0.5}.get(name, 1.0)
    noise, said = added(model, TraceSettings(draws=400, noise=0.5, corruption=name, scale=scale, degrees=9.0))
    noise = noise.double() - (everything.mean(0) if name.endswith("_published") else 0)
    assert float(noise.square().mean().sqrt()) == pytest.approx(wanted, rel=0.03)
    assert said == pytest.approx(float(noise.square().mean().sqrt()), rel=0.03)


@pytest.mark.parametrize("degrees", [1.0, 3.0])
def test_noise_of_heavy_tails_is_said_to_be_what_was_drawn(model, degrees):
    """Where the distribution has no variance too."""
    noise, said = added(model, replace(SMALL, corruption="student_t", degrees=degrees))
    assert said == pytest.approx(float(noise.double().square().mean().sqrt()), rel=1e-4)


def test_noise_of_the_embeddings_covariance_corrupts_as_much_as_round_noise(model):
    """Three sigma of each: before, the covariance's own size came on top of sigma, and nothing was corrupted."""
    round_, shaped = (added(model, replace(SMALL, draws=200, corruption=name))[0] for name in ("gaussian", "multivariate"))  # fmt: skip
    assert float(shaped.std() / round_.std()) == pytest.approx(1.0, rel=0.02)


def test_noise_that_takes_the_embeddings_place_is_said_without_them(model):
    for name in ("gaussian", "student_t"):
        settings = TraceSettings(draws=50, corruption=name, replace=True, prepend_bos=True)
        found = prepare(model, FACT, settings)
        begin, end = found.prompt.subject
        noise = found.corrupted[:, begin:end].double()
        assert found.noise_std == pytest.approx(float(noise.square().mean().sqrt()), rel=0.05)


def test_another_subject_without_a_corruption_that_takes_it_is_an_error(model):
    for chosen in (SMALL, replace(SMALL, corruption="uniform", scale="absolute")):
        with pytest.raises(CorruptionError, match=r'another subject \(.London.\) .* with corruption "tokens" alone'):
            trace(model, FACT, chosen, other="London")
    with pytest.raises(CorruptionError, match='"tokens" alone'):
        trace(model, FACT, replace(SMALL, corruption="tokens"), other="London", family=corruption.gaussian)


def test_traces_whose_draws_scatter_are_averaged(model):
    """Student-t noise of two facts is of one kind, however far its tails were drawn."""
    facts = [FACT, replace(FACT, subject="The Eiffel Tower")]
    found = [trace(model, fact, replace(SMALL, corruption="student_t")) for fact in facts]
    assert found[0].noise_std != found[1].noise_std
    assert average(found).n == 2
    few = corruption.statistics(model, ["The Space Needle", "Paris"], "vocabulary")
    uniform = replace(SMALL, corruption="uniform")
    with pytest.raises(AverageError, match="in its corruption"):
        average([trace(model, facts[0], uniform), trace(model, facts[1], uniform, statistics=few)])


def test_uniform_noise_is_bounded_and_student_t_has_heavy_tails():
    assert draw(corruption.uniform).abs().max() <= 2.0
    heavy, light = (draw(corruption.student_t, degrees=each)[:, 2] for each in (3.0, 100.0))
    kurtosis = [float(((each / each.std()) ** 4).mean()) for each in (heavy, light)]
    assert kurtosis[0] > 6 > kurtosis[1]


def test_a_family_that_needs_a_covariance_says_so():
    noise = Noise(2, 1, 3, 1.0, 3.0, Statistics(1.0, "sigma alone"), corruption.generator(0))
    with pytest.raises(CorruptionError, match="mean and covariance"):
        corruption.multivariate(noise)


@pytest.mark.parametrize("name", NAMED)
def test_every_named_noise_falls_on_the_subject_alone_and_is_the_facts_own(model, name):
    settings = replace(SMALL, corruption=name)
    (first, scale), prompt = corrupted(model, settings=settings)
    torch.randn(100)  # what ran before does not matter
    (again, _), _ = corrupted(model, settings=settings)
    assert torch.equal(first, again)
    (reseeded, _), _ = corrupted(model, settings=replace(settings, seed=1))
    assert not torch.equal(first, reseeded)
    clean = models.embed(model, torch.tensor([prompt.ids]))[0]
    begin, end = prompt.subject
    change = first - clean
    assert scale == pytest.approx(3 * models.embedding_std(model), rel=1e-5)
    assert (change[:, begin:end].abs() > 0).any(-1).all()
    assert torch.equal(first[:, :begin], clean[:begin].expand(3, -1, -1))
    assert torch.equal(first[:, end:], clean[end:].expand(3, -1, -1))
    other = Fact("The Eiffel Tower", FACT.template, "Seattle")
    (theirs, _), their_prompt = corrupted(model, other, settings)
    there = their_prompt.subject[0]
    assert not torch.allclose(theirs[:, there] - models.embed(model, torch.tensor([their_prompt.ids]))[0, there], change[:, begin])  # fmt: skip


def test_extra_tokens_replacement_and_absolute_scale_are_obeyed(model):
    (plain, _), prompt = corrupted(model)
    clean = models.embed(model, torch.tensor([prompt.ids]))[0]
    begin, end = prompt.subject
    (extra, _), _ = corrupted(model, settings=replace(SMALL, extra=2))
    changed = (extra != clean).any(-1).any(0).nonzero()[:, 0].tolist()
    assert changed == list(range(begin, end + 2))
    (beyond, _), _ = corrupted(model, settings=replace(SMALL, extra=99))
    assert (beyond != clean).any(-1).any(0).nonzero()[:, 0].tolist() == list(range(begin, len(prompt.ids)))
    (replaced, _), _ = corrupted(model, settings=replace(SMALL, replace=True))
    torch.testing.assert_close(replaced[:, begin:end] + clean[begin:end], plain[:, begin:end])
    (absolute, scale), _ = corrupted(model, settings=replace(SMALL, scale="absolute", noise=0.5))
    assert scale == 0.5
    torch.testing.assert_close(
        (absolute - clean)[:, begin:end] / 0.5,
        (plain - clean)[:, begin:end] / (3 * models.embedding_std(model)),
        atol=1e-4,
        rtol=1e-3,
    )


def test_statistics_are_of_the_tokens_given(model):
    whole = statistics(model)
    everything = models.embed(model, torch.arange(int(model.cfg.d_vocab))[None])[0]
    assert whole.sigma == pytest.approx(float(everything.std()), rel=1e-5)
    torch.testing.assert_close(whole.mean, everything.mean(0), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(whole.covariance, everything.T.cov(), atol=1e-5, rtol=1e-3)
    texts = ["The Space Needle", "Paris"]
    ids = [token for text in texts for token in model.tokenizer(text, add_special_tokens=False).input_ids]
    some = statistics(model, texts, "subjects")
    assert some.source == "subjects"
    assert some.sigma == pytest.approx(float(models.embed(model, torch.tensor([ids])).std()), rel=1e-5)
    (_, scale), _ = corrupted(model, statistics=some)
    assert scale == pytest.approx(3 * some.sigma)
    assert trace(model, FACT, SMALL, statistics=some).corrupted_by == "gaussian noise, sigma of subjects"
    absolute = replace(SMALL, scale="absolute", corruption="uniform")
    assert trace(model, FACT, absolute).corrupted_by == "uniform noise, absolute scale"
    with pytest.raises(CorruptionError, match="at least 2 tokens"):
        statistics(model, [])


def test_another_subject_of_equal_length_takes_the_subjects_place(model):
    chosen = replace(SMALL, corruption="tokens")
    fact = Fact("Seattle", "The city of {} is in", "Paris", relation="city")
    (embeddings, scale), _ = corrupted(model, fact, chosen, other="London")
    theirs = prompts.prepare(model, Fact("London", fact.template))
    assert scale == 0.0
    assert embeddings.shape[0] == 1
    assert torch.equal(embeddings[0], models.embed(model, torch.tensor([theirs.ids]))[0])
    found = trace(model, fact, chosen, other="London")
    assert found.corrupted_by == "the subject 'London'"
    assert found.draws["mlp"].shape[-1] == 1
    with torch.no_grad():
        log_p = model(torch.tensor([theirs.ids]))[0, -1].log_softmax(-1)
    assert found.p_corrupted == pytest.approx(float(log_p[found.answer_ids[0]].exp()), rel=1e-3)


@pytest.mark.parametrize(
    ("other", "message"),
    [(None, "needs another subject"), ("xqz xqz xqz", "must have as many tokens"), ("Seattle", "the subject itself")],
)
def test_subjects_that_cannot_take_its_place_are_errors(model, other, message):
    fact = Fact("Seattle", "The city of {} is in", "Paris")
    with pytest.raises(CorruptionError, match=message):
        trace(model, fact, replace(SMALL, corruption="tokens"), other=other)


def test_partners_share_relation_and_length_but_not_the_answer(model):
    fact = Fact("Seattle", "The city of {} is in", "Paris", relation="city")
    fits = Fact("London", "The city of {} is in", "Rome", relation="city")
    others = [
        fact,
        fits,
        Fact("Berlin", "The city of {} is in", "Paris", relation="city"),
        Fact("Rome", "The city of {} is in", "London", relation="other"),
        Fact("The Space Needle xqz", "The city of {} is in", "London", relation="city"),
    ]
    assert partner(model, fact, others) == "London"
    assert partner(model, fact, [fact]) is None
    unknown = [replace(each, relation=None) for each in others]
    assert partner(model, unknown[0], unknown) is None, "of no relation none is another's"
    long = Fact("Paris " * 80, "The city of {} is in", "Rome", relation="city")
    assert partner(model, fact, [long, *others]) == "London"


def test_noise_of_ones_own_is_used_and_checked(model):
    def ones(noise: Noise) -> torch.Tensor:
        return noise.scale * torch.ones(noise.draws, noise.tokens, noise.d_model)

    (embeddings, scale), prompt = corrupted(model, family=ones)
    clean = models.embed(model, torch.tensor([prompt.ids]))[0]
    begin, end = prompt.subject
    torch.testing.assert_close(embeddings[:, begin:end], (clean[begin:end] + scale).expand(3, -1, -1))
    found = trace(model, FACT, SMALL, family=ones)
    assert found.draws["mlp"].std(-1).max() < 1e-6
    assert "ones noise, sigma of vocabulary" in found.corrupted_by
    with pytest.raises(CorruptionError, match=r"shape .*; bad gave \(1,\)"):

        def bad(noise: Noise) -> torch.Tensor:
            return torch.zeros(1)

        trace(model, FACT, SMALL, family=bad)
    with pytest.raises(CorruptionError, match="noise must be a tensor"):
        trace(model, FACT, SMALL, family=lambda noise: 3)


@pytest.mark.parametrize("seed", range(6))
def test_a_partner_is_drawn_from_those_that_fit_in_the_order_of_the_alphabet(seed, model):
    """The draw is plain: the seed's stream picks a place, whatever order the facts come in."""
    fact = Fact("Seattle", "The city of {} is in", "Paris", relation="city")
    names = ["London", "Rome", "Berlin", "Paris", "Steve", "soccer", "sport"]
    others = [Fact(name, "The city of {} is in", "elsewhere", relation="city") for name in names]
    fitting = sorted(name for name in names if len(model.to_tokens(" " + name)[0]) == len(model.to_tokens(" Seattle")[0]))  # fmt: skip
    assert len(fitting) > 4
    stream = generator(seed, "partner", fact.prompt, fact.subject)
    expected = fitting[int(torch.randint(len(fitting), (), generator=stream))]
    assert partner(model, fact, others, seed=seed) == partner(model, fact, others[::-1], seed=seed) == expected


def test_statistics_say_of_what_they_are(model):
    assert statistics(model).source == "vocabulary"
    assert statistics(model, source="mine").source == "mine"
    assert statistics(model, ["Rome is"], "mine").source == "mine"
    assert statistics(model, ["Rome is"]).source.endswith("tokens of given texts")
