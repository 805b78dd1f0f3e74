"""Tokenizers from a checkpoint folder: equal to SentencePiece and to their own files, without a network."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from jaxinfer.tokenizer import apply_chat, encode, load_tokenizer, notes

SHARED = Path(__file__).parents[2] / "shared" / "data"
LINES = [
    "Once upon a time, a small fox lived in the wood.",
    "Hello  world   wide",
    "  two spaces first",
    "x ",
    " ",
    "   ",
    "",
    "tab\there\nand\n\nnew lines",
    "emoji 😀☃ and 日本語テキスト",
    "ﬁ ligature ½ \u00a0nbsp fi\u0301 Ａ",
    "1,234.56 naïve café",
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    reached = []

    def refuse(self, address):
        reached.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert not reached


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    return tmp_path / "tokenizer"


def train_sentencepiece(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line.replace("▁", "_") for line in LINES if line.strip()] * 20),
        model_writer=model,
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
        **options,
    )
    return model.getvalue()


TRAINED = {
    "bpe": {"model_type": "bpe", "vocab_size": 350, "byte_fallback": True, "normalization_rule_name": "identity"},
    "bpe, spaces joined": {"model_type": "bpe", "vocab_size": 350, "byte_fallback": True},
    "bpe, spaces kept": {"model_type": "bpe", "vocab_size": 350, "remove_extra_whitespaces": False},
    "no space before": {"model_type": "bpe", "vocab_size": 350, "byte_fallback": True, "add_dummy_prefix": False},
    "unigram": {"model_type": "unigram", "vocab_size": 330, "byte_fallback": True},
}


@pytest.mark.parametrize("name", [*TRAINED, "llama2", "mistral", "stories260K"])
def test_sentencepiece_models_split_as_sentencepiece_does(name, folder):
    if name in TRAINED:
        model = train_sentencepiece(**TRAINED[name])
    else:
        files = {"llama2": "tokenizers/llama2_tokenizer.model", "mistral": "tokenizers/mistral/tokenizer.model.v1"}
        path = SHARED / files.get(name, "stories260K/tokenizer.model")
        if not path.exists():
            pytest.skip(f"{path} is absent")
        model = path.read_bytes()
    (folder / "tokenizer.model").write_bytes(model)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = load_tokenizer(folder.parent)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (reference.bos_id(), reference.eos_id())
    assert len(tokenizer) == reference.get_piece_size()
    for line in LINES:
        ids = reference.encode(line)
        assert encode(tokenizer, line) == [reference.bos_id(), *ids], line
        if reference.unk_id() not in ids:
            assert tokenizer.decode(ids, skip_special_tokens=True) == reference.decode(ids), line


def test_a_config_beside_a_sentencepiece_model_counts(folder):
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(**TRAINED["bpe"]))
    config = {
        "add_bos_token": False,
        "tokenizer_class": "LlamaTokenizer",
        "eos_token": {"content": "<s>", "__type": "AddedToken"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    tokenizer = load_tokenizer(folder.parent)
    assert encode(tokenizer, "fox")[0] != tokenizer.bos_token_id and tokenizer.eos_token == "<s>"
    assert apply_chat(tokenizer, [{"role": "user", "content": "a fox"}]) == encode(tokenizer, "a fox")


def save_byte_level(folder, config=None, template=None):
    """A tokenizer of Llama 3's kind, under the class name of Llama 2's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<b>", "<e>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    if template:
        ids = [(each, backend.token_to_id(each)) for each in special]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<b>", "eos_token": "<e>"} | (config or {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return backend


def test_tokenizer_json_is_taken_as_it_is(folder):
    backend = save_byte_level(folder, template="<b> $A")
    (folder / "tokenizer.model").write_bytes(b"not looked at")
    tokenizer = load_tokenizer(folder.parent)
    for line in LINES:
        ids = encode(tokenizer, line)
        assert ids == backend.encode(line).ids and ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == line


@pytest.mark.parametrize("template", [None, "<b> $A"])
def test_add_bos_token_beside_a_tokenizer_json(folder, template):
    """Obeyed where transformers 4 obeyed it: 5 does not, and files of DeepSeek's distillations need it."""
    for named in ("LlamaTokenizerFast", "GemmaTokenizer", "PreTrainedTokenizerFast", None):
        for said in (True, False, None):
            config = {"tokenizer_class": named, "add_bos_token": said}
            backend = save_byte_level(folder, {name: it for name, it in config.items() if it is not None}, template)
            (folder / "config.json").write_text(json.dumps({"model_type": "llama" if named is None else "qwen2"}))
            expected = bool(template) if said is None or named == "PreTrainedTokenizerFast" else said
            plain = backend.encode("a fox", add_special_tokens=False).ids
            tokenizer = load_tokenizer(folder.parent)
            assert encode(tokenizer, "a fox") == [tokenizer.bos_token_id] * expected + plain, config
            assert apply_chat_alone(tokenizer, "a fox") == plain
            assert len(notes(folder)) == (expected != bool(template)), config
    save_byte_level(folder, {"add_bos_token": True})
    assert notes(folder)[0].startswith("tokenizer_config.json has add_bos_token true, tokenizer.json does not put <b>")


def apply_chat_alone(tokenizer, text):
    tokenizer.chat_template = "{{ messages[0].content }}"
    return apply_chat(tokenizer, [{"role": "user", "content": text}])


@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.json"])
def test_added_tokens_beside_a_byte_level_vocabulary(folder, kind):
    """In each of the three files, with their flags, as by transformers; tokens with flags in special_tokens_map.json
    stop transformers 5 itself."""
    backend = save_byte_level(folder, {"tokenizer_class": "GPT2Tokenizer", "unk_token": "<b>"})
    size, base = backend.get_vocab_size(), json.loads((folder / "tokenizer_config.json").read_text())
    if kind == "vocab.json":
        (folder / "tokenizer.json").unlink()
        backend.model.save(str(folder))
    token = {"content": "<|x|>", "normalized": False, "lstrip": True, "rstrip": False, "single_word": False}
    for name, content, stripped in (
        ("added_tokens.json", {"<|x|>": size}, False),
        ("tokenizer_config.json", base | {"added_tokens_decoder": {str(size): token | {"special": True}}}, True),
        ("special_tokens_map.json", {"additional_special_tokens": [token]}, True),
    ):
        before = (folder / "tokenizer_config.json").read_text()
        (folder / name).write_text(json.dumps(content))
        tokenizer = load_tokenizer(folder.parent)
        one, space, two = (backend.encode(text).ids for text in ("a fox", " ", "fox"))
        assert encode(tokenizer, "a fox <|x|>fox") == [*one, *([] if stripped else space), size, *two], name
        (folder / name).unlink()
        (folder / "tokenizer_config.json").write_text(before)


def test_files_with_a_byte_order_mark(folder):
    backend = save_byte_level(folder, {"add_bos_token": True})
    for path in [*folder.iterdir()]:
        path.write_text(path.read_text(), "utf-8-sig")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}", "utf-8-sig")
    tokenizer = load_tokenizer(folder.parent)
    assert encode(tokenizer, "a fox") == [tokenizer.bos_token_id, *backend.encode("a fox").ids]
    assert tokenizer.decode(apply_chat(tokenizer, [{"role": "user", "content": "hi"}])) == "hi"
    assert len(notes(folder)) == 1


def test_a_prompt_has_no_end_token_but_what_its_text_says(folder):
    backend = save_byte_level(folder, template="<b> $A <e>")
    tokenizer = load_tokenizer(folder.parent)
    plain = backend.encode("a fox", add_special_tokens=False).ids
    assert encode(tokenizer, "a fox") == [tokenizer.bos_token_id, *plain]
    assert encode(tokenizer, "a fox<e>")[-2:] == [plain[-1], tokenizer.eos_token_id]
    assert encode(tokenizer, "") == [tokenizer.bos_token_id]


def test_shared_tokenizers_load(folder):
    for name, text, ids in (("gpt2", "Hello world", [15496, 995]), ("falcon", "Hello world", [9856, 1079])):
        source = SHARED / "tokenizers" / name
        if not source.exists():
            pytest.skip(f"{source} is absent")
        shutil.copytree(source, folder.parent / name / "tokenizer")
        if name == "gpt2":
            config = folder.parent / name / "tokenizer" / "tokenizer_config.json"
            config.write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
        assert encode(load_tokenizer(folder.parent / name), text) == ids


def test_no_tokenizer(tmp_path):
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "generation_config.json").write_text("{}")
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json"])
def test_a_broken_file_is_named(name, folder):
    (folder / name).write_bytes(b"\x01broken")
    with pytest.raises(ValueError, match=f"{folder}: the tokenizer cannot be loaded: "):
        load_tokenizer(folder.parent)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{}", "lacks 'added_tokens'"),
        ('{"version": "1.0"}', "lacks 'added_tokens'"),
        ('{"added_tokens": []}', "lacks 'model'"),
        ('{"added_tokens": [], "model": null}', "'model' is not an object"),
        ('{"added_tokens": [], "model": {"type": "of none"}}', "data did not match any variant"),
        ("[]", "found list, legal is an object"),
        ("[" * 100_000, "damaged, not JSON: nested too deeply"),
        ("{bad", "damaged, not JSON: Expecting property name"),
    ],
)
def test_what_is_wrong_with_a_tokenizer_json_is_said_while_converting_and_loading(text, found, folder):
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=f"^{folder}: the tokenizer cannot be loaded: tokenizer.json: {found}"):
        load_tokenizer(folder.parent)
    with pytest.raises(ValueError, match=f"^tokenizer.json: {found}"):
        notes(folder)


def test_a_broken_vocabulary_is_said_while_converting(folder):
    (folder / "vocab.json").write_text("{bad")
    with pytest.raises(ValueError, match=r"vocab\.json: damaged, not JSON"):
        notes(folder)


def test_sentencepiece_symbols_that_would_split_wrong_are_refused(folder):
    model = train_sentencepiece(model_type="bpe", vocab_size=350, user_defined_symbols=["fox"])
    (folder / "tokenizer.model").write_bytes(model)
    with pytest.raises(ValueError, match="user-defined symbols, the first is 'fox', are not supported"):
        load_tokenizer(folder.parent)


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "<b>{{ m.role }}: {{ m.content }}<e>{% endfor %}{% if add_generation_prompt %}<b>model:{% endif %}"
)


def test_chat(folder):
    backend = save_byte_level(folder, {"chat_template": TEMPLATE}, template="<b> $A")
    tokenizer = load_tokenizer(folder.parent)
    ids = apply_chat(tokenizer, [{"role": "user", "content": "hi"}, {"role": "model", "content": "ho"}])
    assert ids == backend.encode("<b>user: hi<e><b>model: ho<e><b>model:", add_special_tokens=False).ids
    for messages, message in (
        ("hi", r"^messages: 'hi' is not legal; legal: a list of at least one message"),
        ([], r"^messages: \[\] is not legal"),
        (["hi"], r"^messages\[0\]: 'hi' is not legal; legal: an object with role and content"),
        ([{"role": "user"}], r"^messages\[0\].content: None is not legal; legal: a string"),
        ([{"role": "user", "content": "a"}, {"role": 1, "content": "a"}], r"^messages\[1\].role: 1 is not legal"),
        ([{"role": "bad", "content": "a"}], r"^messages: the chat template refuses them: no such role"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_chat(tokenizer, messages)


def test_no_chat_template(folder):
    save_byte_level(folder)
    with pytest.raises(ValueError, match="no chat template; give prompt or prompt_token_ids"):
        apply_chat(load_tokenizer(folder.parent), [{"role": "user", "content": "hi"}])


def test_nothing_is_said_where_pytorch_is_not_installed(tmp_path):
    model = Path(__file__).parents[1] / "examples" / "tinystories" / "model"
    shutil.copytree(model, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    code = f"""import sys; sys.modules["torch"] = None
from jaxinfer.tokenizer import *
print(encode(load_tokenizer({str(tmp_path)!r}), "Once"))"""
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("[") and not done.stderr, done.stderr
