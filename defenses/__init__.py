"""Defenses, one a file: each a `Defense`, its card, and a `SPEC` by which the registry finds it.

Read in this order: `undefended` (the smallest defense there is), `denoiser` and `purifier` (what
diffusion defenses are made of), `diffpure` (a defense made of them), `train` (where the weights of
the digits boards come from), `checkpoints` (how weights are read and held against their digests).
`broken` holds defenses that are known to fail: a board on which they do well is a broken board.
"""
