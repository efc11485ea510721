//! A real browser without a screen: Chromium, told what to do over its DevTools protocol.
//!
//! The protocol runs over two pipes (`--remote-debugging-pipe`): messages are JSON, each ended by a zero byte. What the page complains
//! about (errors on its console, exceptions, what its policy refused) is collected, so that a test can ask that there is none.

use crate::eventually::eventually;
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A browser with one page. Dropping it ends it.
pub struct Browser {
    process: Child,
    commands: ChildStdin,
    messages: mpsc::Receiver<Value>,
    next: u64,
    session: Option<String>,
    complaints: Vec<String>,
    folder: TempDir,
}

/// Programs to try after `MLXNODE_BROWSER`.
const PROGRAMS: [&str; 5] = [
    "chromium",
    "chromium-browser",
    "google-chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
];
/// A browser on a loaded machine starts in seconds.
const ANSWER: Duration = Duration::from_secs(60);
/// What a page shows after something happened.
const APPEARANCE: Duration = Duration::from_secs(30);
/// Messages that came and were not read: a page that talks more than that is broken.
const UNREAD: usize = 10_000;

/// A key as the protocol wants it.
#[derive(Clone, Copy, Debug)]
pub enum Key {
    /// Forward through what can be reached.
    Tab,
    /// Presses what has the focus.
    Enter,
    /// Closes, stops.
    Escape,
    /// Presses a button.
    Space,
}

impl Browser {
    /// Starts one.
    ///
    /// # Errors
    /// Without a browser on this machine: the text says how to get one.
    pub fn start() -> Result<Self> {
        let program = program()?;
        let folder = tempfile::tempdir()?;
        // The shell puts the pipes where the browser looks for them. The sandbox would need rights that CI has not; what is shown is ours.
        let script = "exec \"$0\" --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run \
            --disable-background-networking --disable-component-update --disable-extensions --no-proxy-server \
            --remote-debugging-pipe --user-data-dir=\"$1\" about:blank 3<&0 4>&1 </dev/null >/dev/null 2>\"$1/log\"";
        let mut process = Command::new("sh")
            .args(["-c", script])
            .arg(&program)
            .arg(folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let commands = process.stdin.take().context("stdin is piped")?;
        let stdout = process.stdout.take().context("stdout is piped")?;
        let (sender, messages) = mpsc::sync_channel(UNREAD);
        std::thread::spawn(move || {
            for message in BufReader::new(stdout).split(0) {
                let message = message.ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
                let Some(message) = message else { return };
                if sender.send(message).is_err() {
                    return;
                }
            }
        });
        let complaints = Vec::new();
        let mut browser = Self { process, commands, messages, next: 0, session: None, complaints, folder };
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"}))?;
        let attach = json!({"targetId": target["targetId"], "flatten": true});
        let session = browser.call("Target.attachToTarget", attach)?;
        browser.session = session["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Runtime", "Log"] {
            browser.call(&format!("{domain}.enable"), json!({}))?;
        }
        browser.call("Page.bringToFront", json!({}))?;
        Ok(browser)
    }

    /// Goes to a page and waits until it is read.
    pub fn open(&mut self, url: &str) -> Result<()> {
        let went = self.call("Page.navigate", json!({"url": url}))?;
        ensure!(went["errorText"].is_null(), "cannot open {url}: {}", went["errorText"]);
        self.wait_for(&format!(
            "document.readyState === 'complete' && location.href.startsWith({})",
            json!(url)
        ))
    }

    /// Sets the size of the window, and whether the person likes it dark.
    pub fn resize(&mut self, width: u32, height: u32, is_dark: bool) -> Result<()> {
        let size = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false});
        self.call("Emulation.setDeviceMetricsOverride", size)?;
        let scheme = if is_dark { "dark" } else { "light" };
        let features = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
        self.call("Emulation.setEmulatedMedia", features).map(drop)
    }

    /// The value of an expression in the page.
    pub fn evaluate(&mut self, expression: &str) -> Result<Value> {
        let parameters = json!({"expression": expression, "awaitPromise": true, "returnByValue": true});
        let mut answer = self.call("Runtime.evaluate", parameters)?;
        if !answer["exceptionDetails"].is_null() {
            bail!("{expression}: {}", answer["exceptionDetails"]);
        }
        Ok(answer["result"]["value"].take())
    }

    /// Waits until an expression is true in the page.
    pub fn wait_for(&mut self, condition: &str) -> Result<()> {
        let waited = eventually(APPEARANCE, || {
            ensure!(self.evaluate(condition)?.as_bool() == Some(true), "never: {condition}");
            Ok(())
        });
        waited.with_context(|| {
            let text = self.evaluate("document.body.innerText").unwrap_or_default();
            format!("the page shows {text}; complaints: {:?}", self.complaints)
        })
    }

    /// Presses and lets go of a key, as a person does.
    pub fn press(&mut self, key: Key) -> Result<()> {
        let (name, code, number, text) = match key {
            Key::Tab => ("Tab", "Tab", 9, None),
            Key::Enter => ("Enter", "Enter", 13, Some("\r")),
            Key::Escape => ("Escape", "Escape", 27, None),
            Key::Space => (" ", "Space", 32, Some(" ")),
        };
        for kind in ["keyDown", "keyUp"] {
            let mut event = json!({"type": kind, "key": name, "code": code, "windowsVirtualKeyCode": number});
            if let (Some(text), "keyDown") = (text, kind) {
                event["text"] = text.into();
            }
            self.call("Input.dispatchKeyEvent", event)?;
        }
        Ok(())
    }

    /// Writes where the focus is.
    pub fn write(&mut self, text: &str) -> Result<()> {
        self.call("Input.insertText", json!({"text": text})).map(drop)
    }

    /// Presses Tab until an element that fits the selector has the focus; fails when it is not among the first `most`.
    pub fn tab_to(&mut self, selector: &str, most: usize) -> Result<()> {
        for _ in 0..most {
            self.press(Key::Tab)?;
            let is_there = format!("document.activeElement.matches({})", json!(selector));
            if self.evaluate(&is_there)? == json!(true) {
                return Ok(());
            }
        }
        bail!("{selector} is not reached by {most} tabs")
    }

    /// What went wrong in the page so far.
    pub fn complaints(&mut self) -> Result<&[String]> {
        self.evaluate("1")?; // what came before this answer is read by now
        Ok(&self.complaints)
    }

    fn call(&mut self, method: &str, parameters: Value) -> Result<Value> {
        self.next += 1;
        let id = self.next;
        let mut message = json!({"id": id, "method": method, "params": parameters});
        if let Some(session) = &self.session {
            message["sessionId"] = session.as_str().into();
        }
        let mut bytes = serde_json::to_vec(&message)?;
        bytes.push(0);
        self.commands.write_all(&bytes).with_context(|| self.last_words())?;
        let begun = Instant::now();
        loop {
            let left = ANSWER.saturating_sub(begun.elapsed());
            let message = self.messages.recv_timeout(left);
            let mut message =
                message.with_context(|| format!("{method} was not answered: {}", self.last_words()))?;
            if message["id"] == id {
                ensure!(message["error"].is_null(), "{method}: {}", message["error"]);
                return Ok(message["result"].take());
            }
            self.heed(&message);
        }
    }

    fn heed(&mut self, message: &Value) {
        let told = &message["params"];
        let complaint = match message["method"].as_str() {
            Some("Runtime.exceptionThrown") => &told["exceptionDetails"],
            Some("Log.entryAdded") if told["entry"]["level"] == "error" => &told["entry"],
            Some("Runtime.consoleAPICalled") if told["type"] == "error" || told["type"] == "assert" => told,
            _ => return,
        };
        self.complaints.push(complaint.to_string());
    }

    fn last_words(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn program() -> Result<PathBuf> {
    let named = std::env::var_os("MLXNODE_BROWSER").map(PathBuf::from);
    let is_there = |program: &PathBuf| {
        let mut version = Command::new(program);
        version.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
        version.status().is_ok_and(|status| status.success())
    };
    named.into_iter().chain(PROGRAMS.map(PathBuf::from)).find(is_there).context(
        "the web page is tested in Chromium, and there is none: `apt-get install chromium` (Debian), install Google Chrome (Mac), or \
         name the program in MLXNODE_BROWSER",
    )
}
