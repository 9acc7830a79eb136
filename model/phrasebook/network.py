"""The Mixtral architecture, small and written for training on a few cores.

Experts are stacked into one tensor per layer and run on their rows sorted by
expert, so that a step costs two experts per row and not eight. The equations
are those of MixtralForCausalLM: `export` writes the classic on-disk names, and
the logits that transformers computes from them agree to about 1e-5.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Shape:
    """The sizes, under the names that config.json gives them."""

    vocab_size: int
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    router_aux_loss_coef: float = 0.02

    def config(self) -> dict:
        """The checkpoint's config.json."""
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            **asdict(self),
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "output_router_logits": False,
            "router_jitter_noise": 0.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_cache": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": None,
            "torch_dtype": "bfloat16",
        }


def matrix(*shape: int, scale: float = 1.0) -> nn.Parameter:
    """A weight with the variance that keeps its output at the input's scale."""
    return nn.Parameter(torch.randn(*shape) * scale * shape[-1] ** -0.5)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the half-split convention."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, shape: Shape):
        super().__init__()
        hidden, self.head = shape.hidden_size, shape.head_dim
        self.heads, self.kv_heads = shape.num_attention_heads, shape.num_key_value_heads
        self.qkv = matrix((self.heads + 2 * self.kv_heads) * self.head, hidden)
        self.out = matrix(hidden, self.heads * self.head, scale=0.5)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = F.linear(x, self.qkv).view(batch, length, -1, self.head).transpose(1, 2)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = rotate(q, *rope), rotate(k, *rope)
        repeat = self.heads // self.kv_heads
        k, v = (t.repeat_interleave(repeat, dim=1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=mask)
        return F.linear(mixed.transpose(1, 2).reshape(batch, length, -1), self.out)


class Experts(nn.Module):
    """The sparse block: a router and its SwiGLU experts."""

    def __init__(self, shape: Shape):
        super().__init__()
        hidden, inner = shape.hidden_size, shape.intermediate_size
        self.top, self.count = shape.num_experts_per_tok, shape.num_local_experts
        self.gate = matrix(self.count, hidden)
        self.w13 = matrix(self.count, 2 * inner, hidden)
        self.w2 = matrix(self.count, hidden, inner, scale=0.7)

    def forward(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the output, the balance loss and the rows sent to each expert."""
        probs = F.linear(x, self.gate).float().softmax(-1)
        weight, chosen = probs.topk(self.top, dim=-1)
        weight = weight / weight.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=self.count).tolist()
        rows = order // self.top
        parts = x[rows].split(counts)
        outputs = []
        for part, w13, w2 in zip(parts, self.w13.unbind(), self.w2.unbind()):
            gate, up = F.linear(part, w13).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate) * up, w2))
        scaled = torch.cat(outputs) * weight.flatten()[order, None]
        y = torch.zeros_like(x).index_add(0, rows, scaled.to(x.dtype))
        used = F.one_hot(chosen[real], self.count).sum(dim=(0, 1)).float()
        share = used / used.sum()
        balance = self.count * (share * probs[real].mean(0)).sum()
        return y, balance, used


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.eps = shape.rms_norm_eps
        self.norm1 = nn.Parameter(torch.ones(shape.hidden_size))
        self.norm2 = nn.Parameter(torch.ones(shape.hidden_size))
        self.attention = Attention(shape)
        self.experts = Experts(shape)

    def forward(self, x: Tensor, rope: tuple, mask: Tensor, real: Tensor) -> tuple:
        size = x.shape[-1:]
        x = x + self.attention(F.rms_norm(x, size, self.norm1, self.eps), rope, mask)
        flat = F.rms_norm(x, size, self.norm2, self.eps).flatten(0, 1)
        y, balance, used = self.experts(flat, real)
        return x + y.view_as(x), balance, used


class Network(nn.Module):
    """The whole model, over rows that may hold several documents."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.embed = nn.Parameter(torch.randn(shape.vocab_size, shape.hidden_size) * 0.5)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(shape.hidden_size))
        self.head = matrix(shape.vocab_size, shape.hidden_size)

    def rope(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines for the first `length` positions."""
        half = torch.arange(0, self.shape.head_dim, 2) / self.shape.head_dim
        angles = torch.outer(torch.arange(length).float(), self.shape.rope_theta**-half)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    def forward(self, tokens: Tensor, document: Tensor, wanted: Tensor) -> tuple:
        """Logits at the `wanted` positions, mean balance loss, usage per layer.

        `document` numbers the documents of a row from 1, and 0 is padding;
        rows attend only within their document, backwards.
        """
        length = tokens.shape[1]
        same = document[:, :, None] == document[:, None, :]
        mask = (same & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
        real = (document > 0).flatten().nonzero()[:, 0]
        x, rope = F.embedding(tokens, self.embed), self.rope(length)
        balances, usage = [], []
        for layer in self.layers:
            x, balance, used = layer(x, rope, mask, real)
            balances.append(balance)
            usage.append(used)
        x = F.rms_norm(x[wanted], x.shape[-1:], self.norm, self.shape.rms_norm_eps)
        return F.linear(x, self.head), torch.stack(balances).mean(), torch.stack(usage)


def export(network: Network) -> dict[str, Tensor]:
    """The weights in bf16 under Mixtral's classic checkpoint names."""
    shape = network.shape
    q, kv = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    named = {
        "model.embed_tokens.weight": network.embed,
        "model.norm.weight": network.norm,
        "lm_head.weight": network.head,
    }
    for n, layer in enumerate(network.layers):
        at, block = f"model.layers.{n}", f"model.layers.{n}.block_sparse_moe"
        named[f"{at}.input_layernorm.weight"] = layer.norm1
        named[f"{at}.post_attention_layernorm.weight"] = layer.norm2
        for name, part in zip("qkv", layer.attention.qkv.split((q, kv, kv))):
            named[f"{at}.self_attn.{name}_proj.weight"] = part
        named[f"{at}.self_attn.o_proj.weight"] = layer.attention.out
        named[f"{block}.gate.weight"] = layer.experts.gate
        for e, (w13, w2) in enumerate(zip(layer.experts.w13, layer.experts.w2)):
            w1, w3 = w13.chunk(2)
            for name, part in (("w1", w1), ("w2", w2), ("w3", w3)):
                named[f"{block}.experts.{e}.{name}.weight"] = part
    return {name: part.detach().bfloat16().contiguous() for name, part in named.items()}


@torch.no_grad()
def restore(network: Network, named: dict[str, Tensor]) -> None:
    """The inverse of `export`: reads checkpoint weights into the network."""
    network.embed.copy_(named["model.embed_tokens.weight"])
    network.norm.copy_(named["model.norm.weight"])
    network.head.copy_(named["lm_head.weight"])
    for n, layer in enumerate(network.layers):
        at, block = f"model.layers.{n}", f"model.layers.{n}.block_sparse_moe"
        layer.norm1.copy_(named[f"{at}.input_layernorm.weight"])
        layer.norm2.copy_(named[f"{at}.post_attention_layernorm.weight"])
        parts = [named[f"{at}.self_attn.{name}_proj.weight"] for name in "qkv"]
        layer.attention.qkv.copy_(torch.cat(parts))
        layer.attention.out.copy_(named[f"{at}.self_attn.o_proj.weight"])
        layer.experts.gate.copy_(named[f"{block}.gate.weight"])
        for e in range(network.shape.num_local_experts):
            w1, w2, w3 = (named[f"{block}.experts.{e}.{w}.weight"] for w in ("w1", "w2", "w3"))
            layer.experts.w13[e].copy_(torch.cat((w1, w3)))
            layer.experts.w2[e].copy_(w2)
