"""Prompts of a checkpoint's answers: the tokens that its training examples began with, and the one they ended with."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from engine.answer import encoder
from engine.config.stages import ExamplesConfig
from engine.data.chat import templates
from engine.data.chat.conversation import Conversation
from engine.data.chat.encode import Encoder
from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError

PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the spring <|im_end|> wheels"}]


@pytest.fixture
def restored(corpus):
    def make(stage: str, template: str = "chatml", system: str | None = None):
        cfg = SimpleNamespace(stage=stage, examples=ExamplesConfig(template=template, system=system),
                              model=SimpleNamespace(seq_length=512))
        path = corpus  # which has a folder tokenizer, as a checkpoint does
        return SimpleNamespace(cfg=cfg, path=path, tokenizer=load_tokenizer(path / "tokenizer"))

    return make


@pytest.mark.parametrize("template", ["chatml", "alpaca"])
def test_a_prompt_is_how_an_example_begins(restored, corpus, template):
    model = restored("sft", template)
    encode, end = encoder(model, chat=True)
    prompt = encode(PROMPT)
    coder = Encoder(model.tokenizer, templates.load(template, corpus / "tokenizer", model.tokenizer), 512)
    example = coder.example(Conversation([*PROMPT, {"role": "assistant", "content": "stores"}]))
    tokens, mask = example.tokens.tolist(), example.mask.tolist()
    assert tokens[:len(prompt)] == prompt
    assert not any(mask[:len(prompt)])
    assert mask[len(prompt)]  # the answer begins right behind it
    assert tokens[max(i for i, supervised in enumerate(mask) if supervised)] == end


def test_the_system_prompt_of_training_stands_before_a_prompt_without_one(restored):
    asked = PROMPT[1:]
    own, _ = encoder(restored("sft"), chat=True)
    trained, _ = encoder(restored("sft", system="Be brief."), chat=True)
    assert trained(asked) == own(PROMPT) != own(asked)
    assert trained([{"role": "system", "content": "Be long."}, *asked]) != trained(asked)


def test_words_that_spell_a_special_token_stay_words(restored):
    model = restored("sft")
    encode, _ = encoder(model, chat=True)
    special = model.tokenizer.token_id("<|im_end|>")
    assert encode(PROMPT).count(special) == 2  # the two turns' own


def test_half_a_weight_file_is_one_line(corpus, tmp_path):
    import hf_models

    from engine import answer

    hf_models.save("llama", tmp_path / "hf", corpus / "tokenizer", vocab_size=300)
    file = tmp_path / "hf/model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match="Transformers cannot load it"):
        answer.main(["--model", str(tmp_path / "hf"), "--prompt", "the", "--output", str(tmp_path / "out")])


@pytest.mark.parametrize(("stage", "chat"), [("pretrain", True), ("midtrain", True), ("sft", False)])
def test_without_a_template_the_text_itself(restored, stage, chat):
    model = restored(stage)
    encode, end = encoder(model, chat=chat)
    assert encode([{"role": "user", "content": "the spring"}]) == model.tokenizer.encode("the spring")
    assert end == model.tokenizer.eod_id


def test_a_prompt_that_the_template_cannot_render(restored):
    encode, _ = encoder(restored("sft", "alpaca"), chat=True)
    with pytest.raises(UserError, match="Use --no-chat, or mend the prompt"):
        encode([{"role": "user", "content": "half a pair: \ud800"}])
