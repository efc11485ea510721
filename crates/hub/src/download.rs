//! One file from the hub into a blob: goes on where it broke off, and is what the hub announced when it is done.

use crate::cache::RepoCache;
use crate::error::{HubError, disk};
use crate::remote::{Remote, RemoteFile, header};
use crate::source::HubId;
use ring::digest::{Context, SHA256};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::Duration;

/// Failures in a row, without one new byte, after which a download is given up.
const ATTEMPTS: u32 = 5;
/// Wait after the first such failure; doubles with each. All together some 4 seconds, then the person decides.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Bytes between two reports of progress.
const CHUNK: usize = 256 << 10;

/// A file of a repository at a commit.
pub(crate) struct Download<'a> {
    pub(crate) remote: &'a Remote,
    pub(crate) cache: &'a RepoCache,
    pub(crate) id: &'a HubId,
    pub(crate) commit: &'a str,
    pub(crate) file: &'a str,
    pub(crate) facts: &'a RemoteFile,
}

/// How one connection ended.
enum Broken {
    /// Worth another try.
    Connection(io::Error),
    /// Not.
    For(HubError),
}

impl Download<'_> {
    /// Downloads the file unless its blob is there. `report` gets the bytes of this file that are here.
    pub(crate) fn run(&self, report: &dyn Fn(u64)) -> Result<(), HubError> {
        let (etag, size) = (&self.facts.etag, self.facts.size);
        let (blob, incomplete) = (self.cache.blob(etag), self.cache.incomplete_blob(etag));
        let folder = blob.parent().unwrap_or(&blob);
        fs::create_dir_all(folder).map_err(disk(folder))?;
        let length = |path: &Path| path.metadata().map_or(0, |metadata| metadata.len());
        let _lock = self.cache.lock(etag, || report(length(&incomplete)))?;
        if blob.is_file() && length(&blob) == size {
            report(size);
            return Ok(());
        }
        let mut part = Part::open(&incomplete, size, etag)?;
        report(part.received);
        let mut failures = 0;
        while part.received < size {
            let before = part.received;
            let error = match self.receive(&mut part, report) {
                Ok(()) => continue,
                Err(Broken::For(error)) => return Err(error),
                Err(Broken::Connection(error)) => error,
            };
            failures = if part.received > before { 0 } else { failures + 1 };
            tracing::debug!(file = self.file, received = part.received, size, %error, "download broke off");
            if failures == ATTEMPTS {
                let (file, received) = (self.file.to_owned(), part.received);
                return Err(HubError::Interrupted { file, received, total: size, source: error });
            }
            if failures > 0 {
                std::thread::sleep(FIRST_PAUSE * 2u32.pow(failures - 1));
            }
        }
        part.finish(self.file, &incomplete, &blob)
    }

    /// One connection: appends what comes.
    fn receive(&self, part: &mut Part, report: &dyn Fn(u64)) -> Result<(), Broken> {
        let url = self.remote.file_url(self.id, self.commit, self.file);
        let mut response = self.remote.open(self.id, self.commit, self.file, part.received).map_err(
            |error| match error {
                HubError::Network { source, .. } => Broken::Connection(source.into_io()),
                other => Broken::For(other),
            },
        )?;
        let protocol =
            |reason: &str| Broken::For(HubError::Protocol { url: url.clone(), reason: reason.into() });
        match response.status().as_u16() {
            // Everything from the start, asked for or not.
            200 => part.restart().map_err(Broken::For)?,
            206 => {
                let range = header(response.headers(), "content-range").unwrap_or_default();
                if !range.starts_with(&format!("bytes {}-", part.received)) {
                    return Err(protocol("it sends another range than it was asked for"));
                }
            }
            429 | 500..=599 => {
                return Err(Broken::Connection(io::Error::other(format!("status {}", response.status()))));
            }
            _ => return Err(Broken::For(self.remote.refusal(self.id, Some(self.file), &url, &response))),
        }
        let mut reader = response.body_mut().as_reader();
        let mut chunk = vec![0; CHUNK];
        loop {
            let read = match reader.read(&mut chunk) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Broken::Connection(error)),
            };
            if read as u64 > part.size - part.received {
                return Err(protocol("it sends more bytes than it announced"));
            }
            part.append(&chunk[..read]).map_err(Broken::For)?;
            report(part.received);
        }
        if part.received < part.size {
            return Err(Broken::Connection(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(())
    }
}

/// A blob while it comes.
struct Part {
    path: std::path::PathBuf,
    file: File,
    size: u64,
    received: u64,
    /// The hash so far, for contents that are named by theirs.
    hash: Option<(Context, String)>,
}

impl Part {
    /// Opens what is there already, or begins.
    fn open(path: &Path, size: u64, etag: &str) -> Result<Self, HubError> {
        let file = File::options().read(true).append(true).create(true).open(path).map_err(disk(path))?;
        let is_sha256 = etag.len() == 64 && etag.bytes().all(|byte| byte.is_ascii_hexdigit());
        let hash = is_sha256.then(|| (Context::new(&SHA256), etag.to_ascii_lowercase()));
        let mut part = Self { path: path.into(), file, size, received: 0, hash };
        let present = part.file.metadata().map_err(disk(path))?.len();
        if present > size {
            part.restart()?;
            return Ok(part);
        }
        part.received = present;
        if let Some((context, _)) = &mut part.hash {
            let mut chunk = vec![0; CHUNK];
            loop {
                match part.file.read(&mut chunk) {
                    Ok(0) => break,
                    Ok(read) => context.update(&chunk[..read]),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(disk(path)(error)),
                }
            }
        }
        Ok(part)
    }

    fn restart(&mut self) -> Result<(), HubError> {
        self.file.set_len(0).map_err(disk(&self.path))?;
        self.received = 0;
        if let Some((context, _)) = &mut self.hash {
            *context = Context::new(&SHA256);
        }
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), HubError> {
        self.file.write_all(bytes).map_err(disk(&self.path))?;
        self.received += bytes.len() as u64;
        if let Some((context, _)) = &mut self.hash {
            context.update(bytes);
        }
        Ok(())
    }

    /// Checks the whole and gives it its name.
    fn finish(self, file: &str, incomplete: &Path, blob: &Path) -> Result<(), HubError> {
        if let Some((context, expected)) = self.hash {
            let actual: String = context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
            if actual != expected {
                fs::remove_file(incomplete).map_err(disk(incomplete))?;
                return Err(HubError::Corrupt { file: file.into() });
            }
        }
        self.file.sync_all().map_err(disk(incomplete))?;
        fs::rename(incomplete, blob).map_err(disk(blob))
    }
}
