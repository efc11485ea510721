//! Where strangers' programs run: the seam between what a model's files ask for and the process that pays for it.
//!
//! Fuel bounds how many steps a chat template takes, not how large the strings are that each step makes: a loop that doubles
//! one asks for a terabyte after forty turns, and the engine has no hook for that. The tokenizers library believes its files
//! in the same way. So a process that must not end with a hostile model gives [`ChatTemplate`](crate::ChatTemplate) and
//! [`Tokenizer::from_untrusted_files`] a sandbox with a process of its own (`mlxnode-sandbox`), and [`InProcess`] is what
//! runs in there. What crosses is plain text and bytes.

use std::{
    sync::{Mutex, PoisonError},
    thread,
};

use serde::{Deserialize, Serialize};

use crate::{TextError, TextFiles, Tokenizer, template::Program};

/// Address space, not memory: only what a rendering touches becomes real. A million units of fuel can nest values
/// about 250,000 deep, and dropping one level takes some hundred bytes of stack.
const STACK: usize = 256 << 20;
/// Of each text that a tokenizer is tried on.
const TRIAL_BYTES: usize = 4096;

/// Does the work that strangers' files ask for. A call blocks until the work has ended or was ended.
pub trait Sandbox: Send + Sync {
    /// Compiles a chat template without carrying it out, so that mistakes show when a model is loaded.
    ///
    /// # Errors
    /// [`SandboxError`], its line that of the mistake.
    fn compile(&self, source: &str) -> Result<(), SandboxError>;

    /// Carries a chat template out: its variables are a JSON object, its output has at most `most_bytes`.
    ///
    /// # Errors
    /// [`SandboxError`]
    fn render(&self, source: &str, variables: &str, most_bytes: usize) -> Result<String, SandboxError>;

    /// Builds a tokenizer, uses it on a few texts and drops it, to see whether its files are safe to build one from here. Files that cannot be
    /// built in good order are: the error is the same everywhere.
    ///
    /// # Errors
    /// [`SandboxError`] when building took too much, or could not be tried.
    fn try_tokenizer(&self, files: &TextFiles) -> Result<(), SandboxError>;
}

/// Why there is no result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum SandboxError {
    /// The template cannot be compiled or carried out.
    #[error("line {line}: {reason}")]
    Wrong {
        /// Line within the template, from 1; 0 where unknown.
        line: u64,
        /// What is wrong.
        reason: String,
    },
    /// The template itself says that it does not want this conversation.
    #[error("{0}")]
    Refused(String),
    /// It took more steps, or more time, than an honest one needs.
    #[error("too much work")]
    Work,
    /// It wrote more than it may.
    #[error("too much output")]
    Output,
    /// It asked for more memory than it may have.
    #[error("more than {mebibytes} MiB of memory")]
    Memory {
        /// What it may have, its stack included.
        mebibytes: u64,
    },
    /// Others wait already, as many as may.
    #[error("too many wait")]
    Busy,
    /// The sandbox itself does not work.
    #[error("{0}")]
    Unavailable(String),
}

/// Works in this process, which ends when a template asks for more memory than there is. For the process that has nothing
/// else to do, for tests and for tools.
///
/// Each piece of work has a thread of its own, because a hostile template can build values so deep that dropping them needs
/// more stack than a caller has.
#[derive(Debug)]
pub struct InProcess {
    stack: usize,
    /// The last template: who renders with one does so again.
    compiled: Mutex<Option<Program>>,
}

impl Default for InProcess {
    fn default() -> Self {
        Self::with_stack(STACK)
    }
}

impl InProcess {
    /// With a stack of so many bytes for each piece of work.
    pub fn with_stack(bytes: usize) -> Self {
        Self { stack: bytes, compiled: Mutex::default() }
    }

    fn compiled(&self, source: &str) -> Result<Program, SandboxError> {
        let mut last = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(program) = last.as_ref().filter(|program| program.source() == source) {
            return Ok(program.clone());
        }
        // The old one goes first: both together could be more than this process may have.
        *last = None;
        let program = Program::compile(source)?;
        *last = Some(program.clone());
        Ok(program)
    }

    /// Runs on a thread with the stack that templates need, and turns a panic into an error.
    fn on_large_stack<T: Send>(
        &self,
        work: impl FnOnce() -> Result<T, SandboxError> + Send,
    ) -> Result<T, SandboxError> {
        thread::scope(|scope| {
            let builder = thread::Builder::new().name("sandbox".to_owned()).stack_size(self.stack);
            let handle = builder.spawn_scoped(scope, work).map_err(|error| {
                SandboxError::Unavailable(format!("there is no thread to do it on: {error}"))
            })?;
            handle.join().unwrap_or_else(|_| {
                Err(SandboxError::Wrong { line: 0, reason: "the template engine failed on it".to_owned() })
            })
        })
    }
}

impl Sandbox for InProcess {
    fn compile(&self, source: &str) -> Result<(), SandboxError> {
        self.on_large_stack(|| self.compiled(source).map(drop))
    }

    fn render(&self, source: &str, variables: &str, most_bytes: usize) -> Result<String, SandboxError> {
        // Variables are converted and dropped in there too: both recurse as deep as the values are nested.
        self.on_large_stack(|| self.compiled(source)?.run(variables, most_bytes))
    }

    fn try_tokenizer(&self, files: &TextFiles) -> Result<(), SandboxError> {
        self.on_large_stack(|| {
            let _ = use_up(files); // an error of the files does no harm
            Ok(())
        })
    }
}

/// Builds the tokenizer and has it read what shows a pattern that takes exponential time.
fn use_up(files: &TextFiles) -> Result<(), TextError> {
    let tokenizer = Tokenizer::from_files(files)?;
    for text in ["a", " ", "aA", "1", "\n", "!", "a ", "é", "日", "\u{301}", "<", "▁"] {
        let ids = tokenizer.encode(&text.repeat(TRIAL_BYTES / text.len()), true)?;
        tokenizer.decode(&ids, false)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_is_compiled_once_in_a_row() {
        let sandbox = InProcess::default();
        let first = sandbox.compiled("a").unwrap();
        assert_eq!(sandbox.compiled("a").unwrap().source().as_ptr(), first.source().as_ptr());
        assert_ne!(sandbox.compiled("b").unwrap().source().as_ptr(), first.source().as_ptr());
        assert_eq!(sandbox.render("{{ x }}", r#"{"x": 1}"#, 8), Ok("1".to_owned()));
    }

    #[test]
    fn a_mistake_shows_when_it_is_compiled() {
        let error = InProcess::default().compile("a\n{% if %}").unwrap_err();
        assert!(matches!(error, SandboxError::Wrong { line: 2, .. }), "{error:?}");
    }
}
