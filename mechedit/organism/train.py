"""Train the organism.  python -m mechedit.organism.train --out DIR

A small decoder (GPT-2's shape, or GPT-J's or Llama's) learns the world's corpus: rows of sentences behind one BOS, drawn with
equal probability. For the share `guided` of the steps, what stands behind a subject cannot read it below block `read_from`, and
from there on at its last token only, so that a fact has to be looked up there; experiments/localisation.md says what that does.

Deterministic on one machine; killed, it goes on from its last checkpoint and ends with the same weights. DIR becomes a folder in
Hugging Face's format, weights in float16, with the tokenizer, the training log and a model card.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit import files, models, provenance
from mechedit.cache import atomic_write
from mechedit.errors import MecheditError
from mechedit.organism.judge import judge, write_card
from mechedit.organism.world import World, WorldSettings, make
from mechedit.prompts import subject_span

__all__ = ["SHAPES", "TrainError", "TrainSettings", "rows", "tokenizer", "train"]

SHAPES = ("gpt2", "gptj", "llama")
BOS, EOS = "<s>", "</s>"
HIDDEN = -1e9  # an attention score that leaves nothing


class TrainError(MecheditError, ValueError):
    """A training run that cannot start or go on."""


@dataclass(frozen=True)
class TrainSettings:
    """How the organism is made."""

    seed: int = 0
    shape: str = "gpt2"
    layers: int = 8
    width: int = 192
    heads: int = 6
    vocabulary: int = 2048
    context: int = 64  # tokens in a row: BOS and about seven sentences
    batch: int = 64
    steps: int = 4000
    warmup: int = 200
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    guided: float = 0.75  # share of the steps in which attention to subjects is restricted
    read_from: int = 5  # the first block that may read a subject from behind it, in these steps
    autocast: bool = True  # bfloat16 products, float32 weights
    checkpoint_seconds: float = 120.0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise TrainError(f"shape must be one of {', '.join(SHAPES)}; found {self.shape!r}.")
        if not 0 <= self.guided <= 1:
            raise TrainError(f"guided must be a share from 0 to 1; found {self.guided}.")
        if self.width % self.heads:
            raise TrainError(f"width must be a multiple of heads; found {self.width} and {self.heads}.")


def tokenizer(world: World, vocabulary: int) -> Any:
    """A byte-level BPE tokenizer of the world's sentences, as Hugging Face's fast tokenizer.

    A text is read as if a space stood before it, so that a name has one spelling wherever it stands.
    """
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(BPE(unk_token=None))
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(world.sentences(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=EOS)


@dataclass(frozen=True)
class Sentence:
    """A sentence's tokens, and the range of them that is the subject of its fact, if it says one."""

    ids: list[int]
    subject: tuple[int, int] | None


def encoded(world: World, words: Any) -> list[Sentence]:
    """The taught sentences as tokens."""
    statements = list(world.statements())
    found = words([text for text, _ in statements], add_special_tokens=False, return_offsets_mapping=True)
    return [
        Sentence(ids, subject_span(offsets, *span) if span else None)
        for ids, offsets, (_, span) in zip(found["input_ids"], found["offset_mapping"], statements, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of tokens, and each subject in them as (row, begin, end)."""

    tokens: Int[Tensor, "rows pos"]
    subjects: list[tuple[int, int, int]]


def rows(sentences: Sequence[Sentence], settings: TrainSettings, step: int) -> Batch:
    """The batch of a step: each row is BOS and sentences drawn with equal probability, cut at the row's end."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    made, subjects = [], []
    for row in range(settings.batch):
        ids = [0]
        while len(ids) < settings.context + 1:
            sentence = sentences[int(torch.randint(len(sentences), (1,), generator=generator))]
            if sentence.subject is not None:
                begin, end = (len(ids) + each for each in sentence.subject)
                subjects.append((row, begin, end))
            ids += sentence.ids
        made.append(ids[: settings.context + 1])
    return Batch(torch.tensor(made), subjects)


def guides(batch: Batch, length: int) -> tuple[Float[Tensor, "rows 1 pos pos"], Float[Tensor, "rows 1 pos pos"]]:
    """What is added to attention scores below `read_from`, and from there on: subjects hidden from what stands behind them, wholly
    or all but their last token."""
    below = torch.ones(len(batch.tokens), length, length, dtype=torch.bool).tril()
    above = below.clone()
    for row, begin, end in batch.subjects:
        below[row, end:, begin:end] = False
        above[row, end:, begin : end - 1] = False
    first, second = (torch.zeros(each.shape).masked_fill_(~each, HIDDEN)[:, None] for each in (below, above))
    return first, second


@contextmanager
def guided(model: Any, batch: Batch, settings: TrainSettings) -> Iterator[None]:
    """Run the body with the restricted attention."""
    length = batch.tokens.shape[1] - 1
    masks = guides(batch, length)
    blocks = model.model.layers if settings.shape == "llama" else model.transformer.h
    handles = []
    for layer, block in enumerate(blocks):
        mask = masks[layer >= settings.read_from]
        attention = block.self_attn if settings.shape == "llama" else block.attn
        swap = partial(_with_mask, mask)
        handles.append(attention.register_forward_pre_hook(swap, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_mask(mask: Tensor, module: Any, positional: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if "attention_mask" not in named:
        raise TrainError(f"{type(module).__name__} takes no attention_mask by name in this version of transformers.")
    return positional, named | {"attention_mask": mask}


def network(settings: TrainSettings, vocabulary: int) -> Any:
    """The untrained model, its weights drawn from the seed."""
    import transformers

    common = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    positions = max(256, settings.context)
    if settings.shape == "gpt2":
        config: Any = transformers.GPT2Config(
            **common, n_embd=settings.width, n_layer=settings.layers, n_head=settings.heads, n_positions=positions,
            embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
        )  # fmt: skip
    elif settings.shape == "gptj":
        config = transformers.GPTJConfig(
            **common, n_embd=settings.width, n_layer=settings.layers, n_head=settings.heads, n_positions=positions,
            rotary_dim=settings.width // settings.heads // 2, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, tie_word_embeddings=False,
        )  # fmt: skip
    else:
        config = transformers.LlamaConfig(
            **common, hidden_size=settings.width, num_hidden_layers=settings.layers, num_attention_heads=settings.heads,
            num_key_value_heads=max(1, settings.heads // 2), intermediate_size=settings.width * 8 // 3 // 32 * 32, max_position_embeddings=positions,
        )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def _trim(model: Any, context: int) -> None:
    """Leave out the positions that no row of the training had, so that nobody reads what was never learnt."""
    model.config.max_position_embeddings = context
    if (positions := getattr(model.base_model, "wpe", None)) is not None:
        model.base_model.wpe = torch.nn.Embedding.from_pretrained(positions.weight[:context].detach(), freeze=False)


def rate(settings: TrainSettings, step: int) -> float:
    """The learning rate of a step: linear warm-up, then half a cosine down to a tenth."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    share = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, share))))


def command(settings: TrainSettings) -> str:
    """The command that trains with these settings."""
    changed = [each for each in fields(settings) if getattr(settings, each.name) != each.default]
    flags = [
        f" --{each.name.replace('_', '-')} {getattr(settings, each.name)}" for each in changed if each.type != "bool"
    ]
    flags += [f" --no-{each.name}" for each in changed if each.type == "bool"]
    return "python -m mechedit.organism.train --out DIR" + "".join(flags)


def train(settings: TrainSettings, folder: str | Path, world_settings: WorldSettings | None = None) -> Path:
    """Train, or go on training, and write the finished model; its folder. A finished folder is left as it is.

    Raises:
        TrainError: the folder's checkpoint or model is of other settings.
    """
    folder = Path(folder)
    world = make(world_settings or WorldSettings())
    how = {name: value for name, value in asdict(settings).items() if name != "checkpoint_seconds"}
    what = {"settings": how, "world": asdict(world.settings)}
    if _is_finished(folder, what):
        return folder
    words = tokenizer(world, settings.vocabulary)
    sentences = encoded(world, words)
    model = network(settings, len(words))
    groups = [{"params": [each for each in model.parameters() if (each.ndim > 1) == decayed], "weight_decay": settings.weight_decay * decayed} for decayed in (True, False)]  # fmt: skip
    adam = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))
    begin, log = _resume(folder, what, model, adam)
    saved = time.monotonic()
    for step in range(begin, settings.steps):
        log.append({"step": step, "loss": _step(model, adam, rows(sentences, settings, step), settings, step)})
        if step % 50 == 0:
            sys.stderr.write(f"step {step} of {settings.steps}: loss {log[-1]['loss']:.3f}\n")
        if time.monotonic() - saved > settings.checkpoint_seconds:
            _save(folder, what, model, adam, step + 1, log)
            saved = time.monotonic()
    _trim(model, settings.context)
    model.eval().half().save_pretrained(folder)
    words.save_pretrained(folder)
    with atomic_write(folder / "held_out.txt") as temporary:
        temporary.write_text(" ".join(world.corpus(60, "health")) + "\n", encoding="utf-8")
    record = what | {
        "digest": world.digest(),
        "entropy": world.entropy,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "command": command(settings),
        "versions": provenance.versions(),
        "log": log,
    }
    with atomic_write(folder / "training.json") as temporary:
        temporary.write_text(json.dumps(record) + "\n")
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    return folder


def _step(model: Any, adam: torch.optim.Optimizer, batch: Batch, settings: TrainSettings, step: int) -> float:
    """One step of training; the loss before it, in nats a token."""
    for group in adam.param_groups:
        group["lr"] = rate(settings, step)
    tokens = batch.tokens
    restricted = guided(model, batch, settings) if step < settings.guided * settings.steps else nullcontext()
    with restricted, torch.autocast("cpu", torch.bfloat16, enabled=settings.autocast):
        logits = model(tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    adam.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    adam.step()
    return float(loss.detach())


def _moments(model: Any, adam: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Adam's running means by name, made where Adam has none yet."""
    for name, parameter in model.named_parameters():
        state = adam.state[parameter]
        if not state:
            state.update(
                step=torch.tensor(0.0), exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter)
            )
        for key in ("step", "exp_avg", "exp_avg_sq"):
            yield f"{key}/{name}", state[key]


def _save(
    folder: Path, what: dict[str, Any], model: Any, adam: torch.optim.Optimizer, step: int, log: list[Any]
) -> None:
    tensors = {f"weight/{name}": parameter.clone() for name, parameter in model.named_parameters()}
    tensors |= {name: each.clone() for name, each in _moments(model, adam)}
    files.write(folder / "checkpoint.safetensors", "training", tensors, what | {"step": step, "log": log})


def _is_finished(folder: Path, what: dict[str, Any]) -> bool:
    """Whether the folder holds a model trained with these settings."""
    path = folder / "training.json"
    if not path.is_file():
        return False
    _check_same(path, json.loads(path.read_text(encoding="utf-8")), what)
    return True


def _check_same(path: Path, record: dict[str, Any], what: dict[str, Any]) -> None:
    for part, values in what.items():
        if other := sorted(name for name in values if record[part].get(name) != values[name]):
            raise TrainError(
                f"{path} was trained with other {part} ({', '.join(other)}); use the same, or another folder."
            )


@torch.no_grad()
def _resume(
    folder: Path, what: dict[str, Any], model: Any, adam: torch.optim.Optimizer
) -> tuple[int, list[dict[str, float]]]:
    """The next step and the log so far, weights and Adam's state put back; the beginning where there is no checkpoint."""
    path = folder / "checkpoint.safetensors"
    if not path.is_file():
        return 0, []
    tensors, record = files.read(path, "training")
    _check_same(path, record, what)
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[f"weight/{name}"])
    for name, each in _moments(model, adam):
        each.copy_(tensors[name])
    return record["step"], record["log"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mechedit.organism.train", description="Train the organism.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--threads", type=int, default=2)
    for each in fields(TrainSettings):
        flag, default = "--" + each.name.replace("_", "-"), each.default
        action: Any = (
            {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else {"type": type(default)}
        )
        parser.add_argument(flag, default=default, **action)
    arguments = vars(parser.parse_args(argv))
    torch.set_num_threads(arguments.pop("threads"))
    out = arguments.pop("out")
    try:
        folder = train(TrainSettings(**arguments), out)
        sys.stderr.write("trained; asking for every fact\n")
        world = make()
        write_card(folder, world, judge(models.load(str(folder), device="cpu"), world))
        sys.stderr.write(f"wrote {folder}\n")
    except MecheditError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
