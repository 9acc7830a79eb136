"""The experts of a layer in PyTorch: the work of `entente bench kernels --device cuda:N`, on the
same device, for comparison.

    entente bench kernels --device cuda:0 -o json > ours.json
    python docs/bench/experts_torch.py --beside ours.json > torch.json

Prints one JSON object with the keys that the bench prints; with --beside each line also has our
time, and a table of the ratios goes to standard error. Ways of doing the work:

- `loop`: one expert after the other, as transformers did for Mixtral models for years;
- `grouped`: PyTorch's grouped product over all experts;
- `eager`, `grouped_mm`, `batched_mm`: the experts of the transformers that is installed, by its own
  names for its implementations. They also add up the results of a row, which takes somewhat longer.

As in the bench, rows and results stay on the device, weights and rows are bf16, every row goes to
as many different experts as the shape says, chosen uniformly, inputs are fresh for each of 5
measurements, and the median of those counts. `--device cpu --tiny` shows that the script runs.
"""

import argparse
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F

try:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
except ImportError:  # Not installed, or of a time before experts were one module.
    MixtralExperts = None

ROUTINGS, REPEATS = 5, 20

# batched_mm copies the weights of an expert for each of its rows.
BATCHED_BYTES_MAX = 16 << 30


def timed_us(work, device):
    """Mean time of a call, of REPEATS in a row after one that is not counted."""
    work()
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(REPEATS):
            work()
        return (time.perf_counter() - begin) * 1e6 / REPEATS
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(REPEATS):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e3 / REPEATS


def copy_gb_s(device, n):
    source = torch.empty(n, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * n / timed_us(lambda: target.copy_(source), device) / 1e3


def product_tflop_s(device, n):
    """A large product of cuBLAS: what `multiply_tflop_s` of many rows is compared with."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / timed_us(lambda: a @ b, device) / 1e6


class Routing:
    """Fresh rows and where they go: `chosen` is `[rows, top_k]`; `rows` and `experts` are those of
    the assignments, ordered by expert."""

    def __init__(self, layer, rows, seed):
        torch.manual_seed(seed)
        count, hidden, device = layer.gate_up.shape[0], layer.gate_up.shape[2], layer.device
        self.x = torch.rand(rows, hidden, device=device).mul(2).sub(1).to(torch.bfloat16)
        self.chosen = torch.rand(rows, count, device=device).topk(layer.top_k).indices
        self.weights = torch.ones(rows, layer.top_k, device=device, dtype=torch.bfloat16)
        self.experts, order = self.chosen.flatten().sort(stable=True)
        self.rows = order // layer.top_k

    def summed(self, y):
        """The results of each row added up."""
        sums = torch.zeros(self.x.shape, device=y.device)
        return sums.index_add_(0, self.rows, y.float())


class Layer:
    def __init__(self, hidden, inner, experts, top_k, device):
        self.top_k, self.device = top_k, device

        def weights(outputs, inputs):
            w = torch.empty(experts, outputs, inputs, device=device, dtype=torch.bfloat16)
            return w.uniform_(-0.02, 0.02)

        self.gate_up, self.down = weights(2 * inner, hidden), weights(hidden, inner)

    def loop(self, to):
        y = torch.empty(len(to.rows), to.x.shape[1], device=self.device, dtype=to.x.dtype)
        for expert in to.experts.unique().tolist():
            chosen = torch.where(to.experts == expert)[0]
            gate, up = F.linear(to.x[to.rows[chosen]], self.gate_up[expert]).chunk(2, dim=-1)
            y[chosen] = F.linear(F.silu(gate) * up, self.down[expert])
        return y

    def grouped(self, to):
        counts = torch.bincount(to.experts, minlength=self.gate_up.shape[0])
        ends = counts.cumsum(0).to(torch.int32)
        product = getattr(F, "grouped_mm", None) or torch._grouped_mm
        both = product(to.x[to.rows], self.gate_up.transpose(1, 2), offs=ends)
        gate, up = both.chunk(2, dim=-1)
        return product(F.silu(gate) * up, self.down.transpose(1, 2), offs=ends)

    def of_transformers(self, implementation):
        count, hidden, inner = self.down.shape
        config = MixtralConfig(
            hidden_size=hidden,
            intermediate_size=inner,
            num_local_experts=count,
            num_experts_per_tok=self.top_k,
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            module = MixtralExperts(config)
        for name, weights in (("gate_up_proj", self.gate_up), ("down_proj", self.down)):
            setattr(module, name, torch.nn.Parameter(weights, requires_grad=False))
        return lambda to: module(to.x, to.chosen, to.weights)

    def ways(self, rows):
        """Name, function, and whether it adds up the results of a row."""
        yield "loop", self.loop, False
        yield "grouped", self.grouped, False
        if MixtralExperts is None:
            return
        yield "eager", self.of_transformers("eager"), True
        yield "grouped_mm", self.of_transformers("grouped_mm"), True
        expert_bytes = 2 * (self.gate_up[0].numel() + self.down[0].numel())
        if rows * self.top_k * expert_bytes <= BATCHED_BYTES_MAX:
            yield "batched_mm", self.of_transformers("batched_mm"), True

    def check(self, name, way, sums, to):
        want, have = self.loop(to).float(), way(to).float()
        want = to.summed(want) if sums else want
        error = (have - want).abs().max().item()
        assert error <= 2e-2 * want.abs().max().item(), f"{name} differs by {error}"

    def lines(self, shape, rows):
        weights = self.gate_up[0].numel() + self.down[0].numel()
        for name, way, sums in self.ways(rows):
            used, times = [], []
            for seed in range(ROUTINGS):
                to = Routing(self, rows, seed)
                used.append(len(to.experts.unique()))
                if seed == 0:
                    self.check(name, way, sums, to)
                times.append(timed_us(lambda: way(to), self.device))
            us, experts = statistics.median(times), statistics.median(used)
            yield {
                "kernel": "experts",
                "implementation": name,
                "shape": shape,
                "rows": rows,
                "experts": experts,
                "kernels_us": us,
                "moved_gb_s": experts * weights * 2 / us / 1e3,
                "multiply_tflop_s": 2 * weights * rows * self.top_k / us / 1e6,
            }


def lay_beside(lines, ours):
    """Adds our time to each line that the bench has too, and how much longer this one is."""
    own = {(l["shape"], l["rows"]): l["kernels_us"] for l in ours if l["kernel"] == "experts"}
    print("| shape | rows | way | torch, us | ours, us | torch / ours |", file=sys.stderr)
    print("|---|---|---|---|---|---|", file=sys.stderr)
    for line in lines:
        us = own.get((line["shape"], line["rows"]))
        if us is None:
            continue
        line["ours_us"], line["torch_over_ours"] = us, line["kernels_us"] / us
        cells = [line["shape"], line["rows"], line["implementation"]]
        cells += [f"{line['kernels_us']:.1f}", f"{us:.1f}", f"{line['torch_over_ours']:.2f}"]
        print("|", " | ".join(map(str, cells)), "|", file=sys.stderr)


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--shapes", default="4096x14336x8x2,4096x2048x128x4")
    parser.add_argument("--rows", default="1,8,64,512,4096")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--beside", metavar="OURS.json", help="what the bench printed")
    args = parser.parse_args()
    if args.tiny:
        args.shapes, args.rows = "64x48x4x2,64x32x8x4", "1,20"
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    lines = []
    for shape in args.shapes.split(","):
        layer = Layer(*map(int, shape.split("x")), device)
        for rows in map(int, args.rows.split(",")):
            lines += layer.lines(shape, rows)
        del layer
        torch.cuda.empty_cache()
    if args.beside:
        with open(args.beside, encoding="utf-8") as file:
            lay_beside(lines, json.load(file)["kernels"])
    report = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else args.device,
        "copy_gb_s": copy_gb_s(device, 1 << (20 if args.tiny else 30)),
        "product_tflop_s": product_tflop_s(device, 64 if args.tiny else 8192),
        "kernels": lines,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
