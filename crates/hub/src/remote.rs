//! The hub's HTTP protocol: what a repository has, what a file is, and a file's bytes from an offset on.

use crate::error::HubError;
use crate::files::{is_safe_part, is_safe_path};
use crate::options::Options;
use crate::source::HubId;
use hf_hub::{Repo, RepoType, api::RepoInfo};
use std::time::Duration;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{HeaderMap, Response};
use ureq::{Agent, Body};

/// Longest wait for a connection, and for the first and every further byte. A hub that is slower is as good as gone, and what
/// has come is kept.
const CONNECT: Duration = Duration::from_secs(10);
const SILENCE: Duration = Duration::from_secs(30);

/// Largest list of files that is read; the largest repositories have some thousand files.
const MAX_LIST_BYTES: u64 = 16 << 20;

/// A hub that can be asked.
pub(crate) struct Remote {
    endpoint: String,
    token: Option<crate::Secret>,
    /// Follows redirects, without taking the token to other hosts.
    following: Agent,
    /// Shows redirects: the hub's own answer has the facts about a file that a content network's has not.
    direct: Agent,
}

/// The files of a repository at one commit.
pub(crate) struct Listing {
    pub(crate) commit: String,
    pub(crate) files: Vec<String>,
}

/// What the hub says about a file.
#[derive(Clone, Debug)]
pub(crate) struct RemoteFile {
    /// Names the content: the SHA-256 of large files, the git hash of others.
    pub(crate) etag: String,
    pub(crate) size: u64,
}

impl Remote {
    pub(crate) fn new(options: &Options) -> Self {
        let agent = |redirects: u32| -> Agent {
            let config = Agent::config_builder()
                .http_status_as_error(false)
                .max_redirects(redirects)
                .redirect_auth_headers(RedirectAuthHeaders::SameHost)
                .timeout_connect(Some(CONNECT))
                .timeout_resolve(Some(CONNECT))
                .timeout_recv_response(Some(SILENCE))
                .timeout_per_read(Some(SILENCE))
                .accept_encoding("identity") // sizes and offsets are those of the file itself
                .user_agent(concat!("mlxnode/", env!("CARGO_PKG_VERSION")));
            let config = if is_loopback(&options.endpoint) { config.proxy(None) } else { config };
            config.build().into()
        };
        Self {
            endpoint: options.endpoint.clone(),
            token: options.token.clone(),
            following: agent(10),
            direct: agent(0),
        }
    }

    /// The files of a repository and the commit that its revision stands for now.
    pub(crate) fn list(&self, id: &HubId) -> Result<Listing, HubError> {
        let kind = if id.is_dataset() { RepoType::Dataset } else { RepoType::Model };
        let repo = Repo::with_revision(id.repository(), kind, id.revision().to_owned());
        let url = format!("{}/api/{}", self.endpoint, repo.api_url());
        let mut response = self.call(&self.following, "GET", &url, None)?;
        if !response.status().is_success() {
            return Err(self.refusal(id, None, &url, &response));
        }
        let protocol = |reason: String| HubError::Protocol { url: url.clone(), reason };
        let text = response
            .body_mut()
            .with_config()
            .limit(MAX_LIST_BYTES)
            .read_to_vec()
            .map_err(|source| HubError::Network { url: url.clone(), source })?;
        let info: RepoInfo = serde_json::from_slice(&text).map_err(|error| protocol(error.to_string()))?;
        if !is_safe_part(&info.sha) {
            return Err(protocol("its commit is not one".into()));
        }
        let files: Vec<String> = info.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
        match files.iter().find(|file| !is_safe_path(file)) {
            Some(file) => {
                Err(protocol(format!("it lists the file {:?}", file.chars().take(80).collect::<String>())))
            }
            None => Ok(Listing { commit: info.sha, files }),
        }
    }

    /// Content and size of a file, from the hub itself.
    pub(crate) fn describe(&self, id: &HubId, commit: &str, file: &str) -> Result<RemoteFile, HubError> {
        const MAX_HOPS: usize = 5;
        let mut url = self.file_url(id, commit, file);
        let mut method = "HEAD";
        let mut response = self.call(&self.direct, method, &url, None)?;
        if matches!(response.status().as_u16(), 405 | 501) {
            // A simple mirror that only knows GET; the body is left unread.
            method = "GET";
            response = self.call(&self.direct, method, &url, None)?;
        }
        for _ in 0..MAX_HOPS {
            // The repository may have been renamed: the hub redirects within itself.
            let Some(location) = header(response.headers(), "location") else { break };
            if !response.status().is_redirection() || !location.starts_with('/') || location.starts_with("//")
            {
                break;
            }
            url = format!("{}{location}", origin(&self.endpoint));
            response = self.call(&self.direct, method, &url, None)?;
        }
        if response.status().is_redirection() && header(response.headers(), "x-linked-etag").is_none() {
            response = self.call(&self.following, method, &url, None)?;
        }
        if !response.status().is_success() && !response.status().is_redirection() {
            return Err(self.refusal(id, Some(file), &url, &response));
        }
        let either = |linked: &str, own: &str| {
            header(response.headers(), linked).or_else(|| header(response.headers(), own))
        };
        let protocol = |reason: &str| HubError::Protocol { url: url.clone(), reason: reason.into() };
        let etag = either("x-linked-etag", "etag").ok_or_else(|| protocol("it sends no ETag"))?;
        let etag = etag.trim_start_matches("W/").trim_matches('"').to_owned();
        if !is_safe_part(&etag) {
            return Err(protocol("its ETag is not the name of a content"));
        }
        let size = either("x-linked-size", "content-length")
            .and_then(|size| size.parse().ok())
            .ok_or_else(|| protocol("it does not say how large the file is"))?;
        Ok(RemoteFile { etag, size })
    }

    /// A file's bytes from `offset` on. The caller checks status and range.
    pub(crate) fn open(
        &self,
        id: &HubId,
        commit: &str,
        file: &str,
        offset: u64,
    ) -> Result<Response<Body>, HubError> {
        let range = (offset > 0).then(|| format!("bytes={offset}-"));
        self.call(&self.following, "GET", &self.file_url(id, commit, file), range)
    }

    /// Where a file is.
    pub(crate) fn file_url(&self, id: &HubId, commit: &str, file: &str) -> String {
        format!("{}/{}/resolve/{commit}/{}", self.endpoint, id.path(), escaped(file))
    }

    fn call(
        &self,
        agent: &Agent,
        method: &str,
        url: &str,
        range: Option<String>,
    ) -> Result<Response<Body>, HubError> {
        let mut request = match method {
            "HEAD" => agent.head(url),
            _ => agent.get(url),
        };
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {}", token.expose()));
        }
        if let Some(range) = range {
            request = request.header("Range", range);
        }
        request.call().map_err(|source| HubError::Network { url: url.into(), source })
    }

    /// Why the hub refuses. It tells more in a header than by the status: a repository that is not there is a 401 to strangers.
    pub(crate) fn refusal(
        &self,
        id: &HubId,
        file: Option<&str>,
        url: &str,
        response: &Response<Body>,
    ) -> HubError {
        let (endpoint, repository) = (self.endpoint.clone(), id.path());
        let status = response.status().as_u16();
        match (header(response.headers(), "x-error-code").as_deref(), status, file) {
            (Some("GatedRepo"), ..) => HubError::Gated { id: repository, endpoint },
            (Some("RepoNotFound"), ..) => HubError::NotFound { id: repository, endpoint },
            (Some("RevisionNotFound"), ..) => {
                HubError::NoRevision { id: repository, revision: id.revision().into() }
            }
            (_, 404, Some(file)) => HubError::NoFile { id: repository, file: file.into() },
            (_, 404, None) => HubError::NotFound { id: repository, endpoint },
            (_, 401 | 403, _) => {
                HubError::Unauthorised { id: repository, endpoint, status, had_token: self.token.is_some() }
            }
            _ => HubError::Status { url: url.into(), status },
        }
    }
}

/// A header's text.
pub(crate) fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(|text| text.trim().to_owned())
}

/// Scheme, host and port of a URL.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    let end = url[host..].find('/').map_or(url.len(), |at| host + at);
    &url[..end]
}

/// A proxy from the environment is not for this machine itself.
fn is_loopback(endpoint: &str) -> bool {
    let host = origin(endpoint).rsplit("://").next().unwrap_or_default();
    ["127.", "localhost", "[::1]"].iter().any(|prefix| host.starts_with(prefix))
}

/// A path for a URL: everything but the plainest characters as %XX.
fn escaped(path: &str) -> String {
    let mut text = String::with_capacity(path.len());
    for byte in path.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => {
                text.push(byte.into())
            }
            other => text.push_str(&format!("%{other:02X}")),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_apart_and_escaped() {
        assert_eq!(origin("https://hub.example/base/x"), "https://hub.example");
        assert_eq!(origin("http://127.0.0.1:80"), "http://127.0.0.1:80");
        assert!(is_loopback("http://127.0.0.1:80/x") && !is_loopback("https://huggingface.co"));
        assert_eq!(escaped("a/b c#1?.json"), "a/b%20c%231%3F.json");
    }
}
