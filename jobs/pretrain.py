"""Train the reference model from nothing: a small Llama that retrieves needles inside its window, and its tokenizer.

    python jobs/pretrain.py --out longrope2_ray/assets/reference

Public-domain text (``jobs/pretrain_text``) mixed with retrieval documents in the needle format. 2 CPU cores are enough;
the model card that it writes says how long it took and what the model can do.
"""

import argparse
import json
import math
import random
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longrope2_ray.tasks.books import load_books
from longrope2_ray.tasks.needle import INSTRUCTION, NEEDLE, QUESTION, draw_key, draw_value

TEXT = Path(__file__).parent / "pretrain_text"
IGNORE = -100


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with every digit a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    template = (INSTRUCTION + NEEDLE + QUESTION).format(key="numerous-kite", value="6716097") + "\n"
    rng = random.Random(0)
    keys = " ".join(draw_key(rng) for _ in range(20_000))
    tokenizer.train_from_iterator([*texts, template * 2_000, keys], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def seen_in_training(key: str) -> bool:
    """Three keys of four; the fourth is kept for the check at the end."""
    return zlib.crc32(key.encode()) % 4 != 0


class Documents:
    """Rows of exactly ``window`` tokens with the weight of each token in the loss."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        texts: list[str],
        window: int,
        full_share: float,
        seed: int,
    ):
        self.tokenizer, self.window, self.full_share = tokenizer, window, full_share
        self.rng = random.Random(seed)
        pieces = [text[i : i + 200_000] for text in texts for i in range(0, len(text), 200_000)]
        ids = [tokenizer.encode(piece, add_special_tokens=False) for piece in pieces]
        self.stream = np.concatenate([np.asarray(x, dtype=np.int64) for x in ids])
        self.instruction = self.encode(INSTRUCTION)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def text(self, num_tokens: int) -> list[int]:
        start = self.rng.randrange(len(self.stream) - num_tokens)
        return self.stream[start : start + num_tokens].tolist()

    def retrieval(self, length: int) -> tuple[list[int], list[float]]:
        """One document with one to three needles at random depths, then one question; the answer counts twice."""
        rng, pairs = self.rng, []
        for _ in range(rng.choice((1, 1, 2, 3))):
            while not seen_in_training(key := draw_key(rng)):
                pass
            pairs.append((key, draw_value(rng)))
        key, value = pairs[0]
        needles = [self.encode(NEEDLE.format(key=k, value=v)) for k, v in pairs]
        tail, answer = self.encode(QUESTION.format(key=key)), self.encode(f" {value}")
        bos, eos = [self.tokenizer.bos_token_id], [self.tokenizer.eos_token_id]
        frame = len(bos) + len(self.instruction) + len(tail) + len(answer) + len(eos)
        while len(needles) > 1 and length < frame + sum(map(len, needles)):
            needles.pop()
        room = length - frame - sum(map(len, needles))
        if room < 0:
            return self.plain(length)
        rng.shuffle(needles)
        filler = self.text(room) if room else []
        cuts = sorted(rng.randint(0, room) for _ in needles)
        body: list[int] = []
        for start, stop, needle in zip([0, *cuts], [*cuts, room], [*needles, []], strict=True):
            body += filler[start:stop] + needle
        ids = bos + self.instruction + body + tail + answer + eos
        weights = [1.0] * len(ids)
        for i in range(len(ids) - len(answer) - 1, len(ids) - 1):
            weights[i] = 2.0
        return ids, weights

    def plain(self, length: int) -> tuple[list[int], list[float]]:
        return [self.tokenizer.bos_token_id, *self.text(length - 1)], [1.0] * length

    def packed(self) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        weights: list[float] = []
        while (rest := self.window - len(ids)) >= 100:
            new_ids, new_weights = self.retrieval(min(rest, self.rng.randrange(100, 150)))
            ids, weights = ids + new_ids, weights + new_weights
        new_ids, new_weights = self.plain(rest) if rest else ([], [])
        return ids + new_ids, weights + new_weights

    def copying(self) -> tuple[list[int], list[float]]:
        """A random sequence said twice or more: what retrieval is learnt from."""
        period = self.rng.randrange(8, self.window // 2)
        block = [self.rng.randrange(2, len(self.tokenizer)) for _ in range(period)]
        repeats = math.ceil(self.window / period)
        weights = [0.0] * period + [1.0] * (self.window - period)
        return (block * repeats)[: self.window], weights

    def batch(self, rows: int, copying: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T) token ids and (B, T) loss weights."""
        made = []
        for _ in range(rows):
            if self.rng.random() < copying:
                made.append(self.copying())
                continue
            kind = self.rng.random()
            if kind < 0.15:
                made.append(self.plain(self.window))
            elif kind < 0.15 + self.full_share:
                made.append(self.retrieval(self.window))
            else:
                made.append(self.packed())
        return torch.tensor([m[0] for m in made]), torch.tensor([m[1] for m in made])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--init", help="go on with this model and tokenizer instead of new ones")
    parser.add_argument(
        "--copying-steps", type=int, default=667, help="steps over which copying sequences fade out"
    )
    parser.add_argument(
        "--full-share",
        type=float,
        default=0.08,
        help="share of retrieval documents as long as the window; rare, as long dependencies are in real pre-training",
    )
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile: a fifth faster, needs a C++ compiler"
    )
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    texts = [book.text for book in load_books([str(TEXT)])]
    tokenizer = (
        AutoTokenizer.from_pretrained(args.init)
        if args.init
        else train_tokenizer(texts, args.vocab)
    )
    documents = Documents(tokenizer, texts, args.window, args.full_share, args.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=512 * args.hidden // 192,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        head_dim=64,
        max_position_embeddings=args.window,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM.from_pretrained(args.init) if args.init else LlamaForCausalLM(config)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
    )
    warmup = 100
    token_losses = torch.compile(per_token_losses) if args.compile else per_token_losses
    began = time.time()
    for step in range(args.steps):
        progress = step / args.steps
        rate = min((step + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate
        copying = 0.7 * (1 - step / args.copying_steps) if step < args.copying_steps else 0.0
        ids, weights = documents.batch(args.batch, copying=copying)
        losses = token_losses(model, ids)
        target_weights = weights[:, 1:].flatten()
        loss = (losses * target_weights).sum() / target_weights.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == args.steps - 1:
            answers = losses[target_weights == 2.0]
            answer_loss = answers.mean().item() if len(answers) else math.nan
            seconds = time.time() - began
            print(json.dumps({"step": step, "loss": round(loss.item(), 4), "answer_loss": round(answer_loss, 4),
                              "seconds": round(seconds)}), flush=True)  # fmt: skip
        if step % 250 == 249:
            save(model, tokenizer, args.out)
    save(model, tokenizer, args.out)


def per_token_losses(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """(B, T) token ids to the loss of every token but the first of its row, flat."""
    logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
