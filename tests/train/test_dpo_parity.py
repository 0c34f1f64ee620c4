"""DPO, cDPO, robust DPO and IPO beside TRL: the same tiny models and pairs, the same losses, gradients and metrics."""

from __future__ import annotations

import hugging_face
import pair_runs
import pytest
import tiny
import torch

from engine.config.stages import DpoConfig

# TRL's "sigmoid" leaves label_smoothing out; its "aot" of a single pair, where there is nothing to sort, is cDPO.
PAIRS, VOCAB = 12, tiny.VOCAB
CASES = {
    "dpo": ("sigmoid", {"loss": "dpo", "beta": 0.1}),
    "cdpo": ("aot", {"loss": "dpo", "beta": 0.5, "label_smoothing": 0.2}),
    "robust": ("robust", {"loss": "robust", "beta": 0.3, "label_smoothing": 0.1}),
    "ipo": ("ipo", {"loss": "ipo", "beta": 0.2}),
}


def trainer(policy, teacher, folder, loss_type: str, dpo: DpoConfig):
    """TRL's trainer around two models; its own data is one row that nobody reads."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    import tokenizers
    import transformers

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"t{i}": i for i in range(3, VOCAB)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>",
                                                     unk_token="<unk>")
    args = trl.DPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], loss_type=[loss_type],
                         beta=dpo.beta, label_smoothing=dpo.label_smoothing, activation_checkpointing=False)
    row = datasets.Dataset.from_list([{"prompt": "t3 t4", "chosen": "t5", "rejected": "t6"}])
    return trl.DPOTrainer(model=policy, ref_model=teacher, args=args, train_dataset=row, processing_class=tokenizer)


def theirs(policy, teacher, folder, pairs, loss_type: str, dpo: DpoConfig):
    """-> loss, gradients by TRL's name, metrics."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    built = trainer(policy, teacher, folder, loss_type, dpo)
    rows = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), pair, strict=True)) for pair in pairs]
    total = 0.0
    for batch in [[row] for row in rows] if loss_type == "aot" else [rows]:
        inputs = DataCollatorForPreference(pad_token_id=0)(batch)
        loss = built._compute_loss(built.model.train(), dict(inputs), False) * len(batch) / len(rows)
        loss.backward()
        total += loss.item()
    grads = {name: p.grad for name, p in policy.named_parameters()}
    return total, grads, {name: sum(values) / len(values) for name, values in built._metrics["train"].items()}


def run_of(cfg, pairs):
    """The engine's model and a loader that gives each pair once an epoch, each in a row of its own."""
    from engine.data.examples.pair_rows import PairLoader, UnsharedPairLoader

    tiny.forget_layout()
    run = tiny.start(cfg)
    kind = PairLoader if cfg.examples.prefix_sharing else UnsharedPairLoader
    run.data = kind([pair_runs.store(pairs)], [1.0], seq_length=cfg.model.seq_length, seed=1, pad_id=0, packed=False,
                    dp_rank=0, dp_size=1, num_workers=0)
    return run


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize("name", CASES)
def test_one_step_equals_trl(config, tmp_path, name, shared):
    from engine.model.preference import Preference
    from engine.train import step

    loss_type, section = CASES[name]
    dpo, pairs = DpoConfig(**section), pair_runs.examples(PAIRS)
    changes = {"model__seq_length": 48, "train__global_batch_size": PAIRS, "train__micro_batch_size": 4,
               "train__clip_grad": 0.0, "model__tie_embeddings": False, "examples__prefix_sharing": shared}
    teacher = run_of(config(seed=7, **changes), pairs)
    log_probs = pair_runs.reference_log_probs(teacher, teacher.data)
    teacher_model = hugging_face.model("Llama", tiny.whole_weights(teacher), teacher.cfg.model, vocab_size=VOCAB)
    run = run_of(config(**changes), pairs)
    run.data.set_reference(log_probs)
    policy = hugging_face.model("Llama", tiny.whole_weights(run), run.cfg.model, vocab_size=VOCAB)
    expected, grads, metrics = theirs(policy, teacher_model, tmp_path, pairs, loss_type, dpo)
    objective = Preference(dpo)
    result = step.run(run.cfg, run.chunks, run.optimizer, run.data, run.groups, run.state, objective)
    assert result.sums.tokens == PAIRS
    assert result.sums.loss == pytest.approx(expected, rel=1e-5)
    own = objective.metrics(result.sums)
    for metric in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
                   "logps/rejected"):
        assert own[metric] == pytest.approx(metrics[metric], rel=1e-5, abs=1e-5), metric
    assert 0 < own["rewards/accuracies"] < 1
    ours = hugging_face.state_dict(tiny.whole_weights(run, lambda p: p.main_grad), run.cfg.model)
    norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    for key, grad in grads.items():
        assert (ours[key][: len(grad)] - grad).norm() <= 1e-5 * grad.norm(), key
