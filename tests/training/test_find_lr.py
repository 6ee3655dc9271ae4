"""The search for a learning rate: it keeps to its budget, leaves no trace, and what it suggests trains."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from grown import grow
from prose import WORDS
from support import load

from deus_merge import training
from deus_merge.core.errors import TrainingError
from deus_merge.training import lr_search
from deus_merge.training.lr_search import _choose


def ready(folder: Path):
    model = load(folder)
    training.freeze_base(model, folder)
    return model


def state_of(model) -> dict[str, torch.Tensor]:
    """Everything that a search could leave behind."""
    return {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(random.getstate()[1]),
        "numpy": torch.from_numpy(np.random.get_state()[1].astype(np.int64)),
        "modes": torch.tensor([module.training for module in model.modules()]),
        **{f"weight {name}": p.detach().clone() for name, p in model.named_parameters()},
        **{f"gradient {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    }


def drawn():
    """Batches of unequal sizes, the first the smallest, that take from every random number generator."""
    for number in itertools.count():
        rows = 1 + (number > 0) * (random.randrange(2) + np.random.randint(2))
        ids = torch.randint(3, 120, (rows, 16))
        yield {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("failing", [False, True])
def test_a_search_keeps_to_its_budget_and_leaves_no_trace(deeper, kind, failing):
    model = ready(deeper).eval()
    model.model.layers[2].train()
    next(p for p in model.parameters() if p.requires_grad).grad = torch.ones(1, 1).expand(32, 32).clone()
    before, seen = state_of(model), []

    def loss(model, batch):
        seen.append(batch["input_ids"].numel())
        assert model.training
        if failing and len(seen) == 60:
            raise KeyboardInterrupt
        return model(**batch).loss

    def search():
        return training.find_lr(model, deeper, drawn(), kind=kind, budget_tokens=8000, loss=loss, output_ratio=2.0)

    if failing:
        with pytest.raises(KeyboardInterrupt):
            search()
    else:
        found = search()
        assert found.tokens == sum(seen) <= 8000
        assert dict(found.finals).keys() <= dict(found.curve).keys() and len(found.curve) == 5 and len(found.ramp) > 10
        assert found.suggestion in dict(found.finals)
        assert f"suggested: {found.suggestion:.2e}" in str(found)
    after = state_of(model)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


# fmt: off
CHOICES = {  # losses of runs at rising rates, by step, and which is chosen
    "the lowest": ([[3.0, 3.1], [2.0, 2.1], [2.5, 2.6]], 1),
    "the lower of two that are alike": ([[3.0, 3.1], [2.0, 2.2], [2.1, 2.0]], 1),
    "a lower one that is surely worse": ([[3.0, 3.1], [2.1, 2.2], [2.0, 2.1]], 2),
    "a lower one that gains": ([[3.0, 2.9, 2.8, 2.7], [2.5, 2.4, 2.3, 2.2], [2.3, 2.25, 2.2, 2.15]], 1),
    "a lower one that gains too little": ([[2.5, 2.4, 2.3, 2.2], [2.3, 2.205, 2.11, 2.015]], 1),
    "a lower one that falls behind": ([[2.5, 2.4, 2.3, 2.2], [2.3, 2.1, 1.9, 1.7]], 1),
    "one step down at most": ([[2.0, 2.2], [2.0, 2.2], [2.1, 2.0]], 1),
    "between runs that diverged": ([None, [2.0, 2.1], None], 1),
    "the only one": ([[2.0, 2.1]], 0),
}
# fmt: on


@pytest.mark.parametrize("case", CHOICES)
def test_which_run_is_chosen(case):
    late, expected = CHOICES[case]
    rates = [10.0**i for i in range(len(late))]
    assert _choose(rates, late)[0] == rates[expected]
    with pytest.raises(TrainingError, match="diverge"):
        _choose(rates, [None] * len(rates))


# fmt: off
REFUSED = {
    "too small": ({"budget_tokens": 83 * 64}, r"5,376: 84 steps of 64 tokens"),
    "no batch": ({"batches": []}, "there is no batch"),
    "no labels": ({"batches": [{"input_ids": torch.ones(1, 8, dtype=torch.long)}]}, "computed no loss"),
    "not a batch": ({"batches": ["text"]}, "not a batch"),
    "a rate": ({"lr": 1e-5}, "rate that is searched for"),
    "a loss that is not a number": ({"loss": lambda model, batch: model(**batch).loss * math.nan}, "not a number"),
    "an optimizer": ({"kind": "sgd"}, "unknown optimizer"),
}
# fmt: on


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_rate_of_zeroed_tensors_stays(deeper, monkeypatch, kind):
    """While the others' rate is searched for: it is that of norms behind the outputs."""
    made, used = lr_search.optimizer, []

    def optimizer(*arguments, **settings):
        steps = made(*arguments, **settings)
        steps.register_step_pre_hook(
            lambda steps, *_: used.append({group["name"]: group["lr"] for group in steps.param_groups})
        )
        return steps

    monkeypatch.setattr(lr_search, "optimizer", optimizer)
    batches = [torch.arange(3, 35).reshape(2, 16)]
    training.find_lr(ready(deeper), deeper, batches, kind=kind, budget_tokens=84 * 32, zeroed_lr=2e-5)
    zeroed = [name for name in used[0] if name.startswith("zeroed")]
    assert zeroed and all(rates[name] == 2e-5 for rates in used for name in zeroed)
    assert len({rates["matrices"] for rates in used}) > 5


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, deeper):
    settings, message = REFUSED[case]
    settings = {"batches": [torch.ones(4, 16, dtype=torch.long)], **settings}
    model = ready(deeper)
    with pytest.raises(TrainingError, match=message):
        training.find_lr(model, deeper, settings.pop("batches"), **settings)


@pytest.mark.slow
def test_a_suggestion_trains_well_for_longer(tiny, tmp_path):
    """With Muon, which has AdamW in it, on text unlike the base's, beside rates that are trained for 100 steps: it does
    not diverge, and is near the best."""
    out = grow(tiny, tmp_path / "out", "copy_next")
    drawn = torch.randint(len(WORDS), (30_000,), generator=torch.Generator().manual_seed(0))
    text = " ".join(WORDS[word] for word in drawn)  # a fixed text: of another one, another rate is the best
    ids = torch.tensor(transformers.AutoTokenizer.from_pretrained(tiny)(text, verbose=False)["input_ids"][: 600 * 64])
    windows = ids.view(-1, 64)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    batches = [windows[part] for part in order.split(4)[:150]]  # (4, 64) each

    def final(lr: float) -> float:
        model = ready(out)
        optimizer = training.optimizer(model, out, kind="muon", lr=lr)
        losses = []
        for batch in batches[:100]:
            loss = model(input_ids=batch, labels=batch).loss
            losses.append(loss.item())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return sum(losses[-20:]) / 20

    found = training.find_lr(ready(out), out, batches, kind="muon", budget_tokens=50_000)
    grid = {lr: final(lr) for lr in (1e-3, 1e-2, 1e-1)}
    reached = final(found.suggestion)
    print(found, grid, reached)
    assert reached < found.untrained - 0.8 * (found.untrained - min(grid.values()))
