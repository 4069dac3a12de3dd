"""Trains text-to-image: the UNet learns to predict the noise in latents, given the text and the size ids.

DDPM's loss (arXiv 2006.11239 equation 14) on the latents of a frozen VAE, text from two encoders that are frozen too
unless --train-text, SDXL's conditioning (arXiv 2307.01952), Min-SNR weights (arXiv 2303.09556).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from minipic import training
from minipic.cache import Cache
from minipic.common import InputError, computes_bf16, option, random
from minipic.data import compose, pairs
from minipic.diffusion.schedule import Schedule
from minipic.folder import Photo, read_folder
from minipic.image import labelled_grid
from minipic.layers import lora
from minipic.layouts import load_part, open_part
from minipic.models.unet import UNet, UNetConfig
from minipic.pipeline import Pipeline
from minipic.text import Tokenizer, encode
from minipic.training import Recipe as Base
from minipic.weights import save_lora

PROMPTS = ("a small red sphere left of a large blue cube", "a large yellow torus on a pink floor",
           "a medium green cone on the right", "a large white and red striped cylinder in the middle")


def tiny(context_width, pooled_width):
    """SDXL in miniature: three levels, heads of width 64, about 7 M parameters. Unlike SDXL's its first level attends
    to the text too: what stands in a 64-pixel picture is decided on a grid of 16x16."""
    return UNetConfig(
        sample_size=16, block_out_channels=(64, 128, 128), layers_per_block=1, transformer_layers_per_block=(1, 1, 1),
        down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=(1, 2, 2), norm_num_groups=8, cross_attention_dim=context_width,
        addition_time_embed_dim=32, projection_class_embeddings_input_dim=pooled_width + 6 * 32)


@dataclass
class Denoising(Base):
    """What every recipe has whose network learns to take noise away."""

    model: str = option("weights/tiny", "pipeline folder or file; what the recipe does not train stays as it is")
    side: int = option(0, "training pictures have the area of a square of this side in pixels; 0: the model's own")
    min_snr: float = option(0.0, "Min-SNR weights: gamma, 5 in the paper; 0: the loss as it is")
    logit_normal: float = option(0.0, "train middle noise levels more often: spread of a normal number whose sigmoid "
                                 "is the timestep, 1 in Stable Diffusion 3; 0: all alike")
    balanced: bool = option(False, "weights under which all noise levels of a trained network count about alike")
    drop: float = option(0.1, "share of captions left out, for guidance: half zeros, half the empty prompt")

    LEAST = Base.LEAST | {"side": 0, "min_snr": 0, "logit_normal": 0, "drop": 0}
    train_text = False  # t2i.Recipe makes it a flag

    def __post_init__(self):
        super().__post_init__()
        if self.drop > 1:
            raise InputError(f"--drop must be at most 1, not {self.drop}")
        if self.balanced and self.min_snr:
            raise InputError("--balanced and --min-snr are two weightings of the loss; give one of them")


@dataclass
class Photos(Denoising):
    """What every recipe that draws on a folder of pictures has."""

    data: str = option("", "folder of pictures with .txt captions or metadata.jsonl; empty: the world")
    caption: str = option("", "caption of the pictures of --data that have none")
    cache: str = option("", "folder that keeps the pictures and captions of --data encoded, for the next run too")
    bad_images: str = option("error", "what to do about pictures of --data that cannot be used", ("error", "skip"))

    def __post_init__(self):
        super().__post_init__()
        if self.cache and (not self.data or Path(self.cache).is_file()):
            raise InputError(f"--cache {self.cache}: must be a folder, for what is encoded of --data; give both")
        for flag, folder in (("--out", self.out), ("--save", self.save)):
            if self.data and folder and Path(folder).resolve().is_relative_to(Path(self.data).resolve()):
                raise InputError(f"{flag} {folder}: lies in --data, its pictures would be trained on; choose another")


@dataclass
class Pairs(Denoising):
    """What every recipe has that learns from pairs of the world's pictures, one given and one wanted."""

    scenes: int = option(4000, "different pairs, kept in memory")

    LEAST = Denoising.LEAST | {"scenes": 1}

    def __post_init__(self):
        super().__post_init__()
        if self.side % 16:
            raise InputError(f"--side must be a multiple of 16, not {self.side}")


@dataclass
class Recipe(Photos):
    """Train the UNet of a model on a folder of pictures (--data) or on the world: whole, or a LoRA (--lora-rank)."""

    lora_rank: int = option(0, "train a LoRA of this rank and leave the model as it is; 0 trains the model")
    lora_alpha: float = option(0.0, "the LoRA counts alpha / rank; 0: the rank")
    lora_format: str = option("peft", "the LoRA file's names: PEFT's, as diffusers writes them, or kohya's scripts'",
                              ("peft", "kohya"))
    from_nothing: bool = option(False, "start a new tiny UNet for the folder's VAE and text encoders")
    steps: int = option(8000, "optimizer steps in all")
    lr: float = option(8e-4, "peak learning rate")
    ema: float = option(0.9995, "decay of the weight average that is drawn from and exported; 0 turns it off")
    scenes: int = option(40000, "different pictures of the world; their latents are kept in memory")
    prediction: str = option("v_prediction", "what a new UNet predicts: SDXL's epsilon says little in strong noise, "
                             "where it is decided what stands where", ("epsilon", "v_prediction"))
    train_text: bool = option(False, "train the text encoders too")

    LEAST = Denoising.LEAST | {"lora_rank": 0, "lora_alpha": 0, "scenes": 1}

    def __post_init__(self):
        super().__post_init__()
        if self.from_nothing and self.lora_rank:
            raise InputError("--lora-rank changes a model that is there; leave out --from-nothing")
        if (self.lora_alpha or self.lora_format == "kohya") and not self.lora_rank:
            raise InputError("--lora-alpha and --lora-format kohya: need --lora-rank; without it there is no LoRA")
        if self.side and not self.data:
            raise InputError("--side: the world's pictures have sizes of their own; give --data, or leave it out")


def load(config, stays=False, also=""):
    """The pipeline of --model, in fp32; one that `stays` as it is needs no more digits than the arithmetic has. A UNet
    that looks at more than x trains only in the recipe that says so: `also`."""
    dtype = torch.bfloat16 if stays and config.precision == "bf16" else torch.float32
    pipeline = Pipeline.load(config.model, dtype, cast=stays)
    if pipeline.sdxl and pipeline.text_encoder is None:
        raise InputError(f"--model {config.model}: is a refiner, which no recipe trains; give an ordinary model")
    if pipeline.looks not in ("", also):
        raise InputError(f"--model {config.model}: its UNet takes {pipeline.unet.config.in_channels} channels, which "
                         "this recipe cannot train; give an ordinary model")
    return pipeline


def build(config):
    """The pipeline to train: as it is, or its VAE and text encoders with a new UNet."""
    if not config.from_nothing:
        return load(config, stays=config.lora_rank > 0)
    folder = Path(config.model)
    parts = {name: load_part(open_part(folder / name, name), torch.float32)
             for name in ("vae", "text_encoder", "text_encoder_2")}
    first, second = parts["text_encoder"].config, parts["text_encoder_2"].config
    unet = UNet(tiny(first.hidden_size + second.hidden_size, second.projection_dim))
    for name, module in unet.named_modules():  # every residual branch begins at zero, as LDM's: it learns at once
        if name.endswith(("conv2", "proj_out")) or name == "conv_out":
            torch.nn.init.zeros_(module.weight), torch.nn.init.zeros_(module.bias)
    return Pipeline(unet=unet, **parts, tokenizer=Tokenizer(folder / "tokenizer"),
                    tokenizer_2=Tokenizer(folder / "tokenizer_2"), schedule=Schedule(prediction_type=config.prediction),
                    index={"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True})


def setup(pipeline, config):
    trained = [pipeline.unet, *(text_layers(pipeline) if config.train_text else [])]
    if config.lora_format == "kohya" and not pipeline.sdxl:
        raise InputError("--lora-format kohya: writes names that only SDXL's LoRAs have; leave it out for this model")
    if config.lora_rank:
        return [p for part in trained for p in lora.inject(part, config.lora_rank, config.lora_alpha or None)]
    if config.train_text:
        trained += [encoder.text_model.embeddings for _, encoder in pipeline.towers[:-1]]
    return [p for part in trained for p in part.parameters()]


def text_layers(pipeline):
    """What of the text encoders the UNet sees, but for embeddings: of all but the last encoder, the last layer not."""
    *others, last = [encoder for _, encoder in pipeline.towers]
    return [encoder.text_model.encoder.layers[:-1] for encoder in others] + [last]


def data(pipeline, config):
    """See `batches`; on the world, or on the pictures of --data."""
    pictures = pictures_of(pipeline, config)
    texts = {} if config.train_text or not config.data else encode_texts(pipeline, pictures, config.cache)
    return batches(pipeline, pictures, texts, config)


def batches(pipeline, pictures, texts, config):
    """Batches of latents of one bucket: x0 and noise [B,4,h,w], t [B], size_ids [B,6], captions (None: left out), rows,
    which of `pictures` they are of, and context [B,N,D] and pooled [B,D] where `texts` has them, see encode_texts."""
    photos = isinstance(pictures[0], Photo)
    latents = encode_photos(pipeline.vae, pictures, config.cache) if photos else encode_pictures(pipeline.vae, pictures)
    buckets = list({picture.size: None for picture in pictures})
    members = [[i for i, picture in enumerate(pictures) if picture.size == size] for size in buckets]
    share = torch.tensor([float(len(rows)) for rows in members])

    def sample_of(rows, index):
        generator = random(config.seed, "sample", index)
        row = rows[int(torch.randint(len(rows), (), generator=generator))]
        mean, std = latents[row].float()
        u = torch.rand((), generator=generator).item()
        text = None if u < config.drop / 2 else "" if u < config.drop else pictures[row].caption(generator)
        known = dict(zip(("context", "pooled"), texts[text])) if texts else {}
        return {**known, "x0": mean + std * torch.randn(mean.shape, generator=generator),
                "noise": torch.randn(mean.shape, generator=generator),
                "t": pipeline.schedule.draw_timestep(generator, config.logit_normal),
                "size_ids": pictures[row].size_ids, "captions": text, "rows": row}

    def batch(step, indices):
        bucket = int(torch.multinomial(share, 1, generator=random(config.seed, "bucket", step)))
        samples = [sample_of(members[bucket], index) for index in indices]
        columns = {key: [sample[key] for sample in samples] for key in samples[0]}
        return {key: torch.stack(values) if torch.is_tensor(values[0]) else values for key, values in columns.items()}
    return batch


def pictures_of(pipeline, config):
    """The pictures to train on: data.Pictures of the world, or Photos of --data; `sample` draws what prompts say."""
    pipeline.prompts = PROMPTS
    if not config.data:
        return [compose(config.seed, i) for i in range(config.scenes)]
    step = pipeline.vae.config.factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
    photos = read_folder(config.data, config.side or pipeline.size[0], max(step, 16), config.bad_images == "skip",
                         config.caption, print if training.first() else lambda line: None)
    pipeline.prompts = list(dict.fromkeys(photo.text for photo in photos))[:4]
    return photos


def pairs_of(task, pipeline, config, first, count):
    """Pairs number `first` and following of a task of the world, of the recipe's --side."""
    size = config.side or pipeline.size[1], config.side or pipeline.size[0]
    return pairs(task, config.seed, range(first, first + count), size)


@torch.no_grad()
def encode_texts(pipeline, pictures, cache=""):
    """{text: (context [N,D], pooled [D])} of all captions, of "" and of None. `cache`: a folder, see Cache."""
    texts = tqdm({None, "", *(picture.text for picture in pictures)}, "texts", leave=False, mininterval=2)
    kept = Cache(cache, *pipeline.encoders.values())
    return {text: kept(lambda: [x[0].cpu() for x in encode_batch(pipeline, [text], False) if x is not None],
                       pipeline.sdxl, pipeline.device.type, text is None,
                       *(tokenizer([text or ""]) for tokenizer, _ in pipeline.towers)) for text in texts}


def encode_photos(vae, photos, cache=""):
    """encode_pictures one at a time, for they may be large, and neither others nor the `cache` change any bit."""
    kept, device = Cache(cache, vae), next(vae.parameters()).device
    return [kept(lambda: encode_pictures(vae, [photo]), device.type, computes_bf16(device), photo.size, photo.path)[0]
            for photo in tqdm(photos, "latents", leave=False, mininterval=2)]


@torch.no_grad()
def encode_pictures(vae, pictures, chunk=64):
    """Scaled latents of all pictures: a list of [2,4,h,w], mean and standard deviation, in 16 bits."""
    latents, device = [None] * len(pictures), next(vae.parameters()).device
    order = sorted(range(len(pictures)), key=lambda i: pictures[i].size)
    for start in tqdm(range(0, len(order), chunk), "latents", disable=len(order) == 1, leave=False, mininterval=2):
        rows = order[start:start + chunk]
        for size in {pictures[i].size for i in rows}:
            same = [i for i in rows if pictures[i].size == size]
            images = type(pictures[same[0]]).draw([pictures[i] for i in same])
            images = torch.stack(images).to(device, next(vae.parameters()).dtype)
            with torch.autocast(device.type, torch.bfloat16, enabled=computes_bf16(device)):
                mean, logvar = vae.encode(images)
            std = vae.config.scaling_factor * (0.5 * logvar.float()).exp()
            for i, pair in zip(same, torch.stack([vae.scale(mean.float()), std], dim=1).half().cpu()):
                latents[i] = pair
    return latents


def loss(pipeline, batch, config, network=None, where=None):
    """The objective's loss of a batch -> scalar. `network`: what predicts, if not the UNet; `where`: the part of x0
    that counts, if not all."""
    context, pooled = ((batch["context"], batch.get("pooled")) if "context" in batch else
                       encode_batch(pipeline, batch["captions"], config.train_text))

    def predict(x, t):
        return (network or pipeline.unet)(x, t, context, pooled, batch["size_ids"])
    return pipeline.schedule.objective.loss(predict, batch["x0"], batch["noise"], batch["t"].cpu(),
                                            config.min_snr or None, config.balanced, where).mean()


def encode_batch(pipeline, captions, train_text):
    with torch.set_grad_enabled(train_text):
        context, pooled = encode([text or "" for text in captions], pipeline.towers, pipeline.sdxl)
    told = torch.tensor([text is not None for text in captions], device=context.device)
    return context * told[:, None, None], None if pooled is None else pooled * told[:, None]  # no prompt is zeros


def sample(pipeline, config):
    """Two pictures for each of four prompts: of the folder's, or PROMPTS."""
    rows = [(prompt, picture) for prompt in pipeline.prompts for picture in pipeline.generate(prompt, steps=20, n=2)]
    return labelled_grid([picture for _, picture in rows], [prompt for prompt, _ in rows], columns=4)


def export(pipeline, folder, config):
    """The finished model, a pipeline folder; or the LoRA alone, folder/lora.safetensors."""
    if not config.lora_rank:
        return pipeline.save(folder, torch.float16)
    states = {part: lora.lora_state_dict(model) for part, model in {"unet": pipeline.unet, **pipeline.encoders}.items()}
    save_lora({name: state for name, state in states.items() if state}, folder / "lora.safetensors",
              {"trained on": Path(config.model).name, "steps": str(config.steps)}, config.lora_format == "kohya")
