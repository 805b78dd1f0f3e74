"""Incremental text against decoding in one go: byte-level and SentencePiece tokenizers, trained here and shared."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import StopStringCriteria

from jaxinfer.engine.detokenize import TextStream
from jaxinfer.tokenizer import load_tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data"
PROSE = (
    'Once upon a time, a small fox lived in the wood. The fox was happy!  It said: "Hello, world" and ran.\n\n'
    "Größe, naïve café, señor; 日本語テキスト, 中文字符, здравствуй мир. 😀🎉 e\u0301 1,234.56\tend"
)
NAMES = ("byte level", "byte fallback", "stories260K", "gpt2", "falcon", "llama2")
FOLDERS = {
    "stories260K": "stories260K",
    "falcon": "tokenizers/falcon",
    "gpt2": "tokenizers/gpt2",
    "llama2": "tokenizers",
}


def trained(name):
    """A tokenizer of the GPT-2 kind, or of the LLaMA kind that knows ASCII and spells all else in bytes."""
    special = ["<unk>", "<s>", "</s>", "<|tool|>"]
    if name == "byte level":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator([PROSE] * 4, trainer)
    else:
        plain = Tokenizer(models.BPE(unk_token="<unk>"))
        spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        plain.normalizer = spaces
        plain.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "isolated")
        trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=special, show_progress=False)
        plain.train_from_iterator(["".join(c for c in PROSE if c.isascii())] * 4, trainer)
        core = json.loads(plain.to_str())["model"]
        pieces = special[:3] + [f"<0x{byte:02X}>" for byte in range(256)] + list(core["vocab"])
        vocabulary = {piece: place for place, piece in enumerate(dict.fromkeys(pieces))}
        merges = [tuple(pair) for pair in core["merges"]]
        backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        backend.normalizer = spaces
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(steps)
    backend.add_tokens([AddedToken("<extra>", special=False, normalized=False)])
    backend.add_special_tokens([AddedToken(each, special=True) for each in special])
    return backend


@cache
def tokenizer_of(name, tmp):
    folder = tmp / name.replace(" ", "_") / "tokenizer"
    if name in FOLDERS:
        source = SHARED / FOLDERS[name]
        if not source.exists():
            return None
        if name == "llama2":
            folder.mkdir(parents=True)
            shutil.copy(source / "llama2_tokenizer.model", folder / "tokenizer.model")
        else:
            shutil.copytree(source, folder)
        if name == "gpt2":
            (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    else:
        folder.mkdir(parents=True)
        trained(name).save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder.parent)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(params=NAMES, scope="module")
def tokenizer(request, folder):
    found = tokenizer_of(request.param, folder)
    if found is None:
        pytest.skip(f"{SHARED / FOLDERS[request.param]} is absent")
    return found


def whole(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def continuation(tokenizer, prompt, output):
    """What decoding all has after the decoded prompt; None where that does not begin it."""
    before, text = whole(tokenizer, prompt), whole(tokenizer, [*prompt, *output])
    return text[len(before) :] if text.startswith(before) else None


TEXT = st.text(st.sampled_from("ab e.,'\n\t▁é日😀\u0301\ufffd"), max_size=12)
# real text of the tokenizer, single ids near both ends of the vocabulary (special tokens and bytes are there), any ids
SEGMENT = st.one_of(
    st.tuples(st.just("text"), st.one_of(TEXT, st.sampled_from(PROSE.split(" ")))),
    st.tuples(st.just("ids"), st.lists(st.floats(0, 1, exclude_max=True), max_size=5)),
    st.tuples(st.just("low"), st.lists(st.integers(0, 270), max_size=6)),
    st.tuples(st.just("high"), st.lists(st.integers(1, 6), max_size=2)),
)
CUTS = st.lists(st.integers(1, 7), min_size=1, max_size=6)


def ids_of(tokenizer, segments):
    ids, size = [], len(tokenizer)
    for kind, value in segments:
        if kind == "text":
            ids += tokenizer.encode(value, add_special_tokens=False)
        else:
            ids += [
                {"ids": lambda x: int(x * size), "low": lambda x: x, "high": lambda x: size - x}[kind](x) for x in value
            ]
    return ids


def chunked(ids, cuts):
    """ids in chunks of the lengths cuts, over and over."""
    start, turn = 0, 0
    while start < len(ids):
        yield ids[start : start + cuts[turn % len(cuts)]]
        start += cuts[turn % len(cuts)]
        turn += 1


def stream(tokenizer, prompt, output, cuts, stop=()):
    text = TextStream(tokenizer, prompt, stop)
    pieces = [text.append(chunk) for chunk in chunked(output, cuts)]
    pieces.append(text.finish())
    assert "".join(pieces) == text.text and text.finish() == ""
    return text


@settings(max_examples=120, deadline=None)
@given(st.lists(SEGMENT, max_size=3), st.lists(SEGMENT, max_size=6), CUTS)
def test_pieces_make_the_whole_text(tokenizer, prompt, output, cuts):
    prompt, output = ids_of(tokenizer, prompt), ids_of(tokenizer, output)
    expected = continuation(tokenizer, prompt, output)
    assume(expected is not None)
    assert stream(tokenizer, prompt, output, cuts).text == expected


def spelled(tokenizer, prompt, output, text):
    """The characters of the text with the names of special tokens in it: (character, whether it shows, output tokens
    that it takes)."""
    special = {token: str(added) for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    before, at, found = whole(tokenizer, prompt), 0, []
    decoded = [whole(tokenizer, prompt + output[:count]) for count in range(len(output) + 1)]

    def show(end):
        for here in range(at, end):
            count = next(n for n, each in enumerate(decoded) if each.startswith(before + text[: here + 1]))
            found.append((text[here], True, count))

    for count, token in enumerate(output):
        if token in special:
            same = [one == other for one, other in zip(decoded[count], before + text, strict=False)]
            here = max(at, [*same, False].index(False) - len(before))
            show(here)
            at = here
            found += [(character, False, count + 1) for character in special[token]]
    show(len(text))
    return found


def expected_stop(characters, stops):
    """By trying each end, character by character."""
    whole = "".join(character for character, _, _ in characters)
    for end in range(1, len(whole) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if whole[:end].endswith(stop):
                shown = (character for character, shows, _ in characters[: end - len(stop)] if shows)
                return "".join(shown), stop, characters[end - 1][2]
    return "".join(character for character, shows, _ in characters if shows), None, None


@settings(max_examples=120, deadline=None)
@given(st.lists(SEGMENT, max_size=2), st.lists(SEGMENT, min_size=1, max_size=5), CUTS, st.data())
def test_stop_strings(tokenizer, prompt, output, cuts, data):
    prompt, output = ids_of(tokenizer, prompt), ids_of(tokenizer, output)
    text = continuation(tokenizer, prompt, output)
    assume(text is not None)
    characters = spelled(tokenizer, prompt, output, text)
    searched = "".join(character for character, _, _ in characters)
    assume(searched)
    inside = st.tuples(st.integers(0, len(searched) - 1), st.integers(1, 9)).map(lambda at: searched[at[0] : sum(at)])
    # beginnings of what is there, that go on otherwise
    nearly = st.tuples(inside, st.sampled_from("ab \n<")).map("".join)
    stops = data.draw(st.lists(st.one_of(inside, nearly, TEXT.filter(bool)), min_size=1, max_size=4))
    found = stream(tokenizer, prompt, output, cuts, stops)
    assert (found.text, found.stopped, found.stopped_tokens) == expected_stop(characters, stops)


SPECIAL = [
    ("a fox<|tool|> ran", "<|tool|>", "a fox"),
    ("a fox<|tool|> ran", "x<|tool|> r", "a fo"),  # begins and ends in text
    ("a fox<|tool|> ran", "x<|to", "a fo"),  # ends inside the name, as transformers has it
    ("a fox<|tool|> ran", "ool|> ran", "a fox"),
    ("a fox<|tool|></s> ran", "<|tool|></s>", "a fox"),
    ("a fox<|tool|></s> ran", "></", "a fox"),
    ("<|tool|>a fox", "<|tool|>", ""),
    ("a fox<|tool|> ran", "x r", "a fox ran"),  # it is no neighbour of its neighbour's neighbour
    ("a fox<|tool|> ran<|tool|>", "n<|tool|>", "a fox ra"),
]


@pytest.mark.parametrize("name", ["byte level", "byte fallback"])
@pytest.mark.parametrize(("text", "stop", "expected"), SPECIAL)
def test_a_stop_string_with_special_tokens_in_it_is_where_transformers_has_it(name, folder, text, stop, expected):
    tokenizer = tokenizer_of(name, folder)
    if name == "byte fallback":  # puts a space of its own after a special token
        text = text.replace("> ", ">")
    ids = tokenizer.encode(text, add_special_tokens=False)
    criterion = StopStringCriteria(tokenizer, [stop])
    ends = (count for count in range(1, len(ids) + 1) if criterion(torch.tensor([ids[:count]]), None)[0])
    found = stream(tokenizer, [], ids, [1], [stop])
    assert found.stopped_tokens == next(ends, None)
    assert found.text == stream(tokenizer, [], ids, [3], [stop]).text == expected


@settings(max_examples=60, deadline=None)
@given(TEXT, TEXT.filter(bool), CUTS)
def test_text_is_not_late(tokenizer, prompt, text, cuts):
    """After each chunk of valid text, what is missing is what the definition holds back, and no more."""
    text = text.replace("\ufffd", "")  # looks like spoilt bytes, for which `TextStream` loses patience
    prompt, output = (tokenizer.encode(each, add_special_tokens=False) for each in (prompt, text))
    fallback = {f"<0x{byte:02X}>" for byte in range(256)}
    found, count = TextStream(tokenizer, prompt), 0
    for chunk in chunked(output, cuts):
        found.append(chunk)
        count += len(chunk)
        for settled in range(count, 0, -1):
            known = continuation(tokenizer, prompt, output[:settled])
            spelled = tokenizer.convert_ids_to_tokens(output[settled - 1]) in fallback
            if not spelled and known is not None and not known.endswith("\ufffd"):
                assert found.text == known
                break


@pytest.mark.parametrize("name", ["byte level", "byte fallback"])
def test_output_completes_the_last_character_of_the_prompt(name, folder):
    tokenizer = tokenizer_of(name, folder)
    ids = tokenizer.encode("😀", add_special_tokens=False)
    for cut in (1, 2, 3):
        assert stream(tokenizer, ids[:-cut], ids[-cut:] + tokenizer.encode("a"), [1]).text.startswith("😀")


def test_beginning_of_a_stop_string_is_held_back(folder):
    tokenizer = tokenizer_of("byte level", folder)
    found = TextStream(tokenizer, stop=["fox!", "x\n"])
    said = [found.append(tokenizer.encode(each)) for each in ("the fo", "x", " fo", "xx", "\n", " more")]
    assert said == ["the ", "", "fox ", "fox", "", ""]
    assert (found.text, found.stopped, found.stopped_tokens) == ("the fox fox", "x\n", found.stopped_tokens)
    ids = [token for each in ("the fo", "x", " fo", "xx", "\n") for token in tokenizer.encode(each)]
    assert found.stopped_tokens == len(ids) and found.finish() == ""
    unfinished = TextStream(tokenizer, stop=["fox!"])
    assert unfinished.append(tokenizer.encode("a fox")) == "a " and unfinished.finish() == "fox"


def test_stop_string_completed_by_the_last_bytes(folder):
    tokenizer = tokenizer_of("byte fallback", folder)
    ids = tokenizer.encode("a 日", add_special_tokens=False)
    found = TextStream(tokenizer, stop=["日"])
    assert found.append(ids) == "a "
    assert found.finish() == "" and found.stopped == "日" and found.stopped_tokens == len(ids)


@pytest.mark.parametrize("name", ["byte level", "byte fallback"])
def test_spoilt_bytes_cost_no_more_than_text(name, folder):
    """Decoding work grows with the tokens, not with their square, even when they never make a character."""
    tokenizer = tokenizer_of(name, folder)
    for letter in ("a", "\ufffd"):
        token = next(token for token in range(len(tokenizer)) if whole(tokenizer, [token]) == letter)
        found, work = TextStream(tokenizer), 0
        plain = found._decode

        def counted(end):
            nonlocal work
            work += end
            return plain(end)

        found._decode = counted
        for _ in range(3000):
            found.append([token])
        found.finish()
        assert work < 3000 * 25
