"""CLIP, arXiv 2103.00020: text encoders (SDXL has two), the vision tower, and the contrastive head that trains them.

ids [B,N] -> hidden states of every layer and a pooled vector; pictures [B,3,H,W] -> the same. Attribute paths are the
keys of the official files (`text_model. ...`, `vision_model. ...`, `pre_layrnorm` with its spelling).
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from minipic.common import from_json
from minipic.layers.attention import attention

# config.json of transformers carries many keys that say nothing about the numbers.
SILENT = ("architectures", "bos_token_id", "pad_token_id", "eos_token_id", "model_type", "transformers_version",
          "torch_dtype", "dtype", "initializer_factor", "initializer_range", "output_hidden_states",
          "output_attentions", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id",
          "problem_type")
ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # OpenAI's approximation, kept by CLIP-L
               "gelu": F.gelu}
FIXED = {"attention_dropout": (0.0,), "dropout": (0.0,), "layer_norm_eps": (1e-5,), "num_channels": (3,),
         "hidden_act": tuple(ACTIVATIONS), **dict.fromkeys(SILENT, ...)}


@dataclass(frozen=True)
class CLIPTextConfig:
    """The varying keys of text_encoder/config.json; the defaults are CLIP ViT-L/14's, SDXL's first encoder."""

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"
    projection_dim: int = 768
    with_projection: bool = False  # from `architectures`: only then is there a text_projection in the file

    @classmethod
    def from_json(cls, values, where="text_encoder/config.json"):
        """Read an official config.json; keys it lacks take transformers' defaults, ViT-B/32's."""
        legacy = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "projection_dim": 512}
        projects = "CLIPTextModelWithProjection" in (values.get("architectures") or ())
        return from_json(cls, legacy | values | {"with_projection": projects}, FIXED, where)

    def to_json(self):
        values = asdict(self)
        name = "CLIPTextModelWithProjection" if values.pop("with_projection") else "CLIPTextModel"
        # eos 2 is the official files' wrong id, under which transformers pools at the largest id: the end token
        return {"architectures": [name], "model_type": "clip_text_model", **values, "attention_dropout": 0.0,
                "layer_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}


@dataclass(frozen=True)
class CLIPVisionConfig:
    """The varying keys of image_encoder/config.json; the defaults are CLIP ViT-L/14's."""

    image_size: int = 224
    patch_size: int = 14
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    hidden_act: str = "quick_gelu"
    projection_dim: int = 768

    @classmethod
    def from_json(cls, values, where="image_encoder/config.json"):
        """Read an official config.json; keys it lacks take transformers' defaults, ViT-B/32's."""
        legacy = {"patch_size": 32, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                  "num_attention_heads": 12, "projection_dim": 512}
        return from_json(cls, legacy | values, FIXED, where)

    def to_json(self):
        return {"architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model", **asdict(self),
                "num_channels": 3, "attention_dropout": 0.0, "layer_norm_eps": 1e-5}


CLIP_L = CLIPTextConfig()
OPENCLIP_BIGG = CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
                               hidden_act="gelu", projection_dim=1280, with_projection=True)

class SelfAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, causal):
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v, causal=causal).flatten(2))


class MLP(nn.Module):
    def __init__(self, width, inner, activation):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size)
        self.self_attn = SelfAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, x, causal):
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x, causal):
        """x [B,N,D] -> [x, output of layer 1, ..., output of the last layer]; no final norm."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], causal))
        return states


class TextEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids):
        return self.token_embedding(ids) + self.position_embedding.weight[:ids.shape[1]]


class TextModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)


class CLIPText(nn.Module):
    def __init__(self, config=CLIP_L):
        super().__init__()
        self.config = config
        self.text_model = TextModel(config)
        self.text_projection = nn.Identity()
        if config.with_projection:
            self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, ids):
        """ids [B,N] -> (hidden states: embeddings and each layer's output, [B,N,D] each, without the final norm;
        pooled [B,D]: the end token's state after the final norm and, where there is one, the projection).

        SDXL's context is hidden_states[-2] of both encoders; SD 1.5's is `last(hidden_states)`.
        """
        hidden_states = self.text_model.encoder(self.text_model.embeddings(ids), causal=True)
        # The end token is the last id of the original vocabulary. Tokens added later have larger ids, so an argmax
        # would pool at them; padding repeats the end token in one of SDXL's encoders, so the first one counts.
        end = (ids == self.end_token).int().argmax(dim=1)
        pooled = self.last(hidden_states)[torch.arange(len(ids), device=ids.device), end]
        return hidden_states, self.text_projection(pooled)

    @property
    def end_token(self):
        return self.config.vocab_size - 1

    def last(self, hidden_states):
        return self.text_model.final_layer_norm(hidden_states[-1])


class VisionEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        patches = (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.randn(config.hidden_size) * 0.02)
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(1 + patches, config.hidden_size)

    def forward(self, images):
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)  # [B,C,H,W] -> [B,N,D]
        first = self.class_embedding.expand(len(images), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class VisionModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size)  # sic, in the files
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size)


class CLIPVision(nn.Module):
    def __init__(self, config=CLIPVisionConfig()):
        super().__init__()
        self.config = config
        self.vision_model = VisionModel(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, images):
        """images [B,3,image_size,image_size], normalised as the tower was trained -> (hidden states, pooled [B,D])."""
        model = self.vision_model
        hidden_states = model.encoder(model.pre_layrnorm(model.embeddings(images)), causal=False)
        return hidden_states, self.visual_projection(model.post_layernorm(hidden_states[-1][:, 0]))


def contrastive_loss(images, texts, logit_scale):
    """Symmetric cross-entropy of picture i with text i among all, CLIP figure 3. images, texts [B,D] -> scalar."""
    logits = logit_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
