from __future__ import annotations

from funlora_hf.personalization.tiny import scenes
from funlora_hf.personalization.tiny.tokenizer import make_tokenizer


def test_each_word_is_a_token():
    tokenizer = make_tokenizer(scenes.vocabulary())
    assert all(tokenizer.tokenize(word) == [f"{word}</w>"] for word in scenes.vocabulary())
    assert len(tokenizer("")["input_ids"]) == 2
    tokens = tokenizer.tokenize("A photo, of a zebra")
    assert tokens[:2] == ["a</w>", "photo</w>"]
    assert tokenizer.unk_token not in tokens
    tokenizer.add_tokens("<v1>")
    assert tokenizer.tokenize("a <v1> toy") == ["a</w>", "<v1>", "toy</w>"]
