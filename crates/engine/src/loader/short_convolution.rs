//! The short convolution of LFM2.

use super::{LoadError, Source};
use crate::mixers::ShortConvolution;

impl Source<'_> {
    pub(super) fn short_convolution(&mut self, path: &str) -> Result<ShortConvolution, LoadError> {
        let within = |name: &str| format!("{path}.{name}");
        Ok(ShortConvolution {
            input: self.linear(&within("in_proj"))?,
            convolution: self.convolution(&within("conv"))?,
            output: self.linear(&within("out_proj"))?,
        })
    }
}
