//! How a failure is told: one sentence on stderr, with its causes, and an exit status.

use std::process::ExitCode;

/// Tells the person what went wrong.
pub fn report(error: &anyhow::Error) -> ExitCode {
    let mut sentence = String::new();
    for cause in error.chain() {
        // A gRPC status prints its code, its metadata and more; the person needs what it says.
        let text = match cause.downcast_ref::<tonic::Status>() {
            Some(status) => status.message().to_owned(),
            None => cause.to_string(),
        };
        if text.is_empty() || sentence.ends_with(&text) {
            continue;
        }
        if !sentence.is_empty() {
            sentence.push_str(": ");
        }
        sentence.push_str(&text);
    }
    // eprintln would panic when nobody reads stderr.
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr(), "error: {sentence}");
    ExitCode::FAILURE
}
