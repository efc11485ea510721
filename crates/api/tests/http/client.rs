//! The smallest HTTP client: it sends exactly the bytes that a test wants to send.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// What came back.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    /// Lower case, `name: value`, a line each.
    pub(crate) headers: String,
    pub(crate) body: String,
}

impl Reply {
    pub(crate) fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.body).with_context(|| format!("not JSON: {self:?}"))
    }

    /// The data of the events of a stream.
    pub(crate) fn events(&self) -> Vec<&str> {
        self.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect()
    }
}

/// Sends bytes and reads until the server closes.
pub(crate) async fn raw(address: SocketAddr, request: &[u8]) -> Result<Reply> {
    let mut stream = TcpStream::connect(address).await?;
    // The server may answer and close before it has read everything.
    let _ = stream.write_all(request).await;
    let mut bytes = Vec::new();
    if let Err(error) = stream.read_to_end(&mut bytes).await
        && bytes.is_empty()
    {
        return Err(error.into());
    }
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").with_context(|| format!("no HTTP: {text:?}"))?;
    let (status_line, headers) = head.split_once("\r\n").unwrap_or((head, ""));
    let status = status_line.split(' ').nth(1).and_then(|status| status.parse().ok()).context("status")?;
    let headers = headers.to_ascii_lowercase().replace("\r\n", "\n");
    let body =
        if headers.contains("transfer-encoding: chunked") { unchunked(body)? } else { body.to_owned() };
    Ok(Reply { status, headers, body })
}

fn unchunked(mut rest: &str) -> Result<String> {
    let mut body = String::new();
    while let Some((size, behind)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size.trim(), 16)?;
        if size == 0 {
            break;
        }
        body.push_str(behind.get(..size).context("chunk")?);
        rest = behind.get(size + 2..).context("chunk")?;
    }
    Ok(body)
}

/// A request with these header lines (each with its `\r\n`) and body.
pub(crate) async fn ask(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &str,
    body: &str,
) -> Result<Reply> {
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n{headers}content-length: {}\r\n\r\n{body}",
        body.len()
    );
    raw(address, request.as_bytes()).await
}

pub(crate) async fn get(address: SocketAddr, path: &str) -> Result<Reply> {
    ask(address, "GET", path, "", "").await
}

pub(crate) async fn post(address: SocketAddr, path: &str, body: &Value) -> Result<Reply> {
    ask(address, "POST", path, "content-type: application/json\r\n", &body.to_string()).await
}

/// An answer that must be a good one.
pub(crate) async fn good(address: SocketAddr, path: &str, body: Value) -> Result<Value> {
    let reply = post(address, path, &body).await?;
    ensure!(reply.status == 200, "{body}: {reply:?}");
    reply.json()
}

/// A refusal: its status, its `param` and its message.
pub(crate) async fn refused(address: SocketAddr, path: &str, body: Value) -> Result<(u16, Value, String)> {
    let reply = post(address, path, &body).await?;
    ensure!(reply.status >= 400, "{body}: {reply:?}");
    let error = reply.json()?["error"].clone();
    let message = error["message"].as_str().with_context(|| format!("{reply:?}"))?.to_owned();
    Ok((reply.status, error["param"].clone(), message))
}

/// The data of a stream's events; `[DONE]` is left out.
pub(crate) async fn streamed(address: SocketAddr, path: &str, mut body: Value) -> Result<Vec<Value>> {
    body["stream"] = true.into();
    let reply = post(address, path, &body).await?;
    ensure!(reply.status == 200 && reply.headers.contains("text/event-stream"), "{body}: {reply:?}");
    let events = reply.events().into_iter().filter(|data| *data != "[DONE]");
    events.map(|data| Ok(serde_json::from_str(data)?)).collect()
}
