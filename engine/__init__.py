"""Mainspring: a Megatron-style training engine from a pip install.

The public API, each name loaded when it is first used, so that ``import engine`` takes no time:

    import engine

    engine.prepare(engine.PrepareConfig(input=["my_files"], output="data"))
    cfg = engine.load_config("my_run.yaml", {"train.max_steps": 100})
    state = engine.pretrain.run(cfg)                       # and midtrain, sft, dpo, lora
    with engine.restore(cfg.output_dir) as model:
        print(engine.generate.continuations(model, "def main(", max_new_tokens=40)[0])

Several processes: start the program with torchrun; every call is made on every rank.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from engine import dpo, evaluate, generate, lora, midtrain, pipeline, pretrain, report, sft
    from engine.checkpoint.restore import Restored
    from engine.checkpoint.restore import model as restore
    from engine.config import Config, load_config
    from engine.config.prepare import PrepareConfig
    from engine.data.prepare import prepare
    from engine.data.tokenizer import Tokenizer, load_tokenizer
    from engine.errors import UserError

__all__ = ["Config", "PrepareConfig", "Restored", "Tokenizer", "UserError", "dpo", "evaluate", "generate",
           "load_config", "load_tokenizer", "lora", "midtrain", "pipeline", "prepare", "pretrain", "report", "restore",
           "sft"]

# name: (module, attribute of it; None for the module itself: a driver with a `run`)
_PLACES = {
    "Config": ("engine.config", "Config"),
    "PrepareConfig": ("engine.config.prepare", "PrepareConfig"),
    "Restored": ("engine.checkpoint.restore", "Restored"),
    "Tokenizer": ("engine.data.tokenizer", "Tokenizer"),
    "UserError": ("engine.errors", "UserError"),
    "dpo": ("engine.dpo", None),
    "evaluate": ("engine.evaluate", None),
    "generate": ("engine.generate", None),
    "load_config": ("engine.config", "load_config"),
    "load_tokenizer": ("engine.data.tokenizer", "load_tokenizer"),
    "lora": ("engine.lora", None),
    "midtrain": ("engine.midtrain", None),
    "pipeline": ("engine.pipeline", None),
    "prepare": ("engine.data.prepare", "prepare"),
    "pretrain": ("engine.pretrain", None),
    "report": ("engine.report", None),
    "restore": ("engine.checkpoint.restore", "model"),
    "sft": ("engine.sft", None),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    module, attribute = _PLACES[name]
    loaded = importlib.import_module(module)
    return loaded if attribute is None else getattr(loaded, attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
