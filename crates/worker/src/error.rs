//! Why a worker ends.

use std::time::Duration;

/// What ends a worker before it is told to. The node that started it forms the replica anew.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The arithmetic failed or panicked: nothing that this process computes can be trusted any more.
    #[error("the device failed: {0}")]
    Device(String),
    /// A neighbour is gone.
    #[error("the link {0} is lost: {1}")]
    LinkLost(Side, String),
    /// A neighbour could not be reached in time.
    #[error("no link {side} within {} s: {reason}", .deadline.as_secs())]
    NoLink {
        /// Which neighbour.
        side: Side,
        /// How long the worker tried.
        deadline: Duration,
        /// What went wrong last.
        reason: String,
    },
    /// A neighbour or the driver broke the rules of the pipeline.
    #[error("the pipeline's rules were broken: {0}")]
    Protocol(String),
    /// The model could not be loaded.
    #[error("the shard could not be loaded: {0}")]
    Load(String),
    /// The listener failed.
    #[error("the worker's listener failed: {0}")]
    Listener(String),
}

/// A neighbour, seen from a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The stage that sends to this one.
    Previous,
    /// The stage that this one sends to.
    Next,
}

impl std::fmt::Display for Side {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            Self::Previous => "from the previous stage",
            Self::Next => "to the next stage",
        })
    }
}

impl Fault {
    /// The exit code of the worker process: which kind of fault, for the node and for scripts.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Device(_) => 70,
            Self::LinkLost(..) | Self::NoLink { .. } => 71,
            Self::Protocol(_) => 72,
            Self::Load(_) => 73,
            Self::Listener(_) => 74,
        }
    }
}

/// `text` without what would not fit a status or a log line.
pub(crate) fn shortened(text: &str) -> String {
    const LONGEST: usize = 1000;
    let mut short: String = text.chars().take(LONGEST).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}
