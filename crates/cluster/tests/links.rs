//! A listener talks to the keys it knows, and to nobody else.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)] // clippy.toml exempts #[test] functions, not their helpers

mod support;

use futures::StreamExt;
use mlxnode_cluster::{
    AccessList, ConnectError, ConnectOptions, ExpectedKey, Identity, KeyPin, Role, ServeOptions, connect,
    dial,
};
use mlxnode_proto::internal::v1 as proto;
use proto::peer_client::PeerClient;
use rcgen::PublicKeyData;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::{Listener, eventually, listen};

const TLS_ALERT: u8 = 21;

fn options() -> ConnectOptions {
    ConnectOptions::default()
}

async fn connected(listener: &Listener, identity: &Identity) -> PeerClient<tonic::transport::Channel> {
    let expected = ExpectedKey::Pin(listener.identity.key_pin());
    let channel = connect(&listener.address.to_string(), identity, expected, options()).await.unwrap();
    PeerClient::new(channel)
}

#[tokio::test]
async fn an_admitted_key_is_served_and_known_by_name() {
    let listener = listen(ServeOptions::default()).await;
    let client = Identity::generate().unwrap();
    listener.access.allow(client.key_pin(), Role::Node);
    let mut peer = connected(&listener, &client).await;
    let question = proto::CanReachRequest { node_id: client.id().as_bytes().to_vec().into() };
    assert!(peer.can_reach(question).await.unwrap().into_inner().reachable);

    let any_of = ExpectedKey::AnyOf(Arc::new(AccessList::new([(listener.identity.key_pin(), Role::Node)])));
    let link = dial(&listener.address.to_string(), &client, any_of, options()).await.unwrap();
    assert_eq!(link.pin, listener.identity.key_pin());
}

#[tokio::test]
async fn wrong_ends_are_told_apart() {
    let listener = listen(ServeOptions::default()).await;
    let address = listener.address.to_string();
    let (member, stranger) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    listener.access.allow(member.key_pin(), Role::Node);
    let pin = listener.identity.key_pin();

    let rejected = connect(&address, &stranger, ExpectedKey::Pin(pin), options()).await.unwrap_err();
    assert!(
        matches!(rejected, ConnectError::Rejected { ref alert, .. } if alert == "AccessDenied"),
        "{rejected}"
    );

    let wrong =
        connect(&address, &member, ExpectedKey::Pin(stranger.key_pin()), options()).await.unwrap_err();
    assert!(matches!(wrong, ConnectError::WrongKey { found, .. } if found == pin), "{wrong}");

    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let refused = connect(&free, &member, ExpectedKey::Pin(pin), options()).await.unwrap_err();
    assert!(refused.is_refused(), "{refused}");

    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let short = ConnectOptions { timeout: Duration::from_millis(100), ..options() };
    let address = silent.local_addr().unwrap().to_string();
    let late = connect(&address, &member, ExpectedKey::Pin(pin), short).await.unwrap_err();
    assert!(matches!(late, ConnectError::TimedOut { .. }), "{late}");

    let nowhere = connect("no-port", &member, ExpectedKey::Pin(pin), options()).await.unwrap_err();
    assert!(matches!(nowhere, ConnectError::Address { .. }), "{nowhere}");

    let talker = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = talker.local_addr().unwrap().to_string();
    let speaks =
        std::thread::spawn(move || talker.accept().unwrap().0.write_all(b"HTTP/1.1 400 No\r\n\r\n").unwrap());
    let other = connect(&address, &member, ExpectedKey::Pin(pin), options()).await.unwrap_err();
    assert!(matches!(other, ConnectError::Protocol { .. }), "{other}");
    speaks.join().unwrap();
}

/// What a listener answers to raw bytes, as TLS record types; at the end of the conversation.
fn answers_to(address: std::net::SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    socket.write_all(bytes).unwrap();
    let _ = socket.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    let _ = socket.read_to_end(&mut answer);
    let (mut kinds, mut rest) = (Vec::new(), answer.as_slice());
    while let [kind, _, _, high, low, ..] = rest {
        kinds.push(*kind);
        rest = rest.get(5 + usize::from(u16::from_be_bytes([*high, *low]))..).expect("whole records");
    }
    assert!(rest.is_empty(), "only TLS records come out of the port, not {rest:?}");
    kinds
}

#[tokio::test]
async fn plain_bytes_get_an_alert_or_nothing() {
    let listener = listen(ServeOptions::default()).await;
    let address = listener.address;
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".as_slice();
    for bytes in
        [preface, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\0", b"", &[0xff; 4096], b"\x16\x03\x01\xff\xff"]
    {
        let kinds = tokio::task::spawn_blocking({
            let bytes = bytes.to_vec();
            move || answers_to(address, &bytes)
        });
        let kinds = kinds.await.unwrap();
        assert!(kinds.iter().all(|kind| *kind == TLS_ALERT) && kinds.len() <= 1, "{bytes:?}: {kinds:?}");
    }
}

/// A TLS 1.3 client made of rustls alone, which notes every record type that it is sent.
fn tls_conversation(
    address: std::net::SocketAddr,
    identity: Option<&Identity>,
    alpn: &[&[u8]],
) -> (Vec<u8>, String) {
    conversation(address, stranger::config(identity), alpn)
}

fn conversation(
    address: std::net::SocketAddr,
    mut config: rustls::ClientConfig,
    alpn: &[&[u8]],
) -> (Vec<u8>, String) {
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let name = rustls::pki_types::ServerName::try_from("mlxnode.local").unwrap();
    let mut session = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    session.writer().write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").unwrap();
    let (mut plain, mut ended) = (Vec::new(), String::new());
    loop {
        while session.wants_write() {
            if session.write_tls(&mut socket).is_err() {
                break;
            }
        }
        match session.read_tls(&mut socket) {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
        let outcome = session.process_new_packets();
        let mut buffer = [0; 1024];
        while let Ok(count) = session.reader().read(&mut buffer) {
            if count == 0 {
                break;
            }
            plain.extend_from_slice(&buffer[..count]);
        }
        // The server's first words are enough: an admitted client would wait for more.
        if !plain.is_empty() {
            break;
        }
        if let Err(error) = outcome {
            ended = format!("{error:?}");
            break;
        }
    }
    (plain, ended)
}

mod stranger {
    use super::*;
    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
    use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme};

    #[derive(Debug)]
    struct Anybody;

    impl ServerCertVerifier for Anybody {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }
        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }
        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ECDSA_NISTP256_SHA256]
        }
    }

    /// Shows the certificate of `identity`, if any, signed with a random key of its own.
    pub(super) fn config(identity: Option<&Identity>) -> ClientConfig {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anybody));
        let Some(identity) = identity else { return builder.with_no_client_auth() };
        let random = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let key = PrivateKeyDer::Pkcs8(random.serialize_der().into());
        let key = rustls::crypto::ring::sign::any_supported_type(&key).unwrap();
        // rustls itself would refuse a certificate that is not the key's.
        let certified = rustls::sign::CertifiedKey::new(vec![identity.certificate().clone()], key);
        builder.with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(certified)))
    }
}

#[tokio::test]
async fn an_unknown_client_gets_an_alert_and_not_one_application_byte() {
    let listener = listen(ServeOptions::default()).await;
    let member = Arc::new(Identity::generate().unwrap());
    listener.access.allow(member.key_pin(), Role::Node);
    let address = listener.address;
    type Case = (&'static str, Option<Arc<Identity>>, &'static [&'static [u8]], &'static str);
    let cases: [Case; 5] = [
        ("no certificate", None, &[b"h2"], "CertificateRequired"),
        (
            "a key that is not in the list",
            Some(Arc::new(Identity::generate().unwrap())),
            &[b"h2"],
            "AccessDenied",
        ),
        ("a member's certificate without its key", Some(member.clone()), &[b"h2"], "DecryptError"),
        ("another protocol", None, &[b"http/1.1"], "NoApplicationProtocol"),
        ("pairing while no invite is open", None, &[b"mlxnode-pair/1"], "NoApplicationProtocol"),
    ];
    for (what, identity, alpn, alert) in cases {
        let talk = tokio::task::spawn_blocking(move || tls_conversation(address, identity.as_deref(), alpn));
        let (plain, ended) = talk.await.unwrap();
        assert!(plain.is_empty(), "{what}: got {plain:?}");
        assert_eq!(ended, format!("AlertReceived({alert})"), "{what}");
    }
}

/// Names and dates in a certificate count for nothing, so a clock that is wrong by decades keeps nobody out.
#[tokio::test]
async fn an_expired_certificate_of_an_admitted_key_is_good() {
    let listener = listen(ServeOptions::default()).await;
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let mut params = rcgen::CertificateParams::new(vec!["somebody.example".into()]).unwrap();
    params.not_after = rcgen::date_time_ymd(1999, 12, 31);
    let certificate = params.self_signed(&key).unwrap();
    listener.access.allow(KeyPin::of_public_key(&key.subject_public_key_info()), Role::Node);
    let certified = rustls::sign::CertifiedKey::new(
        vec![certificate.der().clone()],
        rustls::crypto::ring::sign::any_supported_type(&rustls::pki_types::PrivateKeyDer::Pkcs8(
            key.serialize_der().into(),
        ))
        .unwrap(),
    );
    let mut config = stranger::config(None);
    config.client_auth_cert_resolver = Arc::new(rustls::sign::SingleCertAndKey::from(certified));
    let address = listener.address;
    let talk = tokio::task::spawn_blocking(move || conversation(address, config, &[b"h2"]));
    let (plain, _) = talk.await.unwrap();
    assert_eq!(plain.get(3), Some(&4), "HTTP/2 settings, not {plain:?}");
}

#[tokio::test]
async fn a_withdrawn_key_loses_its_connections_within_a_second() {
    let listener = listen(ServeOptions::default()).await;
    let (withdrawn, member) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    listener.access.allow(withdrawn.key_pin(), Role::Node);
    listener.access.allow(member.key_pin(), Role::Node);
    let (mut first, mut second) =
        (connected(&listener, &withdrawn).await, connected(&listener, &member).await);
    let mut idle = first.heartbeat(futures::stream::pending()).await.unwrap().into_inner();
    second.can_reach(proto::CanReachRequest::default()).await.unwrap();

    listener.access.withdraw(&withdrawn.key_pin());
    let started = Instant::now();
    let ended = idle.next().await.expect("the stream ends with an error");
    assert!(ended.is_err() && started.elapsed() < Duration::from_secs(1), "after {:?}", started.elapsed());
    assert!(first.can_reach(proto::CanReachRequest::default()).await.is_err(), "and it cannot come back");
    second.can_reach(proto::CanReachRequest::default()).await.expect("others stay");
}

#[tokio::test]
async fn a_link_can_be_ended_on_the_side_that_dialled() {
    let listener = listen(ServeOptions::default()).await;
    let client = Identity::generate().unwrap();
    listener.access.allow(client.key_pin(), Role::Node);
    let options = options();
    let expected = ExpectedKey::Pin(listener.identity.key_pin());
    let channel = connect(&listener.address.to_string(), &client, expected, options.clone()).await.unwrap();
    let mut peer = PeerClient::new(channel);
    let mut idle = peer.heartbeat(futures::stream::pending()).await.unwrap().into_inner();
    options.end.cancel();
    assert!(idle.next().await.unwrap().is_err());
    assert!(peer.can_reach(proto::CanReachRequest::default()).await.is_err(), "it does not dial again");
}

#[tokio::test]
async fn slow_handshakes_end_and_do_not_keep_others_out() {
    let limits = ServeOptions {
        handshake_timeout: Duration::from_millis(700),
        max_handshakes: 8,
        max_handshakes_per_address: 4,
        ..ServeOptions::default()
    };
    let listener = listen(limits).await;
    let address = listener.address;
    let (from, to) = std::sync::mpsc::sync_channel(1);
    let slow = tokio::task::spawn_blocking(move || {
        let started = Instant::now();
        let mut sockets: Vec<_> = (0..20).map(|_| TcpStream::connect(address).unwrap()).collect();
        from.send(()).unwrap();
        let mut kept = 0;
        for socket in &mut sockets {
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let ended = socket.read(&mut [0; 16]);
            assert!(
                matches!(ended, Ok(0))
                    || ended.is_err_and(|error| error.kind() != std::io::ErrorKind::WouldBlock)
            );
            kept += usize::from(started.elapsed() > Duration::from_millis(500));
        }
        (started.elapsed(), kept)
    });
    to.recv().unwrap();
    let client = Identity::generate().unwrap();
    listener.access.allow(client.key_pin(), Role::Node);
    let (took, kept) = slow.await.unwrap();
    assert!(took < Duration::from_secs(4), "all 20 are gone after {took:?}");
    assert!(kept >= 1, "some were waited for, the others closed at once");
    eventually("a member gets in", async || {
        let expected = ExpectedKey::Pin(listener.identity.key_pin());
        connect(&listener.address.to_string(), &client, expected, options()).await.is_ok()
    })
    .await;
}

#[tokio::test]
async fn shutdown_ends_the_port_and_the_calls_that_do_not_end_by_themselves() {
    let limits = ServeOptions { grace: Duration::from_millis(100), ..ServeOptions::default() };
    let mut listener = listen(limits).await;
    let client = Identity::generate().unwrap();
    listener.access.allow(client.key_pin(), Role::Node);
    let mut peer = connected(&listener, &client).await;
    let mut idle = peer.heartbeat(futures::stream::pending()).await.unwrap().into_inner();
    listener.shutdown.cancel();
    tokio::time::timeout(Duration::from_secs(3), &mut listener.task).await.expect("it ends").unwrap();
    assert!(idle.next().await.unwrap().is_err());
    let expected = ExpectedKey::Pin(listener.identity.key_pin());
    let gone = connect(&listener.address.to_string(), &client, expected, options()).await.unwrap_err();
    assert!(gone.is_refused(), "{gone}");
}

#[tokio::test]
async fn a_channel_dials_again_after_the_other_side_restarted_with_the_same_key() {
    let limits = || ServeOptions { grace: Duration::ZERO, ..ServeOptions::default() };
    let mut listener = listen(limits()).await;
    let client = Identity::generate().unwrap();
    listener.access.allow(client.key_pin(), Role::Node);
    let mut peer = connected(&listener, &client).await;
    peer.can_reach(proto::CanReachRequest::default()).await.unwrap();
    listener.shutdown.cancel();
    (&mut listener.task).await.unwrap();
    eventually("calls fail", async || peer.can_reach(proto::CanReachRequest::default()).await.is_err()).await;

    let again = tokio::net::TcpListener::bind(listener.address).await.unwrap();
    let routes = tonic::service::Routes::new(proto::peer_server::PeerServer::new(support::Echo));
    let shutdown = tokio_util::sync::CancellationToken::new();
    let serving = mlxnode_cluster::serve(
        again,
        listener.identity.clone(),
        listener.access.clone(),
        routes,
        limits(),
        shutdown.clone(),
    );
    let serving = tokio::spawn(serving);
    eventually("calls work", async || peer.can_reach(proto::CanReachRequest::default()).await.is_ok()).await;
    shutdown.cancel();
    serving.await.unwrap().unwrap();

    // Somebody else who took the port is not talked to.
    let thief = Arc::new(Identity::generate().unwrap());
    let port = tokio::net::TcpListener::bind(listener.address).await.unwrap();
    let routes = tonic::service::Routes::new(proto::peer_server::PeerServer::new(support::Echo));
    let shutdown = tokio_util::sync::CancellationToken::new();
    let access = listener.access.clone();
    let serving = mlxnode_cluster::serve(port, thief.clone(), access, routes, limits(), shutdown.clone());
    let serving = tokio::spawn(serving);
    for _ in 0..3 {
        let refused = peer.can_reach(proto::CanReachRequest::default()).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unavailable, "{refused}");
    }
    shutdown.cancel();
    serving.await.unwrap().unwrap();
}
