//! Rotary position embedding in all variants that mlx-lm has, with its arithmetic: wavelengths in single precision on the device,
//! everything that Python computes as a number in double precision.

use mlxnode_checkpoint::{RopeScaling, RopeSpec};
use mlxnode_mlx::{Array, Device, Dtype, Result, Rope};
use std::f64::consts::PI;

/// Rotates queries and keys.
pub(crate) struct RotaryEmbedding {
    dims: i32,
    traditional: bool,
    kind: Kind,
}

enum Kind {
    /// Wavelengths from a base, positions scaled.
    Base { base: f32, scale: f32 },
    /// Wavelengths from a table; the rotated dimensions are multiplied by `input_scale` first.
    Table { freqs: Array, input_scale: Option<f32> },
    /// The base depends on the number of tokens.
    DynamicNtk { base: f64, factor: f64, max_positions: f64 },
}

impl RotaryEmbedding {
    pub(crate) fn new(device: &Device, spec: &RopeSpec) -> Result<Self> {
        let dims = spec.dims as f64;
        let mut traditional = spec.traditional;
        let kind = match &spec.scaling {
            RopeScaling::Default => Kind::Base { base: spec.base as f32, scale: 1.0 },
            RopeScaling::Linear { factor } => {
                Kind::Base { base: spec.base as f32, scale: (1.0 / factor) as f32 }
            }
            RopeScaling::DynamicNtk { factor, max_positions } => {
                Kind::DynamicNtk { base: spec.base, factor: *factor, max_positions: *max_positions as f64 }
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
                let freqs = frequencies(device, spec.base, dims, dims)?;
                let bands = [*low_freq_factor, *high_freq_factor, *original_max_positions];
                Kind::Table { freqs: llama3(device, &freqs, *factor, bands)?, input_scale: None }
            }
            RopeScaling::Yarn { factor, .. } => {
                let freqs = yarn(device, spec, *factor)?;
                let scale = yarn_input_scale(&spec.scaling);
                Kind::Table { freqs, input_scale: (scale != 1.0).then_some(scale as f32) }
            }
            RopeScaling::Longrope { long_factor, input_scale } => {
                traditional = false;
                let factors: Vec<f32> = long_factor.iter().map(|factor| *factor as f32).collect();
                let factors = Array::from_f32(&factors, &[factors.len() as i32])?;
                let freqs = device.multiply(&factors, &frequencies(device, spec.base, dims, dims)?)?;
                Kind::Table { freqs, input_scale: Some(*input_scale as f32) }
            }
            RopeScaling::Reversed => {
                // mlx-lm's `exp(i * (ln(base) / pairs))`, not a power of the base: it rounds otherwise.
                let pairs = (spec.dims / 2) as f64;
                let exponents = device.arange(0.0, pairs, 1.0, Dtype::F32)?;
                let exponents = device.multiply(&exponents, &number(spec.base.ln() / pairs)?)?;
                Kind::Table { freqs: device.negative(&device.exp(&exponents)?)?, input_scale: None }
            }
            RopeScaling::ReversedByPowers => {
                let freqs = frequencies(device, spec.base, dims, dims)?;
                Kind::Table { freqs: device.negative(&freqs)?, input_scale: None }
            }
            RopeScaling::NtkAlpha { alpha } => {
                let base = spec.base * alpha.powf(dims / (dims - 2.0));
                Kind::Table { freqs: frequencies(device, base, dims, dims)?, input_scale: None }
            }
            RopeScaling::Proportional { rotated_dims, factor } => {
                let freqs = frequencies(device, spec.base, *rotated_dims as f64, dims)?;
                let still = vec![f32::INFINITY; spec.dims.saturating_sub(*rotated_dims) / 2];
                let still = Array::from_f32(&still, &[still.len() as i32])?;
                let rotating = device.multiply(&number(*factor)?, &freqs)?;
                Kind::Table { freqs: device.concatenate([&rotating, &still], 0)?, input_scale: None }
            }
        };
        if let Kind::Table { freqs, .. } = &kind {
            freqs.eval()?;
        }
        Ok(Self { dims: spec.dims as i32, traditional, kind })
    }

    /// `[1, heads, tokens, head_dim]`, the first token at position `offset`.
    pub(crate) fn apply(&self, device: &Device, x: &Array, offset: i32) -> Result<Array> {
        let (dims, traditional) = (self.dims, self.traditional);
        let Kind::DynamicNtk { base, factor, max_positions } = &self.kind else {
            return self.turn(device, x, |x, rope| device.rope(x, rope, offset));
        };
        let tokens = f64::from(x.dim(-2) + offset).max(*max_positions);
        let width = f64::from(dims);
        let stretch = (factor * tokens / max_positions) - (factor - 1.0);
        let base = (base * stretch.powf(width / (width - 2.0))) as f32;
        device.rope(x, &Rope { dims, traditional, base: Some(base), scale: 1.0, freqs: None }, offset)
    }

    /// Can rows at different positions be rotated at once? Not where the frequencies depend on the position.
    pub(crate) fn goes_by_row(&self) -> bool {
        !matches!(self.kind, Kind::DynamicNtk { .. })
    }

    /// `[rows, heads, tokens, head_dim]`, the first token of each row at its one of the positions `[rows]`, when
    /// [`Self::goes_by_row`].
    pub(crate) fn apply_by_row(&self, device: &Device, x: &Array, positions: &Array) -> Result<Array> {
        self.turn(device, x, |x, rope| device.rope_by_row(x, rope, positions))
    }

    fn turn(
        &self,
        device: &Device,
        x: &Array,
        turn: impl FnOnce(&Array, &Rope<'_>) -> Result<Array>,
    ) -> Result<Array> {
        let (dims, traditional) = (self.dims, self.traditional);
        match &self.kind {
            Kind::Base { base, scale } => {
                turn(x, &Rope { dims, traditional, base: Some(*base), scale: *scale, freqs: None })
            }
            Kind::Table { freqs, input_scale } => {
                let rope = Rope { dims, traditional, base: None, scale: 1.0, freqs: Some(freqs) };
                match input_scale {
                    None => turn(x, &rope),
                    Some(scale) => turn(&self.scaled(device, x, *scale)?, &rope),
                }
            }
            Kind::DynamicNtk { .. } => {
                Err(mlxnode_mlx::Error::Mlx("these frequencies depend on the position".to_owned()))
            }
        }
    }

    /// The rotated dimensions times `scale`, the others as they are.
    fn scaled(&self, device: &Device, x: &Array, scale: f32) -> Result<Array> {
        let scale = Array::scalar(scale, x.dtype())?;
        if x.dim(-1) == self.dims {
            return device.multiply(x, &scale);
        }
        let start = [0; 4];
        let stop = [x.dim(0), x.dim(1), x.dim(2), self.dims];
        let rotated = device.multiply(&device.slice(x, &start, &stop)?, &scale)?;
        device.slice_update(x, &rotated, &start, &stop)
    }
}

/// A number beside single-precision arrays.
fn number(value: f64) -> Result<Array> {
    Array::scalar(value as f32, Dtype::F32)
}

/// `base ^ (arange(0, rotated, 2) / dims)`.
fn frequencies(device: &Device, base: f64, rotated: f64, dims: f64) -> Result<Array> {
    let exponents = device.divide(&device.arange(0.0, rotated, 2.0, Dtype::F32)?, &number(dims)?)?;
    device.power(&number(base)?, &exponents)
}

/// `bands`: low and high frequency factor, original context.
fn llama3(device: &Device, freqs: &Array, factor: f64, bands: [f64; 3]) -> Result<Array> {
    let [low, high, context] = bands;
    let wavelengths = device.multiply(&number(2.0 * PI)?, freqs)?;
    let (longest, shortest) = (number(context / low)?, number(context / high)?);
    let is_long = device.greater(&wavelengths, &longest)?;
    let is_medium = device
        .logical_and(&device.greater(&wavelengths, &shortest)?, &device.less(&wavelengths, &longest)?)?;
    let stretched = device.select(&is_long, &device.multiply(freqs, &number(factor)?)?, freqs)?;
    let ratio = device.divide(&number(context)?, &wavelengths)?;
    let smooth = device.divide(&device.subtract(&ratio, &number(low)?)?, &number(high - low)?)?;
    let blend = device.divide(&device.subtract(&number(1.0)?, &smooth)?, &number(factor)?)?;
    let smoothed = device.divide(&stretched, &device.add(&blend, &smooth)?)?;
    device.select(&is_medium, &smoothed, &stretched)
}

fn yarn(device: &Device, spec: &RopeSpec, factor: f64) -> Result<Array> {
    let RopeScaling::Yarn { original_max_positions, beta_fast, beta_slow, .. } = spec.scaling else {
        return frequencies(device, spec.base, spec.dims as f64, spec.dims as f64);
    };
    let dims = spec.dims as f64;
    let correction = |rotations: f64| {
        (dims * (original_max_positions / (rotations * 2.0 * PI)).ln()) / (2.0 * spec.base.ln())
    };
    let low = correction(beta_fast).floor().max(0.0);
    let mut high = correction(beta_slow).ceil().min(dims - 1.0);
    if low == high {
        high += 0.001; // the ramp needs a slope
    }
    let pairs = (spec.dims / 2) as f64;
    let ramp = device.subtract(&device.arange(0.0, pairs, 1.0, Dtype::F32)?, &number(low)?)?;
    let ramp = device.divide(&ramp, &number(high - low)?)?;
    let ramp = device.minimum(&device.maximum(&ramp, &number(0.0)?)?, &number(1.0)?)?;
    let kept = device.subtract(&number(1.0)?, &ramp)?;
    let extrapolated = frequencies(device, spec.base, dims, dims)?;
    let interpolated = device.multiply(&number(factor)?, &extrapolated)?;
    let stretched = device.subtract(&number(1.0)?, &kept)?;
    let denominator =
        device.add(&device.multiply(&interpolated, &kept)?, &device.multiply(&extrapolated, &stretched)?)?;
    device.divide(&device.multiply(&interpolated, &extrapolated)?, &denominator)
}

fn yarn_input_scale(scaling: &RopeScaling) -> f64 {
    let RopeScaling::Yarn { factor, mscale, mscale_all_dim, .. } = scaling else { return 1.0 };
    let magnitude = |coefficient: f64| {
        if *factor <= 1.0 { 1.0 } else { 0.1 * coefficient * factor.ln() + 1.0 }
    };
    magnitude(*mscale) / magnitude(*mscale_all_dim)
}
