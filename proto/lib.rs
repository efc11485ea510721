//! The gRPC contract of mlxnode: messages and services compiled from the .proto files beside this one.
//!
//! [`v1`] is public: what clients speak. [`internal`] is what nodes and workers say to each other; it may change
//! with every release, and both sides check [`PROTOCOL_VERSION`] first.

#![allow(missing_docs, unreachable_pub, clippy::all)] // generated code; the .proto files hold the comments

/// The public API.
pub mod v1 {
    tonic::include_proto!("mlxnode.v1");
}

/// What nodes and workers of one cluster say to each other.
pub mod internal {
    pub mod v1 {
        tonic::include_proto!("mlxnode.internal.v1");
    }
}

/// The version of [`internal`]. Nodes refuse to pair or to work together when it differs.
pub const PROTOCOL_VERSION: u32 = 1;

/// All descriptors, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
