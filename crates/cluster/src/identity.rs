//! The key that makes a process itself, and the self-signed certificate that carries it into TLS.
//!
//! ECDSA P-256, because the Secure Enclave of a Mac holds only these and because gRPC clients built on BoringSSL (Python's,
//! for one) verify them, which they do not do with Ed25519. Of the certificate only the public key counts: peers look at
//! its hash and never at names or dates. The certificate is kept beside the key, so that a client which trusts the
//! certificate itself goes on doing so after a restart.

use crate::key_file::{self, KeyError};
use crate::pin::{KeyPin, NodeId};
use rcgen::{
    CertificateParams, DistinguishedName, DnType, IsCa, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::ParsedCertificate;
use std::fmt;
use std::io;
use std::path::Path;
use zeroize::Zeroizing;

/// The DNS name in every certificate, for clients that insist on one. It says nothing about who the owner is.
pub const CERTIFICATE_NAME: &str = "mlxnode.local";

const KEY_FILE: &str = "node.key";
const CERTIFICATE_FILE: &str = "node.crt";

/// A private key with its certificate. The key is wiped from memory when this is dropped.
pub struct Identity {
    key: Zeroizing<Vec<u8>>,
    certificate: CertificateDer<'static>,
    pin: KeyPin,
}

impl Identity {
    /// A new identity in memory, for a worker or a test.
    ///
    /// # Errors
    /// When the system has no random numbers.
    pub fn generate() -> Result<Self, KeyError> {
        Self::from_key(key_file::generate()?)
    }

    /// The identity kept in `directory` (`node.key`, mode 0600, and `node.crt`), made now if there is none.
    ///
    /// # Errors
    /// When the file cannot be read or written, is no key, or can be read by others.
    pub fn load_or_create(directory: &Path) -> Result<Self, KeyError> {
        let key = key_file::load_or_create(&directory.join(KEY_FILE))?;
        let mut identity = Self::from_key(key)?;
        let path = directory.join(CERTIFICATE_FILE);
        let failed = |action| {
            let path = path.clone();
            move |source| KeyError::File { action, path, source }
        };
        // A certificate of another key (a restored backup, say) is worth nothing: the key decides.
        for _ in 0..2 {
            match std::fs::read(&path) {
                Ok(pem) => match certificate_of_key(&pem, &identity.pin) {
                    Some(certificate) => {
                        identity.certificate = certificate;
                        break;
                    }
                    None => std::fs::remove_file(&path).map_err(failed("replace"))?,
                },
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed("read")(error)),
            }
            key_file::create(&path, identity.certificate_pem().as_bytes(), 0o644)?;
        }
        Ok(identity)
    }

    /// The identity in `directory` if there is one; unlike [`Identity::load_or_create`] this makes nothing.
    ///
    /// # Errors
    /// As [`Identity::load_or_create`].
    pub fn load(directory: &Path) -> Result<Option<Self>, KeyError> {
        match key_file::load(&directory.join(KEY_FILE))? {
            Some(_) => Self::load_or_create(directory).map(Some),
            None => Ok(None),
        }
    }

    fn from_key(key: Zeroizing<Vec<u8>>) -> Result<Self, KeyError> {
        let crypto = |error: rcgen::Error| KeyError::Crypto(error.to_string());
        let pkcs8 = PrivatePkcs8KeyDer::from(key.as_slice());
        let pair = KeyPair::from_pkcs8_der_and_sign_algo(&pkcs8, &PKCS_ECDSA_P256_SHA256).map_err(crypto)?;
        let mut params = CertificateParams::new(vec![CERTIFICATE_NAME.to_owned()]).map_err(crypto)?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, CERTIFICATE_NAME);
        params.is_ca = IsCa::ExplicitNoCa;
        let certificate = params.self_signed(&pair).map_err(crypto)?.der().clone();
        let pin = KeyPin::of_public_key(&pair.subject_public_key_info());
        Ok(Self { key, certificate, pin })
    }

    /// The id of the node that this is.
    pub fn id(&self) -> NodeId {
        self.pin.node_id()
    }

    /// The hash of the public key, to which the other side pins its links.
    pub fn key_pin(&self) -> KeyPin {
        self.pin
    }

    /// The self-signed certificate, DER.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The self-signed certificate, PEM: for clients that take it as their root.
    pub fn certificate_pem(&self) -> String {
        let body = data_encoding::BASE64.encode(&self.certificate);
        let mut text = String::from("-----BEGIN CERTIFICATE-----\n");
        for start in (0..body.len()).step_by(64) {
            text.push_str(&body[start..body.len().min(start + 64)]);
            text.push('\n');
        }
        text.push_str("-----END CERTIFICATE-----\n");
        text
    }

    /// The private key for the TLS library.
    pub(crate) fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.to_vec()))
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Identity").field("pin", &self.pin).finish_non_exhaustive()
    }
}

/// The pin of the key in a certificate.
///
/// # Errors
/// When the bytes are not an X.509 certificate.
pub(crate) fn pin_of_certificate(certificate: &CertificateDer<'_>) -> Result<KeyPin, rustls::Error> {
    let parsed = ParsedCertificate::try_from(certificate)?;
    Ok(KeyPin::of_public_key(&parsed.subject_public_key_info()))
}

fn certificate_of_key(pem: &[u8], pin: &KeyPin) -> Option<CertificateDer<'static>> {
    let text = std::str::from_utf8(pem).ok()?.trim();
    let body = text.strip_prefix("-----BEGIN CERTIFICATE-----")?.strip_suffix("-----END CERTIFICATE-----")?;
    let body: String = body.split_whitespace().collect();
    let certificate = CertificateDer::from(data_encoding::BASE64.decode(body.as_bytes()).ok()?);
    (pin_of_certificate(&certificate).ok()? == *pin).then_some(certificate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_stays_the_same_over_restarts() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Identity::load(folder.path()).unwrap().is_none());
        let first = Identity::load_or_create(folder.path()).unwrap();
        let second = Identity::load(folder.path()).unwrap().unwrap();
        assert_eq!(first.id(), second.id());
        assert_eq!(first.certificate(), second.certificate());
        assert_eq!(pin_of_certificate(first.certificate()).unwrap(), first.key_pin());
        assert_ne!(Identity::generate().unwrap().id(), first.id());
    }

    #[test]
    fn a_foreign_certificate_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let first = Identity::load_or_create(folder.path()).unwrap();
        let path = folder.path().join(CERTIFICATE_FILE);
        std::fs::write(&path, Identity::generate().unwrap().certificate_pem()).unwrap();
        let second = Identity::load_or_create(folder.path()).unwrap();
        assert_eq!(pin_of_certificate(second.certificate()).unwrap(), first.key_pin());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), second.certificate_pem());
    }

    #[test]
    fn the_private_key_does_not_show_in_debug_output() {
        let identity = Identity::generate().unwrap();
        assert!(format!("{identity:?}").len() < 60);
    }
}
