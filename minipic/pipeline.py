"""The pipeline: a prompt goes down through text, guidance, UNet and VAE and comes out as a picture.

    pipeline = Pipeline.load("weights/tiny")
    pictures = pipeline.generate("a small red sphere left of a large blue cube", n=4)

SDXL (arXiv 2307.01952): base, refiner, Turbo; Stable Diffusion 1.x and 2.x; image-to-image (2108.01073); inpainting by
latent replacement (2201.09865) or with a UNet that sees the mask; ControlNet (2302.05543); edits by instruction
(InstructPix2Pix, 2211.09800). The same seed gives the picture that diffusers gives.
"""

import math
from pathlib import Path

import torch
import torch.nn as nn

from minipic.adapters import TOKENIZERS, Adapters
from minipic.common import InputError
from minipic.diffusion.guidance import combine, rescale as rescale_to
from minipic.diffusion.samplers import SAMPLERS, keep
from minipic.diffusion.schedule import Schedule
from minipic.image import cover, flatten, to_pictures, to_tensor, white
from minipic.layers import lora
from minipic.layers.graph import graphed, pays
from minipic.layouts import blank, load_part, open_model, save_folder
from minipic.text import Conditioning, encode, open_tokenizer, size_ids

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
AT_ONCE = 1024 * 1024  # pixels in all; the VAE's activations are the largest there are: 0.5 GB each in fp32
WHOLE = 2048 * 2048  # pixels; larger pictures are decoded in tiles: one activation at full size takes 2 to 4 GB in fp32
AESTHETIC = (6.0, 2.5)  # what the refiner is told of the wanted and the unwanted picture, on a scale to 10 (diffusers)


class Pipeline(Adapters):
    """The networks, tokenizers and noise schedule of one model; `index` is its model_index.json.

    SDXL's refiner has no text_encoder, Stable Diffusion 1.x and 2.x have no text_encoder_2.
    """

    def __init__(self, unet, vae, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
                 schedule=None, index=None):
        super().__init__()
        self.unet, self.vae, self.text_encoder, self.text_encoder_2 = unet, vae, text_encoder, text_encoder_2
        self.tokenizer, self.tokenizer_2, self.schedule = tokenizer, tokenizer_2, schedule or Schedule()
        self.sdxl = unet.config.addition_embed_type is not None
        self.index = index or {"_class_name": "StableDiffusionXLPipeline" if self.sdxl else "StableDiffusionPipeline"}
        self.lazy, self.texts = {}, {}  # filled only by load(lazy=True): parts still on disk, texts already encoded

    @classmethod
    def load(cls, path, dtype=None, device=None, vae=None, lazy=False, check_hashes=False, lora=(), cast=False):
        """A model from a diffusers folder or a single .safetensors file, whose tokenizers lie in folders beside it.

        `dtype` (default float32) and `device` (default CPU) of the networks; in float16 a VAE that would overflow stays
        float32. `vae`: another VAE's folder or file. `lazy`: read each network when it is needed and free the text
        encoders before the UNet. `check_hashes`: accept official files only. `lora`: a file, files, or pairs of (file,
        scale), see `add_lora`. `cast`: in float32, large weights stay in the 16 bits of their file, in half the memory,
        see layers/casting.py. Raises InputError naming what is wrong.
        """
        dtype, path = dtype or torch.float32, Path(path)
        if not isinstance(dtype, torch.dtype):
            raise InputError(f"dtype {dtype!r}: give one of PyTorch's, such as torch.bfloat16")
        source = open_model(path, half=dtype != torch.float32, check_hashes=check_hashes, vae=vae)
        parts = source.parts
        if parts["vae"].config.latent_channels != parts["unet"].config.out_channels:
            raise InputError(f"--vae {vae}: makes {parts['vae'].config.latent_channels} channels, the UNet of {path} "
                             f"{parts['unet'].config.out_channels}")
        tokenizers = {TOKENIZERS[name]: open_tokenizer(path, TOKENIZERS[name], part.config.vocab_size)
                      for name, part in parts.items() if name in TOKENIZERS}
        pipeline = cls(**{name: blank(part.model, part.config) for name, part in parts.items()}, **tokenizers,
                       schedule=Schedule.from_json(source.scheduler, path / "scheduler" / "scheduler_config.json"),
                       index=source.index)
        overflows = dtype == torch.float16 and parts["vae"].config.force_upcast
        pipeline.lazy = {name: (part, torch.float32 if name == "vae" and overflows else dtype, device or "cpu", cast)
                         for name, part in parts.items()}
        if not lazy:
            pipeline.fetch(*parts)
            pipeline.lazy = {}
        for file in [lora] if isinstance(lora, (str, Path)) else lora:
            pipeline.add_lora(*(file if isinstance(file, tuple) else (file,)))
        return pipeline

    def fetch(self, *names):
        """Read these parts from disk unless they are here."""
        for name in names:
            if name in self.lazy and next(getattr(self, name).parameters()).is_meta:
                setattr(self, name, load_part(*self.lazy[name]))
                self.apply_added(name)

    def free(self, *names):
        """Give back the memory of these parts, when they can be read again."""
        for name in names:
            if name in self.lazy:
                setattr(self, name, blank(self.lazy[name][0].model, self.lazy[name][0].config))

    def save(self, folder, dtype=None):
        """Write a diffusers folder that `load` and diffusers read. `dtype`: the weights' on disk; None: as they are."""
        if any(lora.layers(self)) or self.loras or self.words:
            raise InputError(f"{folder}: this model has LoRAs or added words, which its files cannot hold; save those "
                             "by themselves")
        self.fetch(*PARTS)
        parts = {name: getattr(self, name) for name in PARTS if getattr(self, name) is not None}
        for name in parts.keys() & TOKENIZERS.keys():
            getattr(self, TOKENIZERS[name]).save(Path(folder) / TOKENIZERS[name])
        save_folder(folder, parts, self.index, self.schedule.to_json(), dtype)

    @property
    def towers(self):
        """[(tokenizer, text encoder), ...] of the encoders this model has."""
        return [(getattr(self, TOKENIZERS[part]), encoder) for part, encoder in self.encoders.items()]

    @property
    def size(self):
        """(width, height) in pixels of the pictures that the UNet was trained for."""
        return (self.unet.config.sample_size * self.vae.config.factor,) * 2

    @property
    def looks(self):
        """What the UNet looks at beside x: "" nothing, "edit" the picture to change (InstructPix2Pix), "mask" where to
        draw and the picture around it (inpainting)."""
        latent = self.vae.config.latent_channels
        return {latent: "", 2 * latent: "edit", 2 * latent + 1: "mask"}[self.unet.config.in_channels]

    @torch.no_grad()
    def encode(self, prompt, negative=None):
        """(what is wanted, what is not): two Conditionings of one row, without sizes.

        No negative prompt at all (None) is zeros where the model was trained so, as SDXL base was; "" is encoded.
        """
        if not isinstance(prompt, str):
            raise InputError(f"prompt {prompt!r}: must be one text; call generate once for each prompt")
        if (prompt, negative) not in self.texts:
            self.fetch(*TOKENIZERS)
            cond, uncond = (Conditioning(*encode([text or ""], self.towers, self.sdxl)) for text in (prompt, negative))
            if negative is None and self.sdxl and self.index.get("force_zeros_for_empty_prompt", True):
                uncond = Conditioning(*(torch.zeros_like(x) for x in cond[:2]))
            if not self.lazy:
                return cond, uncond
            self.texts[prompt, negative] = cond, uncond
        return self.texts[prompt, negative]

    def generate(self, prompt, negative=None, **settings):
        """Draw `n` pictures of a prompt -> list of PIL pictures; picture i has seed + i. `settings`: see `steps`."""
        for x in self.latents(prompt, negative, **settings):
            pass
        return self.decode(x)

    def latents(self, prompt, negative=None, **settings):
        """The same as a generator: x_t [n,4,h,w] after every step, of variance about 1. The last one is the picture."""
        for x, _ in self.steps(prompt, negative, **settings):
            yield x

    @torch.no_grad()
    def steps(self, prompt, negative=None, steps=30, guidance=5.0, seed=0, n=1, size=None, sampler=None, image=None,
              strength=0.75, mask=None, original_size=None, crop=(0, 0), target_size=None, rescale=0.0,
              refiner=None, handover=0.8, control=(), edit=None, image_guidance=1.5, graph=None):
        """Yield (x_t, predicted x0), each [n,4,h,w], after every step; `decode` makes pictures of either.

        guidance: 1 or less is off (Turbo); rescale: see diffusion/guidance.py. size: (width, height), multiples of 8.
        sampler: a name in SAMPLERS, the model's own by default. image: a PIL picture to start from, changed the more
        the higher `strength` (0 to 1); mask: a PIL picture of the same size, white where to draw and black where to
        keep `image`. original_size, crop (left, top) and target_size are SDXL's micro-conditioning: the picture is
        drawn as if cut out of one of that size. refiner: a Pipeline that takes the last 1 - handover of the schedule.
        control: for each ControlNet, in the order of `add_control`, a PIL picture of edges, depth or the like to follow
        and how closely, 1 as trained, 0 not at all: [(picture, scale), ...]. edit: a PIL picture that the prompt says
        how to change, for a model trained to; image_guidance: how much to keep of it, 1 is off. graph: draw with CUDA
        graphs; None: where that `pays`.
        """
        image, edit = (picture and flatten(picture) for picture in (image, edit))
        control = [(flatten(picture), scale) for picture, scale in control]
        size, sampler, grid = self.plan(steps, n, size, sampler, image, strength, mask, control, edit, image_guidance,
                                        refiner, graph)
        graph = pays(self.device) if graph is None else graph
        text, factor, objective = self.encode(prompt, negative), self.vae.config.factor, self.schedule.objective
        generators = [torch.Generator().manual_seed(seed + i) for i in range(n)]  # on the CPU: equal on every device
        shape = (self.vae.config.latent_channels, size[1] // factor, size[0] // factor)

        def noise(step=None):
            return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(self.device)

        pure, keeps = image is None or (mask and strength == 1), mask and self.looks != "mask"
        known = self.encode_picture(to_tensor(cover(image, size)), noise) if keeps or not pure else None
        start = noise()
        beside = self.beside(size, edit, image, mask, noise)
        x = grid.start * start if pure else objective.mix(known, start, grid.sigmas[0])
        stages = [(self, grid, text)]
        if refiner:
            last = refiner.schedule.grid(steps, sampler)
            stages = [(self, grid.part(end=handover), text),
                      (refiner, last.part(start=handover), refiner.encode(prompt, negative))]
        for pipeline, _, _ in stages:
            pipeline.free(*TOKENIZERS)
        for pipeline, grid, text in stages:
            sizes = original_size or size, crop, target_size or size
            follow = [(name, (to_tensor(cover(picture, size))[None] + 1) / 2, scale)
                      for name, (picture, scale) in zip(self.controlnets, control) if scale and pipeline is self]
            predict = pipeline.predictor(*text, sizes, n, guidance, rescale, follow,
                                         beside if pipeline is self else None, image_guidance)
            denoise = pipeline.schedule.objective.denoiser(graphed(predict) if graph else predict, grid)
            drawing = SAMPLERS[sampler](denoise, x, grid.sigmas, noise)
            if keeps:
                drawn = latent_mask(white(mask, size), factor).to(x)
                drawing = keep(drawing, objective.mix, known, start, drawn, grid.sigmas)
            for i, (x, x0) in enumerate(drawing):
                yield objective.scaled(x, grid.sigmas[i + 1]), x0
            if refiner:
                predict = denoise = drawing = None  # they hold the UNet's layers
                pipeline.free("unet", *pipeline.controlnets)

    def plan(self, steps=30, n=1, size=None, sampler=None, image=None, strength=0.75, mask=None, control=(), edit=None,
             image_guidance=1.5, refiner=None, graph=None):
        """(size, sampler, Grid) of a drawing; InputError, naming sample.py's flag, for what cannot be drawn."""
        if sampler is not None and sampler not in SAMPLERS:
            raise InputError(f"--sampler {sampler}: unknown; choose one of {', '.join(SAMPLERS)}")
        if n < 1:
            raise InputError(f"--n {n}: choose 1 or more pictures")
        if mask and not image:
            raise InputError("--mask: needs --image, the picture to keep where the mask is black")
        if mask and mask.size != image.size:
            raise InputError("--mask has {}x{} pixels and --image {}x{}; make both the same size".format(
                *mask.size, *image.size))
        if control and not self.controlnets:
            raise InputError("--control: needs --controlnet, the ControlNet that was trained on such pictures")
        if control and len(control) != len(self.controlnets):
            raise InputError(f"--control: {len(control)} for {len(self.controlnets)} ControlNets; give one for each")
        for _, scale in control:
            if not 0 <= scale < math.inf:
                raise InputError(f"--control-scale {scale}: choose 0 (off) to about 2; 1 is as trained")
        if edit and self.looks != "edit":
            raise InputError("--edit: this model was not trained to edit pictures; train.py edit makes one that is")
        if self.looks == "edit" and not edit:
            raise InputError("this model edits pictures; name one with --edit, and say in the prompt what to change")
        if self.looks == "mask" and not mask:
            raise InputError("this model fills in parts of pictures; name one with --image, and the part with --mask")
        if not 0 <= image_guidance < math.inf:
            raise InputError(f"--image-guidance {image_guidance}: choose 1 (off) to about 2")
        if graph and self.device.type != "cuda":
            raise InputError(f"--graph: is for NVIDIA's GPUs, and this draws on {self.device.type}; leave it out")
        if refiner and refiner.looks:
            raise InputError("--refiner: its UNet sees a picture beside the one that it draws; use an ordinary model")
        size = (size, size) if isinstance(size, int) else size  # a square
        if size is None:
            shown = image or edit or (control[0][0] if control else None)
            size = tuple(side // 8 * 8 for side in shown.size) if shown else self.size
        if any(side < 8 or side % 8 for side in size):
            raise InputError(f"--size {'x'.join(map(str, size))}: width and height must be multiples of 8, at least 8")
        grid = self.schedule.grid(steps, sampler)
        return size, sampler or self.schedule.sampler, grid.strength(strength) if image else grid

    def predictor(self, cond, uncond, sizes, n, guidance, rescale=0.0, follow=(), beside=None, image_guidance=1.0):
        """The network with text and guidance inside: a function predict(x, t).

        cond, uncond: Conditionings of a row a prompt, drawn n times each; sizes: (original, crop, target). Guidance
        runs both in one batch. follow: [(ControlNet's name, hint [1,3,H,W], scale), ...]; what they say is added.
        beside: see there; with a picture to edit there are two guidances, arXiv 2211.09800 equation 3.
        """
        self.fetch("unet", *(name for name, *_ in follow))
        guidance, image_guidance, like = max(guidance, 1), max(image_guidance, 1), next(self.unet.parameters())
        rows, weights, shown = [cond], [], [1]  # shown: whether a row sees what is beside x
        if self.looks == "edit" and max(guidance, image_guidance) > 1:
            rows, weights, shown = [uncond, uncond, cond], [image_guidance - guidance, guidance], [0, 1, 1]
        elif guidance > 1:
            rows, weights, shown = [uncond, cond], [guidance], [1, 1]
        context, pooled = (None if x[0] is None else torch.cat(x).to(like).repeat_interleave(n, dim=0)
                           for x in list(zip(*rows))[:2])
        count = n * len(cond.context)
        read = self.unet.read(context)
        ids = self.size_rows(*sizes)[[int(row is cond) for row in rows]] if self.sdxl else None
        ids = ids.to(like.device).repeat_interleave(count, dim=0) if self.sdxl else None
        if beside is not None:
            beside = torch.cat([share * beside.expand(count, -1, -1, -1) for share in shown]).to(like)
        nets = [(net := getattr(self, name), net.read(context), hint.to(like), scale) for name, hint, scale in follow]

        def predict(x, t):
            both = torch.cat([x] * len(rows)).to(like.dtype)
            told = [net(both, t, heard, hint, pooled, ids, scale) for net, heard, hint, scale in nets]
            told = [sum(residuals) for residuals in zip(*told)] or None
            seen = both if beside is None else torch.cat([both, beside], dim=1)
            prediction = self.unet(seen, t, read, pooled, ids, told).to(x.dtype)
            without, *others = prediction.chunk(len(rows))
            if not others:
                return prediction
            prediction = combine(without, list(zip(weights, others)))
            return rescale_to(prediction, others[-1], rescale) if rescale else prediction

        return predict

    def size_rows(self, original, crop, target):
        """Size ids of the unwanted and the wanted picture [2,6]; the refiner's [2,5] end in the aesthetic score."""
        config = self.unet.config
        count = config.projection_class_embeddings_input_dim - self.text_encoder_2.config.projection_dim
        scores = AESTHETIC[::-1] if count == 5 * config.addition_time_embed_dim else (target, target)
        return torch.stack([size_ids(original, crop, score) for score in scores])

    def beside(self, size, edit, image, mask, noise):
        """What the UNet sees beside x: the latent of `edit` [1,4,h,w], unscaled as diffusers has it; or the mask and
        the latent of the picture with grey in its place [n,5,h,w]; or None."""
        if self.looks == "edit":
            return self.moments(to_tensor(cover(edit, size)))[0].to(self.device)
        if self.looks == "mask":
            drawn = white(mask, size)
            around = self.encode_picture(to_tensor(cover(image, size)) * (1 - drawn), noise)
            drawn = latent_mask(drawn, self.vae.config.factor).to(around).expand(len(around), -1, -1, -1)
            return torch.cat([drawn, around], dim=1)

    def moments(self, image):
        """image [3,H,W] in [-1,1] -> mean and standard deviation of its latent, each [1,4,h,w], unscaled."""
        self.fetch("vae")
        mean, logvar = self.vae.encode(image[None].to(next(self.vae.parameters())))
        return mean.float(), (0.5 * logvar.float()).exp()

    def encode_picture(self, image, noise):
        """image [3,H,W] in [-1,1] -> scaled latents, a draw of the VAE's distribution for each row of noise()."""
        mean, std = self.moments(image)
        return self.vae.scale(mean + std * noise().to(mean.device)).to(self.device)

    @torch.no_grad()
    def decode(self, x):
        """Scaled latents [n,4,h,w] -> n PIL pictures."""
        self.fetch("vae")
        like = next(self.vae.parameters())
        size = x.shape[3] * self.vae.config.factor, x.shape[2] * self.vae.config.factor
        decode = self.vae.decode if math.prod(size) <= WHOLE else self.vae.decode_tiles
        images = torch.cat([decode(part) for part in self.vae.unscale(x).to(like).split(self.at_once(size))])
        if not images.isfinite().all():
            raise InputError(f"the picture came out as NaN or infinity in {str(like.dtype).removeprefix('torch.')}; "
                             "use --dtype bf16 or fp32")
        return to_pictures(images)

    def at_once(self, size):
        """How many pictures of this size to draw or decode together, so that memory does not grow with their number."""
        return max(1, AT_ONCE // (size[0] * size[1]))

    @property
    def device(self):
        """Where drawing happens: the UNet's device, also while it is on disk."""
        return torch.device(self.lazy["unet"][2]) if self.lazy else next(self.unet.parameters()).device


def latent_mask(drawn, factor):
    """[1,H,W] of 0 and 1 -> [1,1,h,w]. The nearest pixel decides for each latent pixel."""
    return nn.functional.interpolate(drawn[None], size=(drawn.shape[1] // factor, drawn.shape[2] // factor))
