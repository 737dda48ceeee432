"""Train MEND's or KE's network for a model. The model is left as it is; a folder has everything.

    checkpoint.safetensors   network, the best so far, optimisers: where a run that was stopped goes on, to the same bits
    EDITOR.safetensors       the best network, once done
    training.json, training.png, training.svg    the log, and its curves

What a step draws depends on the seed and its number alone. Files are written whole or not at all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from mechedit import figures, files, models, provenance
from mechedit.cache import atomic_write, plain
from mechedit.corruption import generator
from mechedit.editors.trained import state as states
from mechedit.editors.trained.data import Case, Data, TrainingError, drawn, some
from mechedit.editors.trained.objective import Losses, Multiplier, losses, observe
from mechedit.editors.trained.state import Trained
from mechedit.models import Blocks, HookedModel
from mechedit.progress import Progress, silent
from mechedit.settings import TRAINING, KeTraining, MendTraining, TrainingSettings

__all__ = ["KIND", "train"]

KIND = "editor-training"
OBSERVED = 1000  # edits that the statistics of MEND's paper are of, at most
TOGETHER = 20  # of them, and of a validation's, at once


def train(
    model: HookedModel,
    editor: str,
    data: Data,
    folder: str | Path,
    settings: TrainingSettings,
    *,
    progress: Progress = silent,
) -> Path:
    """Train, or go on training, and write the network; its file. What is finished is left as it is.

    Raises:
        TrainingError: the folder is of another training, or no validation gave a number.
        EditError, ModelError: the model has no such weights, or there are hooks on it.
    """
    models.check_plain(model)
    folder, trained = Path(folder), states.new(model, editor, settings)
    trained = replace(trained, subjects=states.subject_ids(sorted({each.subject for each in data.train})))
    what = trained.record | {"data": data.key}
    finished = folder / f"{editor}.safetensors"
    if others := [each for each in TRAINING if each != editor and (folder / f"{each}.safetensors").is_file()]:
        raise TrainingError(f"{folder} has what was trained for the editor {others[0]}; use another folder.")
    if finished.is_file():
        _check_same(
            finished, files.described(finished, states.KIND)[1], trained.record | {"training": {"data": data.key}}
        )
        return finished
    with models.alone(model), models.frozen(model):
        run = _Run.begun(model, trained, data)
        run.resume(folder / "checkpoint.safetensors", what)
        while not run.is_done:
            progress("training", run.step, run.settings.steps)
            run.take_step()
            if run.step % run.settings.validate_every == 0 or run.step == run.settings.steps:
                run.validate()
            if run.step % run.settings.checkpoint_every == 0 or run.is_done:
                run.save(folder / "checkpoint.safetensors", what)
    progress("training", run.settings.steps, run.settings.steps)
    return run.finish(folder, finished, data.key)


def _check_same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise where a file of a training is of another."""
    for part in ("editor", "model", "weights"):
        if found.get(part) != wanted[part]:
            raise TrainingError(f"{path} is of another {part}; use another folder.")
    own, other = wanted["settings"], found.get("settings", {})
    if names := sorted(name for name in own if own[name] != other.get(name) and name != "checkpoint_every"):
        raise TrainingError(f"{path} was trained with another {', '.join(names)}; use the same, or another folder.")
    if found.get("data", found.get("training", {}).get("data")) != wanted.get("data", wanted["training"].get("data")):
        raise TrainingError(f"{path} was trained on other data; use another folder.")


@dataclass(eq=False)
class _Run:
    """A training as it stands."""

    model: HookedModel
    trained: Trained
    data: Data
    blocks: Blocks
    multiplier: Multiplier
    optimisers: list[torch.optim.Optimizer]
    best: dict[str, Tensor]
    step: int = 0
    best_step: int = 0
    best_score: float = math.inf
    skipped: int = 0
    log: list[dict[str, float]] = field(default_factory=list)
    recent: list[list[float]] = field(default_factory=list)  # of the steps since the last validation

    @classmethod
    def begun(cls, model: HookedModel, trained: Trained, data: Data) -> _Run:
        multiplier = Multiplier(trained.settings).to(models.device_of(model))
        run = cls(model, trained, data, Blocks(model), multiplier, _optimisers(trained, multiplier), {})
        run.best = run._network()
        return run

    @property
    def settings(self) -> TrainingSettings:
        return self.trained.settings

    @property
    def is_done(self) -> bool:
        """Whether all steps are taken, or no validation was better for too long."""
        return self.step >= self.settings.steps or self.step - self.best_step > self.settings.patience

    def resume(self, path: Path, what: dict[str, Any]) -> None:
        """Go on from the checkpoint, if there is one; else see what the statistics are of."""
        if not path.is_file():
            if self.settings.form == "paper":
                self._observe()
                self.best = self._network()
            return
        tensors, record = files.read(path, KIND)
        _check_same(path, record["what"], what)
        self._take(tensors)
        for name in ("step", "best_step", "best_score", "skipped", "log", "recent"):
            setattr(self, name, math.inf if record[name] is None else record[name])

    def _observe(self) -> None:
        stream = generator(self.settings.seed, "statistics")
        examples = some(self.data, min(OBSERVED, len(self.data.train)), stream)
        cases = list(drawn(self.data, examples, self.settings, stream))
        observe(self.model, self.trained, _parts(cases, TOGETHER), self.blocks)

    def take_step(self) -> None:
        """One step on freshly drawn cases; one whose gradient is no number is left out."""
        settings = self.settings
        stream = generator(settings.seed, "step", str(self.step))
        cases = list(drawn(self.data, some(self.data, settings.batch, stream), settings, stream))
        parameters = [each for own in self._groups() for each in own["params"]]
        totals = [torch.zeros_like(each) for each in parameters]
        sums = [0.0, 0.0, 0.0]
        for part in _parts(cases, settings.together or settings.batch):
            with torch.enable_grad():
                found = losses(self.model, self.trained, part, self.blocks, training=True)
                loss = self.multiplier(found.edit, found.locality) * (len(part) / len(cases))
            for total, each in zip(totals, torch.autograd.grad(loss, parameters), strict=True):
                total += each
            sums = [a + float(b) for a, b in zip(sums, _sums(found), strict=True)]
        norm = float(torch.stack([each.norm() for each in totals]).norm())
        if math.isfinite(norm):
            self._descend(parameters, totals, min(1.0, settings.clip / (norm + 1e-6)))
        else:
            self.skipped += 1
        self.step += 1
        self.recent.append([each / len(cases) for each in sums])

    def _groups(self) -> list[dict[str, Any]]:
        return self.optimisers[0].param_groups

    def _descend(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], factor: float) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient * factor
        share = _share(self.settings, self.step)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["highest"] * share
            optimiser.step()
        for parameter in parameters:
            parameter.grad = None
        self.multiplier.settle()

    @torch.no_grad()
    def validate(self) -> None:
        """Note how it does on the examples for validation, and keep the best network."""
        stream = generator(self.settings.seed, "validation")
        cases = list(drawn(self.data, self.data.validation, self.settings, stream))
        sums = [0.0, 0.0, 0.0]
        for part in _parts(cases, TOGETHER):
            found = losses(self.model, self.trained, part, self.blocks, training=False)
            sums = [a + b for a, b in zip(sums, _sums(found), strict=True)]
        edit, locality, success = (each / len(cases) for each in sums)
        self.multiplier.validated(success)
        total = self.settings.edit_weight * edit + self.settings.locality_weight * locality
        score = total if not self.multiplier.constrained else -success
        if score < self.best_score:
            self.best_score, self.best_step, self.best = score, self.step, self._network()
        seen = [sum(column) / len(self.recent) for column in zip(*self.recent, strict=True)]
        names = ("edit", "locality", "success")
        self.log.append(
            {"step": self.step, "edit": edit, "locality": locality, "success": success, "loss": total}
            | {f"training_{name}": value for name, value in zip(names, seen, strict=True)}
            | ({"alpha": float(self.multiplier.alpha), "margin": float(self.multiplier.margin)} if self.multiplier.constrained else {})
        )  # fmt: skip
        self.recent = []

    def _network(self) -> dict[str, Tensor]:
        return {name: each.detach().clone() for name, each in self.trained.network.state_dict().items()}

    def save(self, path: Path, what: dict[str, Any]) -> None:
        """Write where it stands."""
        tensors = {f"best/{name}": each for name, each in self.best.items()}
        tensors |= {f"network/{name}": each for name, each in self.trained.network.state_dict().items()}
        tensors |= {f"multiplier/{name}": each for name, each in self.multiplier.state_dict().items()}
        for number, optimiser in enumerate(self.optimisers):
            for index, own in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser/{number}/{index}/{name}": each for name, each in own.items()}
        names = ("step", "best_step", "best_score", "skipped", "log", "recent")
        record = {"what": what} | {name: getattr(self, name) for name in names}
        files.write(path, KIND, {name: each.contiguous() for name, each in tensors.items()}, plain(record))

    def _take(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `save` wrote."""
        self.best = _under("best/", tensors)
        self.trained.network.load_state_dict(_under("network/", tensors))
        self.multiplier.load_state_dict(_under("multiplier/", tensors))
        for number, optimiser in enumerate(self.optimisers):
            now = optimiser.state_dict()
            for name, each in _under(f"optimiser/{number}/", tensors).items():
                index, _, key = name.partition("/")
                now["state"].setdefault(int(index), {})[key] = each
            optimiser.load_state_dict(now)

    def finish(self, folder: Path, path: Path, data: str) -> Path:
        """Write the best network, the log and its curves."""
        if not self.best_step:
            raise TrainingError(
                "no validation gave a number. Lower learning_rate or edit_rate, and use another folder."
            )
        best = next(each for each in self.log if each["step"] == self.best_step)
        training = {"data": data, "report": self.data.report, "steps": self.step, "skipped": self.skipped, "best": best}
        self.trained.network.load_state_dict(self.best)
        made = replace(self.trained, record=self.trained.record | {"training": training})
        log = made.record | {"versions": provenance.versions(), "log": self.log}
        with atomic_write(folder / "training.json") as temporary:
            temporary.write_text(json.dumps(plain(log), indent=1) + "\n", encoding="utf-8")
        figures.write(figures.training_curves(self.log, f"{made.record['editor'].upper()} on {made.record['model']['name']}"), folder / "training")  # fmt: skip
        made.save(path)
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)
        return path


def _under(prefix: str, tensors: dict[str, Shaped[Tensor, ...]]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}


def _parts(cases: Sequence[Case], n: int) -> Iterator[Sequence[Case]]:
    for begin in range(0, len(cases), n):
        yield cases[begin : begin + n]


def _sums(found: Losses) -> list[float]:
    return [float(each.detach().sum()) for each in (found.edit, found.locality, found.says)]


def _share(settings: TrainingSettings, step: int) -> float:
    """What of the learning rates a step has."""
    if not settings.warmup:
        return 1.0
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    return (settings.steps - step) / max(1, settings.steps - settings.warmup)


def _optimisers(trained: Trained, multiplier: Multiplier) -> list[torch.optim.Optimizer]:
    """Adam; RMSprop for KE's paper. As published, MEND's edit rates are in Adam with the rest, and in one of their own.

    The first has every parameter.
    """
    settings, network = trained.settings, trained.network
    rates = [each for name, each in network.named_parameters() if name == "rates"]
    rest = [each for name, each in network.named_parameters() if name != "rates"]
    if isinstance(settings, MendTraining):
        slow = {"params": rest, "lr": settings.learning_rate}
        own = {"params": rates, "lr": settings.rate_learning_rate}
        if settings.form == "paper":
            found = [torch.optim.Adam([slow, own])]
        else:
            found = [torch.optim.Adam([slow | {"params": rest + rates}]), torch.optim.Adam([own])]
    elif settings.form == "paper":
        assert isinstance(settings, KeTraining)
        up = {"params": [multiplier.alpha], "lr": settings.alpha_learning_rate}
        return _noted([torch.optim.RMSprop([{"params": rest, "lr": settings.learning_rate}, up], centered=True)])
    else:
        found = [torch.optim.Adam(rest, lr=settings.learning_rate)]
    return _noted(found)


def _noted(optimisers: Sequence[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    """With each group's rate, of which a step has a share."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["highest"] = group["lr"]
    return list(optimisers)
