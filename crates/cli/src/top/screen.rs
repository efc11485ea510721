//! The terminal: taken, written, read and given back.

use super::Follow;
use super::board::{Board, Wish};
use super::draw::draw;
use anyhow::{Context as _, Result};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How long a key or a signal may have to wait for new figures to be looked for.
const BEAT: Duration = Duration::from_millis(50);

/// Is the terminal ours now? One process has one terminal.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// The terminal is as it was before [`screen`].
pub fn is_restored() -> bool {
    !TAKEN.load(Ordering::SeqCst)
}

/// Shows pictures until a key or `stop` ends it. Blocks.
pub fn screen(mut pictures: watch::Receiver<Follow>, stop: &CancellationToken) -> Result<()> {
    TAKEN.store(true, Ordering::SeqCst);
    let _given_back = GiveBack;
    // Also has panics give the terminal back before they are told.
    let mut terminal = ratatui::try_init().context("cannot use this terminal")?;
    let mut board = Board::default();
    board.update(pictures.borrow_and_update().clone());
    let mut is_stale = true;
    while !stop.is_cancelled() {
        if pictures.has_changed().unwrap_or(false) {
            board.update(pictures.borrow_and_update().clone());
            is_stale = true;
        }
        if std::mem::take(&mut is_stale) {
            // Only what changed is written, so nothing flickers.
            terminal.draw(|frame| draw(frame, &board)).context("cannot write to this terminal")?;
        }
        if !event::poll(BEAT).context("cannot read from this terminal")? {
            continue;
        }
        is_stale = true;
        if let Event::Key(key) = event::read().context("cannot read from this terminal")?
            && let Some(wish) = wish(key)
            && board.wish(wish)
        {
            break;
        }
    }
    Ok(())
}

/// Gives the terminal back.
struct GiveBack;

impl Drop for GiveBack {
    fn drop(&mut self) {
        ratatui::restore();
        TAKEN.store(false, Ordering::SeqCst);
    }
}

fn wish(key: KeyEvent) -> Option<Wish> {
    if key.kind == KeyEventKind::Release {
        return None;
    }
    let with_control = key.modifiers.contains(KeyModifiers::CONTROL);
    match key.code {
        KeyCode::Char('c') if with_control => Some(Wish::End),
        _ if with_control => None,
        KeyCode::Char('q') | KeyCode::Esc => Some(Wish::End),
        KeyCode::Char('?' | 'h') => Some(Wish::Help),
        KeyCode::Tab | KeyCode::Right | KeyCode::Char('l') => Some(Wish::NextPane),
        KeyCode::BackTab | KeyCode::Left => Some(Wish::PreviousPane),
        KeyCode::Down | KeyCode::Char('j') => Some(Wish::Down),
        KeyCode::Up | KeyCode::Char('k') => Some(Wish::Up),
        KeyCode::Char('s') => Some(Wish::Sort),
        KeyCode::Char('r') => Some(Wish::Reverse),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_wishes() {
        let plain = |code| wish(KeyEvent::new(code, KeyModifiers::NONE));
        assert_eq!(plain(KeyCode::Char('q')), Some(Wish::End));
        assert_eq!(plain(KeyCode::Char('?')), Some(Wish::Help));
        assert_eq!(plain(KeyCode::BackTab), Some(Wish::PreviousPane));
        assert_eq!(plain(KeyCode::Char('x')), None);
        let control = |letter| wish(KeyEvent::new(KeyCode::Char(letter), KeyModifiers::CONTROL));
        assert_eq!((control('c'), control('q')), (Some(Wish::End), None));
    }
}
