//! One client: sends a completion over HTTP, reads its stream, and notes when each piece came. Blocking, a thread each, so that nothing of
//! the generator runs between two tokens.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use std::io::{BufRead as _, BufReader, ErrorKind, Write as _};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Longest silence of a server that is alive.
const SILENCE: Duration = Duration::from_secs(240);
/// How often a connection is made at most, and how long after the one before.
const TRIES: usize = 100;
const PAUSE: Duration = Duration::from_millis(5);

/// Where to ask, and for which model.
#[derive(Clone, Debug)]
pub(super) struct Server {
    /// HOST:PORT.
    pub(super) address: String,
    /// What the server calls its model.
    pub(super) model: String,
}

/// What to ask.
#[derive(Clone, Debug)]
pub(super) struct Question {
    pub(super) prompt: String,
    pub(super) max_tokens: usize,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Answer {
    /// All tokens came.
    Whole(Times),
    /// The server said no, and how soon: 429 or 503.
    Refused(Duration),
}

/// When what came, after the request was sent.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Times {
    /// Of each piece of text.
    pub(super) pieces: Vec<Duration>,
    /// The text, so that two servers can be held against each other.
    pub(super) text: String,
    /// Tokens of the prompt that needed no work, when the server tells.
    pub(super) cached_tokens: u64,
}

impl Times {
    /// To the first piece.
    pub(super) fn first(&self) -> Duration {
        self.pieces.first().copied().unwrap_or_default()
    }
}

impl Server {
    /// Asks and reads to the end; none when the client hung up. A connection that is dropped before an answer begins is made again: a server may
    /// have room for few that it has not looked at. The time counts from the first try.
    pub(super) fn ask(&self, question: &Question, line: &Line) -> Result<Option<Answer>> {
        let sent = Instant::now();
        let mut tries = 1;
        loop {
            match self.ask_and_read(question, line, sent) {
                _ if line.has_hung_up() => return Ok(None),
                Err(error) if tries < TRIES && line.pieces() == 0 && was_dropped(&error) => {
                    tries += 1;
                    std::thread::sleep(PAUSE);
                }
                answer => return answer.map(Some),
            }
        }
    }

    fn ask_and_read(&self, question: &Question, client: &Line, sent: Instant) -> Result<Answer> {
        let body = json!({
            "model": self.model, "prompt": question.prompt, "max_tokens": question.max_tokens, "temperature": 0.0,
            "stream": true, "stream_options": {"include_usage": true},
        })
        .to_string();
        let mut stream = TcpStream::connect(&self.address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(SILENCE))?;
        client.is_open(stream.try_clone()?);
        write!(
            stream,
            "POST /v1/completions HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            self.address,
            body.len()
        )?;
        let mut lines = BufReader::new(stream);
        let mut line = String::new();
        ensure!(lines.read_line(&mut line)? > 0, std::io::Error::from(ErrorKind::UnexpectedEof));
        let status: u16 = line.split(' ').nth(1).and_then(|status| status.parse().ok()).context("status")?;
        if matches!(status, 429 | 503) {
            return Ok(Answer::Refused(sent.elapsed()));
        }
        ensure!(status == 200, "{}: {}", line.trim(), rest(&mut lines));
        let mut times = Times { pieces: Vec::new(), text: String::new(), cached_tokens: 0 };
        let mut finished = false;
        loop {
            line.clear();
            if lines.read_line(&mut line)? == 0 {
                break;
            }
            // A server may send chunks with their sizes between the lines; events are lines of their own in both cases.
            let Some(data) = line.strip_prefix("data: ").map(str::trim) else { continue };
            if data == "[DONE]" {
                break;
            }
            let event: Value = serde_json::from_str(data).with_context(|| format!("not JSON: {data}"))?;
            if let Some(error) = event.get("error") {
                bail!("the server gave up: {error}");
            }
            if let Some(cached) = event["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64() {
                times.cached_tokens = cached;
            }
            let choice = &event["choices"][0];
            finished |= choice["finish_reason"].is_string();
            let text = choice["text"].as_str().unwrap_or_default();
            if !text.is_empty() {
                times.pieces.push(sent.elapsed());
                times.text.push_str(text);
                client.pieces.store(times.pieces.len(), Ordering::Relaxed);
            }
        }
        ensure!(finished && !times.pieces.is_empty(), "the answer has no end, or no text");
        Ok(Answer::Whole(times))
    }

    /// Requests that run or wait, as its metrics tell.
    pub(super) fn requests(&self) -> Result<f64> {
        let mut stream = TcpStream::connect(&self.address)?;
        stream.set_read_timeout(Some(SILENCE))?;
        write!(stream, "GET /metrics HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", self.address)?;
        let text = rest(&mut stream);
        let of = |name: &str| {
            let lines = text.lines().filter(|line| line.starts_with(name));
            let values: Option<Vec<f64>> =
                lines.map(|line| line.rsplit(' ').next().and_then(|value| value.parse().ok())).collect();
            values.filter(|values| !values.is_empty()).with_context(|| format!("the metrics lack {name}"))
        };
        let all = [of("vllm:num_requests_running{")?, of("vllm:num_requests_waiting{")?].concat();
        Ok(all.into_iter().sum())
    }

    /// Does it answer at all?
    pub(super) fn is_there(&self) -> bool {
        let asked = || -> Result<String> {
            let mut stream = TcpStream::connect(&self.address)?;
            stream.set_read_timeout(Some(Duration::from_secs(2)))?;
            write!(stream, "GET /v1/models HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", self.address)?;
            let mut line = String::new();
            BufReader::new(stream).read_line(&mut line)?;
            Ok(line)
        };
        asked().is_ok_and(|line| line.contains(" 200"))
    }
}

/// A client's connection, for whoever watches it or hangs up.
#[derive(Debug, Default)]
pub(super) struct Line {
    stream: Mutex<Option<TcpStream>>,
    hung_up: AtomicBool,
    pieces: AtomicUsize,
}

impl Line {
    /// Ends the connection, now or as soon as there is one.
    pub(super) fn hang_up(&self) {
        self.hung_up.store(true, Ordering::SeqCst);
        if let Some(stream) = self.stream.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = stream.shutdown(Shutdown::Both); // it may have ended by itself
        }
    }

    /// Pieces of text that came so far.
    pub(super) fn pieces(&self) -> usize {
        self.pieces.load(Ordering::Relaxed)
    }

    fn is_open(&self, stream: TcpStream) {
        *self.stream.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream);
        if self.has_hung_up() {
            self.hang_up();
        }
    }

    fn has_hung_up(&self) -> bool {
        self.hung_up.load(Ordering::SeqCst)
    }
}

/// Before the server looked at the request?
fn was_dropped(error: &anyhow::Error) -> bool {
    let kinds = [
        ErrorKind::ConnectionReset,
        ErrorKind::ConnectionRefused,
        ErrorKind::BrokenPipe,
        ErrorKind::UnexpectedEof,
    ];
    let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    kind.is_some_and(|kind| kinds.contains(&kind))
}

fn rest(lines: &mut impl std::io::Read) -> String {
    let mut bytes = Vec::new();
    let _ = lines.read_to_end(&mut bytes); // what was read before an error still helps
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;
    use std::net::TcpListener;

    /// Answers one connection with these bytes.
    fn serve(answer: &'static str) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 4096]);
            stream.write_all(answer.as_bytes()).unwrap();
            // To close with a part of the request unread would reset the connection.
            let _ = stream.shutdown(Shutdown::Write);
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        });
        Server { address, model: "m".into() }
    }

    fn question() -> Question {
        Question { prompt: "w1".into(), max_tokens: 2 }
    }

    #[test]
    fn a_stream_is_read_with_and_without_chunks() {
        let plain = "HTTP/1.0 200 OK\r\n\r\ndata: {\"choices\": [{\"text\": \"a\"}]}\n\n: keep\n\n\
                     data: {\"choices\": [{\"text\": \"b\", \"finish_reason\": \"length\"}]}\n\n\
                     data: {\"choices\": [], \"usage\": {\"prompt_tokens_details\": {\"cached_tokens\": 7}}}\n\ndata: [DONE]\n\n";
        let chunked = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2a\r\ndata: {\"choices\": [{\"text\": \"a\"}]}\n\n\r\n\
                       40\r\ndata: {\"choices\": [{\"text\": \"b\", \"finish_reason\": \"length\"}]}\n\n\r\n0\r\n\r\n";
        for (answer, cached) in [(plain, 7), (chunked, 0)] {
            let Some(Answer::Whole(times)) = serve(answer).ask(&question(), &Line::default()).unwrap() else {
                panic!("whole")
            };
            assert_eq!((times.pieces.len(), times.text.as_str(), times.cached_tokens), (2, "ab", cached));
        }
    }

    #[test]
    fn who_hangs_up_has_no_answer() {
        let line = Line::default();
        line.hang_up();
        assert_eq!(serve("HTTP/1.1 200 OK\r\n\r\n").ask(&question(), &line).unwrap(), None);
    }

    #[test]
    fn refusals_are_timed_and_what_breaks_is_an_error() {
        let refused =
            serve("HTTP/1.1 429 Too Many Requests\r\n\r\n").ask(&question(), &Line::default()).unwrap();
        assert!(matches!(refused, Some(Answer::Refused(_))));
        for broken in [
            "HTTP/1.1 500 Oops\r\n\r\n",
            "HTTP/1.1 200 OK\r\n\r\ndata: {\"error\": {\"message\": \"gone\"}}\n\n",
            "HTTP/1.1 200 OK\r\n\r\ndata: {\"choices\": [{\"text\": \"a\"}]}\n\n",
        ] {
            assert!(serve(broken).ask(&question(), &Line::default()).is_err(), "{broken}");
        }
    }
}
