"""The grouped LoRA attention against diffusers' processor with PEFT's layers, frozen weights cast once, padding."""

import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0

from fdfo.model.acceleration import cast_frozen_weights, pad_rows, try_compiled
from fdfo.model.flow_model import FlowModel
from fdfo.model.lora_attention import GroupedJointAttention, LoraProduct
from fdfo.model.text import TextEmbeddings


@pytest.fixture
def trained(tiny: FlowModel) -> FlowModel:
    """The tiny model in float64 with an adapter that does something."""
    tiny.add_lora(8, 16, 0)
    tiny.pipe.transformer.double()
    with torch.no_grad():
        for i, parameter in enumerate(tiny.trainable()):
            parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(i))
    return tiny


def velocity(model: FlowModel) -> torch.Tensor:
    generator, config = torch.Generator().manual_seed(0), model.pipe.transformer.config
    x, tokens, pooled = (
        torch.randn(3, *shape, generator=generator, dtype=torch.float64)
        for shape in (model.latent_shape(64), (32, config.joint_attention_dim), (config.pooled_projection_dim,))
    )
    sigma = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    return model.velocity(x, sigma, TextEmbeddings(tokens, pooled), None, 1.0)


def everything(model: FlowModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Velocity with the adapter, its gradient, and the base model's velocity."""
    model.pipe.transformer.zero_grad()
    v = velocity(model)
    v.square().sum().backward()
    with model.base(), torch.no_grad():
        base = velocity(model)
    return v.detach(), torch.cat([p.grad.flatten() for p in model.trainable()]), base


def test_grouped_attention_is_diffusers_own(trained: FlowModel):
    trained.pipe.transformer.set_attn_processor(JointAttnProcessor2_0())
    own = everything(trained)
    trained.pipe.transformer.set_attn_processor(GroupedJointAttention())
    for ours, theirs in zip(everything(trained), own, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    assert (own[0] - own[2]).abs().max() > 1e-2  # the adapter does something


def test_gradient_of_the_product():
    generator = torch.Generator().manual_seed(0)
    x, W, bias, A, B = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 5, 6), (7, 6), (7,), (3, 6), (7, 3))
    )
    x, A, B = (t.requires_grad_() for t in (x, A, B))
    torch.testing.assert_close(LoraProduct.apply(x, W, bias, A, B), x @ W.T + bias + x @ A.T @ B.T)
    assert torch.autograd.gradcheck(LoraProduct.apply, (x, W, bias, A, B))


def test_frozen_weights_are_cast_once_as_autocast_would(tiny: FlowModel):
    tiny.add_lora(8, 16, 0)
    transformer = tiny.pipe.transformer.to(torch.bfloat16)
    for parameter in tiny.trainable():
        parameter.data = parameter.data.float()
    before = {name: p.detach().clone() for name, p in transformer.named_parameters()}
    cast_frozen_weights(transformer, torch.float16)
    kinds = {name: p.dtype for name, p in transformer.named_parameters()}
    assert all(kinds[name] == torch.float32 for name in kinds if "lora_" in name or "norm_q" in name)
    halves = [name for name, kind in kinds.items() if kind == torch.float16]
    assert len(halves) > 50
    for name, parameter in transformer.named_parameters():
        assert torch.equal(parameter, before[name].to(parameter.dtype))
    assert len(tiny.trainable()) == 2 * len(tiny.lora_targets)


def test_padding_repeats_a_row():
    rows = torch.arange(6.0).view(3, 2)
    assert pad_rows(rows, 3) is rows and pad_rows(rows, 5).tolist() == [*rows.tolist(), [0, 1], [0, 1]]


def test_batches_of_one_size_change_nothing(tiny: FlowModel):
    """As where blocks are compiled: 5 rows as 2 + 2 + 1 padded, in sampling and in training, to the bit alike."""
    tiny.add_lora(8, 16, 0)
    text = tiny.encode(["a red ring on a blue background"] * 5)
    generator = torch.Generator().manual_seed(4)
    x, sigma = torch.randn(5, *tiny.latent_shape(64), generator=generator), torch.rand(5, generator=generator)
    plain = tiny.velocity(x, sigma, text, None, 1.0)
    plain.sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in tiny.trainable()])
    for parameter in tiny.trainable():
        parameter.grad = None
    tiny.compiled_rows = 2
    with torch.no_grad():
        sampled = tiny.velocity(x, sigma, text, None, 1.0)
    trained = tiny.velocity(x, sigma, text, None, 1.0)
    assert not sampled.requires_grad and torch.equal(sampled, trained)
    torch.testing.assert_close(trained, plain, rtol=0, atol=1e-5)
    trained.sum().backward()
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in tiny.trainable()]), gradient, rtol=1e-4, atol=1e-3)


def test_a_failing_compiler_means_eager(tiny: FlowModel, monkeypatch: pytest.MonkeyPatch):
    """Blocks that cannot be compiled stay eager, with the reason; the run goes on."""
    tiny.add_lora(8, 16, 0)

    def fail(*arguments: object) -> None:
        raise RuntimeError("no compiler here\nat all")

    monkeypatch.setattr(tiny, "_warm_up", fail)
    assert tiny.accelerate(4, 64) == "RuntimeError: no compiler here"
    assert tiny.compiled_rows is None
    text = tiny.encode(["a red ring on a blue background"])
    assert tiny.velocity(torch.randn(1, *tiny.latent_shape(64)), torch.rand(1), text, None, 1.0).isfinite().all()


@pytest.mark.skipif("deterministic" not in torch._inductor.list_options(), reason="PyTorch 2.9 has no such mode")
def test_blocks_are_compiled_in_the_deterministic_mode(monkeypatch: pytest.MonkeyPatch):
    """Else each process chooses by timing how its kernels sum. The compiler is asked in a pass of its own, which ends it there."""

    def stop(graph: torch.fx.Graph) -> None:
        raise RuntimeError(f"deterministic: {torch._inductor.config.deterministic}")

    monkeypatch.setattr(torch._inductor.config, "post_grad_custom_post_pass", stop)
    layer = torch.nn.LayerNorm(3)
    assert try_compiled([(layer, False)], lambda: layer(torch.ones(1, 3))).endswith("RuntimeError: deterministic: True")
    assert layer(torch.ones(1, 3)).isfinite().all()
