"""CLIP (arXiv 2103.00020): text encoders, of which SDXL has two, vision tower, contrastive loss.

ids [B,N] -> hidden states of every layer and a pooled vector; pictures [B,3,H,W] -> the same.
Attribute paths are the keys of the official files (`text_model. ...`, `vision_model. ...`,
`pre_layrnorm` with its spelling).
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from minipic.common import CheckedConfig, ParameterError
from minipic.layers.attention import attention


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """OpenAI's approximation of GELU, which CLIP-L was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class TransformerConfig(CheckedConfig):
    """What the configs of the text encoders and of the vision tower check alike."""

    LIMITS = {
        "hidden_size": (1, 65536), "intermediate_size": (1, 1 << 20), "num_hidden_layers": (1, 256),
        "num_attention_heads": (1, 1024), "projection_dim": (1, 65536), "vocab_size": (1, 1 << 24),
        "max_position_embeddings": (1, 65536), "image_size": (1, 65536), "patch_size": (1, 65536)}

    def __post_init__(self):
        super().__post_init__()
        heads = self.num_attention_heads
        if self.hidden_size % heads:
            raise ParameterError("num_attention_heads", f"{heads} heads do not divide hidden_size "
                                                        f"{self.hidden_size}")
        if self.hidden_act not in ACTIVATIONS:
            raise ParameterError("hidden_act", f"{self.hidden_act!r} is not supported; "
                                               f"use {' or '.join(ACTIVATIONS)}")


@dataclass(frozen=True)
class CLIPTextConfig(TransformerConfig):
    """Where text_encoder/config.json files differ; the defaults are SDXL's first encoder's."""

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"
    projection_dim: int = 768
    with_projection: bool = False  # from `architectures`: the file has a text_projection


@dataclass(frozen=True)
class CLIPVisionConfig(TransformerConfig):
    """Where image_encoder/config.json files differ; the defaults are CLIP ViT-L/14's."""

    image_size: int = 224
    patch_size: int = 14
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    hidden_act: str = "quick_gelu"
    projection_dim: int = 768

    def __post_init__(self):
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise ParameterError("patch_size", f"{self.patch_size} does not divide image_size "
                                               f"{self.image_size}")


CLIP_L = CLIPTextConfig()
OPENCLIP_BIGG = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
    with_projection=True)


class SelfAttention(nn.Module):
    """x [B,N,D] -> [B,N,D]. causal: token n sees tokens 0..n only."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, causal: bool) -> torch.Tensor:
        q = self.q_proj(x).unflatten(-1, (self.heads, -1))  # [B,N,h,d]
        k = self.k_proj(x).unflatten(-1, (self.heads, -1))
        v = self.v_proj(x).unflatten(-1, (self.heads, -1))
        return self.out_proj(attention(q, k, v, causal=causal).flatten(2))


class MLP(nn.Module):
    """x [B,N,D] -> [B,N,D]."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """x [B,N,D] -> [B,N,D]: attention and MLP, each added to what it reads the norm of."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size)
        self.self_attn = SelfAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, causal: bool) -> torch.Tensor:
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The layers, without the norms before and after them."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: torch.Tensor, causal: bool) -> list[torch.Tensor]:
        """x [B,N,D] -> [x, output of layer 1, ..., output of the last layer]; no final norm."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], causal))
        return states


class TextEmbeddings(nn.Module):
    """ids [B,N] -> [B,N,D]."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[:ids.shape[1]]


class TextModel(nn.Module):
    """What the official files call `text_model`; CLIPText runs its parts."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)


class CLIPText(nn.Module):
    """A text encoder: ids [B,N] -> the states of every layer, and a pooled vector."""

    def __init__(self, config: CLIPTextConfig = CLIP_L):
        super().__init__()
        self.config = config
        self.text_model = TextModel(config)
        self.text_projection = nn.Identity()
        if config.with_projection:
            self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(
            self, ids: torch.Tensor,
            end_token: torch.Tensor | None = None) -> tuple[list[torch.Tensor], torch.Tensor]:
        """ids [B,N] -> (hidden states, pooled).

        end_token [B,1]: its id; None: the last one, as where no words were added.
        hidden states: the embeddings and each layer's output, [B,N,D] each, without the final norm.
            SDXL's context is hidden_states[-2] of both encoders, SD 1.5's is `last(hidden_states)`.
        pooled [B,D]: the end token's state after the final norm and, where there is one, the
            projection.
        """
        hidden_states = self.text_model.encoder(self.text_model.embeddings(ids), causal=True)
        # Tokens added to a vocabulary have larger ids than its end token, so an argmax over the ids
        # would pool at them. Padding repeats the end token in one of SDXL's encoders, so the first
        # one counts.
        if end_token is None:
            end_token = self.config.vocab_size - 1
        end = (ids == end_token).int().argmax(dim=1)
        rows = torch.arange(len(ids), device=ids.device)
        pooled = self.last(hidden_states)[rows, end]
        return hidden_states, self.text_projection(pooled)

    def last(self, hidden_states: list[torch.Tensor]) -> torch.Tensor:
        """The last layer's output after the final norm, [B,N,D]."""
        return self.text_model.final_layer_norm(hidden_states[-1])


class VisionEmbeddings(nn.Module):
    """images [B,3,H,W] -> [B,1+patches,D]: a learnt class token, then the patches row by row."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        patch = config.patch_size
        patches = (config.image_size // patch) ** 2
        self.class_embedding = nn.Parameter(torch.randn(config.hidden_size) * 0.02)
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(1 + patches, config.hidden_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)  # [B,C,H,W] -> [B,N,D]
        first = self.class_embedding.expand(len(images), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class VisionModel(nn.Module):
    """What the official files call `vision_model`; CLIPVision runs its parts."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size)  # sic, in the files
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size)


class CLIPVision(nn.Module):
    """The vision tower: images [B,3,H,W] -> states of every layer, and a pooled vector."""

    def __init__(self, config: CLIPVisionConfig = CLIPVisionConfig()):
        super().__init__()
        self.config = config
        self.vision_model = VisionModel(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """images [B,3,size,size], normalised as in training -> (hidden states, pooled [B,D])."""
        model = self.vision_model
        x = model.pre_layrnorm(model.embeddings(images))
        hidden_states = model.encoder(x, causal=False)
        class_token = hidden_states[-1][:, 0]
        return hidden_states, self.visual_projection(model.post_layernorm(class_token))


def contrastive_loss(images: torch.Tensor, texts: torch.Tensor,
                     logit_scale: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of picture i with text i among all texts, and the other way round (figure 3).

    images, texts [B,D]; logit_scale [], the logarithm of the scale -> the mean of both, [].
    """
    logits = logit_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
