//! Ctrl-C: while an answer runs it ends the answer, at any other time the process.
//!
//! A second Ctrl-C during an answer ends the process, for the case that the first one finds no open ear. One thread listens as
//! long as the process lives; it owns nothing that would have to be put away.

use anyhow::{Context as _, Result};
use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::watch;

/// What a shell expects of a process that Ctrl-C ended: 128 and the signal's number.
pub const EXIT_STATUS: u8 = 130;

/// The listener. Cheap to clone.
#[derive(Clone)]
pub struct Interrupts {
    answering: Arc<AtomicBool>,
    pressed: Arc<watch::Sender<bool>>,
}

impl Interrupts {
    /// Starts to listen.
    pub fn listen() -> Result<Self> {
        let interrupts = Self { answering: Arc::default(), pressed: Arc::new(watch::Sender::new(false)) };
        let listener = interrupts.clone();
        // Built here, so that a signal that comes right after this call is heard.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot listen for Ctrl-C")?;
        let mut signals = {
            let _entered = runtime.enter();
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())
                .context("cannot listen for Ctrl-C")?
        };
        std::thread::Builder::new()
            .name("interrupts".into())
            .spawn(move || {
                while runtime.block_on(signals.recv()).is_some() {
                    listener.press();
                }
            })
            .context("cannot listen for Ctrl-C")?;
        Ok(interrupts)
    }

    /// An answer begins: until the result is dropped, Ctrl-C ends only the answer.
    pub fn answer(&self) -> AnswerGuard {
        self.pressed.send_replace(false);
        self.answering.store(true, Ordering::Release);
        AnswerGuard { interrupts: self.clone() }
    }

    fn press(&self) {
        // Looked at first: the answer may be over as soon as it hears of this.
        let answering = self.answering.load(Ordering::Acquire);
        let again = self.pressed.send_replace(true);
        if again || !answering {
            let _ = writeln!(std::io::stderr(), "\nerror: interrupted");
            std::process::exit(i32::from(EXIT_STATUS));
        }
    }
}

/// An answer that Ctrl-C can end.
pub struct AnswerGuard {
    interrupts: Interrupts,
}

impl AnswerGuard {
    /// Ctrl-C was pressed.
    pub fn pressed(&self) -> bool {
        *self.interrupts.pressed.borrow()
    }

    /// Resolves when Ctrl-C is pressed.
    pub async fn wait(&self) {
        let mut pressed = self.interrupts.pressed.subscribe();
        // The sender lives as long as this guard, so waiting cannot fail.
        let _ = pressed.wait_for(|pressed| *pressed).await;
    }
}

impl Drop for AnswerGuard {
    fn drop(&mut self) {
        self.interrupts.answering.store(false, Ordering::Release);
    }
}

/// The exit status of a command whose answer was or was not interrupted.
pub fn exit_code(interrupted: bool) -> ExitCode {
    if interrupted { ExitCode::from(EXIT_STATUS) } else { ExitCode::SUCCESS }
}
