"""Train the reference model: a small Llama that retrieves needles inside its window.

    python jobs/reference_model/pretrain.py --out longrope2_ray/assets/reference

Its tokenizer is trained too. The data are the bundled pre-training texts, in the public domain,
mixed with retrieval documents in the needle format. 2 CPU cores are enough; the model card says how
long it took and what the model can do.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longrope2_ray.tasks.books import load_books
from longrope2_ray.tasks.needle import INSTRUCTION, NEEDLE, QUESTION, draw_key, draw_value
from longrope2_ray.tasks.retrieval import seen_in_training

IGNORE = -100


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE with every digit a token of its own."""
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


class Documents:
    """The source of training rows: exactly ``window`` tokens, each with its weight in the loss.

    Args:
        tokenizer: the model's tokenizer.
        texts: the pre-training texts.
        window: tokens of a row.
        full_share: share of the rows that are one retrieval document as long as the window.
        seed: seed of all that is drawn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        texts: list[str],
        window: int,
        full_share: float,
        seed: int,
    ):
        self.tokenizer = tokenizer
        self.window = window
        self.full_share = full_share
        self.rng = random.Random(seed)
        pieces = [text[i : i + 200_000] for text in texts for i in range(0, len(text), 200_000)]
        ids = [tokenizer.encode(piece, add_special_tokens=False) for piece in pieces]
        self.stream = np.concatenate([np.asarray(x, dtype=np.int64) for x in ids])
        self.instruction = self.encode(INSTRUCTION)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without BOS and EOS."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def text(self, num_tokens: int) -> list[int]:
        """Draw a stretch of the texts."""
        start = self.rng.randrange(len(self.stream) - num_tokens)
        return self.stream[start : start + num_tokens].tolist()

    def retrieval(self, length: int) -> tuple[list[int], list[float]]:
        """Draw one document: one to three needles, then one question; its answer counts twice."""
        rng, pairs = self.rng, []
        # Keys outside this set are kept for the check: the model never sees them.
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
        # The answer stands before the EOS token.
        weights = [1.0] * len(ids)
        for i in range(len(ids) - len(answer) - 1, len(ids) - 1):
            weights[i] = 2.0
        return ids, weights

    def plain(self, length: int) -> tuple[list[int], list[float]]:
        """Draw a stretch of the texts as a document of its own, behind a BOS token."""
        return [self.tokenizer.bos_token_id, *self.text(length - 1)], [1.0] * length

    def packed(self) -> tuple[list[int], list[float]]:
        """Draw short retrieval documents until the window is full, the rest plain text."""
        ids: list[int] = []
        weights: list[float] = []
        while (rest := self.window - len(ids)) >= 100:
            new_ids, new_weights = self.retrieval(min(rest, self.rng.randrange(100, 150)))
            ids, weights = ids + new_ids, weights + new_weights
        new_ids, new_weights = self.plain(rest) if rest else ([], [])
        return ids + new_ids, weights + new_weights

    def copying(self) -> tuple[list[int], list[float]]:
        """Draw a random sequence, repeated to the window's end: retrieval is learned from it."""
        period = self.rng.randrange(8, self.window // 2)
        block = [self.rng.randrange(2, len(self.tokenizer)) for _ in range(period)]
        repeats = math.ceil(self.window / period)
        weights = [0.0] * period + [1.0] * (self.window - period)
        return (block * repeats)[: self.window], weights

    def batch(self, rows: int, copying: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw (B, T) token ids and (B, T) loss weights; ``copying`` is the share of such rows."""
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


def parse_arguments() -> argparse.Namespace:
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
        help="share of retrieval documents as long as the window; rare, as in real pre-training",
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
    return parser.parse_args()


def build_model(
    arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerFast
) -> LlamaForCausalLM:
    """Make a new model of the given size, or load the one to go on with."""
    if arguments.init:
        return LlamaForCausalLM.from_pretrained(arguments.init)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden,
        intermediate_size=512 * arguments.hidden // 192,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=arguments.hidden // 64,
        head_dim=64,
        max_position_embeddings=arguments.window,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def build_optimizer(model: LlamaForCausalLM, learning_rate: float) -> torch.optim.Optimizer:
    """Make AdamW with weight decay on matrices only."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


def train(arguments: argparse.Namespace, model: LlamaForCausalLM, documents: Documents) -> None:
    """Train with a cosine schedule; print a line every 50 steps, and save every 250."""
    optimizer = build_optimizer(model, arguments.lr)
    token_losses = torch.compile(per_token_losses) if arguments.compile else per_token_losses
    warmup = 100
    began = time.time()
    for step in range(arguments.steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / arguments.steps))
        rate = min((step + 1) / warmup, 0.02 + 0.98 * cosine)
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * rate
        fading = step < arguments.copying_steps
        copying = 0.7 * (1 - step / arguments.copying_steps) if fading else 0.0
        ids, weights = documents.batch(arguments.batch, copying=copying)
        losses = token_losses(model, ids)
        target_weights = weights[:, 1:].flatten()
        loss = (losses * target_weights).sum() / target_weights.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == arguments.steps - 1:
            answers = losses[target_weights == 2.0]
            line = {
                "step": step,
                "loss": round(loss.item(), 4),
                "answer_loss": round(answers.mean().item() if len(answers) else math.nan, 4),
                "seconds": round(time.time() - began),
            }
            print(json.dumps(line), flush=True)
        if step % 250 == 249:
            save(model, documents.tokenizer, arguments.out)


def per_token_losses(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Return the loss of every token but the first of its row, flat, for (B, T) token ids."""
    logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write model and tokenizer to a directory that ``from_pretrained`` reads."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    texts = [book.text for book in load_books(["bundled:pretraining"])]
    if arguments.init:
        tokenizer = AutoTokenizer.from_pretrained(arguments.init)
    else:
        tokenizer = train_tokenizer(texts, arguments.vocab)
    documents = Documents(tokenizer, texts, arguments.window, arguments.full_share, arguments.seed)
    model = build_model(arguments, tokenizer)
    train(arguments, model, documents)
    save(model, tokenizer, arguments.out)


if __name__ == "__main__":
    main()
