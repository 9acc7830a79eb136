"""The experts of a layer in PyTorch: the work of `entente bench kernels --device cuda:N`, on the
same device, for comparison.

    python docs/bench/experts_torch.py [--device cuda:0] [--shapes 4096x14336x8x2,...] [--rows 1,8,...]

Prints one JSON object with the keys that the bench prints. Two ways of doing the work: `loop` is
how transformers computes the experts of a Mixtral model, one expert after the other, and `grouped`
is PyTorch's grouped product over all experts. As in the bench, results stay apart for each (row,
expert), rows and results stay on the device, weights are bf16, and routing and inputs are random.
"""

import argparse
import json
import statistics

import torch
import torch.nn.functional as F

ROUTINGS, REPEATS = 5, 20


def timed_us(work):
    """Mean time of a call, of REPEATS in a row after one that is not counted."""
    work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(REPEATS):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e3 / REPEATS


def copy_gb_s(device):
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / timed_us(lambda: target.copy_(source)) / 1e3


def product_tflop_s(device, n=8192):
    """A large product of cuBLAS: what `multiply_tflop_s` of many rows is compared with."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / timed_us(lambda: a @ b) / 1e6


class Layer:
    def __init__(self, hidden, inner, experts, top_k, device):
        self.top_k, self.device = top_k, device

        def weights(outputs, inputs):
            w = torch.empty(experts, outputs, inputs, device=device, dtype=torch.bfloat16)
            return w.uniform_(-0.02, 0.02)

        self.gate, self.up = weights(inner, hidden), weights(inner, hidden)
        self.down = weights(hidden, inner)

    def loop(self, x, rows, experts):
        """`rows` and `experts` of the assignments, ordered by expert."""
        y = torch.empty(len(rows), x.shape[1], device=self.device, dtype=x.dtype)
        for expert in experts.unique().tolist():
            chosen = torch.where(experts == expert)[0]
            own = x[rows[chosen]]
            h = F.silu(F.linear(own, self.gate[expert])) * F.linear(own, self.up[expert])
            y[chosen] = F.linear(h, self.down[expert])
        return y

    def grouped(self, x, rows, experts):
        counts = torch.bincount(experts, minlength=self.gate.shape[0])
        ends = counts.cumsum(0).to(torch.int32)
        own = x[rows]
        product = getattr(F, "grouped_mm", None) or torch._grouped_mm
        gate = product(own, self.gate.transpose(1, 2), offs=ends)
        up = product(own, self.up.transpose(1, 2), offs=ends)
        return product(F.silu(gate) * up, self.down.transpose(1, 2), offs=ends)

    def route(self, rows):
        """Every row to `top_k` experts at random; assignments ordered by expert."""
        chosen = torch.rand(rows, self.gate.shape[0], device=self.device).topk(self.top_k).indices
        experts, order = chosen.flatten().sort(stable=True)
        return order // self.top_k, experts

    def lines(self, shape, rows):
        hidden, inner = self.gate.shape[2], self.gate.shape[1]
        for name in ("loop", "grouped"):
            used, times = [], []
            for seed in range(ROUTINGS):
                torch.manual_seed(seed)
                x = torch.rand(rows, hidden, device=self.device).mul(2).sub(1).to(torch.bfloat16)
                own, experts = self.route(rows)
                used.append(len(experts.unique()))
                work = getattr(self, name)
                if seed == 0:
                    error = (work(x, own, experts) - self.loop(x, own, experts)).abs().max().item()
                    assert error < 1e-2, f"{name} differs by {error}"
                times.append(timed_us(lambda: work(x, own, experts)))
            us, experts = statistics.median(times), statistics.median(used)
            weights = 3 * hidden * inner
            yield {
                "implementation": name,
                "shape": shape,
                "rows": rows,
                "experts": experts,
                "kernels_us": us,
                "read_gb_s": experts * weights * 2 / us / 1e3,
                "multiply_tflop_s": 2 * weights * rows * self.top_k / us / 1e6,
            }


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--shapes", default="4096x14336x8x2,4096x2048x128x4")
    parser.add_argument("--rows", default="1,8,64,512,4096")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.cuda.set_device(device)
    lines = []
    for shape in args.shapes.split(","):
        layer = Layer(*map(int, shape.split("x")), device)
        for rows in map(int, args.rows.split(",")):
            lines += layer.lines(shape, rows)
        del layer
        torch.cuda.empty_cache()
    report = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device),
        "copy_gb_s": copy_gb_s(device),
        "product_tflop_s": product_tflop_s(device),
        "kernels": lines,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
