"""The joint attention with its LoRA as few large matrix products: same function as diffusers' processor with PEFT's layers.

Queries, keys and values of one stream come from one product [x, x A^T] [W, s B]^T: the LoRA's part is added inside the
matrix unit's float32 accumulator, where separate layers round every part and pass over the activations several times.
"""

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn


class LoraProduct(torch.autograd.Function):
    """x [..., K], frozen W [M, K] and bias [M], A [r, K], B [M, r] -> x W^T + bias + (x A^T) B^T: [..., M], all of one type.

    Written out because autograd would also form the gradient of the frozen weights, at the cost of another forward.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B):
        both = torch.cat([x, x @ A.T], dim=-1)  # [..., K + r]
        ctx.save_for_backward(both, weight, A, B)
        return F.linear(both, torch.cat([weight, B], dim=1), bias)

    @staticmethod
    def backward(ctx, dy):
        both, weight, A, B = ctx.saved_tensors
        sizes = [A.shape[1], A.shape[0]]
        dx, dxa = (dy @ torch.cat([weight, B], dim=1)).split(sizes, dim=-1)
        dx = dx + dxa @ A
        x, xa = both.flatten(0, -2).split(sizes, dim=-1)
        dA = dxa.flatten(0, -2).T @ x
        dB = dy.flatten(0, -2).T @ xa
        return dx, None, None, dA, dB


def grouped_linear(layers: list[nn.Module], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the outputs of linear layers that share their input x [..., K], with or without LoRA, from one product: [..., M] each."""
    base = [getattr(layer, "base_layer", layer) for layer in layers]
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    x, weight, bias = x.to(dtype), torch.cat([b.weight for b in base]).to(dtype), torch.cat([b.bias for b in base]).to(dtype)
    adapted = [layer for layer in layers if hasattr(layer, "lora_A") and not layer.disable_adapters]
    if adapted:
        assert len(adapted) == len(layers)
        A = torch.cat([layer.lora_A["default"].weight for layer in layers]).to(dtype)  # [layers * r, K]
        B = torch.block_diag(*[layer.scaling["default"] * layer.lora_B["default"].weight for layer in layers]).to(dtype)
        y = LoraProduct.apply(x, weight, bias, A, B)
    else:
        y = F.linear(x, weight, bias)
    return y.split([b.out_features for b in base], dim=-1)


class GroupedJointAttention:
    """Attention processor for SD3's blocks: one product for queries, keys and values of each stream."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """hidden_states [N, S, D] of the image, encoder_hidden_states [N, L, D] of the text -> the same shapes, attended to each other."""
        assert attention_mask is None, "SD3 attends to everything"
        pixels = hidden_states.shape[1]
        q, k, v = self.heads(attn, [attn.to_q, attn.to_k, attn.to_v], hidden_states, attn.norm_q, attn.norm_k)
        if encoder_hidden_states is not None:
            layers = [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]
            text = self.heads(attn, layers, encoder_hidden_states, attn.norm_added_q, attn.norm_added_k)
            q, k, v = (torch.cat(pair, dim=1) for pair in zip((q, k, v), text, strict=True))
        # Heads after tokens in memory: the attention answers in the same order, so that merging the heads copies nothing.
        q, k, v = (part.transpose(1, 2) for part in (q.to(v.dtype), k.to(v.dtype), v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [N, S + L, D]
        (image,) = grouped_linear([attn.to_out[0]], mixed[:, :pixels])
        if encoder_hidden_states is None:
            return image
        if attn.context_pre_only:
            return image, mixed[:, pixels:]
        (words,) = grouped_linear([attn.to_add_out], mixed[:, pixels:])
        return image, words

    def heads(
        self, attn: Attention, layers: list[nn.Module], x: torch.Tensor, norm_q: nn.Module | None, norm_k: nn.Module | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and values of one stream: x [N, S, D] -> [N, S, H, D / H] each, queries and keys normalised."""
        q, k, v = (y.unflatten(-1, (attn.heads, -1)) for y in grouped_linear(layers, x))
        return (q if norm_q is None else norm_q(q)), (k if norm_k is None else norm_k(k)), v
