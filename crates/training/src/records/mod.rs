//! What a run leaves of its course, beside the adapter: figures of every report, for people and programs.
//!
//! - [`Recorder`]: JSON lines, comma-separated values and TensorBoard's event files, as the configuration's `report_to` asks for them
//! - [`Curve`]: the losses, as a picture
//! - [`Sums`]: updates between two reports
//! - [`RecordedJob`]: a job of the cluster that keeps all of these

mod averages;
mod canvas;
mod curve;
mod recorded;
mod recorder;
mod tensorboard;

pub use averages::{Averages, Cadence, Sums};
pub use curve::{ChartError, Curve, PictureError};
pub use recorded::{RecordOptions, RecordedJob};
pub use recorder::{RecordError, Recorder, Trained, Validated};
