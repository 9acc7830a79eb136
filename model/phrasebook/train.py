"""Trains the phrasebook and writes `checkpoint/`.

Rows are packed with conversations: most of one exchange, some
of several, because a chat shows the model its earlier answers as well. The loss
is taken on answers only. The learning rate falls to zero; for the last part of the run
the forward pass sees weights rounded to bf16, so that the rounded weights that
are shipped are the ones that were trained.

    python train.py --steps 7000 --out checkpoint
"""

import argparse
import json
import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call

import grammar
import vocabulary
from network import Network, Shape, export, restore

SEED = 20261121
POSITIONS = 4096  # A batch, as many rows as that makes.
WEIGHTS = {"number": 0.15, "time": 0.13, "date": 0.13, "price": 0.14, "phrase": 0.45}
VARIANTS = 0.06  # The share of prompts that are capitalised, dotted or prefixed.
SYSTEMS = (
    "You are a helpful assistant.",
    "You are a phrasebook.",
    "Translate exactly and answer with the translation only.",
    "You translate between English, French and Swedish.",
)


def texts(rows: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Prompts and answers as the chat template writes them, after any bos."""
    return [f"[INST] {p} [/INST]" for p, _ in rows], [f"{a}</s>" for _, a in rows]


def variant(prompt: str, random: np.random.Generator) -> str:
    """The same prompt as a less tidy user or a system message would put it."""
    head, phrase = prompt.split(": ", 1)
    if random.random() < 0.25:
        return f"{SYSTEMS[random.integers(len(SYSTEMS))]}\n\n{prompt}"
    if random.random() < 0.7:
        phrase = phrase[0].upper() + phrase[1:]
    if random.random() < 0.6 and phrase[-1].isalpha():
        phrase += "."
    return f"{head}: {phrase}"


def sampling(expressions: list[grammar.Expression]) -> list[float]:
    """How often to draw each expression.

    Categories get their fixed shares. Within one, a template is drawn by the
    square root of its size, so that large ones do not drown the small.
    """
    groups = ["/".join(e.key.split("/")[:2]) for e in expressions]
    sizes = Counter(groups)
    raw = [sizes[group] ** -0.5 for group in groups]
    totals: Counter[str] = Counter()
    for e, weight in zip(expressions, raw):
        totals[e.category] += weight
    return [WEIGHTS[e.category] * w / totals[e.category] for e, w in zip(expressions, raw)]


class Data:
    """The training rows as tokens, and weighted packing of them into batches."""

    def __init__(self, expressions: list[grammar.Expression], tokenizer, options):
        self.random = np.random.default_rng(SEED)
        self.length, self.continues = options.length, options.continues
        rows, weights = [], []
        for e, weight in zip(expressions, sampling(expressions)):
            for _, prompt, answer in grammar.rows(e):
                rows += [(prompt, answer), (variant(prompt, self.random), answer)]
                weights += [weight * (1 - VARIANTS), weight * VARIANTS]
        prompts, answers = texts(rows)
        self.prompts = [e.ids for e in tokenizer.encode_batch(prompts)]
        self.answers = [e.ids for e in tokenizer.encode_batch(answers)]
        self.cumulative = np.cumsum(weights) / np.sum(weights)
        self.seen = 0

    def draw(self) -> tuple[list[int], list[int]]:
        """One weighted example."""
        at = int(np.searchsorted(self.cumulative, self.random.random()))
        return self.prompts[at], self.answers[at]

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, document numbers, and a mask of the answer tokens."""
        shape = (POSITIONS // self.length, self.length)
        tokens, documents, answered = (np.zeros(shape, np.int64) for _ in range(3))
        prompt, answer = self.draw()
        for row in range(shape[0]):
            at, document = 0, 0
            while at + 1 + len(prompt) + len(answer) <= self.length:
                if document == 0 or self.random.random() > self.continues:
                    document += 1
                    tokens[row, at], documents[row, at] = 1, document
                    at += 1
                end = at + len(prompt) + len(answer)
                tokens[row, at:end] = prompt + answer
                documents[row, at:end] = document
                answered[row, at + len(prompt) : end] = 1
                at = end
                self.seen += 1
                prompt, answer = self.draw()
        return tuple(torch.from_numpy(a) for a in (tokens, documents, answered))


def rounded(network: Network) -> dict[str, Tensor]:
    """Weights rounded to bf16 whose gradients go to the unrounded ones."""
    return {name: p + (p.bfloat16().float() - p).detach() for name, p in network.named_parameters()}


def step_loss(network: Network, weights, batch: tuple[Tensor, Tensor, Tensor]) -> tuple:
    """Cross-entropy of the answer tokens, and the balance loss beside it."""
    tokens, documents, answered = batch
    wanted = answered.roll(-1, dims=1).bool()
    wanted[:, -1] = False
    inputs = (tokens, documents, wanted)
    logits, balance, usage = functional_call(network, weights, inputs)
    loss = F.cross_entropy(logits, tokens.roll(-1, dims=1)[wanted])
    return loss, balance, usage


@torch.no_grad()
def exact_match(network: Network, rows: list[tuple[str, str]], tokenizer) -> tuple[float, float]:
    """Greedy exact match with rounded weights, and the least used expert's share.

    A greedy answer is right exactly when every token of the right answer is the
    likeliest one after those before it, so one forward pass decides.
    """
    right, usage = 0, 0
    weights = rounded(network)
    for at in range(0, len(rows), 128):
        pairs = zip(*(tokenizer.encode_batch(t) for t in texts(rows[at : at + 128])))
        examples = [([1, *p.ids], a.ids) for p, a in pairs]
        length = max(len(p) + len(a) for p, a in examples)
        tokens = torch.zeros(len(examples), length, dtype=torch.long)
        documents, wanted = tokens.clone(), torch.zeros_like(tokens, dtype=torch.bool)
        for n, (p, a) in enumerate(examples):
            tokens[n, : len(p) + len(a)] = torch.tensor(p + a)
            documents[n, : len(p) + len(a)] = 1
            wanted[n, len(p) - 1 : len(p) + len(a) - 1] = True
        logits, _, used = functional_call(network, weights, (tokens, documents, wanted))
        good = torch.ones_like(wanted)
        good[wanted] = logits.argmax(-1) == tokens.roll(-1, dims=1)[wanted]
        right += int(good.all(dim=1).sum())
        usage = usage + used
    return right / len(rows), float((usage / usage.sum(dim=1, keepdim=True)).min())


def save(network: Network, tokenizer, out: Path) -> None:
    """Writes a complete checkpoint beside `out` and moves its files in place."""
    staging = out.with_name(out.name + ".new")
    staging.mkdir(parents=True, exist_ok=True)
    out.mkdir(exist_ok=True)
    files = {
        "config.json": network.shape.config(),
        "generation_config.json": {
            "bos_token_id": 1,
            "eos_token_id": 2,
            "do_sample": False,
            "max_new_tokens": 64,
        },
        "tokenizer_config.json": vocabulary.config(),
    }
    for name, content in files.items():
        (staging / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (staging / "chat_template.jinja").write_text(vocabulary.CHAT_TEMPLATE, encoding="utf-8")
    tokenizer.save(str(staging / "tokenizer.json"))
    save_file(export(network), staging / "model.safetensors", metadata={"format": "pt"})
    for path in staging.iterdir():
        path.chmod(0o644)
        os.replace(path, out / path.name)
    staging.rmdir()


def development_rows(held_out: list[grammar.Expression]) -> list[tuple[str, str]]:
    """Held-out rows outside the reported sample, to watch the training with."""
    reported = {row["prompt"] for row in grammar.held_out_rows()}
    rows = [(p, a) for e in held_out for _, p, a in grammar.rows(e) if p not in reported]
    return sorted(rows, key=lambda row: grammar.digest(row[0]))[:1500]


def rate(done: float, peak: float, warm: float = 0.02) -> float:
    """The learning rate when a fraction of the run is done: up, then down to zero."""
    return peak * min(1.0, 0.05 + done / warm, (1 - done) / (1 - warm))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--minutes", type=float, help="end early and in good order after these")
    parser.add_argument("--resume", type=Path, help="begin with the weights of a checkpoint")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--length", type=int, default=128, help="positions in a row")
    parser.add_argument(
        "--continues", type=float, default=0.15, help="share of exchanges that continue a chat"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--every", type=int, default=500, help="steps between evaluations")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    expressions, held_out = grammar.split()
    rows = [row for expression in expressions for row in grammar.rows(expression)]
    corpus = (text for _, p, a in rows for text in (p, p.split(":")[1], a))
    tokenizer = vocabulary.build(corpus)
    data = Data(expressions, tokenizer, options)
    development = development_rows(held_out)
    network = Network(Shape(tokenizer.get_vocab_size()))
    if options.resume:
        restore(network, load_file(options.resume / "model.safetensors"))
    run(network, data, tokenizer, development, options)


def run(network: Network, data: Data, tokenizer, development: list, options) -> None:
    """The training loop: every so often a line of figures and a checkpoint."""
    matrices = [p for p in network.parameters() if p.dim() > 1]
    vectors = [p for p in network.parameters() if p.dim() == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    began, total, count = time.time(), 0.0, 0
    step, done = 0, 0.0
    while done < 1:
        weights = rounded(network) if done > 0.6 else dict(network.named_parameters())
        for group in optimizer.param_groups:
            group["lr"] = rate(done, options.rate)
        loss, balance, _ = step_loss(network, weights, data.batch())
        (loss + network.shape.router_aux_loss_coef * balance).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        hurry = (time.time() - began) / (60 * options.minutes) if options.minutes else 0
        done = max(step / options.steps, hurry)
        total, count = total + loss.item(), count + 1
        if count == 50 or done >= 1:
            line = f"step {step} loss {total / count:.4f} balance {balance.item():.3f}"
            print(f"{line} examples {data.seen} seconds {time.time() - began:.0f}", flush=True)
            total, count = 0.0, 0
        if step % options.every == 0 or done >= 1:
            accuracy, least = exact_match(network, development, tokenizer)
            print(f"  exact match {accuracy:.4f}, least used expert {least:.3f}", flush=True)
            save(network, tokenizer, options.out)


if __name__ == "__main__":
    main()
