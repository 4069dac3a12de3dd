# %% [markdown]
# # 12 · From the tiny model to SDXL
#
# - **Goal:** build the real SDXL without its weights, say what it weighs and costs, and prove that
#   the official files fit
# - **Time:** 20 s
# - **Needs:** 05_unet
# - **Figures:** files, blocks, memory
#
# All lessons use a tiny SDXL of a few million parameters. SDXL base 1.0 is the same code with
# larger numbers in its config. Its files have seven gigabytes, but we need none of them: PyTorch's
# *meta* device builds networks whose tensors have a shape and no content.

# %%
from lesson import Lesson

lesson = Lesson("12_tiny_to_sdxl")

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from minipic.common import InputError, find_file
from minipic.figures import bars, table
from minipic.layers import lora
from minipic.models.clip import CLIP_L, OPENCLIP_BIGG, CLIPText
from minipic.models.unet import SDXL_BASE, UNet
from minipic.models.vae import SDXL_VAE, VAE
from minipic.pipeline import Pipeline
from minipic.weights.layouts import build_empty
from minipic.weights.parts import check_fit

tiny = Pipeline.load("weights/tiny").unet
for key, value in vars(SDXL_BASE).items():
    if getattr(tiny.config, key) != value:
        print(f"{key}: tiny {getattr(tiny.config, key)}, SDXL {value}")

# %% [markdown]
# ## Predict
#
# SDXL's UNet has three levels, of 320, 640 and 1280 channels, at 128 x 128, 64 x 64 and 32 x 32
# latent pixels. The first level has no attention, the second 2 transformer blocks and the third 10
# in each place. **Which share of the parameters is in the blocks of the third level, with the
# middle? And which share of the operations?**
#
# ## Built from nothing

# %%
lesson.show_source(build_empty)
sdxl = build_empty(UNet, SDXL_BASE)
networks = {
    "unet": (sdxl, "unet/diffusion_pytorch_model.fp16.safetensors"),
    "vae": (build_empty(VAE, SDXL_VAE), "vae/diffusion_pytorch_model.fp16.safetensors"),
    "text_encoder": (build_empty(CLIPText, CLIP_L), "text_encoder/model.fp16.safetensors"),
    "text_encoder_2": (
        build_empty(CLIPText, OPENCLIP_BIGG), "text_encoder_2/model.fp16.safetensors")}


def count(module: torch.nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


lesson.expect("parameters of SDXL's UNet", count(sdxl))
lesson.expect("the same over the tiny UNet's", count(sdxl) / count(tiny))

# %% [markdown]
# ## Do the official files fit?
#
# A .safetensors file is 8 bytes that say how long its header is, the header, and the numbers. The
# header is a text: of each tensor its name, type, shape and place. It is filled up with spaces to
# a multiple of 8. If we know every name and every shape, we can predict the size of the file to
# the byte. The sizes of the official files are recorded in weights/official.json.

# %%
def file_size(network: torch.nn.Module) -> int:
    """Bytes of the .safetensors file of a network in 16 bits."""
    header = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in sorted(network.state_dict().items()):
        end = position + 2 * tensor.numel()
        header[name] = {
            "dtype": "F16", "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + 8 * -(-length // 8) + position


recorded = json.loads(find_file("weights/official.json").read_text(encoding="utf-8"))
official = recorded["repositories"]["stabilityai/stable-diffusion-xl-base-1.0"]["files"]
rows = [["network", "tensors", "parameters", "predicted bytes", "official file", "difference"]]
differences = []
for name, (network, file) in networks.items():
    size, _ = official[file]
    differences.append(abs(file_size(network) - size))
    rows.append([name, str(len(network.state_dict())), f"{count(network):,}",
                 f"{file_size(network):,}", f"{size:,}", str(differences[-1])])
lesson.show(table(rows), "files",
            "The four networks of SDXL base 1.0, their predicted size on disk in 16 bits, and the "
            "size of the official file. Each is right to the byte.")
lesson.expect("largest difference in bytes", max(differences))

# %% [markdown]
# One letter too many in one of 2,641 names, or one number too many in a shape, would have shown.
# This is what "attribute paths are the official keys" means: `unet.down_blocks[1].attentions[0]`
# in the code is `down_blocks.1.attentions.0` in the file, and nothing is renamed.
#
# ## What loads unchanged?
#
# So every diffusers file of SDXL loads, and what has the same config: Turbo, and thousands of
# fine-tuned models. Single files have other names, and minipic/weights/keys.py renames them. And
# the weights of the tiny UNet? Compare names and shapes.

# %%
tiny_shapes = {name: tuple(x.shape) for name, x in tiny.state_dict().items()}
sdxl_shapes = {name: tuple(x.shape) for name, x in sdxl.state_dict().items()}
shared = tiny_shapes.keys() & sdxl_shapes.keys()
same_shape = [name for name in shared if tiny_shapes[name] == sdxl_shapes[name]]
print(f"tiny {len(tiny_shapes)} names, SDXL {len(sdxl_shapes)}, shared {len(shared)}, "
      f"of the same shape {sorted(same_shape)}")
print("only tiny:", sorted(tiny_shapes.keys() - shared)[0])
print("only SDXL:", sorted(sdxl_shapes.keys() - shared)[0])
lesson.expect("names that both have", len(shared))
lesson.expect("tensors that both could share", len(same_shape))
try:
    origins = {name: (name, shape) for name, shape in tiny_shapes.items()}
    check_fit(UNet, SDXL_BASE, origins, Path("weights/tiny/unet"))
except InputError as error:
    print("refused:", error)

# %% [markdown]
# Only one bias fits, by accident: both predict four channels. Code is shared, weights are not. A
# loader must refuse what does not fit, because a network that keeps some random tensors still
# runs, and draws noise.
#
# ## Where the parameters are, and where the work is
#
# On the meta device a network even runs, on shapes. PyTorch's counter adds up the multiplications
# and additions of one step for 1024 x 1024 pixels.

# %%
with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
    sdxl(torch.empty(1, 4, 128, 128), torch.empty(1), torch.empty(1, 77, 2048),
         torch.empty(1, 1280), torch.empty(1, 6))
operations = {name: sum(kinds.values()) for name, kinds in counter.get_flop_counts().items()}
total = counter.get_total_flops()
rows = [["block", "tiny: parameters", "SDXL: parameters", "share", "share of the operations"]]
deepest = {"parameters": 0, "operations": 0}
for name in ("down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block",
             "up_blocks.0", "up_blocks.1", "up_blocks.2"):
    params = count(sdxl.get_submodule(name))
    work = operations[f"UNet.{name}"]
    rows.append([name, f"{count(tiny.get_submodule(name)):,}", f"{params:,}",
                 f"{100 * params / count(sdxl):.1f} %", f"{100 * work / total:.1f} %"])
    if name in ("down_blocks.2", "mid_block", "up_blocks.0"):
        deepest["parameters"] += params
        deepest["operations"] += work
lesson.show(table(rows), "blocks",
            "The seven blocks of the UNet, from the way down over the middle to the way up. The "
            "blocks of the third level are down_blocks.2, mid_block and up_blocks.0.")
lesson.expect("10^12 operations in a step", total / 1e12)
lesson.expect("share of parameters in the third level", deepest["parameters"] / count(sdxl))
lesson.expect("share of operations in the third level", deepest["operations"] / total)

# %% [markdown]
# Nearly all parameters are where the picture is smallest, and the smallest pictures cost little
# for each parameter: a weight of the third level is used for 32 x 32 pixels, one of the first for
# 128 x 128. A step is 6.8 * 10^12 operations. Guidance doubles it, and 30 steps make 400 * 10^12
# for a picture.
#
# ## Memory
#
# A parameter has 4 bytes in 32 bits (fp32) and 2 in 16 bits (bf16). Training with AdamW keeps four
# numbers for each trained parameter, in fp32: itself, its gradient and two averages. A LoRA of rank
# 32 (lesson 10) trains few parameters, and needs the frozen UNet in 16 bits only.

# %%
everything = sum(count(network) for network, _ in networks.values())
adapted = build_empty(UNet, SDXL_BASE)
with torch.device("meta"):
    trained = sum(param.numel() for param in lora.inject(adapted, 32, match=lora.ATTENTION))
gigabytes = {
    "draw: all four, fp32": 4 * everything / 1e9,
    "draw: all four, 16 bits": 2 * everything / 1e9,
    "draw: UNet alone, 16 bits": 2 * count(sdxl) / 1e9,
    "train the UNet, fp32": 16 * count(sdxl) / 1e9,
    "train a LoRA, rank 32": (2 * count(sdxl) + 16 * trained) / 1e9}
lesson.show(bars(gigabytes, "Memory for weights and their training", " GB"), "memory",
            "Without activations, which come on top. The text encoders are needed before the UNet, "
            "so minipic lets them go first. Training the UNet takes eight times as much as "
            "drawing with it in 16 bits, and a LoRA little more than drawing.")
lesson.expect("million parameters of a LoRA of rank 32", trained / 1e6)
lesson.expect("GB to train the UNet over those to train a LoRA",
              gigabytes["train the UNet, fp32"] / gigabytes["train a LoRA, rank 32"])

# %% [markdown]
# ## Change one thing
#
# What would SDXL weigh with 2 transformer blocks in each place of its third level instead of 10?
# Other keys to change: `block_out_channels`, `cross_attention_dim`.

# %%
DEPTHS = (1, 2, 2)
changed = build_empty(UNet, replace(SDXL_BASE, transformer_layers_per_block=DEPTHS))
print(f"{count(changed) / 1e6:.0f} million parameters, {count(changed) / count(sdxl):.2f} of SDXL")

# %% [markdown]
# ## Exercises
#
# 1. In how many places does SDXL's UNet read the words (modules whose name ends in `attn2`)? The
#    exercise of lesson 05 asked for it.
# 2. Build `SD15` of minipic/models/unet.py. How many parameters has it, and which keys of SDXL's
#    file does it lack?
# 3. Count the operations for 512 x 512 pixels. Are they a quarter? Which part is not, and why?
