"""Golden for OpenCLIP's names and its text projection: python tests/goldens/make_openclip.py (needs open_clip_torch).

A tiny text tower of open_clip with random weights, under the names that single-file SDXL checkpoints give it; three
rows of token ids; and the pooled vectors that open_clip itself computes. Writes openclip.safetensors beside this file.
"""

from pathlib import Path

import torch
from open_clip.transformer import TextTransformer, text_global_pool
from safetensors.torch import save_file

WIDTH, VOCAB = 16, 32

if __name__ == "__main__":
    torch.manual_seed(0)
    tower = TextTransformer(context_length=12, vocab_size=VOCAB, width=WIDTH, heads=2, layers=2, output_dim=WIDTH)
    for p in tower.parameters():  # its own start has zero biases and unit norms, which would hide a swapped name
        p.data = torch.randn_like(p) / WIDTH ** 0.5
    ids = torch.tensor([[30, 5, 9, 31, 0, 0, 0, 0, 0, 0, 0, 0], [30, 7, 31, 0, 0, 0, 0, 0, 0, 0, 0, 0],
                        [30, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 31]])  # 31, the largest id, ends the text
    with torch.no_grad():
        pooled = tower.eval()(ids)
    state = {name: x.contiguous() for name, x in tower.state_dict().items() if name != "attn_mask"}
    tensors = state | {"logit_scale": torch.tensor(4.6), "golden.ids": ids, "golden.pooled": pooled}
    save_file(tensors, Path(__file__).with_name("openclip.safetensors"))
    print({name: tuple(x.shape) for name, x in tensors.items()})
