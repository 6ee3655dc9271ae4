"""Reads exported settings with a trainer's own parser, and applies them with its own code; started by
test_other_trainers.py with the Python of that trainer's environment.

Usage: python settings_reader.py axolotl|llama-factory JOBS, where JOBS is a JSON list of {settings, out}: a YAML file
and the file for the answer, {trained: names, rates: learning rate by name} or {error}.
"""

import importlib.util
import json
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import transformers
import yaml


def axolotl(settings: dict) -> dict:
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.freeze import freeze_layers_except

    needed = {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 1e-4}
    needed |= {"datasets": [{"path": "x", "type": "alpaca"}], "gradient_checkpointing": True}
    read = validate_config(DictDefault({**needed, **settings}))
    if unknown := sorted(settings.keys() - read.keys()):  # the parser drops keys that it does not know
        raise ValueError(f"unknown keys: {unknown}")
    model = transformers.AutoModelForCausalLM.from_pretrained(read.base_model, dtype="float32")
    freeze_layers_except(model, read.unfrozen_parameters)
    arguments = {"lr_groups": read.lr_groups, "weight_decay": 0.0, "embedding_lr_scale": None, "embedding_lr": None}

    def decayed(model):
        return transformers.Trainer.get_decay_parameter_names(None, model)

    trainer = SimpleNamespace(args=SimpleNamespace(**arguments), get_decay_parameter_names=decayed)
    groups = mixin("axolotl", "core/trainers/mixins/optimizer.py").OptimizerMixin.create_optimizer_grouped_parameters(
        trainer, model, {"lr": read.learning_rate}
    )
    reentrant = read.gradient_checkpointing_kwargs["use_reentrant"]
    return answer(model, groups) | {"optimizer": read.optimizer, "reentrant": reentrant}


def mixin(package: str, path: str):
    """A module without the packages around it, which import all that a training needs."""
    folder = Path(importlib.util.find_spec(package).submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("mixin", folder / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def llama_factory(settings: dict) -> dict:
    from llamafactory.hparams import get_train_args
    from llamafactory.model.adapter import init_adapter
    from llamafactory.train.trainer_utils import create_custom_optimizer

    needed = {"stage": "pt", "do_train": True, "dataset": "x", "template": "default", "output_dir": "unused"}
    model_args, _, training_args, tuning_args, _ = get_train_args({**needed, **settings})  # refuses unknown keys
    model = transformers.AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, dtype="float32")
    model = init_adapter(model.config, model, model_args, tuning_args, is_trainable=True)
    made = create_custom_optimizer(model, training_args, tuning_args)
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": training_args.learning_rate}]
    return answer(model, groups if made is None else made.param_groups) | {
        "optimizer": type(made).__name__ if made else str(training_args.optim.value),
        "by_muon": sorted(n for n, p in model.named_parameters() if made and made.state[p].get("use_muon")),
    }


def answer(model, groups: list[dict]) -> dict:
    names = {id(p): name for name, p in model.named_parameters()}
    trained = sorted(name for name, p in model.named_parameters() if p.requires_grad)
    return {"trained": trained, "rates": {names[id(p)]: group["lr"] for group in groups for p in group["params"]}}


def main(trainer: str, jobs: Path) -> None:
    for job in json.loads(jobs.read_text()):
        try:
            settings = yaml.safe_load(Path(job["settings"]).read_text())
            found = {"axolotl": axolotl, "llama-factory": llama_factory}[trainer](settings)
        except Exception:  # whatever it is, it is the answer to these settings
            found = {"error": traceback.format_exc()}
        Path(job["out"]).write_text(json.dumps(found | {"transformers": transformers.__version__}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
