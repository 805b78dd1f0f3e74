"""Train the embedded model: a small LLaMA and its tokenizer, from one text file of stories.

    python3 examples/tinystories/train.py --train TRAIN.txt --valid VALID.txt --output OUTDIR

Needs torch, transformers, tokenizers and safetensors, which the inference package itself does not use. The output is
a folder in Hugging Face form, with the figures of the run in training.json.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import random
import time
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
END_ID = 0
CONTEXT = 1024
DEV_STORIES = 200
PROMPTS = (
    "Once upon a time",
    "One day, a little girl named Lily",
    "Tom and his dog went to the park. They",
    "There was a big red ball",
    "The old bear was very sad because",
    '"Can I help you?" asked the small bird.',
    "Mom said it was time to sleep, but Ben",
    "In the forest there lived a rabbit who",
)


def read_stories(path: Path) -> list[str]:
    """The stories of a file where a line `<|endoftext|>` ends each; empty ones are left out."""
    stories = [story.strip() for story in path.read_text(encoding="utf-8").split(END)]
    stories = [story for story in stories if story]
    if len(stories) < 2:
        raise SystemExit(f"{path}: found {len(stories)} stories; expected many, each ended by {END}")
    return stories


def train_tokenizer(stories: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (Sennrich et al. 2016) whose encodings start with the one special token, id 0."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        stories,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, END_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def encode(tokenizer: PreTrainedTokenizerFast, stories: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(stories)]


def new_model(vocab_size: int, dropout: float) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=512,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        use_cache=True,
    )
    model = LlamaForCausalLM(config)
    if dropout:
        # LlamaConfig knows dropout of attention weights only; a corpus this small needs it on the residual branches.
        def drop(module, _, output):
            return F.dropout(output, dropout, module.training)

        model.model.embed_tokens.register_forward_hook(drop)
        for layer in model.model.layers:
            layer.self_attn.o_proj.register_forward_hook(drop)
            layer.mlp.down_proj.register_forward_hook(drop)
    return model


def epoch_windows(lengths: list[int], order: list[int], starts: list[int], size: int) -> list[int]:
    """Where in the stream, laid out in `order`, each window of `size` tokens begins: always at the start of a story.

    The story that a window cuts off begins the next one, so that position 0 always holds the beginning-of-text token,
    as at inference. What is lost is the tail of the last window and of stories longer than a window.
    """
    total = starts[-1] + lengths[order[-1]]
    windows, index = [], 0
    while starts[index] + size <= total:
        windows.append(starts[index])
        end = starts[index] + size
        following = index + 1
        while following < len(order) and starts[following] + lengths[order[following]] <= end:
            following += 1
        index = following
        if index >= len(order):
            break
    return windows


def batches(stories: list[list[int]], batch: int, rng: random.Random, device: str):
    """One epoch of [B, CONTEXT + 1] token batches: stories in a new order, packed; the ragged last batch is dropped."""
    order = list(range(len(stories)))
    rng.shuffle(order)
    lengths = [len(story) for story in stories]
    starts, stream = [], []
    for index in order:
        starts.append(len(stream))
        stream += stories[index]
    windows = epoch_windows(lengths, order, starts, CONTEXT + 1)
    rng.shuffle(windows)
    tokens = torch.tensor(stream, device=device)
    offsets = torch.arange(CONTEXT + 1, device=device)
    for first in range(0, len(windows) - batch + 1, batch):
        yield tokens[torch.tensor(windows[first : first + batch], device=device)[:, None] + offsets]


def precision(device: str):
    return torch.autocast("cuda", torch.bfloat16) if device.startswith("cuda") else contextlib.nullcontext()


@torch.no_grad()
def nats(model: LlamaForCausalLM, stories: list[list[int]], device: str, batch: int = 32) -> tuple[float, int]:
    """Negative log-likelihood in nats, in float32, and tokens scored: each story alone, after its first token.

    No story may be longer than the context (see `fit_context`).
    """
    model.eval()
    stories = sorted(stories, key=len)
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    for first in range(0, len(stories), batch):
        rows = stories[first : first + batch]
        width = max(map(len, rows))
        # Padding is on the right and attention is causal: what is padded changes no score that is counted.
        tokens = torch.tensor([row + [END_ID] * (width - len(row)) for row in rows], device=device)
        real = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows], device=device)
        logits = model(tokens[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        total += (loss * real[:, 1:].flatten()).double().sum()
        count += int(real[:, 1:].sum())
    return total.item(), count


def bits_per_byte(model, stories: list[list[int]], texts: list[str], device: str) -> float:
    """Bits per UTF-8 byte of the texts; the end of a story is not scored, so a scoring call gives the same figure."""
    return nats(model, stories, device)[0] / math.log(2) / sum(len(text.encode()) for text in texts)


def fit_context(tokenizer, texts: list[str]) -> tuple[list[list[int]], list[str]]:
    """Tokens and texts of those stories that fit the context whole."""
    kept = [(ids, text) for ids, text in zip(encode(tokenizer, texts), texts, strict=True) if len(ids) <= CONTEXT]
    return [ids for ids, _ in kept], [text for _, text in kept]


def train(model, stories, dev, dev_texts, args, device: str, started: float) -> dict:
    """Train in place and leave the weights with the least development loss in the model. Returns the run's figures."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
        fused=device.startswith("cuda"),
    )
    rng = random.Random(args.seed)
    steps_per_epoch = sum(map(len, stories)) / (args.batch * CONTEXT)
    planned = args.steps or round(args.epochs * steps_per_epoch)
    warmup = max(1, min(200, planned // 10))
    best = {"dev_bits_per_byte": math.inf, "step": 0}
    best_state = None
    step, epoch, seen, done = 0, 0, 0, False
    loop_started = time.monotonic()
    losses = torch.zeros((), device=device)
    losses_since = 0
    while not done:
        epoch += 1
        for tokens in batches(stories, args.batch, rng, device):
            # Whichever limit is nearer drives the decay, so that a slow machine still ends at the low rate.
            share = max(step / planned, (time.monotonic() - loop_started) / (60 * args.minutes))
            if share >= 1:
                done = True
                break
            lr = args.lr * min(1, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
            for group in optimizer.param_groups:
                group["lr"] = lr
            model.train()
            with precision(device):
                logits = model(tokens[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses += loss.detach()
            losses_since += 1
            seen += tokens.shape[0] * CONTEXT
            step += 1
        figure = bits_per_byte(model, dev, dev_texts, device)
        print(
            f"{time.monotonic() - started:6.1f} s  epoch {epoch}  step {step}/{planned}  lr {lr:.1e}  "
            f"train loss {losses.item() / max(1, losses_since):.4f}  dev bits/byte {figure:.4f}",
            flush=True,
        )
        losses.zero_()
        losses_since = 0
        if figure < best["dev_bits_per_byte"]:
            best = {"dev_bits_per_byte": figure, "step": step}
            best_state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(best_state)
    return {"steps": step, "best_step": best["step"], "epochs": seen / sum(map(len, stories)), "tokens_seen": seen,
            "dev_bits_per_byte": best["dev_bits_per_byte"]}  # fmt: skip


def rounded(model: LlamaForCausalLM, dtype: torch.dtype) -> LlamaForCausalLM:
    """A float32 copy of the model, on the host, whose weights have passed through `dtype`."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict({name: tensor.cpu().to(dtype).float() for name, tensor in model.state_dict().items()})
    return copy


@torch.no_grad()
def continuations(model, tokenizer, prompts, length: int, device: str) -> list[str]:
    """Greedy text of `length` tokens after each prompt, past any end of text."""
    model.eval()
    texts = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=device)
        for _ in range(length):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
        texts.append(tokenizer.decode(ids[0, 1:]))
    return texts


def save(model: LlamaForCausalLM, tokenizer, dtype: torch.dtype, output: Path) -> None:
    model.to(dtype).save_pretrained(output)
    GenerationConfig(bos_token_id=END_ID, eos_token_id=END_ID).save_pretrained(output)
    tokenizer.save_pretrained(output)
    # transformers 5 writes the name of its own backend class there, which transformers 4 does not know.
    path = output / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--valid", type=Path, required=True, help="held-out stories, used for the final figure only")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=45)
    parser.add_argument("--steps", type=int, help="instead of --epochs")
    parser.add_argument("--minutes", type=float, default=5.5, help="the schedule is shortened to end by then")
    parser.add_argument("--batch", type=int, default=16, help="windows of 1024 tokens per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.5)
    parser.add_argument("--dropout", type=float, default=0.12)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--sample-tokens", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    started = time.monotonic()
    torch.manual_seed(args.seed)
    device = args.device
    texts = read_stories(args.train)
    random.Random(args.seed).shuffle(texts)
    tokenizer = train_tokenizer(texts, args.vocab_size)
    stories = encode(tokenizer, texts[DEV_STORIES:])
    dev, dev_texts = fit_context(tokenizer, texts[:DEV_STORIES])
    valid, valid_texts = fit_context(tokenizer, read_stories(args.valid))
    model = new_model(len(tokenizer), args.dropout).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    train_tokens = sum(map(len, stories))
    print(
        f"{time.monotonic() - started:6.1f} s  {len(stories)} stories, {train_tokens} tokens, "
        f"vocabulary {len(tokenizer)}, {parameters} parameters",
        flush=True,
    )
    figures = train(model, stories, dev, dev_texts, args, device, started)
    train_seconds = time.monotonic() - started

    candidates = {dtype: rounded(model, dtype).to(device) for dtype in (torch.float16, torch.bfloat16)}
    held_out = {dtype: bits_per_byte(copy, valid, valid_texts, device) for dtype, copy in candidates.items()}
    held_out[torch.float32] = bits_per_byte(model, valid, valid_texts, device)
    dtype = min(candidates, key=held_out.get)
    chosen = candidates[dtype]
    samples = continuations(chosen, tokenizer, PROMPTS, args.sample_tokens, device)
    args.output.mkdir(parents=True, exist_ok=True)
    save(chosen.cpu(), tokenizer, dtype, args.output)

    name = (
        torch.cuda.get_device_name() if device.startswith("cuda") else f"{platform.machine()}, {os.cpu_count()} cores"
    )
    report = {
        "parameters": parameters,
        "stories": len(stories),
        "train_tokens": train_tokens,
        **figures,
        "held_out_bits_per_byte": {str(kind).removeprefix("torch."): value for kind, value in held_out.items()},
        "held_out_stories": len(valid),
        "held_out_tokens": sum(map(len, valid)) - len(valid),
        "held_out_bytes": sum(len(text.encode()) for text in valid_texts),
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": round(train_seconds, 1),
        "device": name,
        "settings": {
            key: value for key, value in vars(args).items() if key not in ("train", "valid", "output", "device")
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (args.output / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    for text in samples:
        print(f"\n--- {text}")
    size = sum(path.stat().st_size for path in args.output.iterdir() if path.is_file())
    print(f"\n{time.monotonic() - started:6.1f} s  {args.output}: {size} bytes")


if __name__ == "__main__":
    main()
