//! A private key in a file: made once, readable by its owner only.
//!
//! The file is P-256 in PKCS #8 PEM. Two processes that start at once in one directory agree on one key, because the file
//! appears under its name complete or not at all.

use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

const PEM_BEGIN: &str = "-----BEGIN PRIVATE KEY-----";
const PEM_END: &str = "-----END PRIVATE KEY-----";
/// A P-256 key takes 241 bytes; a file far beyond that is not one.
const MAX_FILE: u64 = 16 * 1024;

/// Why a key could not be loaded or made.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file system said no.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Others than the owner may read the key.
    #[error("others can read the private key {}: run `chmod 600 {}` if no one else had access, else delete it and pair this node again", path.display(), path.display())]
    Exposed {
        /// The key file.
        path: PathBuf,
    },
    /// Not a key that we wrote.
    #[error("{} does not hold a P-256 private key in PKCS #8 PEM: restore it, or delete it and pair this node again", path.display())]
    Malformed {
        /// The key file.
        path: PathBuf,
    },
    /// The system's random numbers or the key library failed.
    #[error("cannot make a key: {0}")]
    Crypto(String),
}

/// A new P-256 private key, PKCS #8 DER.
pub(crate) fn generate() -> Result<Zeroizing<Vec<u8>>, KeyError> {
    let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &SystemRandom::new())
        .map_err(|error| KeyError::Crypto(error.to_string()))?;
    Ok(Zeroizing::new(document.as_ref().to_vec()))
}

/// The key in `path` (PKCS #8 DER), or `None` when there is no such file.
pub(crate) fn load(path: &Path) -> Result<Option<Zeroizing<Vec<u8>>>, KeyError> {
    let failed = |action| move |source| KeyError::File { action, path: path.to_path_buf(), source };
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("read")(error)),
    };
    if metadata.mode() & 0o077 != 0 {
        return Err(KeyError::Exposed { path: path.to_path_buf() });
    }
    if metadata.len() > MAX_FILE {
        return Err(KeyError::Malformed { path: path.to_path_buf() });
    }
    let text = Zeroizing::new(fs::read_to_string(path).map_err(failed("read"))?);
    let key = from_pem(&text).ok_or_else(|| KeyError::Malformed { path: path.to_path_buf() })?;
    EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &key, &SystemRandom::new())
        .map_err(|_| KeyError::Malformed { path: path.to_path_buf() })?;
    Ok(Some(key))
}

/// The key in `path`, made now if there is none. The directory is made too, for its owner only.
pub(crate) fn load_or_create(path: &Path) -> Result<Zeroizing<Vec<u8>>, KeyError> {
    if let Some(key) = load(path)? {
        return Ok(key);
    }
    let key = generate()?;
    if create(path, to_pem(&key).as_bytes(), 0o600)? {
        return Ok(key);
    }
    // Another process was quicker: its key is the one.
    load(path)?.ok_or_else(|| KeyError::File {
        action: "read",
        path: path.to_path_buf(),
        source: io::ErrorKind::NotFound.into(),
    })
}

/// Puts a file in place, complete and synced. False when there was one already, which then stays as it was.
pub(crate) fn create(path: &Path, content: &[u8], mode: u32) -> Result<bool, KeyError> {
    let failed = |action| move |source| KeyError::File { action, path: path.to_path_buf(), source };
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(failed("make a folder for"))?;
    let temporary = path.with_extension(format!("{:016x}", rand::random::<u64>()));
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&temporary)
        .map_err(failed("write"))?;
    let written = file.write_all(content).and_then(|()| file.sync_all());
    // A link fails when the name exists, a rename would replace what is there.
    let linked = written.and_then(|()| fs::hard_link(&temporary, path));
    let removed = fs::remove_file(&temporary);
    match linked {
        Ok(()) => {
            removed.and_then(|()| fs::File::open(directory)?.sync_all()).map_err(failed("write"))?;
            Ok(true)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(failed("write")(error)),
    }
}

fn to_pem(key: &[u8]) -> Zeroizing<String> {
    let body = Zeroizing::new(data_encoding::BASE64.encode(key));
    let mut text = Zeroizing::new(format!("{PEM_BEGIN}\n"));
    for start in (0..body.len()).step_by(64) {
        text.push_str(&body[start..body.len().min(start + 64)]);
        text.push('\n');
    }
    text.push_str(PEM_END);
    text.push('\n');
    text
}

fn from_pem(text: &str) -> Option<Zeroizing<Vec<u8>>> {
    let body = text.trim().strip_prefix(PEM_BEGIN)?.strip_suffix(PEM_END)?;
    let body = Zeroizing::new(body.split_whitespace().collect::<String>());
    data_encoding::BASE64.decode(body.as_bytes()).ok().map(Zeroizing::new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_key_is_made_once_for_its_owner_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/node.key");
        let keys: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| load_or_create(&path).unwrap())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(keys.windows(2).all(|pair| pair[0] == pair[1]), "eight racing processes agree on one key");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o777, 0o700);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing else is left behind");
    }

    #[test]
    fn a_readable_or_damaged_key_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.key");
        load_or_create(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(load_or_create(&path), Err(KeyError::Exposed { .. })));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        for damaged in [&text[..text.len() / 2], "", "hello", &text.replace("PRIVATE", "PUBLIC")] {
            fs::write(&path, damaged).unwrap();
            assert!(matches!(load_or_create(&path), Err(KeyError::Malformed { .. })), "{damaged:?}");
        }
    }
}
