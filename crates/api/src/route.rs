//! The way to the coordinator: in this process, or on another node, to which the call is handed on as it is.

use mlxnode_coordinator::coordinator::CoordinatorHandle;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Request, Status};

/// Where the coordinator is.
#[derive(Clone)]
pub enum Route {
    /// In this process.
    Here(CoordinatorHandle),
    /// On another node.
    There(Channel),
}

/// Finds the coordinator anew for each call: it may move, and links break.
pub trait CoordinatorRoute: Send + Sync + 'static {
    /// Where it is now.
    ///
    /// # Errors
    /// `UNAVAILABLE`, with the coordinator's name, when it cannot be reached.
    fn route(&self) -> Result<Route, Status>;
}

pub(crate) const FORWARDED: &str = "mlxnode-forwarded";

/// The call for another node's coordinator. A call is handed on once: two nodes that take each other for the coordinator (one has an
/// older roster) must not send it back and forth.
///
/// # Errors
/// `UNAVAILABLE` when it was handed on already.
pub(crate) fn forwarded<T>(request: Request<T>) -> Result<Request<T>, Status> {
    if request.metadata().contains_key(FORWARDED) {
        return Err(Status::unavailable(
            "this node is not the coordinator (any more); try again in a moment",
        ));
    }
    let timeout = request.metadata().get("grpc-timeout").cloned();
    let mut onward = Request::new(request.into_inner());
    onward.metadata_mut().insert(FORWARDED, MetadataValue::from_static("1"));
    if let Some(timeout) = timeout {
        onward.metadata_mut().insert("grpc-timeout", timeout);
    }
    Ok(onward)
}

/// What the caller hears when a call that was handed on failed. What the coordinator answered stays as it is; a broken connection
/// (the transport's errors have a source, answers have none) is told in words.
pub(crate) fn not_answered(status: Status) -> Status {
    match std::error::Error::source(&status) {
        None => status,
        Some(_) => Status::unavailable(format!(
            "the coordinator does not answer any more ({}); see `mlxnode status` and try again in a moment",
            status.message()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::Code;

    #[test]
    fn a_broken_connection_is_told_in_words_and_an_answer_is_kept() {
        let broken = Status::from_error(Box::new(std::io::Error::from(std::io::ErrorKind::BrokenPipe)));
        let told = not_answered(broken);
        assert_eq!(told.code(), Code::Unavailable);
        assert!(told.message().contains("coordinator"), "{told}");
        let answer = not_answered(Status::not_found("no node is called x"));
        assert_eq!((answer.code(), answer.message()), (Code::NotFound, "no node is called x"));
    }
}
