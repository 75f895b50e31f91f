"""Defenses, one a file: each a `Defense`, its card, and a `SPEC` by which the registry finds it.

Read in this order:

* `undefended`: the smallest defense there is.
* `schedule` and `denoiser`: noise levels, and the one interface that diffusion defenses are written against;
  `mixture` is its closed form, `denoiser_sources` reads those that people bring.
* `purifier` and `purified`: a diffusion process back to an image, and a classifier behind it; `diffpure`
  is made of just these. `guidance` is what `gdmp`, `victim_guided` and `robust_guidance` add.
* `class_errors` and `diffusion_classifier`: Bayes' rule with a class-conditional denoiser; `noised_diffusion`
  is what `epndc` and `apndc` share.
* `networks`, `recipes`, `fitting` and `train`: where the weights of the digits boards come from.
* `checkpoints`: how weights are read and held against their digests; `variants`: cards under options.

`broken` holds defenses that are known to fail: a board on which they do well is a broken board.
"""
