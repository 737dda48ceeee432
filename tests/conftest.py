"""Tiny random models of several shapes, made the way a user's folder is: Hugging Face format, a fast tokenizer, `load`.

The same folders load as HookedTransformer on TransformerLens 3.9 and as TransformerBridge on 4.x, so every test that uses
them runs on both. Their weights are larger than usual, so that noise and edits move probabilities visibly.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from mechedit import guards, models, sources
from mechedit.facts import Fact
from mechedit.organism.world import World
from mechedit.runs.shards import Shards
from tests.browser import browser, opened  # noqa: F401 (fixtures)

pytest_plugins = ["pytester"]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
transformers.logging.disable_progress_bar()  # of saving tiny models, in what commands are seen to say

WORDS = (
    "The Space Needle is located in the city of Seattle. The Eiffel Tower is located in the city of Paris. "
    "Steve Jobs was the founder of Apple. Megan Rapinoe plays the sport of soccer. London Berlin Rome piano violin. "
)
COMMON = {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
LLAMA_LIKE = COMMON | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
}
GEMMA_LIKE = LLAMA_LIKE | {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 4,  # shorter than the prompts, so that it matters
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "gpt2": lambda: transformers.GPT2Config(
        **COMMON, n_embd=32, n_layer=4, n_head=4, n_positions=64, initializer_range=0.25
    ),
    "gptj": lambda: transformers.GPTJConfig(
        **COMMON,
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_positions=64,
        rotary_dim=4,
        initializer_range=0.25,
        tie_word_embeddings=False,
    ),
    "neox": lambda: transformers.GPTNeoXConfig(
        **COMMON,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.25,
    ),
    "llama": lambda: transformers.LlamaConfig(**LLAMA_LIKE),
    "qwen2": lambda: transformers.Qwen2Config(**LLAMA_LIKE),
    "gemma2": lambda: transformers.Gemma2Config(**GEMMA_LIKE),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GEMMA_LIKE),
}
FACT = Fact(
    "The Space Needle",
    "{} is located in the city of",
    target_true="Seattle",
    target_new="Paris",
    paraphrases=("The city of The Space Needle is",),
    neighbours=("The Eiffel Tower is located in the city of",),
)


def make_folder(folder: Path, shape: str) -> Path:
    """Write a random model of this shape, and a tokenizer, in Hugging Face's format."""
    return _write(folder, SHAPES[shape]())


def make_random_gpt2(folder: Path, layers: int, heads: int, width: int) -> Path:
    """Write a random model of GPT-2's shape at a size of its own, with its vocabulary's size, for benchmarks."""
    config = {"n_layer": layers, "n_head": heads, "n_embd": width, "vocab_size": 50257}
    return _write(folder, transformers.GPT2Config(**(COMMON | config)))


def _write(folder: Path, config: transformers.PretrainedConfig) -> Path:
    tokenizer = Tokenizer(BPE(unk_token=None))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [WORDS] * 4,
        BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False),
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model of a shape, made once."""
    made: dict[str, Path] = {}

    def get(shape: str) -> Path:
        if shape not in made:
            made[shape] = make_folder(tmp_path_factory.mktemp(shape), shape)
        return made[shape]

    return get


@pytest.fixture(scope="session")
def load(folder: Callable[[str], Path]) -> Callable[[str], models.HookedModel]:
    """A tiny hooked model of a shape, loaded once; `unchanged` guards the ones that tests use."""
    loaded: dict[str, models.HookedModel] = {}

    def get(shape: str) -> models.HookedModel:
        if shape not in loaded:
            loaded[shape] = models.load(str(folder(shape)), device="cpu")
            # A bridge's first run adds hooks of its own to Hugging Face's modules, and they stay.
            loaded[shape].run_with_cache(torch.tensor([[2, 3]]))
        return loaded[shape]

    return get


def state(model: models.HookedModel) -> tuple[dict[str, torch.Tensor], list[bool], int, int]:
    """Everything that must be as it was: weights, gradient flags, hooks of hook points, hooks of modules."""
    points = model.hook_dict.values()
    return (
        {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        [parameter.requires_grad for parameter in model.parameters()],
        sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in points),
        sum(len(module._forward_hooks) for module in model.modules()),
    )


def assert_same_state(model: models.HookedModel, before: tuple[dict[str, torch.Tensor], list[bool], int, int]) -> None:
    after = state(model)
    assert after[1:] == before[1:]
    assert all(torch.equal(after[0][name], weight) for name, weight in before[0].items())


@pytest.fixture
def model(load: Callable[[str], models.HookedModel]) -> models.HookedModel:
    """The tiny GPT-2, checked to come back as it was."""
    tiny = load("gpt2")
    before = state(tiny)
    yield tiny
    assert_same_state(tiny, before)


def kept_units(folder: Path) -> dict[str, bytes]:
    """The units of a run by name, each as the bytes of the file that it would be."""
    found = Shards(folder / "units")
    return {name: found.get(name) for name in found.names()}


def widen_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let edits be as large as random models need them, larger than any trained one does."""
    for name in ("relative_norm", "essence_kl", "perplexity_ratio"):
        monkeypatch.setitem(guards.BANDS, name, (0.0, 1e9, "nothing"))


@contextmanager
def unchecked() -> Iterator[None]:
    """Without the suite's checks of types, which users do not have, and which make what is long several times as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


@pytest.fixture(scope="module")
def as_users() -> Iterator[None]:
    """A module's tests without the suite's checks of types."""
    with unchecked():
        yield


def _unchecked(make: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(make)
    def made(*given: Any) -> Any:
        with unchecked():
            return make(*given)

    return made


# The organism's thousands of facts and questions are made once in a process.
World.__dict__["facts"].func = _unchecked(World.__dict__["facts"].func)
sources._of_the_world = _unchecked(sources._of_the_world)


@pytest.fixture(autouse=True)
def own_threads_and_seed() -> Iterator[None]:
    """What a test draws does not depend on those before it, nor on how many threads it runs; experiments set their own."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fact() -> Fact:
    return FACT


@pytest.fixture(autouse=True)
def own_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Each test has a cache of its own; those on real weights share the user's, where the converted model is."""
    if "real" not in request.keywords:
        monkeypatch.setenv("MECHEDIT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder with the published data sets, which are not part of the project."""
    found = Path(os.environ.get("MECHEDIT_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (found / "known_facts.json").is_file():
        pytest.skip(f"no published data in {found}; set MECHEDIT_DATA to the folder that has known_facts.json")
    return found
