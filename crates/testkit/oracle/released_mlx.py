"""Makes mlx-lm 0.32.2 work on the released MLX 0.32.2: import it before a model with packed experts runs.

mlx-lm passes `global_scale`, always None for what we make, which gather_qmm of that MLX does not take.
"""

import mlx.core as mx

gather_qmm = mx.gather_qmm


def gather_qmm_without_global_scale(*args, global_scale=None, **kwargs):
    assert global_scale is None
    return gather_qmm(*args, **kwargs)


mx.gather_qmm = gather_qmm_without_global_scale
