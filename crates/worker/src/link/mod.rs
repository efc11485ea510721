//! The stream from one stage to the next: frames one way, credits the other.
//!
//! ```text
//!  compute thread ─▶ outbox ─▶ sender ══ Stage.Link ══▶ receiver ─▶ inbox ─▶ compute thread (or driver, on the ring)
//!                     (8)        ▲                         ▲                      │ takes a message:
//!                                └───────── credits ◀══════╧══════ ledger ◀───────┘ one credit comes free
//! ```
//!
//! The receiver grants as many frames as it has room for; the sender sends no more, its outbox fills, and the compute thread
//! before it stops. So every queue between two stages is bounded, and a slow stage slows those before it.

use mlxnode_compute::Activation;

mod assembler;
mod credit;
mod frames;
mod receiver;
mod sender;

pub(crate) use assembler::{Assembler, Direction, FrameError, LinkPlan};
pub(crate) use credit::{CreditLedger, Granted};
pub(crate) use frames::Frames;
pub(crate) use receiver::{Received, receive};
pub(crate) use sender::{LinkTarget, send};

/// Largest piece of an activation in one frame: HTTP/2 and TLS work on pieces far smaller, and a decode step must not wait long
/// behind one of them (1 MiB takes 0.8 ms at 10 Gbit/s).
pub(crate) const FRAME_BYTES: usize = 1 << 20;

/// Frames that may be on their way or waiting at the receiver: 128 MiB at the very most, from a hostile or a runaway neighbour.
/// Credits come back half a window at a time, and the largest activation is 64 frames, so a smaller window could leave a sender
/// in the middle of one without a credit for good.
pub(crate) const WINDOW_FRAMES: u32 = 2 * (Activation::MAX_BYTES / FRAME_BYTES) as u32;

/// Messages between the compute thread and the sender. Few: what waits here cannot be overtaken any more.
pub(crate) const OUTBOX_MESSAGES: usize = 8;
