"""Settings of training: what every recipe has, and what recipes of one kind have in common."""

from dataclasses import dataclass

from minipic.common import InputError, ParameterError, real_path
from minipic.training.flags import option

# The headings of `train.py NAME --help`.
DATA = "what to train on"
LORA = "the LoRA"
LOSS = "the loss"
HOW = "how to train"
WHERE = "where things go"


@dataclass
class TrainSettings:
    """The settings of every recipe. A recipe adds its own fields, and may change these defaults."""

    steps: int = option(1000, "optimizer steps in all", group=HOW)
    batch: int = option(32, "samples per step, over all processes", group=HOW)
    gradient_accumulation: int = option(
        1, "parts that a batch is cut into, to save memory", group=HOW)
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, more time", group=HOW)
    lr: float = option(1e-3, "peak learning rate", group=HOW)
    warmup: int = option(100, "steps in which the learning rate rises to its peak", group=HOW)
    lr_schedule: str = option(
        "cosine", "learning rate after the warm-up",
        ("constant", "cosine", "linear", "halved"), group=HOW)
    weight_decay: float = option(0.01, "AdamW's decay of matrices and kernels", group=HOW)
    max_grad_norm: float = option(
        1.0, "gradients are scaled down to this norm; 0: never", group=HOW)
    ema: float = option(0.999, "decay of the weight average that is exported; 0: none", group=HOW)
    precision: str = option(
        None, "arithmetic of the forward pass; bf16 where the device has it, if left out",
        ("fp32", "bf16"), group=HOW)
    workers: int = option(
        None, "processes that prepare batches ahead; if left out none on a CPU, and with a GPU one "
        "per core, up to 8", group=HOW)
    minutes: float = option(
        0.0, "end after so many minutes, though not all steps are done; the learning rate then "
        "follows the time; 0: no limit", group=HOW)
    fsdp: bool = option(False, "shard what is trained over the processes of torchrun", group=HOW)
    seed: int = option(0, "seed of new weights, of the data and of the noise", group=HOW)
    out: str = option("", "run folder; runs/RECIPE if left out", group=WHERE)
    save: str = option("", "folder for the finished weights; OUT/model if left out", group=WHERE)
    overwrite: bool = option(
        False, "replace weights in --save that this run has not made", group=WHERE)
    resume: str = option(
        "", "go on from a checkpoint folder, or from the newest: latest", group=WHERE)
    allow_data_change: bool = option(
        False, "go on though files of the model or the data have changed", group=WHERE)
    save_every: int = option(500, "steps between checkpoints", group=WHERE)
    keep: int = option(2, "checkpoints to keep", group=WHERE)
    sample_every: int = option(500, "steps between sample pictures; 0: none", group=WHERE)
    log_every: int = option(10, "steps between lines of log.jsonl", group=WHERE)

    GROUPS = (DATA, LORA, LOSS, HOW, WHERE)
    MINIMUM = {
        "steps": 1, "batch": 1, "gradient_accumulation": 1, "lr": 0, "warmup": 0, "weight_decay": 0,
        "max_grad_norm": 0, "ema": 0, "save_every": 1, "keep": 1, "sample_every": 0, "log_every": 1,
        "seed": 0, "workers": 0, "minutes": 0}

    def __post_init__(self):
        for name, low in self.MINIMUM.items():
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise ParameterError(name, f"must be at least {low}, not {value}")
        if self.ema >= 1:
            raise ParameterError("ema", f"must be below 1, not {self.ema}; try 0.999")


@dataclass
class DenoisingSettings(TrainSettings):
    """What every recipe has that trains a network to remove noise."""

    model: str = option("weights/tiny", "folder or file of the model to start from", group=DATA)
    resolution: int = option(
        0, "train on pictures of this area, the side of a square in pixels; 0: the model's own",
        group=DATA)
    caption_dropout: float = option(
        0.1, "share of captions left out, for guidance: half as in drawing without a negative "
        "prompt, half as with an empty one",
        group=LOSS)
    min_snr: float = option(
        0.0, "Min-SNR weighting: its gamma, 5 in the paper; 0: none", group=LOSS)
    balanced: bool = option(
        False, "weight noise levels so that each counts about alike", group=LOSS)
    logit_normal: float = option(
        0.0, "draw middle noise levels more often: the spread, 1 in Stable Diffusion 3; "
        "0: all alike", group=LOSS)

    MINIMUM = TrainSettings.MINIMUM | {
        "resolution": 0, "min_snr": 0, "logit_normal": 0, "caption_dropout": 0}
    train_text = False  # LoraSettings make it a flag

    def __post_init__(self):
        super().__post_init__()
        if self.caption_dropout > 1:
            raise ParameterError(
                "caption_dropout", f"must be at most 1, not {self.caption_dropout}")
        if self.balanced and self.min_snr:
            raise InputError(
                "--balanced and --min-snr are two weightings of the loss; give one of them")


@dataclass
class PhotoSettings(DenoisingSettings):
    """What every recipe has that trains on a folder of pictures."""

    data: str = option(
        "", "folder of pictures with .txt captions or metadata.jsonl; the world if left out",
        group=DATA)
    caption: str = option("", "caption of pictures that have none", group=DATA)
    bad_images: str = option(
        "error", "what to do about unusable pictures", ("error", "skip"), group=DATA)

    def __post_init__(self):
        super().__post_init__()
        if not self.data:
            for name in ("caption", "bad_images"):
                if getattr(self, name) != getattr(type(self), name):  # the default
                    raise ParameterError(name, "needs --data; without it this does nothing")
            return
        data = real_path(self.data)
        for name in ("out", "save"):
            folder = getattr(self, name)
            if folder and real_path(folder).is_relative_to(data):
                raise ParameterError(
                    name, f"{folder} lies in --data, so its pictures would be trained on; "
                    "choose another")


@dataclass
class LoraSettings(PhotoSettings):
    """What every recipe has that trains a UNet on a folder of pictures, whole or by a LoRA."""

    lora_rank: int = option(
        0, "train a LoRA of this rank and leave the model as it is; 0: train the model", group=LORA)
    lora_alpha: float = option(
        0.0, "the LoRA is scaled by alpha / rank; 0: alpha is the rank", group=LORA)
    lora_format: str = option(
        "peft", "names in the LoRA's file: PEFT's, which diffusers reads, or kohya's",
        ("peft", "kohya"), group=LORA)
    train_text: bool = option(False, "train the text encoders too", group=DATA)

    MINIMUM = PhotoSettings.MINIMUM | {"lora_rank": 0, "lora_alpha": 0}

    def __post_init__(self):
        super().__post_init__()
        if self.lora_alpha and not self.lora_rank:
            raise ParameterError("lora_alpha", "needs --lora-rank; without it there is no LoRA")
        if self.lora_format == "kohya" and not self.lora_rank:
            raise ParameterError("lora_format", "needs --lora-rank; without it there is no LoRA")


@dataclass
class PairSettings(DenoisingSettings):
    """What every recipe has that learns from pairs: one picture given and one wanted."""

    scenes: int = option(4000, "different pairs, kept in memory", group=DATA)

    MINIMUM = DenoisingSettings.MINIMUM | {"scenes": 1}

    def __post_init__(self):
        super().__post_init__()
        if self.resolution % 16:
            raise ParameterError("resolution", f"must be a multiple of 16, not {self.resolution}")
