from __future__ import annotations

import itertools
import threading
from dataclasses import replace

import pytest
import torch

from mechedit import above, keys, losses, models, optimisers, prompts, values
from mechedit.facts import Fact
from mechedit.models import ModelError
from mechedit.settings import RomeSettings
from tests.conftest import FACT, assert_same_state, state

QUICK = RomeSettings(layer=1, steps=8, prefixes=((3, 2), (5, 1)))
BOS = replace(QUICK, prepend_bos=True)


def slow_value(model, rows, essence, target, initial, shares, layer, settings, cost=lambda delta: 0.0, told=None):
    """The same optimisation written plainly: whole forward passes with all logits, one prompt at a time. Losses are told to a list."""
    told = [] if told is None else told
    delta = torch.zeros_like(initial, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=settings.learning_rate)

    def log_p(ids, subject, share, change):
        def add(module, args, output):
            output = output.clone()
            output[0, subject] = output[0, subject] + share * change
            return output

        handle = models.mlp_module(model, layer).register_forward_hook(add)
        try:
            return model(torch.tensor([list(ids)]))[0].log_softmax(-1)
        finally:
            handle.remove()

    original = log_p(essence.ids, essence.lookup, 0.0, delta)[essence.lookup].detach()
    for _ in range(settings.steps):
        losses = []
        for row, share in zip(rows, shares, strict=False):
            predicted = log_p([*row.ids, *target[:-1]], row.lookup, share, delta)
            losses.append(-torch.stack([predicted[row.last + step, token] for step, token in enumerate(target)]).mean())
        new = log_p(essence.ids, essence.lookup, shares[-1], delta)[essence.lookup]
        nll, kl = torch.stack(losses).mean(), (new.exp() * (new - original)).sum()
        loss = nll + settings.kl * kl + settings.weight_decay * delta.norm() / initial.norm() ** 2
        loss = loss + cost(delta)
        told.append(float(loss))
        (delta.grad,) = torch.autograd.grad(loss, [delta])
        adam.step()
        with torch.no_grad():
            delta.mul_((settings.clamp * initial.norm() / delta.norm()).clamp(max=1.0))
    return initial + delta.detach()


@pytest.mark.parametrize("shape", ["gpt2", "gptj", "gemma3"])
def test_the_value_equals_a_plain_optimisation(shape, load):
    model = load(shape)
    before = state(model)
    settings = replace(BOS, steps=3, clamp=0.8, stop_at=0.0, learning_rate=0.1)
    rows = keys.contexts(model, FACT, ("", "Rome. ", "London Berlin. "), prepend_bos=True)
    (essence,) = keys.contexts(model, Fact(FACT.subject, "{} is a"), ("",), prepend_bos=True)
    target = [*prompts.continuation(model, FACT.prompt, "zebra"), 0]  # the first of all ids is one like others
    key = keys.subject_keys(model, 1, rows)[0]
    initial = (key @ models.W_out(model, 1) + models.b_out(model, 1)).detach()
    shares = torch.tensor([1.0, 0.7, 1.3, 0.9])
    fast = values.optimise(model, rows, essence, [target] * len(rows), initial, shares, 1, settings)
    slow = slow_value(model, rows, essence, target, initial, shares, 1, settings)
    torch.testing.assert_close(fast.value, slow, atol=1e-3, rtol=1e-2)
    assert len(fast.losses) == 3
    assert_same_state(model, before)


def slow_parts(model, rows, essence, target, initial, layer, settings, parts):
    """Several parts of a block changed at once, each by a delta of its own: whole forward passes, one prompt at a time."""
    delta = torch.zeros_like(initial, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=settings.learning_rate)
    modules = {"mlp": models.mlp_module(model, layer), **{part: model.hook_dict[hook.format(layer)] for part, hook in values.HOOKS.items()}}  # fmt: skip

    def log_p(ids, subject, changes):
        def add(change):
            def hook(module, args, output):
                output = output.clone()
                output[0, subject] = output[0, subject] + change
                return output

            return hook

        handles = [
            modules[part].register_forward_hook(add(change)) for part, change in zip(parts, changes, strict=True)
        ]
        try:
            return model(torch.tensor([list(ids)]))[0].log_softmax(-1)
        finally:
            for handle in handles:
                handle.remove()

    original = log_p(essence.ids, essence.lookup, delta)[essence.lookup].detach()
    for _ in range(settings.steps):
        losses, is_top = [], True
        for row in rows:
            predicted = log_p([*row.ids, *target[:-1]], row.lookup, delta)
            told = [predicted[row.last + step] for step in range(len(target))]
            is_top = is_top and all(int(each.argmax()) == token for each, token in zip(told, target, strict=True))
            losses.append(-torch.stack([each[token] for each, token in zip(told, target, strict=True)]).mean())
        new = log_p(essence.ids, essence.lookup, delta)[essence.lookup]
        nll, kl = torch.stack(losses).mean(), settings.kl * (new.exp() * (new - original)).sum()
        decay = sum(settings.weight_decay * own.norm() / first.norm() ** 2 for own, first in zip(delta, initial, strict=True))  # fmt: skip
        if is_top and settings.stop == "top":
            if float(kl) <= 0.01:
                break
            nll = 0.1 * nll
        (delta.grad,) = torch.autograd.grad(nll + kl + decay, [delta])
        adam.step()
        with torch.no_grad():
            for own, first in zip(delta, initial, strict=True):
                own.mul_((settings.clamp * first.norm() / own.norm()).clamp(max=1.0))
    return initial + delta.detach()


@pytest.mark.parametrize(("shape", "parts", "stop"), [("gemma3", ("attn", "mlp"), "target"), ("gpt2", ("attn", "mlp"), "top"), ("gemma3", ("stream",), "target")])  # fmt: skip
def test_several_parts_of_a_block_are_changed_together_and_each_is_kept_within_its_own_bound(shape, parts, stop, load):
    model = load(shape)
    settings = replace(BOS, steps=6, clamp=0.7, stop_at=0.0, learning_rate=0.1, kl=0.05, stop=stop)
    rows = keys.contexts(model, FACT, ("", "Rome. "), prepend_bos=True)
    (essence,) = keys.contexts(model, Fact(FACT.subject, "{} is a"), ("",), prepend_bos=True)
    target = prompts.continuation(model, FACT.prompt, "Paris")
    initial = torch.randn(len(parts), 32, generator=torch.Generator().manual_seed(1))
    given = initial if len(parts) > 1 else initial[0]
    fast = values.optimise(model, rows, essence, [target] * 2, given, torch.ones(3), 1, settings, parts)
    slow = slow_parts(model, rows, essence, target, initial, 1, settings, parts)
    torch.testing.assert_close(fast.value, slow.view(given.shape), atol=2e-3, rtol=1e-2)
    assert fast.value.shape == given.shape
    moved = (fast.value - given).view(initial.shape).norm(dim=1) / initial.norm(dim=1)
    assert bool((moved <= 0.7 + 1e-5).all())
    assert bool((moved > 0.01).all())


SEVERAL = [
    (FACT, "Paris"),
    (replace(FACT, subject="The Eiffel Tower"), "zebra"),  # of several tokens
    (Fact("Rome", "{} is where the piano of"), "Apple"),
    (Fact("Steve Jobs", "The founder, {}, plays"), "soccer"),
]


@pytest.fixture(scope="module", params=["gpt2", "gemma3"])
def double(request, folder):
    return models.load(str(folder(request.param)), device="cpu", dtype=torch.float64)


def near(model, tolerance):
    """The tolerance, or that of single precision where Hugging Face's norms compute in it whatever the model's numbers are."""
    return 1e-4 if models.is_bridge(model) and model.cfg.architecture == "Gemma3ForCausalLM" else tolerance


def sought(model, fact, target, before=("", "Rome. ", "London Berlin. ")):
    rows = keys.contexts(model, fact, before, prepend_bos=True)
    (essence,) = keys.contexts(model, Fact(fact.subject, "{} is a"), ("",), prepend_bos=True)
    ids = prompts.continuation(model, fact.prompt, target)
    key = keys.subject_keys(model, 1, rows)[0].to(models.W_out(model, 1).dtype)
    initial = (key @ models.W_out(model, 1) + models.b_out(model, 1)).detach()
    shares = torch.linspace(1.0, 0.6, len(rows) + 1, dtype=initial.dtype)
    return values.Sought(rows, essence, [ids] * len(rows), initial, shares)


def test_values_sought_together_are_what_plain_optimisations_of_each_find(double):
    settings = replace(BOS, steps=4, clamp=0.8, stop_at=0.0, kl=0.5, learning_rate=0.1)
    every = [sought(double, fact, target) for fact, target in SEVERAL]
    for each, own in zip(every, values.optimise_all(double, every, 1, settings), strict=True):
        with models.frozen(double):
            slow = slow_value(double, each.rows, each.essence, each.targets[0], each.initial, each.shares, 1, settings)
        assert own.value.dtype == torch.float64
        torch.testing.assert_close(own.value, slow, rtol=0, atol=near(double, 1e-7))


@pytest.mark.parametrize("stop", ["target", "published", "top"])
def test_each_of_several_facts_stops_by_itself_and_is_run_no_more(double, stop, monkeypatch):
    settings = replace(BOS, steps=5, clamp=3.0, stop_at=0.0, kl=0.01, stop=stop)
    every = [sought(double, fact, target) for fact, target in SEVERAL]
    third = sorted(sum(each.losses[2]) for each in values.optimise_all(double, every, 1, settings))
    settings = replace(settings, stop_at=(third[1] + third[2]) / 2)
    alone = [values.optimise_all(double, [each], 1, settings)[0] for each in every]
    ran, plain = [], above.Group.run
    monkeypatch.setattr(above.Group, "run", lambda group, *given: ran.append(len(group.rows)) or plain(group, *given))
    together = values.optimise_all(double, every, 1, settings)
    taken = [len(each.losses) for each in alone]
    assert len(set(taken)) > 1, "they do not all end at once"
    assert [len(each.losses) for each in together] == taken
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(other.value, one.value, rtol=0, atol=near(double, 1e-9))
        torch.testing.assert_close(torch.tensor(other.losses), torch.tensor(one.losses), rtol=near(double, 1e-6), atol=near(double, 1e-9))  # fmt: skip
    assert sum(ran) == sum(steps * (len(each.rows) + 1) for steps, each in zip(taken, every, strict=True))


@pytest.mark.parametrize("shape", ["gpt2", "gemma3"])
def test_what_the_model_says_already_is_first_whatever_rounding_does(load, shape):
    """In float32 the same logit comes out of two products with other last bits; PMET's stop is at once where nothing is to be learnt."""
    model = load(shape)
    facts = [replace(FACT, subject=subject) for subject in ["The Space Needle", "The Eiffel Tower", "Rome", "Steve Jobs", "London", "Berlin", "Apple", "violin", "piano", "soccer"]]  # fmt: skip
    every = [sought(model, fact, "Paris", ("",)) for fact in facts]
    with torch.no_grad():
        tops = [int(model(torch.tensor([list(each.rows[0].ids)]))[0, -1].argmax()) for each in every]
    every = [replace(each, targets=[[top]]) for each, top in zip(every, tops, strict=True)]
    found = values.optimise_all(model, every, 1, replace(BOS, steps=3, stop="top", stop_at=0.0))
    assert [len(each.losses) for each in found] == [1] * len(facts)


@pytest.mark.parametrize("module", [above, losses])
def test_with_little_memory_few_rows_run_at_once_and_find_the_same(double, module, monkeypatch):
    settings = replace(BOS, steps=3, stop_at=0.0)
    every = [sought(double, fact, target) for fact, target in SEVERAL]
    bars, plain = [], values.optimise_all(double, every, 1, settings)
    monkeypatch.setattr(module, "MEMORY", 1)
    found = values.optimise_all(double, every, 1, settings, progress=lambda what, done, of: bars.append((done, of)))
    for one, other in zip(plain, found, strict=True):
        torch.testing.assert_close(other.value, one.value, rtol=0, atol=near(double, 1e-9))
    assert bars == [(done, 12) for done in ([0, 4, 8, 12] if module is above else range(13))]


@pytest.fixture
def two_threads(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(above, "FEWEST", 1)
    yield
    torch.set_num_threads(threads)


def test_threads_that_run_pieces_side_by_side_find_the_same(double, two_threads, monkeypatch):
    settings = replace(BOS, steps=4, stop_at=0.0, kl=0.5)
    every = [sought(double, fact, target) for fact, target in SEVERAL]
    plain, ran = above.Group.run, set()
    monkeypatch.setattr(above.Group, "run", lambda group, *given: ran.add((threading.get_ident(), torch.get_num_threads())) or plain(group, *given))  # fmt: skip
    several = values.optimise_all(double, every, 1, settings)
    assert {threads for _, threads in ran} == ({2} if models.is_bridge(double) else {1})
    assert len(ran) == 1 if models.is_bridge(double) else len(ran) > 1
    assert torch.get_num_threads() == 2
    monkeypatch.setattr(above, "MOST", 1)
    for one, other in zip(values.optimise_all(double, every, 1, settings), several, strict=True):
        torch.testing.assert_close(other.value, one.value, rtol=0, atol=near(double, 1e-9))
        torch.testing.assert_close(torch.tensor(other.losses), torch.tensor(one.losses), rtol=near(double, 1e-6), atol=near(double, 1e-9))  # fmt: skip


def test_an_error_in_a_thread_leaves_the_model_and_the_threads_as_they_were(double, two_threads, monkeypatch):
    before, plain = state(double), above.Group.run

    def broken(group, *given):
        plain(group, *given)
        raise KeyboardInterrupt

    monkeypatch.setattr(above.Group, "run", broken)
    every = [sought(double, fact, target) for fact, target in SEVERAL]
    with pytest.raises(KeyboardInterrupt):
        values.optimise_all(double, every, 1, BOS)
    assert_same_state(double, before)
    assert torch.get_num_threads() == 2


def test_a_prompt_that_is_learnt_is_left_out_and_its_last_loss_counts(double, monkeypatch):
    """Against the plain optimisation with its rows taken away by hand, step after step."""
    settings = replace(BOS, steps=3, clamp=3.0, kl=0.0, weight_decay=0.0, learning_rate=0.3, leave_learnt=True)
    each = sought(double, FACT, "Paris", ("", "Rome. ", "London Berlin. ", "Apple. "))

    def losses(rows, value):
        change = value - each.initial
        found = []
        for index in rows:
            row = each.rows[index]
            handle = models.mlp_module(double, 1).register_forward_hook(lambda module, args, output, row=row, index=index: output.index_put((torch.tensor([0]), torch.tensor([row.lookup])), each.shares[index] * change, accumulate=True))  # fmt: skip
            with torch.no_grad():
                said = double(torch.tensor([list(row.ids)]))[0, -1].log_softmax(-1)
            handle.remove()
            found.append(-float(said[each.targets[0][0]]))
        return found

    assert len(each.targets[0]) == 1
    at = [losses(range(4), values.optimise_all(double, [each], 1, replace(settings, steps=n, stop_at=0.0))[0].value) for n in range(3)]  # fmt: skip
    first = sorted(at[0])
    stop_at = (first[0] + min(first[1], sum(first) / 4)) / 2  # one of four is below it before any step
    ran, plain = [], above.Group.run
    monkeypatch.setattr(above.Group, "run", lambda group, *given: ran.append(len(group.rows)) or plain(group, *given))
    found = values.optimise_all(double, [each], 1, replace(settings, stop_at=stop_at))[0]
    assert found.losses[0][0] == pytest.approx(sum(at[0]) / 4)
    left = [index for index in range(4) if at[0][index] >= stop_at]
    assert ran[0] == 5
    assert ran[1] == 4
    (now,) = values.optimise_all(
        double, [each], 1, replace(settings, stop_at=0.0, steps=1)
    )  # the first step is all rows'
    expected = (sum(losses(left, now.value)) + sum(at[0][index] for index in range(4) if index not in left)) / 4
    assert found.losses[1][0] == pytest.approx(expected)


def test_no_prompt_leaves_by_a_step_that_is_taken_back_and_such_a_step_is_no_row_of_the_losses(double, monkeypatch):
    settings = replace(BOS, steps=3, clamp=0.3, leave_learnt=True, stop_at=0.0, fisher=1.0)
    each, G = sought(double, FACT, "Paris", ("",)), 1e-6 * torch.eye(32)
    first, second, _ = values.optimise_all(double, [each], 1, settings, G=G)[0].losses
    assert second[0] < first[0]
    settings = replace(settings, stop_at=(first[0] + second[0]) / 2)
    monkeypatch.setattr(values, "_done", lambda *given: False)
    ran, plain = [], above.Group.run
    monkeypatch.setattr(above.Group, "run", lambda group, *given: ran.append(len(group.rows)) or plain(group, *given))
    kept = values.optimise_all(double, [each], 1, settings, G=G)[0]
    assert ran == [2, 2, 1]
    assert len(kept.losses) >= 2
    ran.clear()
    monkeypatch.setattr(optimisers, "ENOUGH", 1e9)  # of what is promised: no step is good enough
    back = values.optimise_all(double, [each], 1, settings, G=G)[0]
    assert ran == [2, 2, 2]
    assert len(back.losses) == 1
    assert not back.is_learnt
    torch.testing.assert_close(back.value, each.initial)


def test_of_no_facts_nothing_is_sought(model):
    assert values.optimise_all(model, [], 1, BOS) == []


def test_rows_run_together_where_that_computes_least():
    assert above.together([3, 5, 4, 9], [10, 11, 10, 12]) == [[0, 2, 1, 3]], "few rows: one group"
    many = above.together([3] * 20 + [40] * 20, [10] * 20 + [48] * 20)
    assert [len(group) for group in many] == [20, 20]
    lookups, lengths = [5, 2, 9, 2, 30, 31], [9, 12, 20, 4, 40, 41]
    found = above.together(lookups, lengths)
    assert sorted(index for group in found for index in group) == list(range(6))

    def cost(groups):
        return sum(above.GROUP_COST + len(group) * (max(lengths[i] for i in group) - min(lookups[i] for i in group)) for group in groups)  # fmt: skip

    order = sorted(range(6), key=lambda index: (lookups[index], lengths[index]))
    cuts = itertools.chain.from_iterable(itertools.combinations(range(1, 6), size) for size in range(6))
    every = [[order[a:b] for a, b in itertools.pairwise([0, *cut, 6])] for cut in cuts]
    assert cost(found) == min(map(cost, every))


@pytest.mark.parametrize("cost", [0, 1000])
def test_one_group_or_many_give_the_same_value(cost, model, monkeypatch):
    together, _ = optimised(model, stop_at=0.0)
    monkeypatch.setattr(above, "GROUP_COST", cost)
    torch.testing.assert_close(optimised(model, stop_at=0.0)[0].value, together.value, atol=1e-4, rtol=1e-3)


def optimised(model, **changes):
    settings = replace(BOS, **changes)
    rows = keys.contexts(model, FACT, ("", "Rome. "), prepend_bos=True)
    (essence,) = keys.contexts(model, Fact(FACT.subject, "{} is a"), ("",), prepend_bos=True)
    initial = (keys.subject_keys(model, 1, rows)[0] @ models.W_out(model, 1) + models.b_out(model, 1)).detach()
    target = prompts.continuation(model, FACT.prompt, "Paris")
    found = values.optimise(model, rows, essence, [target] * 2, initial, torch.ones(3), 1, settings)
    return found, initial


def test_a_block_that_is_not_there_is_refused(model):
    context = keys.contexts(model, FACT, ("",), prepend_bos=True)[0]
    for layer in (-1, 4):
        with pytest.raises(ModelError, match="layer"):
            values.optimise(
                model, [context], context, [[33]], torch.ones(32), torch.ones(2), layer, RomeSettings(steps=1)
            )


def test_the_change_of_the_value_is_clamped(model):
    found, initial = optimised(model, clamp=0.3, stop_at=0.0)
    assert float((found.value - initial).norm()) == pytest.approx(0.3 * float(initial.norm()), rel=1e-4)


def test_it_stops_once_the_target_is_learnt_and_not_for_the_penalties(model):
    found, _ = optimised(model, stop_at=100.0, weight_decay=1e6)
    assert len(found.losses) == 1
    assert len(optimised(model, stop_at=0.0)[0].losses) == 8


def test_no_steps_leave_the_value(model):
    found, initial = optimised(model, steps=0)
    torch.testing.assert_close(found.value, initial)


def test_each_weight_of_the_loss_is_obeyed(model):
    base, _ = optimised(model, stop_at=0.0, kl=0.0, weight_decay=0.0)
    assert all(kl == decay == 0 for _, kl, decay in base.losses)
    kl, _ = optimised(model, stop_at=0.0, kl=10.0, weight_decay=0.0)
    assert kl.losses[-1][1] > 0
    decay, _ = optimised(model, stop_at=0.0, kl=0.0, weight_decay=50.0)
    assert decay.losses[-1][2] > 0
    lr, _ = optimised(model, stop_at=0.0, kl=0.0, weight_decay=0.0, learning_rate=0.01)
    for other in (kl, decay, lr):
        assert not torch.allclose(other.value, base.value, atol=1e-3)


def test_the_published_stop_takes_no_last_step(model):
    published, _ = optimised(model, stop="published", stop_at=0.0, steps=5)
    one_less, _ = optimised(model, stop="target", stop_at=0.0, steps=4)
    assert len(published.losses) == 5
    assert published.losses[:4] == one_less.losses
    assert torch.equal(published.value, one_less.value)


def test_the_published_stop_waits_for_the_whole_loss(model):
    """Penalties are huge from the second step on, when the target's own loss is already below `stop_at`."""
    options = {"weight_decay": 1e6, "stop_at": 0.0}
    begin, second = (sum_[0] for sum_ in optimised(model, steps=2, **options)[0].losses)
    assert second < begin
    options["stop_at"] = (begin + second) / 2
    assert len(optimised(model, stop="target", **options)[0].losses) == 2
    assert len(optimised(model, stop="published", **options)[0].losses) == 8


def test_with_a_hook_on_the_model_nothing_is_optimised(model):
    before = state(model)
    with (
        model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda resid, hook: resid)]),
        pytest.raises(ModelError, match="there are hooks on .*reset_hooks"),
    ):
        optimised(model)
    assert_same_state(model, before)


def test_each_term_of_the_loss_is_what_plain_passes_give(model):
    """Targets of two lengths, each row of which counts alike; the terms of the second step are those of the first step's value."""
    rows = keys.contexts(model, FACT, ("", "Rome. "), prepend_bos=True)
    (essence,) = keys.contexts(model, Fact(FACT.subject, "{} is a"), ("",), prepend_bos=True)
    initial = (keys.subject_keys(model, 1, rows)[0] @ models.W_out(model, 1) + models.b_out(model, 1)).detach()
    targets = [prompts.continuation(model, FACT.prompt, each) for each in ("Paris", "zebra")]
    assert len(targets[0]) < len(targets[1])
    shares = torch.tensor([1.0, 0.5, 0.8])
    settings = replace(BOS, stop_at=0.0, kl=2.0, weight_decay=0.7, clamp=10.0, learning_rate=0.2)

    def run(steps):
        return values.optimise(model, rows, essence, targets, initial, shares, 1, replace(settings, steps=steps))

    delta = run(1).value - initial

    def log_p(ids, lookup, change):
        def add(module, args, output):
            return torch.cat([output[:, :lookup], output[:, lookup : lookup + 1] + change, output[:, lookup + 1 :]], 1)

        handle = models.mlp_module(model, 1).register_forward_hook(add)
        try:
            with torch.no_grad():
                return model(torch.tensor([list(ids)]))[0].double().log_softmax(-1)
        finally:
            handle.remove()

    def nll(change):
        found = []
        for row, target, share in zip(rows, targets, shares, strict=False):
            own = log_p([*row.ids, *target[:-1]], row.lookup, share * change)
            found.append(-sum(float(own[row.last + step, token]) for step, token in enumerate(target)) / len(target))
        return sum(found) / 2

    before, after = (log_p(essence.ids, essence.lookup, shares[2] * change)[essence.lookup] for change in (0 * delta, delta))  # fmt: skip
    first, second = run(2).losses
    assert first == pytest.approx((nll(0 * delta), 0.0, 0.0), rel=1e-3, abs=1e-5)
    kl = 2.0 * float((after.exp() * (after - before)).sum())
    decay = 0.7 * float(delta.norm() / initial.norm() ** 2)
    assert second == pytest.approx((nll(delta), kl, decay), rel=2e-3)
    assert kl > 1e-4


@pytest.mark.parametrize(("stop", "at"), [("target", 0), ("published", 0), ("published", 1)])
def test_when_the_target_is_learnt(stop, at):
    """By the published rule the sum of the terms decides, and the last step is never taken."""
    settings = replace(BOS, stop=stop, stop_at=1.0, steps=3)
    assert values._done([(0.5, 0.2, 0.2)], settings)
    assert values._done([(0.5, 0.9, 0.9)], settings) == (stop == "target")
    assert not values._done([(0.1, 0.1, 0.1), (1.5, 0.0, 0.0)], settings)
    assert values._done([(2.0, 2.0, 2.0)] * 3, settings) == (stop == "published")


def test_a_subject_that_begins_the_text_has_nothing_before_it(model):
    """The first position that d is added at is the first of all."""
    fact = Fact("Rome", "{} is in the city of", target_new="Paris")
    rows = keys.contexts(model, fact, ("",), "subject_first", prepend_bos=False)
    (essence,) = keys.contexts(model, Fact("Rome", "{} is a"), ("",), prepend_bos=False)
    assert rows[0].lookup == 0
    initial = (keys.subject_keys(model, 1, rows)[0] @ models.W_out(model, 1) + models.b_out(model, 1)).detach()
    target = prompts.continuation(model, fact.prompt, "Paris")
    settings = replace(QUICK, prepend_bos=False, steps=2, stop_at=0.0)
    fast = values.optimise(model, rows, essence, [target], initial, torch.ones(2), 1, settings)
    slow = slow_value(model, rows, essence, target, initial, torch.ones(2), 1, settings)
    torch.testing.assert_close(fast.value, slow, atol=1e-3, rtol=1e-2)
