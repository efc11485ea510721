//! A picture of points that charts are drawn on, with letters of its own: no font has to be installed.

use noto_sans_mono_bitmap::{FontWeight, RasterHeight, get_raster, get_raster_width};
use plotters_backend::text_anchor::{HPos, VPos};
use plotters_backend::{BackendColor, BackendCoord, BackendTextStyle, DrawingBackend, DrawingErrorKind};
use std::convert::Infallible;

const LETTERS: RasterHeight = RasterHeight::Size16;

/// Rows of red, green and blue.
pub(super) struct Canvas<'a> {
    pub(super) pixels: &'a mut [u8],
    pub(super) width: u32,
    pub(super) height: u32,
}

type Drawn = Result<(), DrawingErrorKind<NoError>>;

/// Drawing into memory does not fail.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct NoError(Infallible);

impl DrawingBackend for Canvas<'_> {
    type ErrorType = NoError;

    fn get_size(&self) -> (u32, u32) {
        (self.width, self.height)
    }

    fn ensure_prepared(&mut self) -> Drawn {
        Ok(())
    }

    fn present(&mut self) -> Drawn {
        Ok(())
    }

    fn draw_pixel(&mut self, (x, y): BackendCoord, color: BackendColor) -> Drawn {
        let (Ok(x), Ok(y)) = (u32::try_from(x), u32::try_from(y)) else { return Ok(()) };
        if x >= self.width || y >= self.height {
            return Ok(());
        }
        let place = 3 * (y as usize * self.width as usize + x as usize);
        let (red, green, blue) = color.rgb;
        for (below, above) in self.pixels.iter_mut().skip(place).zip([red, green, blue]) {
            let mixed = f64::from(*below) * (1.0 - color.alpha) + f64::from(above) * color.alpha;
            *below = mixed.round() as u8;
        }
        Ok(())
    }

    fn draw_text<S: BackendTextStyle>(&mut self, text: &str, style: &S, (x, y): BackendCoord) -> Drawn {
        let (width, height) = self.estimate_text_size(text, style)?;
        let (width, height) = (width.cast_signed(), height.cast_signed());
        let left = match style.anchor().h_pos {
            HPos::Left => x,
            HPos::Center => x - width / 2,
            HPos::Right => x - width,
        };
        let top = match style.anchor().v_pos {
            VPos::Top => y,
            VPos::Center => y - height / 2,
            VPos::Bottom => y - height,
        };
        let color = style.color();
        let step = i32::try_from(get_raster_width(FontWeight::Regular, LETTERS)).unwrap_or(0);
        for (left, letter) in (0..).map(|place| left + place * step).zip(text.chars()) {
            let known = get_raster(letter, FontWeight::Regular, LETTERS);
            let Some(raster) = known.or_else(|| get_raster('?', FontWeight::Regular, LETTERS)) else {
                continue;
            };
            for (y, row) in (top..).zip(raster.rows()) {
                for (x, strength) in (left..).zip(row) {
                    let alpha = color.alpha * f64::from(*strength) / 255.0;
                    self.draw_pixel((x, y), BackendColor { alpha, rgb: color.rgb })?;
                }
            }
        }
        Ok(())
    }

    fn estimate_text_size<S: BackendTextStyle>(
        &self,
        text: &str,
        _style: &S,
    ) -> Result<(u32, u32), DrawingErrorKind<NoError>> {
        let letters = u32::try_from(text.chars().count()).unwrap_or(u32::MAX);
        let width = u32::try_from(get_raster_width(FontWeight::Regular, LETTERS)).unwrap_or(0);
        Ok((letters.saturating_mul(width), LETTERS.val() as u32))
    }
}
