"""Incremental text: characters in pieces, leading spaces, stop strings, byte fallback."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from paxattn.text import TextStream


def sentencepiece_like():
    """Decodes as the tokenizers of Llama 2 and Mistral do."""
    words = ["<unk>", *[f"<0x{i:02X}>" for i in range(256)], "▁Hello", "▁world", "▁!", "ab", "▁"]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer, {word: i for i, word in enumerate(words)}


TOKENIZER, IDS = sentencepiece_like()


def streamed(tokens, step=1, **options):
    stream = TextStream(TOKENIZER, **options)
    text = ""
    for i in range(0, len(tokens), step):
        text += stream.push(tokens[i : i + step], final=i + step >= len(tokens))[0]
    return text


def test_the_space_after_the_prompt_is_kept():
    new = [IDS["▁world"], IDS["▁!"]]
    assert streamed(new, prompt=[IDS["▁Hello"]]) == " world !"
    assert streamed(new) == "world !"


def test_a_character_in_pieces_comes_whole():
    pieces = [IDS[f"<0x{byte:02X}>"] for byte in "é€".encode()]
    stream = TextStream(TOKENIZER, prompt=[IDS["ab"]])
    assert [stream.push([p], final=False)[0] for p in pieces] == ["", "é", "", "", "€"]


def test_a_character_that_the_prompt_began():
    prompt, new = ([IDS[f"<0x{byte:02X}>"] for byte in part] for part in (b"\xe2\x82", b"\xac"))
    assert streamed(new, prompt=[IDS["ab"], *prompt]) == "€"


def test_special_tokens_leave_nothing_to_decode_again():
    tokenizer, _ = sentencepiece_like()
    tokenizer.add_special_tokens(["<end>"])
    end = tokenizer.token_to_id("<end>")
    stream = TextStream(tokenizer, prompt=[IDS["ab"]])
    assert stream.push([end] * 50, final=False) == ("", 50)
    assert len(stream._ids) == 1
    assert stream.push([IDS["▁world"]], final=True)[0] == " world"


@pytest.mark.parametrize("step", [1, 3])
def test_any_tokens_decode_without_error(step):
    rng = np.random.default_rng(0)
    for _ in range(200):
        tokens = [*rng.integers(1, len(IDS), 12).tolist(), IDS["ab"]]
        text = streamed(tokens, step, prompt=[IDS["ab"]])
        assert text.endswith("ab")


@pytest.mark.parametrize("step", [1, 2, 5])
def test_stop_strings_across_tokens(step):
    tokens = [IDS["ab"], IDS["▁Hello"], IDS["▁world"], IDS["ab"], IDS["ab"]]
    assert streamed(tokens, step, stop=["lo wor"]) == "ab Hel"
    stream = TextStream(TOKENIZER, stop=["lo wor", "zz"])
    used = [stream.push([token], final=False)[1] for token in tokens]
    assert used == [1, 1, 1, 0, 0]
    assert stream.stopped
