"""minipic: SDXL from scratch in readable Python, and the papers that people fine-tune it with.

A prompt goes down through text, guidance, UNet and VAE and comes out as a picture. A paper is one
file (`minipic/papers/`) that changes one of these from outside.

Dimension key, used in every comment and docstring:

    B batch   C channels   H W height and width of a picture   h w of its latent
    N tokens  D width of a token   R rank   n pictures of a drawing
    in attention: h heads, d width of a head, M keys

Tensors: `x` is a picture or latent, `x0` clean, `sigma` its noise level, `t` a timestep, `v` a
velocity; `context` [B,N,D] and `pooled` [B,D] are text, `size_ids` [B,6] SDXL's sizes and crops.
`config` is the settings of a model, recipe or paper; `guidance` is the scale of classifier-free
guidance.
"""

__version__ = "0.1.0"
