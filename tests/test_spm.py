"""Tokenizers from SentencePiece models, over combinations of the files beside them: equal to transformers' and
SentencePiece's own."""

import io
import json
import re
from itertools import product

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from jaxinfer.tokenizer import encode, load_tokenizer, notes

TOKENS = ("<|im_start|>", "<|im_end|>")
TEXTS = [
    "Hello world",
    " Hello",
    "  two spaces first",
    "a <|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nhi<|im_end|>",
    "fox</s>USER: x",
    "fox </s> USER",
    "<s>USER",
    "x<|im_start|>y",
    "x  <|im_end|>  y",
    "<|im_start|><|im_end|>",
    "",
    " ",
    "a b ",
    "the fox<|im_end|>the <s>the",
    "naïve ﬁ ½",
]
SAMPLE = ["a small fox lived in the wood", "Hello  world", "the user\nand\n\nthe assistant", "naïve café ﬁ ½ USER: x"]
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
MODELS = {
    "bpe": PLAIN,
    "no space before": PLAIN | {"add_dummy_prefix": False},
    "normalizing": {},
    "unigram": PLAIN | {"model_type": "unigram"},
}


@pytest.fixture(scope="module")
def trained():
    models = {}
    for name, options in MODELS.items():
        model = io.BytesIO()
        options = {"model_type": "bpe", "vocab_size": 330, "byte_fallback": True, "hard_vocab_limit": False} | options
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SAMPLE * 20), model_writer=model, minloglevel=2, num_threads=1, **options
        )
        models[name] = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return models


BASE = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}


def write(folder, reference, config, added=None, named=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(reference.serialized_model_proto())
    files = {"tokenizer_config": BASE | config, "added_tokens": added, "special_tokens_map": named}
    for name, content in files.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def flagged(content, **flags):
    flags = {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False} | flags
    return {"content": content, **flags}


def numbered(reference, special, **flags):
    start = reference.get_piece_size()
    return {str(start + i): flagged(token, **flags) | {"special": special} for i, token in enumerate(TOKENS)}


def by_sentencepiece(reference, text):
    """With every text between two special tokens split as one of its own."""
    ids = {"<s>": 1, "</s>": 2} | {token: reference.get_piece_size() + i for i, token in enumerate(TOKENS)}
    parts = re.split("(" + "|".join(map(re.escape, ids)) + ")", text)
    return [1, *(token for part in parts if part for token in ([ids[part]] if part in ids else reference.encode(part)))]


def same_in_all_versions(text, legacy):
    # transformers 5 drops a space at the beginning of a legacy text
    return legacy is False or not re.search(r"(^|>) ", text)


FILES = ("added_tokens.json", "tokenizer_config.json", "special_tokens_map.json")
FLAGS = ({}, {"normalized": True}, {"single_word": True}, {"lstrip": True}, {"rstrip": True})
PLACES = [(FILES[0], True, {}), (FILES[0], False, {}), *product(FILES[1:2], (True, False), FLAGS)]
PLACES += list(product(FILES[2:], (True,), FLAGS))


@pytest.mark.parametrize("where,special,flags", PLACES)
def test_added_tokens_are_found_as_by_transformers(trained, tmp_path, where, special, flags):
    from transformers import LlamaTokenizer

    reference = trained["bpe"]
    added = numbered(reference, special, **flags)
    contents = {token["content"]: int(place) for place, token in added.items()}
    for legacy, prefixed in product((True, False, None), (True, False, None)):
        config = {} if legacy is None else {"legacy": legacy}
        config |= {} if prefixed is None else {"add_prefix_space": prefixed}
        ours = tmp_path / f"{legacy}-{prefixed}"
        if where == "tokenizer_config.json":
            write(ours / "tokenizer", reference, config | {"added_tokens_decoder": added})
        elif where == "special_tokens_map.json":
            named = {"additional_special_tokens": [flagged(token, **flags) for token in TOKENS]}
            write(ours / "tokenizer", reference, config, named=named)
        else:
            named = {"additional_special_tokens": list(TOKENS)} if special else None
            write(ours / "tokenizer", reference, config, added=contents, named=named)
        # where it stands makes no difference; transformers 5 does not find those of special_tokens_map.json
        config |= {"legacy": legacy is not False, "added_tokens_decoder": added}
        theirs = LlamaTokenizer.from_pretrained(write(ours / "hf", reference, config), local_files_only=True)
        tokenizer = load_tokenizer(ours)
        for text in TEXTS:
            if same_in_all_versions(text, legacy):
                assert encode(tokenizer, text) == theirs.encode(text), (text, legacy, prefixed)
            elif prefixed is not False and not {"single_word", "lstrip", "rstrip"} & flags.keys():
                assert encode(tokenizer, text) == by_sentencepiece(reference, text), (text, legacy, prefixed)


@pytest.mark.parametrize("name", MODELS)
def test_texts_between_special_tokens(trained, tmp_path, name):
    """Split as by SentencePiece unless legacy is false, whatever transformers makes of the model's normalizer."""
    reference = trained[name]
    for legacy in (True, None):
        config = {"added_tokens_decoder": numbered(reference, True)} | ({"legacy": legacy} if legacy else {})
        folder = tmp_path / str(legacy)
        write(folder / "tokenizer", reference, config)
        tokenizer = load_tokenizer(folder)
        for text in TEXTS:
            assert encode(tokenizer, text) == by_sentencepiece(reference, text), text


@pytest.mark.parametrize("name", ["bpe", "no space before"])
def test_legacy_false(trained, tmp_path, name):
    """A space is put before the whole text alone, and where the model itself puts none."""
    from transformers import LlamaTokenizer

    for prefixed in (True, False, None):
        config = {"legacy": False, "add_prefix_space": prefixed}
        config |= {"added_tokens_decoder": numbered(trained[name], True)}
        folder = write(tmp_path / str(prefixed) / "tokenizer", trained[name], config)
        theirs, tokenizer = LlamaTokenizer.from_pretrained(folder, local_files_only=True), load_tokenizer(folder.parent)
        for text in TEXTS:
            assert encode(tokenizer, text) == theirs.encode(text), (text, prefixed)


def test_a_normalizing_model_without_legacy(trained, tmp_path):
    """The space after a special token is part of the text, and runs of spaces are joined."""
    folder = write(tmp_path / "tokenizer", trained["normalizing"], {"legacy": False})
    tokenizer, reference = load_tokenizer(tmp_path), trained["normalizing"]
    assert encode(tokenizer, "the  ﬁ</s>  user ") == [*by_sentencepiece(reference, "the fi</s>user")]
    assert encode(tokenizer, "the</s>user") != by_sentencepiece(reference, "the</s>user")
    assert [note.partition("; ")[0] for note in notes(folder)] == ["tokenizer.model: the model normalizes text"]


def test_a_file_of_special_tokens_counts_unless_the_config_lists_all(trained, tmp_path):
    reference, start = trained["bpe"], trained["bpe"].get_piece_size()
    named = {"eos_token": flagged("<|im_end|>"), "pad_token": "<unk>"}
    added = {"<|im_start|>": start, "<|im_end|>": start + 1}
    write(tmp_path / "old" / "tokenizer", reference, {}, added=added, named=named)
    write(tmp_path / "new" / "tokenizer", reference, {"added_tokens_decoder": {}}, added=added, named=named)
    old, new = load_tokenizer(tmp_path / "old"), load_tokenizer(tmp_path / "new")
    assert (old.eos_token_id, old.pad_token_id, len(old)) == (start + 1, reference.unk_id(), start + 2)
    assert old.decode(encode(old, "a<|im_start|>b<|im_end|>"), skip_special_tokens=True) == "a<|im_start|> b"
    assert (new.eos_token, new.pad_token, len(new)) == ("</s>", None, start)


def test_ids_of_added_tokens(trained, tmp_path):
    reference, start = trained["bpe"], trained["bpe"].get_piece_size()
    for where in ("added_tokens", "added_tokens_decoder"):
        if where == "added_tokens":
            write(tmp_path / "tokenizer", reference, {}, added={"<a>": start, "<b>": start + 2})
        else:
            write(
                tmp_path / "tokenizer", reference, {where: {str(start + 2): flagged("<b>"), str(start): flagged("<a>")}}
            )
        with pytest.raises(
            ValueError, match=f"added token '<b>': its id is {start + 2}, legal is {start + 1}, the next"
        ):
            load_tokenizer(tmp_path)
    # a token in a piece's place has the piece's id
    write(tmp_path / "tokenizer", reference, {"added_tokens_decoder": {"0": flagged("<pad>")}})
    tokenizer = load_tokenizer(tmp_path)
    assert encode(tokenizer, "a<pad>") == [1, *reference.encode("a"), 0] and tokenizer.decode([0]) == "<pad>"


def test_what_versions_of_transformers_see_differently_is_said(trained, tmp_path):
    folder = write(tmp_path / "tokenizer", trained["no space before"], {"add_bos_token": None})
    assert [re.split(r"[:;]", note.removeprefix("tokenizer.model: "))[0] for note in notes(folder)] == [
        "no legacy in tokenizer_config.json",
        "a text that begins with a space keeps it, as in SentencePiece and transformers 4 (5 drops one)",
        "no add_bos_token",
        "the model puts no space before a text",
    ]
    assert encode(load_tokenizer(tmp_path), "a")[0] == 1
    write(folder, trained["no space before"], {"legacy": False})
    assert notes(folder) == []


def test_pieces_are_joined_by_their_scores(trained, tmp_path):
    """Not by their ids, which have another order where double spaces come first, as in LLaMA 2."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(trained["bpe"].serialized_model_proto())
    joined = [piece for piece in proto.pieces if piece.type == piece.NORMAL and len(piece.piece) > 1]
    for piece, score in zip(joined, [piece.score for piece in joined][::-1]):
        piece.score = score
    reference = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    folder = write(tmp_path / "tokenizer", reference, {"legacy": False})
    assert [note.partition(", ")[0] for note in notes(folder)] == ["tokenizer.model: pieces are joined by their scores"]
    ids = encode(load_tokenizer(tmp_path), "answer")  # "▁a" before "an"
    assert ids == [1, *reference.encode("answer")] != [1, *trained["bpe"].encode("answer")]


def test_gemma_puts_no_space_before_a_text(trained, tmp_path):
    reference = trained["no space before"]
    write(tmp_path / "tokenizer", reference, {"tokenizer_class": "GemmaTokenizer", "legacy": False})
    assert encode(load_tokenizer(tmp_path), "the</s>user") == by_sentencepiece(reference, "the</s>user")
