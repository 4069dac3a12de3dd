"""Models on disk -> networks: a diffusers folder or a single .safetensors file, part by part.

    source = open_model("weights/sdxl-base")      # reads headers and configs only
    encoder = load_part(source.parts["text_encoder"], torch.bfloat16)    # reads this part's weights

Nothing is read twice or held twice, so a caller can use a text encoder and drop it before it loads
the UNet. The two layouts are described in folders.py and single_file.py.
"""

from pathlib import Path

from minipic.common import InputError, ParameterError
from minipic.models.vae import SDXL_VAE, VAE, VAEConfig
from minipic.weights import keys
from minipic.weights.files import check_finished
from minipic.weights.folders import open_folder, open_part, save_folder, save_part
from minipic.weights.parts import (
    Part, Source, build_empty, check_part, load_part, memory_format, part_entries, prefix_in)
from minipic.weights.single_file import FIRST_STAGE, SINGLE_FILES, identify_file, open_single_file

__all__ = [
    "Part", "Source", "build_empty", "load_part", "memory_format", "open_model", "open_part",
    "open_vae", "save_folder", "save_part"]


def open_model(path: str | Path, half: bool = False, vae: str | Path | None = None) -> Source:
    """A model from a diffusers folder or a single .safetensors file. Reads no weights.

    half: prefer a folder's fp16 files where it has both. vae: the folder or file of another VAE;
    some single files have none. Raises InputError naming the file or key at fault.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(
            f"{path}: no such file or folder; fetch official weights with weights/download.py")
    if path.is_dir() and not (path / "model_index.json").exists():
        check_finished(path)
        files = list(path.glob("*.safetensors"))
        if len(files) != 1:
            inside = [*path.glob("*/model_index.json"), *path.glob("snapshots/*/model_index.json")]
            hint = f"; give the model in it, such as {inside[0].parent}" if inside else ""
            raise InputError(
                f"{path} is no model: it has neither model_index.json nor one .safetensors file"
                f"{hint}")
        path = files[0]
    source = open_folder(path, half) if path.is_dir() else open_single_file(path)
    if vae is not None:
        source.parts["vae"] = open_vae(vae, source.parts["vae"].config)
    if not any(source.parts["vae"].files.values()):
        raise ParameterError("vae", f"{vae or path} holds no VAE; name one that does")
    return source


def open_vae(path: str | Path, config: VAEConfig = SDXL_VAE) -> Part:
    """A VAE: its folder or a whole model's, or a file in LDM's or diffusers' names.

    config: of a file that holds a VAE alone, which says nothing of it.
    """
    path = Path(path)
    if path.is_dir():
        is_whole_model = (path / "model_index.json").exists()
        return open_part(path / "vae" if is_whole_model else path, "vae")
    entries, kind = identify_file(path)
    if kind in SINGLE_FILES:
        return open_single_file(path).parts["vae"]
    if kind != "vae":
        raise InputError(f"{path} is {kind}; expected a VAE")
    prefix = prefix_in(entries, FIRST_STAGE.prefix)
    return check_part(Part(VAE, config, {path: part_entries(entries, prefix)}, prefix, keys.vae))
