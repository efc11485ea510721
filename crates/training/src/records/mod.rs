//! What a run leaves of its course, beside the adapter: figures of every report, for people and programs.
//!
//! - [`Recorder`]: JSON lines, comma-separated values and TensorBoard's event files, as the configuration's `report_to` asks for them
//! - [`Curve`]: the losses, as a picture

mod canvas;
mod curve;
mod recorder;
mod tensorboard;

pub use curve::{ChartError, Curve};
pub use recorder::{RecordError, Recorder, Trained, Validated};
