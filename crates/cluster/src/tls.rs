//! TLS 1.3 with pinned public keys: both sides show a self-signed certificate, and only the hash of its key decides.
//!
//! There is no certificate authority, no expiry and no look at names, so nothing here depends on a clock. What the
//! handshake does prove, by its signature, is that the other side holds the private key. Sessions are never resumed:
//! a resumed session would skip the check of a key that may have been withdrawn since.

use crate::admission::Admission;
use crate::identity::{Identity, pin_of_certificate};
use crate::pin::KeyPin;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::ring::{cipher_suite, default_provider};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, ServerConfig,
    SignatureScheme, version,
};
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// gRPC speaks HTTP/2.
pub(crate) const ALPN_LINK: &[u8] = b"h2";
/// Pairing, while an invite is open.
pub(crate) const ALPN_PAIRING: &[u8] = b"mlxnode-pair/1";

/// Which key must answer on the other side of a link.
#[derive(Clone)]
pub enum ExpectedKey {
    /// This one.
    Pin(KeyPin),
    /// Any that this admits, whatever its role.
    AnyOf(Arc<dyn Admission>),
    /// Any at all. Only for pairing by code, where the exchange itself proves who it is.
    #[doc(hidden)]
    Unproven,
}

impl ExpectedKey {
    fn accepts(&self, pin: &KeyPin) -> bool {
        match self {
            Self::Pin(expected) => expected == pin,
            Self::AnyOf(admission) => admission.admit(pin).is_some(),
            Self::Unproven => true,
        }
    }
}

impl fmt::Debug for ExpectedKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pin(pin) => out.debug_tuple("Pin").field(pin).finish(),
            Self::AnyOf(_) => out.write_str("AnyOf"),
            Self::Unproven => out.write_str("Unproven"),
        }
    }
}

/// The key that answered last, expected or not: for the error message.
#[derive(Clone, Debug, Default)]
pub(crate) struct FoundKey(Arc<Mutex<Option<KeyPin>>>);

impl FoundKey {
    pub(crate) fn get(&self) -> Option<KeyPin> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, pin: KeyPin) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(pin);
    }
}

/// The side that listens: `admits` says which keys come in, `alpn` what is spoken.
pub(crate) fn server_config(
    identity: &Identity,
    admits: Option<Arc<dyn Admission>>,
    alpn: &[u8],
) -> Result<Arc<ServerConfig>, Error> {
    let provider = provider();
    let verifier = Arc::new(ClientKey { admits, algorithms: provider.signature_verification_algorithms });
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![identity.certificate().clone()], identity.private_key())?;
    config.alpn_protocols = vec![alpn.to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    Ok(Arc::new(config))
}

/// The side that dials. The second value holds the key that answered, also when it was not the expected one.
pub(crate) fn client_config(
    identity: &Identity,
    expected: ExpectedKey,
    alpn: &[u8],
) -> Result<(Arc<ClientConfig>, FoundKey), Error> {
    let provider = provider();
    let found = FoundKey::default();
    let verifier = Arc::new(ServerKey {
        expected,
        found: found.clone(),
        algorithms: provider.signature_verification_algorithms,
    });
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(vec![identity.certificate().clone()], identity.private_key())?;
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_sni = false;
    Ok((Arc::new(config), found))
}

/// The key with which the other side of a finished handshake proved itself.
pub(crate) fn peer_pin(certificates: Option<&[CertificateDer<'_>]>) -> Option<KeyPin> {
    pin_of_certificate(certificates?.first()?).ok()
}

fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    let make = || {
        // AES-128 first: Apple silicon and every recent x86 have it in hardware, and 128 bits are what P-256 gives.
        let cipher_suites = vec![
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ];
        Arc::new(CryptoProvider { cipher_suites, ..default_provider() })
    };
    PROVIDER.get_or_init(make).clone()
}

fn refused() -> Error {
    Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)
}

fn no_tls12<T>() -> Result<T, Error> {
    Err(Error::General("TLS 1.2 is not spoken here".into()))
}

struct ClientKey {
    /// `None` lets every key through: the pairing exchange proves who it is.
    admits: Option<Arc<dyn Admission>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl fmt::Debug for ClientKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("ClientKey")
    }
}

impl ClientCertVerifier for ClientKey {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let pin = pin_of_certificate(certificate)?;
        match &self.admits {
            Some(admission) if admission.admit(&pin).is_none() => Err(refused()),
            _ => Ok(ClientCertVerified::assertion()),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}

struct ServerKey {
    expected: ExpectedKey,
    found: FoundKey,
    algorithms: WebPkiSupportedAlgorithms,
}

impl fmt::Debug for ServerKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "ServerKey({:?})", self.expected)
    }
}

impl ServerCertVerifier for ServerKey {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let pin = pin_of_certificate(certificate)?;
        self.found.note(pin);
        if self.expected.accepts(&pin) { Ok(ServerCertVerified::assertion()) } else { Err(refused()) }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}
