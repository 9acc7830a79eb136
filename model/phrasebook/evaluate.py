"""Scores a checkpoint with transformers on the held-out phrases.

This is the reference for `entente eval`: the same prompts through the chat
template, greedy answers, exact match. It also counts which experts the router
chose for every row, prompts and answers alike, because an expert that is never
used would make a poor demonstration of distributing experts.

    python evaluate.py --checkpoint checkpoint --compute float32
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent


class Usage:
    """Counts, per layer, the rows that the router sent to each expert."""

    def __init__(self, model: torch.nn.Module):
        self.real = torch.empty(0, dtype=torch.bool)
        self.layers = [torch.zeros(model.config.num_local_experts) for _ in model.model.layers]
        for counts, layer in zip(self.layers, model.model.layers):
            layer.mlp.gate.register_forward_hook(self.hook(counts))

    def hook(self, counts: torch.Tensor):
        """A hook that reads the experts chosen for the rows that are not padding."""

        def count(_gate, _inputs, output) -> None:
            chosen = output[-1][self.real.flatten()]
            counts.add_(chosen.flatten().bincount(minlength=len(counts)))

        return count


@torch.no_grad()
def answers(model, tokenizer, prompts: list[str], usage: Usage) -> list[str]:
    """Greedy answers to prompts of equal token length, so that none is padded."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens, cache, out = inputs["input_ids"], None, []
    alive = torch.ones(len(prompts), dtype=torch.bool)
    for _ in range(64):
        usage.real = alive[:, None].expand_as(tokens)
        result = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        cache, tokens = result.past_key_values, result.logits[:, -1:].argmax(-1)
        out.append(torch.where(alive[:, None], tokens, tokenizer.eos_token_id))
        alive = alive & (tokens[:, 0] != tokenizer.eos_token_id)
        if not alive.any():
            break
    return tokenizer.batch_decode(torch.cat(out, dim=1), skip_special_tokens=True)


def by_length(tokenizer, rows: list[dict]) -> list[list[dict]]:
    """Rows in batches whose prompts have the same number of tokens."""
    groups = defaultdict(list)
    for row in rows:
        groups[len(tokenizer.encode(row["prompt"]))].append(row)
    return [group[at : at + 64] for group in groups.values() for at in range(0, len(group), 64)]


def report(title: str, scores: dict[str, list[bool]]) -> None:
    """One line per direction or category."""
    for name, marks in sorted(scores.items()):
        line = f"{title} {name:<8} {100 * sum(marks) / len(marks):6.2f} %"
        print(f"{line}  ({sum(marks)} of {len(marks)})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--heldout", type=Path, default=HERE / "heldout.jsonl")
    parser.add_argument("--compute", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.bfloat16)
    model = model.to(getattr(torch, options.compute)).eval()
    rows = [json.loads(line) for line in options.heldout.read_text("utf-8").splitlines()]
    usage, scores = Usage(model), {key: defaultdict(list) for key in ("direction", "category")}
    everything = {"overall": []}
    for batch in by_length(tokenizer, rows):
        given = answers(model, tokenizer, [row["prompt"] for row in batch], usage)
        for row, answer in zip(batch, given):
            right = answer == row["answer"]
            everything["overall"].append(right)
            for key, marks in scores.items():
                marks[row[key]].append(right)
            if not right:
                print(f"wrong: {row['prompt']} -> {answer!r}, not {row['answer']!r}")
    for title, marks in (*scores.items(), ("accuracy", everything)):
        report(title, marks)
    for n, counts in enumerate(usage.layers):
        shares = " ".join(f"{100 * share:5.1f}" for share in counts / counts.sum())
        print(f"layer {n}: per cent of routed rows per expert {shares}")


if __name__ == "__main__":
    main()
