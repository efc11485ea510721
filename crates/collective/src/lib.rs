//! Adds up the gradients of several workers: who computes what, who sends what to whom, and what a loss or a join changes.
//!
//! Every worker of a job holds all parameters and makes every update, so that a lost one takes nothing with it but the step under way.
//!
//! - [`deal`]: a step's micro-batches among the members, in runs
//! - [`Slices`]: which member adds up which part of the gradient
//! - [`Member`]: one worker's side of the exchange; it hears its trainer, the other members and the rounds
//! - [`Rounds`]: who belongs to the group, and from which step it goes on; one per job, beside the coordinator
//!
//! All of it is plain: events in, effects out. Threads, streams and clocks are the worker's.

mod dealing;
mod exchange;
mod formation;
mod gather;
mod member;
mod rounds;
mod slices;

pub use dealing::{MOST_MEMBERS, deal};
pub use formation::{CatchUp, Formation, MemberId, Order};
pub use member::{Answer, Frame, FrameError, Member, MemberEffect, Report};
pub use rounds::{Rounds, RoundsEffect, RoundsOptions, RoundsSummary};
pub use slices::{CHUNK_VALUES, Slices};
