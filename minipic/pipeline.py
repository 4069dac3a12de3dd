"""The pipeline: from a prompt through text encoders, guidance, UNet and VAE to a picture.

    pipeline = Pipeline.load("weights/tiny")
    pictures = pipeline.generate("a small red sphere left of a large blue cube", n=4)

SDXL (arXiv 2307.01952): base, refiner, Turbo; Stable Diffusion 1.x and 2.x; image-to-image
(2108.01073); inpainting by latent replacement (2201.09865) or with a UNet that sees the mask;
ControlNet (2302.05543); edits by instruction (InstructPix2Pix, 2211.09800). The same seed gives
the picture that diffusers gives.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
from PIL import Image
from tqdm.auto import tqdm

from minipic.common import InputError, ParameterError, find_file
from minipic.diffusion.guidance import combine, rescale
from minipic.diffusion.samplers import SAMPLERS, keep_unmasked
from minipic.diffusion.schedule import Grid, Schedule
from minipic.draw_settings import DrawSettings, check_against_model, choose_size, nth_seed
from minipic.image import mask_to_tensor, resize_and_crop, to_pictures, to_tensor
from minipic.kernels.cuda_graph import graph_helps, graphed
from minipic.layers import lora
from minipic.models.clip import CLIPText
from minipic.models.unet import UNet
from minipic.models.vae import VAE
from minipic.text import Conditioning, Tokenizer, encode_weighted, open_tokenizer, size_ids
from minipic.weights.configs import config_to_json, read_config
from minipic.weights.files import replacing_folder
from minipic.weights.layouts import open_model, save_folder
from minipic.weights.networks import TEXT_ENCODERS, TOKENIZER_OF, Networks, OnDisk, is_scale

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
PIXELS_AT_ONCE = 1024 * 1024    # drawn or decoded together: 0.5 GB an activation of the VAE in fp32
PIXELS_UNTILED = 2048 * 2048    # larger pictures are decoded in tiles
AESTHETIC_SCORES = (2.5, 6.0)   # of 10, for the refiner: unwanted and wanted picture (diffusers)


@dataclass
class Stage:
    """One model's share of the steps; a refiner takes the last ones."""

    pipeline: "Pipeline"
    grid: Grid
    cond: Conditioning
    uncond: Conditioning


@dataclass
class Drawing:
    """What `Pipeline.prepare` has made ready for the first step: n pictures of one prompt."""

    settings: DrawSettings
    x: torch.Tensor                     # [n,4,h,w] at the first noise level
    noise: "SeededNoise"                # for samplers that add some on their way
    stages: list[Stage]
    known: torch.Tensor | None = None   # the latent of `image`, where a part of it is kept
    first_noise: torch.Tensor | None = None  # unit noise, from which x was made
    extra: torch.Tensor | None = None   # what the UNet sees besides x, see `extra_channels`

    def __len__(self):
        return sum(len(stage.grid) for stage in self.stages)


@dataclass(frozen=True)
class Branch:
    """One of the predictions that guidance combines in a step."""

    text: Conditioning
    weight: float = 0.0         # of its difference to the first prediction, see guidance.combine
    sees_image: bool = True     # whether an editing UNet sees the picture to change


class SeededNoise:
    """Unit noise [n,C,h,w]. Row i has a generator of its own, see `nth_seed`, whatever n is.

    The generators are on the CPU, as diffusers' by default: the noise is the same on every device.
    Every call takes the next numbers of the generators.
    """

    def __init__(self, seed: int, n: int, shape: tuple, device: torch.device):
        self.generators = []
        for i in range(n):
            self.generators.append(torch.Generator().manual_seed(nth_seed(seed, i)))
        self.shape = shape
        self.device = device

    def __call__(self, step: int | None = None) -> torch.Tensor:
        # A sampler names the step, for noise that depends on it. This noise only follows the order
        # of the calls.
        rows = [torch.randn(self.shape, generator=generator) for generator in self.generators]
        return torch.stack(rows).to(self.device)


class Pipeline(Networks):
    """A model that draws: its networks and tokenizers, and its noise schedule.

    index: its model_index.json.
    """

    def __init__(
            self, unet: UNet, vae: VAE, text_encoder: CLIPText | None = None,
            text_encoder_2: CLIPText | None = None, tokenizer: Tokenizer | None = None,
            tokenizer_2: Tokenizer | None = None,
            schedule: Schedule | None = None, index: dict | None = None):
        super().__init__(unet, vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2)
        self.schedule = schedule or Schedule()
        name = "StableDiffusionXLPipeline" if self.is_sdxl else "StableDiffusionPipeline"
        self.index = index or {"_class_name": name}
        # {(prompt, negative, changes): Conditionings}. When networks are read lazily, the text
        # encoders are gone by the time a second batch of pictures needs these.
        self.encoded = {}

    @classmethod
    def load(
            cls, path: str | Path, dtype: torch.dtype | None = None,
            device: str | torch.device | None = None,
            lora: str | Path | tuple | list = (), vae: str | Path | None = None,
            lazy: bool = False, cast: bool = False) -> "Pipeline":
        """A model from a diffusers folder, or from a .safetensors file beside its tokenizers.

        dtype: of the networks, float32 by default. In float16 a VAE that would overflow stays in
            float32.
        device: the CPU by default.
        lora: a LoRA file, or a pair (file, scale), or a list of either. A file by itself has the
            scale 1; see `add_lora`.
        vae: the folder or file of another VAE.
        lazy: read each network when it is needed, and give the text encoders' memory back before
            the UNet is read.
        cast: in float32, large weights stay in the 16 bits of their file, in half the memory
            (kernels/casting.py).
        Raises InputError naming what is wrong.
        """
        if not isinstance(path, (str, Path)):
            raise ParameterError("path", f"expected a file or folder, not {path!r}")
        path = find_file(path)
        vae = find_file(vae) if vae is not None else None
        dtype = dtype or torch.float32
        if not isinstance(dtype, torch.dtype):
            raise ParameterError("dtype", f"{dtype!r} is none of PyTorch's, such as torch.bfloat16")
        device = usable_device(device or "cpu")
        loras = files_and_scales(lora)
        source = open_model(path, half=dtype != torch.float32, vae=vae)
        parts = source.parts
        latent_channels = parts["vae"].config.latent_channels
        channels = parts["unet"].config.out_channels
        if latent_channels != channels:
            raise ParameterError(
                "vae", f"{vae} makes {latent_channels} channels, the UNet of {path} {channels}")

        on_disk = {}
        for name, part in parts.items():
            overflows = name == "vae" and dtype == torch.float16 and part.config.force_upcast
            on_disk[name] = OnDisk(part, torch.float32 if overflows else dtype, device, cast)
        tokenizers = {}
        for name in parts.keys() & TOKENIZER_OF.keys():
            folder = TOKENIZER_OF[name]
            tokenizers[folder] = open_tokenizer(path, folder, parts[name].config.vocab_size)
        schedule_path = path / "scheduler" / "scheduler_config.json"
        schedule = read_config(Schedule, source.scheduler, schedule_path)

        networks = {}
        for name, network in on_disk.items():
            networks[name] = network.empty() if lazy else network.load()
        pipeline = cls(**networks, **tokenizers, schedule=schedule, index=source.index)
        if lazy:  # empty networks have no numbers yet: `fetch` replaces each by one read from disk
            pipeline.on_disk = on_disk
        for file, scale in loras:
            pipeline.add_lora(file, scale)
        return pipeline

    def save(
            self, folder: str | Path, dtype: torch.dtype | None = None,
            class_name: str | None = None):
        """Write a diffusers folder that `load` and diffusers read, all at once.

        dtype: of the weights there; None: as they are.
        class_name: of diffusers' pipeline for this model, if it is no longer that in `index`.
        """
        if any(lora.layers(self)) or self.loras or self.words:
            raise InputError(
                f"{folder}: this model has LoRAs or added words, which its files cannot hold; "
                "save those by themselves")
        self.fetch(*PARTS)
        parts = {name: getattr(self, name) for name in PARTS if getattr(self, name) is not None}
        index = self.index | {"_class_name": class_name or self.index["_class_name"]}
        with replacing_folder(folder) as temporary:
            for name in parts.keys() & TOKENIZER_OF.keys():
                tokenizer = TOKENIZER_OF[name]
                getattr(self, tokenizer).save(temporary / tokenizer)
            save_folder(temporary, parts, index, config_to_json(self.schedule), dtype)

    def __repr__(self):
        width, height = self.size
        name = self.index["_class_name"]
        lines = [f"{name} on {self.device}, draws {width}x{height} pixels"]
        for name, network in self.named_children():
            weight = next(network.parameters())
            count = sum(param.numel() for param in network.parameters())
            place = "on disk" if weight.is_meta else str(weight.dtype).removeprefix("torch.")
            lines.append(f"  {name}: {type(network).__name__}, {count:,} parameters, {place}")
        lines.append(f"  schedule: {self.schedule.sampler}, {self.schedule.prediction_type}")
        lines += [f"  LoRA {name} at {scale:g}" for name, (scale, _) in self.loras.items()]
        lines += [f"  word {word!r}" for word in self.words]
        return "\n".join(lines)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels of the pictures that the UNet was trained for."""
        side = self.unet.config.sample_size * self.vae.config.factor
        return side, side

    @property
    def zeros_for_empty_prompt(self) -> bool:
        """Whether the UNet knows no text at all as zeros, as SDXL base does, or as the text ""."""
        return self.is_sdxl and self.index.get("force_zeros_for_empty_prompt", True)

    # Drawing --------------------------------------------------------------------------------------

    def generate(
            self, prompt: str, negative: str | None = None, steps: int = 30, guidance: float = 5.0,
            seed: int = 0, n: int = 1, size: tuple[int, int] | int | None = None,
            sampler: str | None = None, image: Image.Image | None = None, strength: float = 0.75,
            mask: Image.Image | None = None, control: tuple = (), edit: Image.Image | None = None,
            image_guidance: float = 1.5, refiner: "Pipeline | None" = None,
            high_noise_frac: float = 0.8, original_size: tuple[int, int] | None = None,
            crop: tuple[int, int] = (0, 0), target_size: tuple[int, int] | None = None,
            guidance_rescale: float = 0.0, graph: bool | None = None,
            progress: bool | None = None) -> list[Image.Image]:
        """Draw n pictures of a prompt.

        prompt, negative: what to draw, and what not; of any length, with weights such as
            (red:1.3), see text.parse_weights. No negative prompt (None) is not always the empty
            one, see `encode`.
        steps: from noise to picture.
        guidance: how much to follow the prompt; 1 or less is off, as Turbo wants it.
        seed: from 0 to 2**64 - 1; picture i has seed + i.
        size: (width, height), multiples of 8; by default that of the picture that is given, but no
            more pixels than the model's own size.
        sampler: a name in samplers.SAMPLERS; the model's own by default.
        image: a picture to start from, changed the more the higher `strength`, above 0 up to 1.
        mask: white where to draw, black or transparent where to keep `image`; of the same size.
        control: [(picture, scale), ...] for the ControlNets in the order of `add_controlnet`:
            edges, depth or the like, and how closely to follow them, 1 as trained, 0 not at all.
        edit: a picture that the prompt says how to change, for a model trained to.
        image_guidance: how much to follow `edit`; 1 is off.
        refiner: a second model, which takes over when only 1 - high_noise_frac of the noise
            schedule is left.
        original_size (width, height), crop (left, top), target_size: SDXL's micro-conditioning. The
            picture is drawn as if it were cut at `crop` out of one of original_size.
        guidance_rescale: 0 to 1, see diffusion/guidance.py.
        graph: draw with CUDA graphs; by default where that is faster.
        progress: show a progress bar; by default in a terminal or notebook.
        Raises InputError naming the parameter that is wrong.
        """
        settings = DrawSettings(
            prompt=prompt, negative=negative, steps=steps, guidance=guidance, seed=seed, n=n,
            size=size, sampler=sampler, image=image, strength=strength, mask=mask, control=control,
            edit=edit, image_guidance=image_guidance, refiner=refiner,
            high_noise_frac=high_noise_frac, original_size=original_size, crop=crop,
            target_size=target_size, guidance_rescale=guidance_rescale, graph=graph)
        if not isinstance(progress, bool | None):
            raise ParameterError("progress", f"expected True, False or None, not {progress!r}")
        drawing = self.prepare(settings)
        hidden = None if progress is None else not progress  # None: hidden without a terminal
        for x, _ in tqdm(self.denoise(drawing), total=len(drawing), disable=hidden, leave=False):
            pass
        return self.decode(x)

    def latents(
            self, prompt: str, negative: str | None = None, steps: int = 30, guidance: float = 5.0,
            seed: int = 0, n: int = 1, size: tuple[int, int] | int | None = None,
            sampler: str | None = None, image: Image.Image | None = None, strength: float = 0.75,
            mask: Image.Image | None = None, control: tuple = (), edit: Image.Image | None = None,
            image_guidance: float = 1.5, refiner: "Pipeline | None" = None,
            high_noise_frac: float = 0.8, original_size: tuple[int, int] | None = None,
            crop: tuple[int, int] = (0, 0), target_size: tuple[int, int] | None = None,
            guidance_rescale: float = 0.0, graph: bool | None = None) -> Iterator[torch.Tensor]:
        """`generate` as a generator: x_t [n,4,h,w] after every step, of variance about 1.

        `decode` the last one.
        """
        settings = DrawSettings(
            prompt=prompt, negative=negative, steps=steps, guidance=guidance, seed=seed, n=n,
            size=size, sampler=sampler, image=image, strength=strength, mask=mask, control=control,
            edit=edit, image_guidance=image_guidance, refiner=refiner,
            high_noise_frac=high_noise_frac, original_size=original_size, crop=crop,
            target_size=target_size, guidance_rescale=guidance_rescale, graph=graph)
        drawing = self.prepare(settings)  # mistakes are raised here, before the first step
        return (x for x, _ in self.denoise(drawing))

    @torch.no_grad()
    def encode(self, prompt: str, negative: str | None = None) -> tuple[Conditioning, Conditioning]:
        """(what is wanted, what is not): two Conditionings of one row, without sizes.

        A negative prompt of None is none at all, see `zeros_for_empty_prompt`; "" is encoded.
        """
        for name, text in (("prompt", prompt), ("negative", negative or "")):
            if not isinstance(text, str):
                raise ParameterError(name, f"expected one text, not {text!r}")
        key = prompt, negative, self.changes
        if key in self.encoded:
            return self.encoded[key]
        self.fetch(*TEXT_ENCODERS)
        encoders = self.tokenizers_and_encoders
        wanted, unwanted = encode_weighted([prompt, negative or ""], encoders, self.is_sdxl)
        cond = Conditioning(*wanted)
        uncond = Conditioning(*unwanted)
        if negative is None and self.zeros_for_empty_prompt:
            uncond = Conditioning(torch.zeros_like(cond.context), torch.zeros_like(cond.pooled))
        if self.on_disk:
            self.encoded[key] = cond, uncond
        return cond, uncond

    def plan(self, settings: DrawSettings) -> tuple[DrawSettings, Grid]:
        """The settings with size and sampler filled in, and the noise levels of the drawing.

        Reads no weights. Raises ParameterError for what cannot be drawn with this model.
        """
        check_against_model(settings, self)
        size = choose_size(settings, self.size)
        if settings.mask is not None:
            mask = mask_to_tensor(settings.mask, size)
            if not latent_mask(mask, self.vae.config.factor).any():
                raise ParameterError(
                    "mask", "hardly anything of it is white, so nothing would be drawn; paint "
                    "white where to draw")
        grid = self.schedule.grid(settings.steps, settings.sampler)
        if settings.image is not None:
            grid = grid.strength(settings.strength)
        sampler = settings.sampler or self.schedule.sampler
        return replace(settings, size=size, sampler=sampler), grid

    @torch.no_grad()
    def prepare(self, settings: DrawSettings) -> Drawing:
        """Encode what is given, and draw the noise to start from."""
        settings, grid = self.plan(settings)
        cond, uncond = self.encode(settings.prompt, settings.negative)
        width, height = settings.size
        factor = self.vae.config.factor
        shape = (self.vae.config.latent_channels, height // factor, width // factor)
        noise = SeededNoise(settings.seed, settings.n, shape, self.device)

        # Every noise() takes the next numbers of the generators. The order of these calls is that
        # of diffusers and must stay: for the picture, for the first x, for the masked picture.
        has_mask = settings.mask is not None
        keeps_a_part = has_mask and self.extra_input != "mask"
        from_noise = settings.image is None or (has_mask and settings.strength == 1)
        known = None
        if keeps_a_part or not from_noise:
            image = to_tensor(resize_and_crop(settings.image, settings.size))
            known = self.encode_picture(image, noise)
        first_noise = noise()
        if from_noise:
            # grid.start: the standard deviation of the noise to start from
            x = grid.start * first_noise
        else:
            x = self.schedule.objective.add_noise(known, first_noise, grid.sigmas[0])
        extra = self.extra_channels(settings, noise)

        stages = [self.stage(settings, grid, cond, uncond)]
        if settings.refiner is not None:
            stages = self.stages_with_refiner(settings, grid, cond, uncond)
        for stage in stages:
            stage.pipeline.free(*TEXT_ENCODERS)
        if not keeps_a_part:
            known = None
        return Drawing(settings, x, noise, stages, known, first_noise, extra)

    def stage(
            self, settings: DrawSettings, grid: Grid,
            cond: Conditioning, uncond: Conditioning) -> Stage:
        """This model's share of a drawing. SDXL's Conditionings get their size ids."""
        if self.is_sdxl:
            original = settings.original_size or settings.size
            target = settings.target_size or settings.size
            negative_ids, positive_ids = self.negative_and_positive_size_ids(
                original, settings.crop, target)
            cond = cond._replace(size_ids=positive_ids)
            uncond = uncond._replace(size_ids=negative_ids)
        return Stage(self, grid, cond, uncond)

    def stages_with_refiner(
            self, settings: DrawSettings, grid: Grid,
            cond: Conditioning, uncond: Conditioning) -> list[Stage]:
        """The base model draws the first high_noise_frac of the schedule, the refiner the rest."""
        refiner = settings.refiner
        first = grid.part(end=settings.high_noise_frac)
        refiner_grid = refiner.schedule.grid(settings.steps, settings.sampler)
        last = refiner_grid.part(start=settings.high_noise_frac)
        refiner_text = refiner.encode(settings.prompt, settings.negative)
        return [
            self.stage(settings, first, cond, uncond),
            refiner.stage(settings, last, *refiner_text)]

    def negative_and_positive_size_ids(
            self, original: tuple[int, int], crop: tuple[int, int],
            target: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Size ids [1,6] of what is not wanted and of what is wanted: SDXL base has the same.

        The refiner's [1,5] end in an aesthetic score instead of the target size, a low and a high
        one.
        """
        if self.takes_aesthetic_score:
            negative_end, positive_end = AESTHETIC_SCORES
        else:
            negative_end = positive_end = target
        negative = size_ids(original, crop, negative_end)
        positive = size_ids(original, crop, positive_end)
        return negative[None], positive[None]

    @property
    def takes_aesthetic_score(self) -> bool:
        """Whether this is SDXL's refiner, whose UNet has room for five size ids instead of six."""
        config = self.unet.config
        pooled_width = self.text_encoder_2.config.projection_dim
        size_ids_width = config.projection_class_embeddings_input_dim - pooled_width
        return size_ids_width == 5 * config.addition_time_embed_dim

    def extra_channels(self, settings: DrawSettings, noise: SeededNoise) -> torch.Tensor | None:
        """What the UNet sees besides x, see `extra_input`.

        Editing: the latent of `edit` [1,4,h,w], unscaled as diffusers has it. Inpainting: the mask
        and the latent of the picture with grey in its place [n,5,h,w]. Else None.
        """
        if self.extra_input == "edit":
            mean, _ = self.encode_moments(to_tensor(resize_and_crop(settings.edit, settings.size)))
            return mean.to(self.device)
        if self.extra_input == "mask":
            mask = mask_to_tensor(settings.mask, settings.size)
            image = to_tensor(resize_and_crop(settings.image, settings.size))
            around = self.encode_picture(image * (1 - mask), noise)
            mask = latent_mask(mask, self.vae.config.factor).to(around)
            return torch.cat([mask.expand(len(around), -1, -1, -1), around], dim=1)
        return None

    @torch.no_grad()
    def denoise(
            self, drawing: Drawing, network: Callable | None = None,
            guide_by_image: bool = False) -> Iterator[tuple]:
        """Yield (x_t, predicted x0), each [n,4,h,w] and ready for `decode`, after every step.

        What is yielded is for looking at: do not edit it in place. A `network` can change the
        drawing.
        network: what predicts instead of the UNet; called as
            network(x, t, context, pooled, size_ids, residuals), with the rows of `predictor`.
        guide_by_image: the network shows a picture besides x, which image_guidance is for. Of the
            three predictions that are then combined, it must leave the picture out of the first.
        """
        settings = drawing.settings
        use_graph = graph_helps(self.device) if settings.graph is None else settings.graph
        x = drawing.x
        for stage in drawing.stages:
            pipeline = stage.pipeline
            sigmas = stage.grid.sigmas
            objective = pipeline.schedule.objective
            predict = pipeline.guided_network(drawing, stage, network, guide_by_image)
            if use_graph:
                predict = graphed(predict)
            denoiser = objective.denoiser(predict, stage.grid)
            states = SAMPLERS[settings.sampler](denoiser, x, sigmas, drawing.noise)
            if drawing.known is not None:
                mask = mask_to_tensor(settings.mask, settings.size)
                mask = latent_mask(mask, self.vae.config.factor).to(x)
                states = keep_unmasked(
                    states, objective.add_noise, drawing.known, drawing.first_noise, mask,
                    sigmas)
            for i, (x, x0) in enumerate(states):
                # diffusers' latents have a variance of about 1, also between the steps, and the VAE
                # decodes such. At sigma 0, after the last step, network_input changes nothing.
                yield objective.network_input(x, sigmas[i + 1]), x0
            if settings.refiner is not None:
                predict = denoiser = states = None  # they hold the UNet's layers
                pipeline.free("unet", *pipeline.controlnets)

    def guided_network(
            self, drawing: Drawing, stage: Stage, network: Callable | None = None,
            guide_by_image: bool = False) -> Callable:
        """The function predict(x, t) that the sampler calls in this stage of a drawing.

        It looks up what the drawing asks for: which branches, which ControlNets, which extra
        channels. `predictor` makes the function of them.
        """
        settings = drawing.settings
        branches = self.guidance_branches(stage, settings, guide_by_image)
        # ControlNets and extra channels are the first model's. A refiner has none.
        controls = []
        extra = None
        if stage is drawing.stages[0]:
            extra = drawing.extra
            for name, (picture, scale) in zip(self.controlnets, settings.control):
                if scale:
                    picture = to_tensor(resize_and_crop(picture, settings.size))
                    controls.append((name, (picture[None] + 1) / 2, scale))
        n = len(drawing.x)
        return self.predictor(branches, n, settings.guidance_rescale, controls, extra, network)

    def guidance_branches(
            self, stage: Stage, settings: DrawSettings,
            guide_by_image: bool = False) -> list[Branch]:
        """The predictions that a step combines; weights as in `guidance.combine`.

        guide_by_image: see `denoise`. A UNet for editing is always guided by its picture too.
        """
        guidance = max(settings.guidance, 1.0)
        image_guidance = max(settings.image_guidance, 1.0)
        by_image = guide_by_image or self.extra_input == "edit"
        if by_image and max(guidance, image_guidance) > 1:
            # arXiv 2211.09800 equation 3: e00 + sI (eI0 - e00) + sT (eIT - eI0). Its predictions
            # are e00 without picture and text, eI0 with the picture, eIT with both; sI is the image
            # guidance, sT the guidance. Written as differences from e00, the weight of eI0 - e00 is
            # sI - sT and that of eIT - e00 is sT.
            return [
                Branch(stage.uncond, sees_image=False),
                Branch(stage.uncond, image_guidance - guidance),
                Branch(stage.cond, guidance)]
        if guidance > 1:
            return [Branch(stage.uncond), Branch(stage.cond, guidance)]
        return [Branch(stage.cond)]

    def predictor(
            self, branches: list[Branch], n: int, guidance_rescale: float = 0.0,
            controls: list[tuple[str, torch.Tensor, float]] | tuple = (),
            extra: torch.Tensor | None = None, network: Callable | None = None) -> Callable:
        """Make predict(x, t): it runs all branches as one batch through the network, and combines.

        It knows no settings: everything that it needs is a parameter. Whatever is the same in every
        step is computed here, once.

        n: the rows of x for each row of a branch's text.
        controls: [(name of a ControlNet, what it follows [.,3,H,W] in 0..1, scale), ...].
        extra: what the UNet sees besides x.
        network: what predicts instead of the UNet.
        """
        self.fetch("unet", *(name for name, _, _ in controls))
        network = network or self.unet
        weight = next(self.unet.parameters())

        # The order of the rows: all n pictures of branch 0, then all n of branch 1, and so on.
        def rows(tensors):
            """One row for each picture and branch; None where the model has none of them."""
            if tensors[0] is None:
                return None
            return torch.cat(tensors).to(weight.device).repeat_interleave(n, dim=0)

        context = rows([branch.text.context for branch in branches]).to(weight)
        pooled = rows([branch.text.pooled for branch in branches])
        if pooled is not None:
            pooled = pooled.to(weight)
        ids = rows([branch.text.size_ids for branch in branches])
        text_kv = self.unet.text_keys_values(context)  # keys and values, the same in every step
        if extra is not None:
            extra = extra.expand(len(context) // len(branches), -1, -1, -1)
            hidden = torch.zeros_like(extra)
            shown = [extra if branch.sees_image else hidden for branch in branches]
            extra = torch.cat(shown).to(weight)
        active_controlnets = []
        for name, hint, scale in controls:
            controlnet = getattr(self, name)
            control_kv = controlnet.text_keys_values(context)
            active_controlnets.append((controlnet, control_kv, hint.to(weight), scale))

        def predict(x, t):
            inputs = torch.cat([x] * len(branches)).to(weight.dtype)
            residuals = None
            for controlnet, control_kv, hint, scale in active_controlnets:
                more = controlnet(inputs, t, control_kv, hint, pooled, ids, scale)
                if residuals is None:
                    residuals = more
                else:
                    residuals = [a + b for a, b in zip(residuals, more)]
            if extra is not None:
                inputs = torch.cat([inputs, extra], dim=1)
            prediction = network(inputs, t, text_kv, pooled, ids, residuals)
            first, *others = prediction.to(x.dtype).chunk(len(branches))
            if not others:
                return first
            weights = [branch.weight for branch in branches[1:]]
            guided = combine(first, list(zip(weights, others)))
            if guidance_rescale:
                guided = rescale(guided, others[-1], guidance_rescale)
            return guided

        return predict

    # Pictures and latents -------------------------------------------------------------------------

    def encode_moments(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """image [3,H,W] in [-1,1] -> mean and deviation of its latent, each [1,4,h,w], unscaled."""
        self.fetch("vae")
        mean, logvar = self.vae.encode(image[None].to(next(self.vae.parameters())))
        return mean.float(), (0.5 * logvar.float()).exp()

    def mean_latent(self, image: torch.Tensor) -> torch.Tensor:
        """image [3,H,W] in [-1,1] -> the mean of its latent, scaled [1,4,h,w]."""
        mean, _ = self.encode_moments(image)
        return self.vae.scale(mean).to(self.device)

    def encode_picture(self, image: torch.Tensor, noise: Callable) -> torch.Tensor:
        """image [3,H,W] in [-1,1] -> scaled latents, a sample for each row of noise()."""
        mean, std = self.encode_moments(image)
        return self.vae.scale(mean + std * noise().to(mean.device)).to(self.device)

    @torch.no_grad()
    def decode(self, x: torch.Tensor) -> list[Image.Image]:
        """Scaled latents [n,4,h,w] -> n PIL pictures."""
        self.fetch("vae")
        weight = next(self.vae.parameters())
        width = x.shape[3] * self.vae.config.factor
        height = x.shape[2] * self.vae.config.factor
        decode = self.vae.decode
        if width * height > PIXELS_UNTILED:
            decode = self.vae.decode_tiles
        chunks = self.vae.unscale(x).to(weight).split(self.pictures_at_once((width, height)))
        images = torch.cat([decode(chunk) for chunk in chunks])
        if not images.isfinite().all():
            dtype = str(weight.dtype).removeprefix("torch.")
            raise ParameterError(
                "dtype", f"the picture came out as NaN or infinity in {dtype}; use bf16 or fp32")
        return to_pictures(images)

    def pictures_at_once(self, size: tuple[int, int]) -> int:
        """How many pictures of this size to draw or decode together, to bound the memory."""
        return max(1, PIXELS_AT_ONCE // (size[0] * size[1]))


def usable_device(device: str | torch.device) -> torch.device:
    """The device of this name. ParameterError where PyTorch cannot compute on it here."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise ParameterError(
            "device", f"PyTorch cannot compute on {device!r} here; 'cpu' always works") from error
    return torch.device(device)


def files_and_scales(lora: str | Path | tuple | list) -> list[tuple[str | Path, float]]:
    """The `lora` of Pipeline.load as [(file, scale), ...]."""
    is_file = isinstance(lora, (str, Path))
    is_pair = isinstance(lora, tuple) and len(lora) == 2 and isinstance(lora[1], (int, float))
    if not isinstance(lora, (str, Path, tuple, list)):
        raise ParameterError("lora", f"expected files or pairs (file, scale), not {lora!r}")
    pairs = []
    for item in [lora] if is_file or is_pair else lora:
        pair = item if isinstance(item, tuple) else (item, 1.0)
        if len(pair) != 2 or not isinstance(pair[0], (str, Path)) or not is_scale(pair[1]):
            raise ParameterError("lora", f"expected a file or a pair (file, scale), not {item!r}")
        pairs.append(pair)
    return pairs


def latent_mask(mask: torch.Tensor, factor: int) -> torch.Tensor:
    """[1,H,W] of 0 and 1 -> [1,1,h,w]. The nearest pixel decides for each latent pixel."""
    size = mask.shape[1] // factor, mask.shape[2] // factor
    return nn.functional.interpolate(mask[None], size=size)
