//! The cluster in the terminal.
//!
//! | module | one line |
//! |---|---|
//! | [`board`] | what is shown: four tables of rows, which one has the focus, what keys do; plain |
//! | [`draw`] | the board on a screen |
//! | [`mod@screen`] | the terminal: taken, written, read, given back |
//! | [`words`] | figures as people read them |
//!
//! The terminal is given back however `top` ends: by a key, a signal, an error or a panic.

mod board;
mod draw;
mod screen;
mod words;

pub use board::text;
pub use screen::{is_restored, screen};

use mlxnode_api::jobs::JobView;
use mlxnode_api::picture::Picture;

/// The newest picture, and whether there will be more.
#[derive(Clone, Debug, Default)]
pub struct Follow {
    pub picture: Picture,
    /// The newest first.
    pub jobs: Vec<JobView>,
    /// Why there is nothing newer; then the picture is old.
    pub lost: Option<String>,
}
