//! A hub on loopback: one repository, with faults on request.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A file of the repository.
#[derive(Clone)]
pub(crate) struct Served {
    pub(crate) content: Vec<u8>,
    pub(crate) etag: String,
    /// Large files are elsewhere: the hub redirects, with the facts in headers of its own.
    pub(crate) elsewhere: bool,
    /// What the hub says it has, when that is not the length of the content.
    pub(crate) claimed: Option<usize>,
}

/// What goes wrong.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// The connection ends after this many bytes of the next body.
    CutAfter(usize),
    /// The next request for a range gets everything.
    IgnoreRange,
    /// The next request for a range gets another one.
    WrongRange,
    /// The next file request gets this status.
    Status(u16),
}

/// What the server is and what it saw.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) files: BTreeMap<String, Served>,
    pub(crate) faults: VecDeque<Fault>,
    /// Only who brings this token gets in.
    pub(crate) token: Option<String>,
    /// Status and error code for every request.
    pub(crate) refuse: Option<(u16, &'static str)>,
    /// The commit that the list names.
    pub(crate) commit: Option<String>,
    /// The repository is called new/name now; requests for the old name are redirected.
    pub(crate) renamed: bool,
    /// HEAD is not known here.
    pub(crate) no_head: bool,
    /// "METHOD PATH range=…", one for each request.
    pub(crate) requests: Vec<String>,
    /// Authorization headers that came to the content network.
    pub(crate) tokens_elsewhere: Vec<String>,
}

/// Stops and joins its thread when dropped.
pub(crate) struct Server {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves a small model of o/n.
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(State { files: small_model(), ..State::default() }));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let (state, stop) = (Arc::clone(&state), Arc::clone(&stop));
            move || {
                for stream in listener.incoming() {
                    if stop.load(Ordering::SeqCst) {
                        break;
                    }
                    // One request for each connection, one after the other: the client asks for nothing in parallel.
                    let _ = serve(stream.unwrap(), address, &state);
                }
            }
        });
        Self { address, state, stop, thread: Some(thread) }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap())
    }

    /// The requests since the last call.
    pub(crate) fn requests(&self) -> Vec<String> {
        self.with(|state| std::mem::take(&mut state.requests))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        let _ = self.thread.take().unwrap().join();
    }
}

fn sha256(content: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, content);
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn small_model() -> BTreeMap<String, Served> {
    let weights: Vec<u8> = (0..1_000_000u32).map(|index| (index * 7 / 3) as u8).collect();
    let small = |name: &str, content: &str| {
        let etag = format!("{:040x}", name.len() * 1000 + content.len());
        (name.to_owned(), Served { content: content.into(), etag, elsewhere: false, claimed: None })
    };
    let large = |name: &str, content: Vec<u8>| {
        (name.to_owned(), Served { etag: sha256(&content), content, elsewhere: true, claimed: None })
    };
    BTreeMap::from([
        small("config.json", r#"{"model_type": "llama"}"#),
        small("tokenizer.json", "{}"),
        small("templates/chat template.jinja", "{{ messages }}"),
        small("merges.txt", ""),
        small("modeling.py", "import os"),
        small("README.md", "# n"),
        large("model.safetensors", weights),
        large("pytorch_model.bin", vec![1; 10]),
    ])
}

struct Request {
    method: String,
    path: String,
    range_from: Option<usize>,
    token: Option<String>,
}

fn read_request(stream: &TcpStream) -> std::io::Result<Request> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?; // a test that hangs tells less than one that fails
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next().ok_or(std::io::ErrorKind::UnexpectedEof)??;
    let mut words = first.split(' ').map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut request = Request { method, path, range_from: None, token: None };
    for line in lines {
        let line = line?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(": ").unwrap();
        match name.to_ascii_lowercase().as_str() {
            "range" => {
                let from = value.strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap();
                request.range_from = Some(from.parse().unwrap());
            }
            "authorization" => request.token = Some(value.strip_prefix("Bearer ").unwrap().to_owned()),
            _ => {}
        }
    }
    Ok(request)
}

fn serve(stream: TcpStream, address: SocketAddr, state: &Mutex<State>) -> std::io::Result<()> {
    let request = read_request(&stream)?;
    let mut state = state.lock().unwrap();
    let range = request.range_from.map(|from| format!(" range={from}")).unwrap_or_default();
    state.requests.push(format!("{} {}{range}", request.method, request.path));
    let path = request.path.clone();
    if let Some(name) = path.strip_prefix("/elsewhere/") {
        state.tokens_elsewhere.extend(request.token.clone());
        let file = state.files[name].clone();
        return send_file(stream, &request, &mut state, &file, "");
    }
    if let Some((status, code)) = state.refuse {
        return respond(stream, &request, status, &format!("X-Error-Code: {code}\r\n"), b"refused");
    }
    if state.token.is_some() && state.token != request.token {
        return respond(stream, &request, 401, "X-Error-Code: GatedRepo\r\n", b"refused");
    }
    if state.no_head && request.method == "HEAD" {
        return respond(stream, &request, 501, "", b"");
    }
    if state.renamed && path.contains("o/n/") {
        let location = format!("Location: {}\r\n", path.replace("o/n/", "new/name/"));
        return respond(stream, &request, 307, &location, b"");
    }
    let name = if state.renamed { "new/name" } else { "o/n" };
    // Data sets have the same files: which of them are taken is the question.
    let api = ["models", "datasets"].map(|kind| format!("/api/{kind}/{name}/revision/"));
    if api.iter().any(|api| path.starts_with(api)) {
        let siblings: Vec<_> =
            state.files.keys().map(|name| serde_json::json!({ "rfilename": name })).collect();
        let commit = state.commit.clone().unwrap_or_else(|| COMMIT.into());
        let list = serde_json::json!({ "id": name, "sha": commit, "siblings": siblings });
        return respond(stream, &request, 200, "", list.to_string().as_bytes());
    }
    let path = path.strip_prefix("/datasets").unwrap_or(&path);
    let Some(file) = path.strip_prefix(&format!("/{name}/resolve/{COMMIT}/")) else {
        return respond(stream, &request, 404, "X-Error-Code: RepoNotFound\r\n", b"");
    };
    let Some(served) = state.files.get(&file.replace("%20", " ")).cloned() else {
        return respond(stream, &request, 404, "X-Error-Code: EntryNotFound\r\n", b"");
    };
    if let Some(Fault::Status(status)) = state.faults.front().cloned()
        && request.method == "GET"
    {
        state.faults.pop_front();
        return respond(stream, &request, status, "", b"");
    }
    let facts = format!("X-Repo-Commit: {COMMIT}\r\n");
    if served.elsewhere {
        // Another host name for the same listener, so that the token must stay behind.
        let facts = format!(
            "{facts}X-Linked-Etag: \"{}\"\r\nX-Linked-Size: {}\r\nLocation: http://localhost:{}/elsewhere/{file}\r\n",
            served.etag,
            served.claimed.unwrap_or(served.content.len()),
            address.port(),
        );
        return respond(stream, &request, 302, &facts, b"");
    }
    send_file(stream, &request, &mut state, &served, &format!("{facts}ETag: \"{}\"\r\n", served.etag))
}

fn send_file(
    stream: TcpStream,
    request: &Request,
    state: &mut State,
    file: &Served,
    headers: &str,
) -> std::io::Result<()> {
    let total = file.content.len();
    let mut from = request.range_from;
    match (state.faults.front().cloned(), &mut from) {
        (Some(Fault::CutAfter(bytes)), _) if request.method == "GET" && total > bytes => {
            state.faults.pop_front();
            let rest = &file.content[from.unwrap_or(0)..];
            let status = if from.is_some() { 206 } else { 200 };
            let range = content_range(from, total);
            let bytes = bytes.min(rest.len());
            return send(stream, status, &format!("{headers}{range}"), &rest[..bytes], rest.len());
        }
        (Some(Fault::IgnoreRange), Some(_)) => {
            state.faults.pop_front();
            from = None;
        }
        (Some(Fault::WrongRange), Some(offset)) => {
            state.faults.pop_front();
            *offset += 1;
        }
        _ => {}
    }
    let status = if from.is_some() { 206 } else { 200 };
    let range = content_range(from, total);
    respond(stream, request, status, &format!("{headers}{range}"), &file.content[from.unwrap_or(0)..])
}

fn content_range(from: Option<usize>, total: usize) -> String {
    from.map(|from| format!("Content-Range: bytes {from}-{}/{total}\r\n", total - 1)).unwrap_or_default()
}

fn respond(
    stream: TcpStream,
    request: &Request,
    status: u16,
    headers: &str,
    body: &[u8],
) -> std::io::Result<()> {
    let sent = if request.method == "HEAD" { &[] } else { body };
    send(stream, status, headers, sent, body.len())
}

fn send(
    mut stream: TcpStream,
    status: u16,
    headers: &str,
    body: &[u8],
    length: usize,
) -> std::io::Result<()> {
    write!(stream, "HTTP/1.1 {status} X\r\nContent-Length: {length}\r\nConnection: close\r\n{headers}\r\n")?;
    stream.write_all(body)?;
    stream.flush()
}
