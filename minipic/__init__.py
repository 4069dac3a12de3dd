"""minipic: SDXL from scratch in a few thousand readable lines.

A prompt goes down through text, guidance, UNet and VAE and comes out as a picture; a paper is one file
(`minipic/methods/`) that changes one of these from outside.

Dimension key, used in every comment and docstring:

    B batch   C channels   H height   W width   N tokens   D width of a token   h heads   d width of a head
    F frames  E experts    R rank

Tensors: `x` a picture or latent, `x0` clean, `xt` noised, `eps` noise, `v` velocity, `sigma` noise level,
`t` timestep; `context` [B,N,D] and `pooled` [B,D] are text, `size_ids` [B,6] SDXL's sizes and crops.
`config` is a model's or recipe's settings; `guidance` is the classifier-free guidance scale.
"""

__version__ = "0.1.0"
