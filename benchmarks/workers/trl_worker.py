"""TRL's side of bench_post: ``SFTTrainer`` or ``DPOTrainer`` as a user starts them, paused between two steps.

The trainer trains in a thread of its own; ``step`` lets it do one optimizer step, its data loader and logging included.
"""

from __future__ import annotations

import importlib
import json
import threading
from pathlib import Path
from typing import Any

from benchmarks.workers.protocol import Step, serve


def build(config: dict) -> tuple[Step, dict]:
    """``config``: see bench_post.worker_config."""
    import torch

    torch.set_num_threads(config["threads"])
    torch.manual_seed(config["seed"])
    gate = _gate()
    trainer = _trainer(config, gate)
    tokens = _tokens(trainer, config)
    threading.Thread(target=_train, args=(trainer, gate), daemon=True).start()

    def step(_index: int) -> float:
        return gate.let_one_pass()

    parameters = sum(p.numel() for p in trainer.model.parameters())
    return step, {"parameters": parameters, "examples_per_step": config["batch_size"], "tokens_per_step": tokens}


def _train(trainer: Any, gate: Any) -> None:
    try:
        trainer.train()
    except BaseException as error:  # raised in the main thread, which waits
        gate.fail(error)


def _gate() -> Any:
    """A callback of Trainer's that waits before each step until it may, and says when the step is over."""
    from transformers import TrainerCallback

    class Gate(TrainerCallback):
        def __init__(self):
            self.may, self.done = threading.Semaphore(0), threading.Semaphore(0)
            self.loss, self.error = float("nan"), None

        def on_step_begin(self, args, state, control, **kwargs):
            self.may.acquire()

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.loss = float((logs or {}).get("loss", self.loss))

        def on_step_end(self, args, state, control, **kwargs):
            self.done.release()

        def fail(self, error):
            self.error = error
            self.done.release()

        def let_one_pass(self):
            """The loss that was logged last: that of the step before, for Trainer logs after a step's end."""
            self.may.release()
            self.done.acquire()
            if self.error is not None:
                raise self.error
            return self.loss

    return Gate()


def _trainer(config: dict, gate: Any) -> Any:
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trl: Any = importlib.import_module("trl")  # its names are loaded when they are asked for
    tokenizer = AutoTokenizer.from_pretrained(config["model_dir"])
    dtype = "bfloat16" if config["precision"] == "pure" else "float32"
    model = AutoModelForCausalLM.from_pretrained(config["model_dir"], dtype=dtype, attn_implementation="sdpa")
    rows = [json.loads(line) for line in Path(config["data"]).read_text(encoding="utf-8").splitlines()]
    data = datasets.Dataset.from_list([{name: row[name] for name in config["fields"]} for row in rows])
    common: dict[str, Any] = {
        "output_dir": config["scratch"], "per_device_train_batch_size": config["micro_batch_size"],
        "gradient_accumulation_steps": config["batch_size"] // config["micro_batch_size"],
        "max_steps": config["max_steps"], "learning_rate": config["lr"], "lr_scheduler_type": "constant",
        "weight_decay": config["weight_decay"], "max_grad_norm": config["clip_grad"], "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": config["device"] == "cpu", "seed": config["seed"],
        "bf16": config["precision"] == "autocast", "max_length": config["seq_length"], "disable_tqdm": True,
        "gradient_checkpointing": False, "dataset_num_proc": None, "dataloader_pin_memory": False}
    if config["task"] == "sft":
        args = trl.SFTConfig(**common, packing=config["packing"], completion_only_loss=True)
        return trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[gate])
    args = trl.DPOConfig(**common, beta=config["beta"], precompute_ref_log_probs=False)
    return trl.DPOTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[gate])


def _tokens(trainer: Any, config: dict) -> float:
    """Tokens of a step's examples, padding left out: the mean over the dataset as the trainer tokenized it."""
    rows = trainer.train_dataset
    names = [name for name in rows.column_names if name.endswith("_ids")]
    total = sum(len(row) for name in names for row in rows[name])
    return config["batch_size"] * total / len(rows)


if __name__ == "__main__":
    serve(build)
