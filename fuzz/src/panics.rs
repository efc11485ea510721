//! Which panics are findings.
//!
//! libFuzzer's runtime takes every panic for one. But mlxnode-text guards the tokenizers library and the template engine,
//! which assert where a file contradicts itself, with `catch_unwind` and a thread of its own. So a panic in our code ends
//! the run at once, and one in a library only if nobody catches it: then it reaches the target, which aborts.

use std::panic::PanicHookInfo;

/// Makes panics in libraries the business of whoever catches them. For a target's `init`.
pub fn let_guards_catch() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if is_ours(info) {
            report(info); // and aborts
        }
    }));
}

/// The same in a process whose parent is the fuzzer: a panic in our code ends it with a code, and not with the signal of an
/// allocation too many, which is how hostile input is supposed to end there.
pub fn end_on_ours() {
    std::panic::set_hook(Box::new(|info| {
        if is_ours(info) {
            std::process::exit(77);
        }
    }));
}

/// Ours are compiled from this repository; the paths of libraries and of the standard library have their own folders in them.
fn is_ours(info: &PanicHookInfo<'_>) -> bool {
    info.location().is_none_or(|place| {
        let file = place.file();
        !["/registry/", "/rustc/", "/rustlib/"].iter().any(|folder| file.contains(folder))
    })
}
