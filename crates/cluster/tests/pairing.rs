//! Joining by invite: who gets in, and who does not.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)] // clippy.toml exempts #[test] functions, not their helpers

mod support;

use mlxnode_cluster::{
    Admit, ClusterKey, Identity, Invite, InviteSecret, Inviter, JoinError, JoinRequest, Joined, NodeFacts,
    Refusal, Roster, RosterEntry, ServeOptions, SignedRoster, join,
};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use support::{Listener, eventually, listen_as};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// A coordinator in a box.
struct Registrar {
    key: ClusterKey,
    roster: Mutex<Roster>,
    refuses: Mutex<Option<Refusal>>,
}

#[tonic::async_trait]
impl Admit for Registrar {
    async fn admit(&self, joiner: JoinRequest) -> Result<SignedRoster, Refusal> {
        if let Some(refusal) = self.refuses.lock().unwrap().clone() {
            return Err(refusal);
        }
        let mut roster = self.roster.lock().unwrap();
        roster
            .admit(joiner.node_id, &joiner.facts.name, joiner.facts.addresses)
            .map_err(|error| Refusal::Member(error.to_string()))?;
        Ok(self.key.sign(roster.clone()).unwrap())
    }
}

struct Member {
    inviter: Arc<Inviter>,
    registrar: Arc<Registrar>,
    listener: Listener,
}

impl Member {
    async fn new() -> Self {
        let identity = Arc::new(Identity::generate().unwrap());
        let key = ClusterKey::generate().unwrap();
        let founder = RosterEntry { node_id: identity.id(), name: "studio".into(), addresses: vec![] };
        let roster = Mutex::new(Roster::found(&key, "desk", founder));
        let registrar = Arc::new(Registrar { key, roster, refuses: Mutex::default() });
        let inviter = Arc::new(Inviter::new(identity.clone(), registrar.clone()));
        let options = ServeOptions { pairing: Some(inviter.clone()), ..ServeOptions::default() };
        let listener = listen_as(identity, Arc::default(), options).await;
        Self { inviter, registrar, listener }
    }

    fn address(&self) -> String {
        self.listener.address.to_string()
    }

    fn invite(&self) -> Invite {
        self.inviter.open(self.registrar.key.cluster(), &[self.address()])
    }

    fn members(&self) -> usize {
        self.registrar.roster.lock().unwrap().nodes().len()
    }
}

async fn join_with(secret: &str, targets: &[String], identity: &Identity) -> Result<Joined, JoinError> {
    let facts =
        NodeFacts { name: "studio".into(), addresses: vec!["10.0.0.2:7070".into()], ..Default::default() };
    join(targets, &secret.parse::<InviteSecret>().unwrap(), identity, &facts).await
}

fn refusal(outcome: Result<Joined, JoinError>) -> Refusal {
    match outcome {
        Err(JoinError::Refused { refusal, .. }) => refusal,
        other => panic!("expected a refusal, not {other:?}"),
    }
}

#[tokio::test]
async fn a_node_joins_with_the_code_as_people_type_it() {
    let member = Member::new().await;
    let invite = member.invite();
    let joiner = Identity::generate().unwrap();
    let typed = invite.code.reveal().to_lowercase().replace('-', " ");
    let joined = join_with(&typed, &[member.address()], &joiner).await.unwrap();
    assert_eq!(joined.inviter, member.listener.identity.id());
    assert_eq!(joined.roster.roster().get(&joiner.id()).unwrap().name, "studio-2");
    assert!(!member.inviter.is_open(), "one use");
    let again = join_with(&typed, &[member.address()], &Identity::generate().unwrap()).await;
    assert_eq!(refusal(again), Refusal::Closed);
}

#[tokio::test]
async fn a_node_joins_with_the_token_alone_and_a_replay_is_refused() {
    let member = Member::new().await;
    let mut announced = member.inviter.open_until();
    let token = member.invite().token.reveal();
    assert!(announced.borrow_and_update().is_some());
    let joined = join_with(&token, &[], &Identity::generate().unwrap()).await.unwrap();
    assert_eq!(joined.roster.roster().cluster(), member.registrar.key.cluster());
    announced.changed().await.unwrap();
    assert!(announced.borrow().is_none());

    let stranger = Identity::generate().unwrap();
    assert_eq!(refusal(join_with(&token, &[], &stranger).await), Refusal::Closed);
    member.invite(); // a new invite does not revive the old token
    assert_eq!(refusal(join_with(&token, &[], &stranger).await), Refusal::Used);
    assert_eq!(member.members(), 2);
}

#[tokio::test]
async fn five_wrong_codes_close_the_window() {
    let member = Member::new().await;
    let invite = member.invite();
    let right = invite.code.reveal();
    let wrong =
        if right.starts_with('0') { right.replacen('0', "1", 1) } else { format!("0{}", &right[1..]) };
    let joiner = Identity::generate().unwrap();
    for attempt in 1..=5 {
        assert!(member.inviter.is_open(), "attempt {attempt}");
        let outcome = join_with(&wrong, &[member.address()], &joiner).await;
        assert!(matches!(outcome, Err(JoinError::Unproven { .. })), "{outcome:?}");
        // The joiner broke off, so the member needs a moment to see that.
        eventually("the try is counted", async || attempt < 5 || !member.inviter.is_open()).await;
    }
    assert_eq!(refusal(join_with(&right, &[member.address()], &joiner).await), Refusal::Closed);
    assert_eq!(refusal(join_with(&invite.token.reveal(), &[], &joiner).await), Refusal::Closed);
    assert_eq!(member.members(), 1);
}

#[tokio::test]
async fn an_invite_runs_out() {
    let member = Member::new().await;
    let cluster = member.registrar.key.cluster();
    let invite = member.inviter.open_for(cluster, &[member.address()], Duration::ZERO);
    let joiner = Identity::generate().unwrap();
    assert_eq!(
        refusal(join_with(&invite.code.reveal(), &[member.address()], &joiner).await),
        Refusal::Closed
    );
}

#[tokio::test]
async fn the_coordinators_refusal_reaches_the_person_and_costs_no_try() {
    let member = Member::new().await;
    let invite = member.invite();
    let joiner = Identity::generate().unwrap();
    for _ in 0..7 {
        *member.registrar.refuses.lock().unwrap() = Some(Refusal::Failed("the coordinator is away".into()));
        let outcome = join_with(&invite.code.reveal(), &[member.address()], &joiner).await;
        assert_eq!(refusal(outcome), Refusal::Failed("the coordinator is away".into()));
    }
    *member.registrar.refuses.lock().unwrap() = None;
    join_with(&invite.code.reveal(), &[member.address()], &joiner).await.unwrap();
    let twice = refusal(join_with(&member.invite().token.reveal(), &[], &joiner).await);
    assert!(matches!(twice, Refusal::Member(ref text) if text.contains("member already")), "{twice}");
}

#[tokio::test]
async fn a_token_is_shown_to_no_other_key() {
    let (member, other) = (Member::new().await, Member::new().await);
    other.invite();
    let token = member.invite().token.reveal();
    member.listener.shutdown.cancel();
    let InviteSecret::Token(mut secret) = token.parse().unwrap() else { panic!("a token") };
    secret.addresses.clear();
    let joiner = Identity::generate().unwrap();
    let outcome =
        join(&[other.address()], &InviteSecret::Token(secret), &joiner, &NodeFacts::default()).await;
    let Err(JoinError::Connect(error)) = outcome else { panic!("{outcome:?}") };
    assert!(matches!(error, mlxnode_cluster::ConnectError::WrongKey { .. }), "{error}");
}

#[tokio::test]
async fn the_first_target_that_takes_the_code_is_joined() {
    let (member, closed) = (Member::new().await, Member::new().await);
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let code = member.invite().code.reveal();
    let targets = [free, closed.address(), member.address()];
    let joined = join_with(&code, &targets, &Identity::generate().unwrap()).await.unwrap();
    assert_eq!(joined.address, member.address());
    let none = join_with(&code, &[], &Identity::generate().unwrap()).await;
    assert!(matches!(none, Err(JoinError::NoTarget)), "{none:?}");
}

/// A man in the middle: ends the joiner's TLS session itself, opens another one to the member, and passes every byte of
/// the conversation on. Answers how many bytes went either way.
async fn relay(to: SocketAddr) -> (SocketAddr, tokio::task::JoinHandle<(usize, usize)>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let task = tokio::spawn(async move {
        let identity = Identity::generate().unwrap();
        let (tcp, _) = listener.accept().await.unwrap();
        let from_joiner = tokio_rustls::TlsAcceptor::from(Arc::new(middle::server(&identity)));
        let (mut joiner, member) = (from_joiner.accept(tcp).await.unwrap(), middle::client(to).await);
        let mut member = member;
        let (mut up, mut down) = (0, 0);
        let (mut first, mut second) = (vec![0; 4096], vec![0; 4096]);
        loop {
            tokio::select! {
                count = joiner.read(&mut first) => match count {
                    Ok(count) if count > 0 => {
                        up += count;
                        member.write_all(&first[..count]).await.unwrap();
                    }
                    _ => break,
                },
                count = member.read(&mut second) => match count {
                    Ok(count) if count > 0 => {
                        down += count;
                        joiner.write_all(&second[..count]).await.unwrap();
                    }
                    _ => break,
                },
            }
        }
        (up, down)
    });
    (address, task)
}

mod middle {
    use super::*;
    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
    use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
    use rustls::{DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};

    #[derive(Debug)]
    struct Anybody;

    type Verified = Result<HandshakeSignatureValid, Error>;

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
        ) -> Verified {
            Ok(HandshakeSignatureValid::assertion())
        }
        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Verified {
            Ok(HandshakeSignatureValid::assertion())
        }
        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ECDSA_NISTP256_SHA256]
        }
    }

    impl ClientCertVerifier for Anybody {
        fn root_hint_subjects(&self) -> &[DistinguishedName] {
            &[]
        }
        fn verify_client_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: UnixTime,
        ) -> Result<ClientCertVerified, Error> {
            Ok(ClientCertVerified::assertion())
        }
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Verified {
            Ok(HandshakeSignatureValid::assertion())
        }
        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Verified {
            Ok(HandshakeSignatureValid::assertion())
        }
        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ECDSA_NISTP256_SHA256]
        }
    }

    fn own() -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let certificate = rcgen::CertificateParams::new(vec!["x".into()]).unwrap().self_signed(&key).unwrap();
        (vec![certificate.der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))
    }

    pub(super) fn server(_: &Identity) -> rustls::ServerConfig {
        let (certificates, key) = own();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(Arc::new(Anybody))
            .with_single_cert(certificates, key)
            .unwrap();
        config.alpn_protocols = vec![b"mlxnode-pair/1".to_vec()];
        config
    }

    pub(super) async fn client(to: SocketAddr) -> tokio_rustls::client::TlsStream<tokio::net::TcpStream> {
        let (certificates, key) = own();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anybody))
            .with_client_auth_cert(certificates, key)
            .unwrap();
        config.alpn_protocols = vec![b"mlxnode-pair/1".to_vec()];
        let tcp = tokio::net::TcpStream::connect(to).await.unwrap();
        let name = ServerName::try_from("x").unwrap();
        tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, tcp).await.unwrap()
    }
}

#[tokio::test]
async fn a_relay_between_two_tls_sessions_is_found_out() {
    let member = Member::new().await;
    let code = member.invite().code.reveal();
    let (address, relay) = relay(member.listener.address).await;
    let outcome = join_with(&code, &[address.to_string()], &Identity::generate().unwrap()).await;
    assert!(matches!(outcome, Err(JoinError::Unproven { .. })), "{outcome:?}");
    let (up, down) = relay.await.unwrap();
    assert!(up > 30 && down > 30, "the relay did pass the conversation on: {up} up, {down} down");
    assert_eq!(member.members(), 1);
    // The person tries again without the man in the middle.
    join_with(&code, &[member.address()], &Identity::generate().unwrap()).await.unwrap();
}

/// Says something else than a joiner would.
async fn babble(member: &Member, bytes: &[u8]) {
    let mut stream = middle::client(member.listener.address).await;
    let _ = stream.write_all(bytes).await;
    let _ = stream.shutdown().await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
}

#[tokio::test]
async fn nonsense_costs_the_stranger_its_connection_and_nothing_else() {
    let member = Member::new().await;
    let invite = member.invite();
    for bytes in [b"".as_slice(), b"\0\0", b"\xff\xff\xff\xff", b"\0\0\0\x04\xff\xff\xff\xff", &[0, 0, 0, 0]]
    {
        babble(&member, bytes).await;
    }
    assert!(member.inviter.is_open());
    join_with(&invite.code.reveal(), &[member.address()], &Identity::generate().unwrap()).await.unwrap();
}

#[tokio::test]
async fn another_protocol_version_is_named() {
    use mlxnode_proto::internal::v1 as proto;
    use prost::Message;
    let member = Member::new().await;
    member.invite();
    let hello = proto::PairingHello { protocol_version: 999, version: "9.9.9".into(), ..Default::default() };
    let hello = hello.encode_to_vec();
    let mut stream = middle::client(member.listener.address).await;
    stream.write_all(&(hello.len() as u32).to_be_bytes()).await.unwrap();
    stream.write_all(&hello).await.unwrap();
    let length = stream.read_u32().await.unwrap();
    let mut answer = vec![0; length as usize];
    stream.read_exact(&mut answer).await.unwrap();
    let answer = proto::PairingChallenge::decode(answer.as_slice()).unwrap().answer.unwrap();
    let proto::pairing_challenge::Answer::Refusal(refusal) = answer else { panic!("a refusal") };
    assert_eq!(refusal.reason(), proto::pairing_refusal::Reason::ProtocolVersion);
    assert!(refusal.text.contains("999") && refusal.text.contains("9.9.9"), "{}", refusal.text);
    assert!(member.inviter.is_open());
}
