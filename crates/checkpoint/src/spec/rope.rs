//! Rotary position embedding.

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// How many of the head's dimensions rotate, from the first on. Even.
    pub dims: usize,
    /// Base of the wavelengths ("theta").
    pub base: f64,
    /// Pairs are neighbours (2i, 2i+1) instead of halves (i, i + dims/2).
    pub traditional: bool,
    /// How the wavelengths are stretched for long contexts.
    pub scaling: RopeScaling,
}

/// How wavelengths are stretched, by mlx-lm's rules (`rope_utils.py`). Below, `freqs[i] = base^(2i/dims)`, the inverse of
/// the angular frequency, which is what MLX's rope takes. MLX computes them in single precision.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Positions are multiplied by `1 / factor`.
    Linear {
        /// Stretch.
        factor: f64,
    },
    /// With T = max(tokens so far, max_positions), the base becomes
    /// `base * (factor * T / max_positions - (factor - 1))^(dims / (dims - 2))`.
    DynamicNtk {
        /// Stretch.
        factor: f64,
        /// The model's `max_position_embeddings`.
        max_positions: usize,
    },
    /// Long wavelengths are stretched by `factor`, short ones kept, those between smoothed.
    Llama3 {
        /// Stretch.
        factor: f64,
        /// Wavelengths above `original_max_positions / low_freq_factor` are long.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_positions / high_freq_factor` are short.
        high_freq_factor: f64,
        /// Context before the stretch.
        original_max_positions: f64,
    },
    /// YaRN: a ramp between stretched and kept wavelengths, and a factor on the rotated dimensions of queries and keys.
    Yarn {
        /// Stretch.
        factor: f64,
        /// Context before the stretch.
        original_max_positions: f64,
        /// Rotations above which a dimension is kept.
        beta_fast: f64,
        /// Rotations below which a dimension is stretched.
        beta_slow: f64,
        /// Numerator of the input factor: `m(mscale) / m(mscale_all_dim)`, `m(c) = 0.1 c ln(factor) + 1`, 1 for factor <= 1.
        mscale: f64,
        /// Denominator.
        mscale_all_dim: f64,
    },
    /// Every wavelength has its own stretch; the rotated dimensions of queries and keys are multiplied by `input_scale`.
    /// Ignores `traditional`: pairs are always halves. mlx-lm always takes the long factors.
    Longrope {
        /// One factor for each pair of dimensions, or a single one for all.
        long_factor: Vec<f64>,
        /// `sqrt(1 + ln(max / original) / ln(original))`, or 1 when nothing is stretched.
        input_scale: f64,
    },
    /// The base becomes `base * alpha^(dims / (dims - 2))`.
    NtkAlpha {
        /// Stretch.
        alpha: f64,
    },
    /// Not at all, but pairs rotate the other way round. Wavelengths are exponentials of multiples of the base's logarithm.
    Reversed,
    /// The same with powers of the base: in single precision that is not always the same number.
    ReversedByPowers,
    /// Exponents over all dimensions, but only the first `rotated_dims` rotate; the others have infinite wavelength.
    Proportional {
        /// How many dimensions rotate. Even.
        rotated_dims: usize,
        /// Stretch.
        factor: f64,
    },
}
