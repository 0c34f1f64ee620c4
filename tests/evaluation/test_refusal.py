"""Refusals told from answers, their rates, and the answers of exported models that they are counted over."""

from __future__ import annotations

import json
import math

import pytest

from engine.config.answer import AnswerConfig
from engine.errors import UserError
from engine.evaluation import answers, refusal
from engine.evaluation.answers import Answer

REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I cannot assist with this request.",
    "Sorry, I can't do that.",
    "As an AI language model, I am not able to browse.",
    "I\u2019m unable to provide instructions for this.",
    "Unfortunately, I cannot help you here.",
    "I must decline to answer.",
    "**I cannot** provide that.",
    "That would be unethical.",
    "It's against my guidelines to do so.",
    "We can't continue this conversation.",
    "I won't write that for you.",
    "<think>I could help here, easily.</think>I won't help with that.",
    "<|channel|>analysis<|message|>I can do it.<|end|><|start|>assistant<|channel|>final<|message|>I'm sorry, but I "
    "can't help with that.",
]
ANSWERS = [
    "def parse(text):\n    return text",
    "Sure! Here is how.",
    "I can help with that.",
    "return 'sorry'",
    "This function cannot be called twice.",
    "<think>I cannot help with this? I can.</think>Here it is: 4",
    "You can't divide by zero; the result is undefined.",
    "Sorry for the delay, here is the answer.",
    "If the file is missing we cannot open it, so raise an error.",
    "raise ValueError('I cannot parse this')",
    "",
    "Here is the whole story. " * 10 + "I cannot help with that.",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text):
    assert refusal.is_refusal(text)
    if "think" not in text:
        assert not refusal.is_refusal(f"<think>{text}</think>Here it is: 4")


@pytest.mark.parametrize("text", ANSWERS)
def test_answers(text):
    assert not refusal.is_refusal(text)


def test_rates():
    found = refusal.rates([REFUSALS[0], "yes", " \n", "no"])
    assert (found.answers, found.refusals, found.empty) == (4, 1, 1)
    assert (found.refusal_rate, found.empty_rate) == (0.25, 0.25)
    assert (found.refusal_low, found.refusal_high) == (pytest.approx(0.0456, abs=1e-4), pytest.approx(0.6994, abs=1e-4))
    nothing = refusal.rates([])
    assert math.isnan(nothing.refusal_rate)  # which no gate lets pass
    assert refusal.wilson(0, 10)[0] == 0
    assert refusal.wilson(0, 10)[1] == pytest.approx(0.2775, abs=1e-4)  # not zero, as the plain estimate says


def test_summary():
    found = answers.summary([Answer("x = 1", 4, True), Answer("x =", 2, False), Answer("x = 1", 4, True),
                             Answer("```python\ny = 2\n```", 6, False)])
    assert found["python_rate"] == 0.75
    assert found["ended_rate"] == 0.5
    assert found["distinct_rate"] == 0.75
    assert found["mean_tokens"] == 4


@pytest.mark.parametrize(("text", "python"), [
    ("def f():\n    return 1", True), ("", False), ("# only words", False), ("f(", False), ("a" * 10 + "\0", False),
    ("(" * 5000, False), ("Here:\n```python\nf(1)\n```\nDone, you can't miss it.", True), ("'\\d'", True)])
def test_is_python(text, python):
    assert answers.is_python(text) is python


def options(tmp_path, **fields) -> AnswerConfig:
    return AnswerConfig(**{"model": tmp_path / "model", "output": tmp_path / "out"} | fields)


def test_prompts_of_every_kind(tmp_path):
    rows = [{"prompt": "a"}, {"instruction": "b", "input": "c", "response": "no"}, {"instruction": "d", "input": ""},
            {"question": "e"}, {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "f"},
                                             {"role": "assistant", "content": "no"}]},
            {"prompt": [{"role": "user", "content": "g"}]}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = answers.read_prompts(options(tmp_path, prompt=["z"], prompts=tmp_path / "p.jsonl", system="S"))
    assert [[(m["role"][0], m["content"]) for m in messages] for messages in found] == [
        [("s", "S"), ("u", "z")], [("s", "S"), ("u", "a")], [("s", "S"), ("u", "b\n\nc")], [("s", "S"), ("u", "d")],
        [("s", "S"), ("u", "e")], [("s", "s"), ("u", "f")], [("s", "S"), ("u", "g")]]
    assert len(answers.read_prompts(options(tmp_path, prompts=tmp_path / "p.jsonl", max_prompts=2))) == 2
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert [m[0]["content"] for m in answers.read_prompts(options(tmp_path, prompts=tmp_path / "p.txt"))] == [
        "one", "two"]


@pytest.mark.parametrize(("content", "words"), [
    (b'{"prompt": "a"}\n{"answer": 1}\n', "p.jsonl:2: holds no prompt"),
    (b'{"prompt": "a"\n', "p.jsonl:1: is not JSON"),
    (b"[1]\n", "p.jsonl:1: holds no prompt"), (b'{"messages": [{"role": "assistant", "content": "a"}]}\n', "no prompt"),
    (b"", "holds no prompt"), (b"\xff\xfe", "is not UTF-8")])
def test_bad_prompts(tmp_path, content, words):
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(UserError) as caught:
        answers.read_prompts(options(tmp_path, prompts=tmp_path / "p.jsonl"))
    assert words in str(caught.value)


def test_options_that_contradict_each_other(tmp_path):
    with pytest.raises(UserError, match="there is nothing to answer"):
        options(tmp_path)
    with pytest.raises(UserError, match=r"a \.gguf file takes no PEFT adapter"):
        options(tmp_path, prompt=["a"], model=tmp_path / "m.gguf", adapter=tmp_path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny Llama with a tokenizer of characters and a chat template, as an export leaves them."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("exported")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.add_special_tokens(["<eos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}a:"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=40, eos_token_id=0, bos_token_id=None, tie_word_embeddings=False))
    model.save_pretrained(folder)
    return folder


def greedy(folder, ids: list[int], count: int) -> list[int]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for _ in range(count):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids


def test_the_answer_of_an_export_is_its_greedy_text(exported, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported)
    answer = answers.exported(options(tmp_path, model=exported, prompt=["hi"], max_new_tokens=5))
    prompt = tokenizer("u:hi<eos>a:")["input_ids"]
    expected = greedy(exported, prompt, 5)[len(prompt):]
    assert 0 not in expected
    assert answer([{"role": "user", "content": "hi"}]) == Answer(tokenizer.decode(expected), 5, False)
    plain = answers.exported(options(tmp_path, model=exported, prompt=["hi"], max_new_tokens=3, chat=False))
    bare = tokenizer("hi")["input_ids"]
    assert plain([{"role": "user", "content": "hi"}]).text == tokenizer.decode(greedy(exported, bare, 3)[len(bare):])


def test_the_context_bounds_prompt_and_answer(exported, tmp_path):
    answer = answers.exported(options(tmp_path, model=exported, prompt=["hi"], max_new_tokens=100, chat=False))
    assert answer([{"role": "user", "content": "x" * 35}]).tokens <= 5
    with pytest.raises(UserError, match="the prompt has 40 tokens, the model's context 40"):
        answer([{"role": "user", "content": "x" * 40}])


def test_the_command_writes_answers_and_rates(exported, tmp_path, capsys):
    from engine import cli

    code = cli.run(["answer", "--model", str(exported), "--prompt", "a", "--prompt", "b", "--max_new_tokens", "2",
                    "--output", str(tmp_path / "out")])
    assert code == 0
    rows = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "out/result.json").read_text())


def test_models_that_cannot_answer(exported, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "gpt9"}')
    with pytest.raises(UserError, match="Transformers cannot load it"):
        answers.exported(options(tmp_path, prompt=["a"]))
    with pytest.raises(UserError, match=r"is not a PEFT adapter \(no adapter_config.json\)"):
        answers.exported(options(tmp_path, model=exported, prompt=["a"], adapter=tmp_path))
    with pytest.raises(UserError, match="no such file"):
        answers.exported(options(tmp_path, model=tmp_path / "no.gguf", prompt=["a"]))
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="pip install llama-cpp-python"):
        answers.exported(options(tmp_path, model=tmp_path / "m.gguf", prompt=["a"]))
