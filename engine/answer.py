"""`mainspring answer --model … --prompts FILE --output DIR`: a model's answers, and the rates that gates are set on.

``--model`` is a run or checkpoint of the engine's, a Hugging Face directory (``--adapter``: with a PEFT adapter), or a
.gguf file. DIR/answers.jsonl has each prompt with its answer, DIR/result.json refusal_rate and the other shares.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from engine.errors import UserError

if TYPE_CHECKING:
    from engine.checkpoint.restore import Restored
    from engine.config.answer import AnswerConfig
    from engine.evaluation.answers import Answer, Messages


def main(argv: list[str]) -> int:
    """Writes both files and prints the shares. Returns the exit code."""
    from engine.config import parse
    from engine.config.answer import AnswerConfig

    options = parse(AnswerConfig, argv, prog="mainspring answer")

    from engine.evaluation import answers, refusal

    prompts = answers.read_prompts(options)
    with opened(options) as answer:
        found = [answer(prompt) for prompt in prompts]
    rows = [json.dumps({"prompt": prompt, "answer": each.text, "tokens": each.tokens, "ended": each.ended,
                        "refusal": refusal.is_refusal(each.text)}, ensure_ascii=False)
            for prompt, each in zip(prompts, found, strict=True)]
    result = {"model": str(options.model)} | answers.summary(found)
    text = json.dumps(result, indent=1)
    write(options, "\n".join(rows) + "\n", text + "\n")
    print(text)
    return 0


@contextlib.contextmanager
def opened(options: AnswerConfig) -> Iterator[Callable[[Messages], Answer]]:
    """The model, as a function from a prompt to its answer. Raises ``UserError``."""
    from engine.evaluation import answers

    if answers.is_exported(options.model):
        yield answers.exported(options)
        return
    if options.adapter is not None:
        raise UserError("goes over a Hugging Face directory, and this is none", where=f"adapter: {options.model}",
                        fix="Give the run of the lora stage itself as --model")
    from engine.checkpoint import restore
    from engine.stages.origin import load_base

    plan = restore.plan(options.model, device=options.device, precision=options.precision)
    with restore.load(plan, load_base=load_base) as restored:
        yield from_checkpoint(restored, options)


def from_checkpoint(restored: Restored, options: AnswerConfig) -> Callable[[Messages], Answer]:
    """Answers of a model of the engine's, on one rank, prompts rendered by the template that it was trained with."""
    from engine.evaluation.answers import Answer
    from engine.evaluation.generation import Sampling, generate

    tokenizer, sampling = restored.tokenizer, Sampling(
        max_new_tokens=options.max_new_tokens, temperature=options.temperature, top_p=options.top_p, seed=options.seed)
    encode, end = encoder(restored, chat=options.chat)

    def answer(messages: Messages) -> Answer:
        prompt = encode(messages)
        limit = min(options.max_new_tokens, restored.cfg.model.seq_length - len(prompt))
        added = generate(restored.chunks[0], prompt, sampling, eod_id=end, vocab_size=tokenizer.vocab_size)[0]
        return Answer(tokenizer.decode(added), len(added), len(added) < limit)

    return answer


def encoder(restored: Restored, *, chat: bool) -> tuple[Callable[[Messages], list[int]], int]:
    """From messages to token ids, and the token that ends an answer. Of a model that learned no template (``chat``
    false, or only pretrained) the contents as they are. Words that spell a special token stay words."""
    tokenizer, cfg = restored.tokenizer, restored.cfg
    if not chat or cfg.stage not in ("sft", "dpo", "lora"):
        return lambda messages: tokenizer.encode("\n".join(m["content"] for m in messages)), tokenizer.eod_id
    from engine.data.chat import templates
    from engine.data.chat.conversation import BadRow
    from engine.data.chat.encode import Encoder

    template = templates.load(cfg.examples.template, restored.path / "tokenizer", tokenizer)
    # With the system prompt that training put before conversations that have none.
    coder = Encoder(tokenizer, template, cfg.model.seq_length, system=cfg.examples.system)

    def encode(messages: Messages) -> list[int]:
        try:
            return coder.prompt(messages).tolist()
        except BadRow as error:
            raise UserError(str(error), where="prompt", fix="Use --no-chat, or mend the prompt") from error

    return encode, min(coder.end_ids, default=tokenizer.eod_id)


def write(options: AnswerConfig, rows: str, result: str) -> None:
    """Each file beside its place, then renamed; the rates last."""
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        for name, text in (("answers.jsonl", rows), ("result.json", result)):
            temporary = options.output / f"{name}.tmp"
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(options.output / name)
    except OSError as error:
        raise UserError(error.strerror or str(error), where=str(options.output),
                        fix="Choose another --output") from error


if __name__ == "__main__":
    from engine.runtime import command

    sys.exit(command(main, sys.argv[1:]))
