"""Tiny models with fixed weights and inputs, and their peers in diffusers and transformers, for the parity tests.

A case is a kind of model and a name: `run(*ours("unet", "sdxl"))` and `run(*peer("unet", "sdxl"))` give the outputs and
the gradients of both. Weights come from numpy's frozen random stream, so a golden file holds results only.
"""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minipic.models.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from minipic.models.unet import UNet, UNetConfig
from minipic.models.vae import VAE, VAEConfig
from minipic.weights.configs import config_to_json

GOLDENS = Path(__file__).parent / "goldens"
OFFICIAL = Path(__file__).parents[2] / "shared" / "official"  # configs that the repository may not contain

UNETS = {
    "sdxl": UNetConfig(  # three levels: 10x14 latents halve to 5x7, then to 3x4, and must come back
        block_out_channels=(16, 32, 48), transformer_layers_per_block=(0, 1, 2), attention_head_dim=(1, 2, 3),
        cross_attention_dim=24, addition_time_embed_dim=8, projection_class_embeddings_input_dim=20 + 6 * 8,
        norm_num_groups=8),
    "refiner": UNetConfig(  # five size ids, a resolution without attention at either end, one number for the depths
        block_out_channels=(16, 32, 32, 32), transformer_layers_per_block=2, attention_head_dim=(1, 2, 4, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=20, addition_time_embed_dim=8, projection_class_embeddings_input_dim=20 + 5 * 8,
        norm_num_groups=4, layers_per_block=1),
    "sd15": UNetConfig(  # 1x1 convolutions around the transformers, one number for the heads, no sizes
        block_out_channels=(16, 32, 48, 48), transformer_layers_per_block=1, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, cross_attention_dim=20,
        use_linear_projection=False, addition_embed_type=None, addition_time_embed_dim=None,
        projection_class_embeddings_input_dim=None, norm_num_groups=8),
    "inpainting": UNetConfig(  # nine channels in, four out; transformers of depth 0; an eps of its own
        in_channels=9, block_out_channels=(16, 24), transformer_layers_per_block=(0, 1), attention_head_dim=(2, 3),
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=20, addition_embed_type=None, addition_time_embed_dim=None,
        projection_class_embeddings_input_dim=None, norm_num_groups=4, norm_eps=1e-3, layers_per_block=3),
}
VAES = {
    "sdxl": VAEConfig(block_out_channels=(16, 24, 32), norm_num_groups=4),
    "flux": VAEConfig(block_out_channels=(16, 32), norm_num_groups=8, latent_channels=16, layers_per_block=1,
                      shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False, use_post_quant_conv=False),
}
TEXTS = {
    f"{activation}{'_projected' * projected}": CLIPTextConfig(
        vocab_size=60, max_position_embeddings=12, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, projection_dim=24, hidden_act=activation, with_projection=projected)
    for activation in ("quick_gelu", "gelu") for projected in (False, True)
}
VISIONS = {
    activation: CLIPVisionConfig(image_size=20, patch_size=5, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                 num_attention_heads=4, projection_dim=24, hidden_act=activation)
    for activation in ("quick_gelu", "gelu")
}
CASES = {"unet": UNETS, "vae": VAES, "text": TEXTS, "vision": VISIONS}
MODELS = {"unet": UNet, "vae": VAE, "text": CLIPText, "vision": CLIPVision}


def numbers(shape, seed):
    """Standard normal numbers that no version of numpy changes."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(tuple(shape)))


def fill(model):
    """Give every parameter numbers of a useful size: no zero bias and no unit gain hides a mistake."""
    for seed, (name, p) in enumerate(sorted(model.named_parameters())):
        values = numbers(p.shape, seed)
        if p.ndim > 1 and "embedding." not in name:
            values = values / p[0].numel() ** 0.5  # unit gain, so that the deepest level is heard in the output
        elif name.endswith("weight") and p.ndim == 1:  # the gain of a norm
            values = 1 + values / 4
        p.data.copy_(values / 4 if name.endswith("bias") else values)
    return model


def inputs(kind, config):
    """t and sizes are small here: float32's last bit of a frequency differs among CPUs, and t = 999 turns it into a
    change of 1e-4 in the output, which a golden made elsewhere would not forgive. test_unet.py has the large ones."""
    if kind == "unet":
        made = {"x": numbers((2, config.in_channels, 10, 14), 1), "t": torch.tensor([3.25, 0.5]),
                "context": numbers((2, 7, config.cross_attention_dim), 2)}
        if config.addition_embed_type:
            sizes = torch.tensor([[4, 3, 0, 1, 2, 5], [2, 1, 3, 0, 2, 2]])
            count = (config.projection_class_embeddings_input_dim - 20) // config.addition_time_embed_dim
            made |= {"pooled": numbers((2, 20), 3), "size_ids": sizes[:, :count]}
        return made
    if kind == "vae":
        return {"image": numbers((2, 3, 20, 28), 1) / 2, "z": numbers((2, config.latent_channels, 5, 7), 2)}
    if kind == "text":  # padded with the end token, padded with 0, not padded; 58 starts and 59 ends a text
        return {"ids": torch.tensor([[58, 5, 6, 7, 59, 59, 59, 59, 59, 59], [58, 9, 8, 59, 0, 0, 0, 0, 0, 0],
                                     [58, 1, 2, 3, 4, 5, 6, 7, 8, 59]])}
    return {"images": numbers((2, 3, config.image_size, config.image_size), 1)}


def unet_outputs(model, x, t, context, pooled=None, size_ids=None):
    return {"prediction": model(x, t, context, pooled, size_ids)}


def vae_outputs(model, image, z):
    mean, logvar = model.encode(image)
    return {"mean": mean, "logvar": logvar, "picture": model.decode(z)}


def text_outputs(model, ids):
    hidden_states, pooled = model(ids)
    return {"hidden_states": torch.stack(hidden_states), "last": model.last(hidden_states), "pooled": pooled}


def vision_outputs(model, images):
    hidden_states, pooled = model(images)
    return {"hidden_states": torch.stack(hidden_states), "pooled": pooled}


OUTPUTS = {"unet": unet_outputs, "vae": vae_outputs, "text": text_outputs, "vision": vision_outputs}


def peer_outputs(kind):
    """The same as OUTPUTS, asked of diffusers' and transformers' models."""
    def unet(model, x, t, context, pooled=None, size_ids=None):
        added = {"text_embeds": pooled, "time_ids": size_ids}
        return {"prediction": model(x, t, context, added_cond_kwargs=added).sample}

    def vae(model, image, z):
        latent = model.encode(image).latent_dist
        return {"mean": latent.mean, "logvar": latent.logvar, "picture": model.decode(z).sample}

    def text(model, ids):
        out = model(ids, output_hidden_states=True)
        pooled = out.text_embeds if "text_embeds" in out else out.pooler_output
        return {"hidden_states": torch.stack(out.hidden_states), "last": out.last_hidden_state, "pooled": pooled}

    def vision(model, images):
        out = model(images, output_hidden_states=True)
        return {"hidden_states": torch.stack(out.hidden_states), "pooled": out.image_embeds}

    return {"unet": unet, "vae": vae, "text": text, "vision": vision}[kind]


def build_peer(config):
    """The peer's model of our config, built from the config.json that we write; skips the test without it."""
    values = config_to_json(config)
    if isinstance(config, (UNetConfig, VAEConfig)):
        return getattr(pytest.importorskip("diffusers"), values["_class_name"]).from_config(values)
    transformers = pytest.importorskip("transformers")
    name, = values["architectures"]
    parts = transformers.CLIPVisionConfig if "Vision" in name else transformers.CLIPTextConfig
    return getattr(transformers, name)(parts(**values))


def file_key(name):
    """transformers' CLIPTextModel lacks `text_model.` in memory, never in files; every other name is a file's."""
    return f"text_model.{name}" if name.startswith(("embeddings.", "encoder.layers.", "final_layer_norm.")) else name


def ours(kind, name, dtype=torch.float32):
    config = CASES[kind][name]
    return OUTPUTS[kind], fill(MODELS[kind](config)).to(dtype), inputs(kind, config)


def peer(kind, name, dtype=torch.float32):
    """Raises where the two state dicts differ by a key or a shape."""
    _, model, given = ours(kind, name, dtype)
    other, weights = build_peer(model.config).to(dtype).eval(), model.state_dict()
    other.load_state_dict({key: weights[file_key(key)] for key in other.state_dict()})
    assert {file_key(key) for key in other.state_dict()} == set(weights)
    return peer_outputs(kind), other, given


def run(outputs, model, given):
    """What the model returns, and the gradients of one fixed scalar of it by every input and parameter."""
    dtype = next(model.parameters()).dtype
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
    with torch.no_grad():  # attention takes another path where gradients are wanted
        found = outputs(model, **given)
    given = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in given.items()}
    sum((v * numbers(v.shape, 9).to(dtype)).sum() for v in outputs(model, **given).values()).backward()
    gradients = {k: v.grad for k, v in given.items() if v.requires_grad}
    return found, gradients | {file_key(k): p.grad for k, p in model.named_parameters()}


def distance(a, b):
    """The largest difference, relative to the largest number of `b`."""
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


def summary(gradients):
    """One number a gradient, its product with fixed random numbers, sorted by name: small enough for a golden."""
    return torch.stack([(g * numbers(g.shape, 8)).sum() for _, g in sorted(gradients.items())])


def golden(kind, name):
    """(outputs, summary of the gradients) of the peer in float64, as tests/goldens/make_models.py wrote them."""
    found = {k.removeprefix(f"{name}."): v for k, v in load_file(GOLDENS / f"models_{kind}.safetensors").items()
             if k.startswith(f"{name}.")}
    return found, found.pop("gradients")


def key_table(model):
    """(number of tensors, of parameters, digest of all names and shapes): equal tables mean interchangeable files."""
    tensors = model.state_dict()
    lines = "\n".join(sorted(f"{file_key(name)} {tuple(t.shape)}" for name, t in tensors.items()))
    return len(tensors), sum(t.numel() for t in tensors.values()), hashlib.sha256(lines.encode()).hexdigest()[:16]


def check_golden(kind, name):
    """Our model gives the peer's recorded numbers: in float64 to 1e-6, and in float32 to what rounding leaves of it."""
    expected, expected_gradients = golden(kind, name)
    found, gradients = run(*ours(kind, name, torch.float64))
    assert found.keys() == expected.keys()
    assert max(distance(found[key], expected[key]) for key in expected) <= 1e-6
    assert distance(summary(gradients), expected_gradients) <= 5e-6
    with torch.no_grad():
        outputs, model, given = ours(kind, name)
        found = outputs(model, **{k: v.float() if v.is_floating_point() else v for k, v in given.items()})
    assert max(distance(found[key].double(), expected[key]) for key in expected) <= 5e-6


def check_peer(kind, name, tolerance):
    """Our model and the installed peer with the same weights: outputs in float32 to `tolerance`, gradients to 1e-5 of
    the largest; and in float64 every single gradient, where rounding hides nothing."""
    (found, gradients), (expected, expected_gradients) = run(*ours(kind, name)), run(*peer(kind, name))
    assert found.keys() == expected.keys() and gradients.keys() == expected_gradients.keys()
    assert max(distance(found[key], expected[key]) for key in expected) <= tolerance
    largest = max(g.abs().max() for g in expected_gradients.values())
    for key, gradient in expected_gradients.items():
        assert (gradients[key] - gradient).abs().max() <= 1e-5 * largest, key

    (_, gradients), (_, expected_gradients) = (run(*f(kind, name, torch.float64)) for f in (ours, peer))
    floor = 1e-6 * max(g.abs().max() for g in expected_gradients.values())  # a bias of keys has no gradient but noise
    for key, gradient in expected_gradients.items():
        assert (gradients[key] - gradient).abs().max() <= 1e-9 * max(gradient.abs().max(), floor), key
