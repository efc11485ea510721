//! Who is let in over HTTP, and how much each may ask.
//!
//! ```text
//! request ─▶ Gate::admit(what the route needs, the presented key) ─▶ Pass ── tokens as they come ──▶ its buckets
//! ```
//!
//! [`decide`] and [`Buckets`] are plain: what is known and `now` in, a verdict out. [`Gate`] holds the keys as they are now. Without any
//! key a listener that only this machine reaches is open; everywhere else, and from the first key on, nobody is let in without one.

mod buckets;

pub use buckets::{Allowance, Balance, Buckets, Exhausted};

use crate::keys::{KeyEntry, KeyRole, KeysView, find};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// What a route needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing: it tells nothing and changes nothing.
    Open,
    /// A key that may use models.
    User,
    /// The same, to look at the cluster: not counted against what the key may ask.
    Read,
    /// A key that may fine-tune models: with its own files and jobs, or, when it administers the cluster, with all.
    Train,
    /// A key that may change what is loaded, who has keys, and all jobs.
    Admin,
    /// A key that may read figures; none where only this machine can ask.
    Metrics,
}

/// How a listener lets people in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GateOptions {
    /// Machines other than this one can reach the listener.
    pub is_public: bool,
    /// Ask for a key even where only this machine can ask, and for figures too.
    pub requires_key: bool,
}

/// Why somebody is not let in.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Denied {
    /// No key was presented.
    #[error(
        "this node asks for an API key: send `Authorization: Bearer KEY`; whoever runs the cluster makes one by `mlxnode keys create NAME`"
    )]
    NoKey,
    /// The presented key is none, or was revoked.
    #[error("the API key is not valid (any more); `mlxnode keys create NAME` makes a new one")]
    WrongKey,
    /// The key may do less.
    #[error("this API key may not do that: it has the role {has}")]
    WrongRole {
        /// Its role.
        has: &'static str,
    },
    /// The node does not know the keys yet.
    #[error("this node has not heard from the coordinator which API keys are valid; try again in a moment")]
    NotKnownYet,
    /// The key asked too much.
    #[error(transparent)]
    Exhausted(Exhausted),
}

/// What is known about who was let in.
#[derive(Clone, Debug, Default)]
pub struct Pass {
    /// The key; none where the gate is open.
    pub key: Option<Arc<KeyEntry>>,
    /// What the key may ask still.
    pub balance: Balance,
}

/// Decides by the keys alone, not by how much was asked. `Ok(None)`: let in without a key.
///
/// # Errors
/// [`Denied`], without [`Denied::Exhausted`].
pub fn decide<'a>(
    view: &'a KeysView,
    options: GateOptions,
    needs: Access,
    presented: Option<&str>,
) -> Result<Option<&'a KeyEntry>, Denied> {
    let is_ours_alone = !options.is_public && !options.requires_key;
    if needs == Access::Open || (needs == Access::Metrics && is_ours_alone) {
        return Ok(None);
    }
    if !view.is_known {
        return Err(Denied::NotKnownYet);
    }
    if view.keys.is_empty() && is_ours_alone {
        return Ok(None);
    }
    let key = find(&view.keys, presented.ok_or(Denied::NoKey)?).ok_or(Denied::WrongKey)?;
    let may = match needs {
        Access::Open => true,
        Access::User | Access::Read => matches!(key.role, KeyRole::User | KeyRole::Trainer | KeyRole::Admin),
        Access::Train => matches!(key.role, KeyRole::Trainer | KeyRole::Admin),
        Access::Metrics => matches!(key.role, KeyRole::Metrics | KeyRole::Admin),
        Access::Admin => key.role == KeyRole::Admin,
    };
    if may { Ok(Some(key)) } else { Err(Denied::WrongRole { has: key.role.name() }) }
}

/// The gate of one listener. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Gate {
    keys: watch::Receiver<KeysView>,
    options: GateOptions,
    buckets: Arc<Mutex<Buckets>>,
}

impl Gate {
    /// A gate for these keys.
    pub fn new(keys: watch::Receiver<KeysView>, options: GateOptions) -> Self {
        Self { keys, options, buckets: Arc::default() }
    }

    /// Lets everybody in: there is no key, and only this machine asks.
    pub fn open() -> Self {
        let (_, keys) = watch::channel(KeysView { keys: Vec::new(), is_known: true });
        Self::new(keys, GateOptions::default())
    }

    /// Lets a request in, and counts it against its key when it asks a model.
    ///
    /// # Errors
    /// [`Denied`]
    pub fn admit(&self, needs: Access, presented: Option<&str>, now: Instant) -> Result<Pass, Denied> {
        let view = self.keys.borrow();
        let key = decide(&view, self.options, needs, presented)?;
        self.count(needs, key, &view, now)
    }

    /// Lets a call in whose connection was let in already, by the key that it carries besides: the call may do what the key may, and is
    /// counted against it. Without a key, and where nothing is needed, it may do what its connection may.
    ///
    /// # Errors
    /// [`Denied`]
    pub fn narrow(&self, needs: Access, presented: Option<&str>, now: Instant) -> Result<Pass, Denied> {
        match presented {
            Some(_) if needs != Access::Open => {
                let view = self.keys.borrow();
                let options = GateOptions { is_public: true, requires_key: true };
                let key = decide(&view, options, needs, presented)?;
                self.count(needs, key, &view, now)
            }
            _ => Ok(Pass::default()),
        }
    }

    fn count(
        &self,
        needs: Access,
        key: Option<&KeyEntry>,
        view: &KeysView,
        now: Instant,
    ) -> Result<Pass, Denied> {
        let Some(key) = key else { return Ok(Pass::default()) };
        let balance = match needs {
            Access::User => self.lock().admit(key, &view.keys, now).map_err(Denied::Exhausted)?,
            _ => Balance::default(),
        };
        Ok(Pass { key: Some(Arc::new(key.clone())), balance })
    }

    /// Is who was let in with this key (or without one) let in still? Asked by answers that go on for long.
    pub fn admits_still(&self, needs: Access, key: Option<&KeyEntry>) -> bool {
        let view = self.keys.borrow();
        match key {
            None => decide(&view, self.options, needs, None).is_ok(),
            Some(key) => view.keys.iter().any(|known| known.hash == key.hash && known.role == key.role),
        }
    }

    /// Tokens were read or generated for this tenant ([`KeyEntry::tenant`]); others than keys have no limits.
    pub fn spend(&self, tenant: &str, tokens: u64, now: Instant) {
        self.lock().spend(tenant, tokens, now);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Buckets> {
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long a client should wait, in whole seconds: never 0, which would mean at once.
pub fn retry_seconds(wait: Duration) -> u64 {
    u64::try_from(wait.as_millis().div_ceil(1000)).unwrap_or(u64::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlxnode_coordinator::keys::{KeyLimits, KeyText};

    fn key(name: &str, byte: u8, role: KeyRole) -> (KeyText, KeyEntry) {
        let text = KeyText::new(&[byte; 32]);
        let limits = KeyLimits { requests_per_minute: Some(2), tokens_per_minute: None };
        let (hash, models) = (text.hash(), Vec::new());
        (text, KeyEntry { name: name.into(), hash, role, models, limits, created_unix: 0 })
    }

    /// Every need times every credential, for each kind of listener: what is let in is written down here, all else is denied.
    #[test]
    fn only_what_is_listed_is_let_in() {
        let (user, user_entry) = key("user", 1, KeyRole::User);
        let (admin, admin_entry) = key("admin", 2, KeyRole::Admin);
        let (trainer, trainer_entry) = key("trainer", 5, KeyRole::Trainer);
        let (metrics, metrics_entry) = key("metrics", 3, KeyRole::Metrics);
        let (revoked, _) = key("revoked", 4, KeyRole::Admin);
        let with_keys =
            KeysView { keys: vec![user_entry, admin_entry, metrics_entry, trainer_entry], is_known: true };
        let without = KeysView { keys: Vec::new(), is_known: true };
        let unknown = KeysView::default();
        let credentials = [
            ("none", None),
            ("wrong", Some("mlx-0000000000000000000000000000000000000000000")),
            ("empty", Some("")),
            ("revoked", Some(revoked.reveal())),
            ("user", Some(user.reveal())),
            ("trainer", Some(trainer.reveal())),
            ("admin", Some(admin.reveal())),
            ("metrics", Some(metrics.reveal())),
        ];
        let needs = [Access::Open, Access::User, Access::Read, Access::Train, Access::Admin, Access::Metrics];
        for (is_public, requires_key) in [(false, false), (true, false), (false, true), (true, true)] {
            let options = GateOptions { is_public, requires_key };
            let is_ours_alone = !is_public && !requires_key;
            for (keys, view) in [("keys", &with_keys), ("no keys", &without), ("unknown", &unknown)] {
                for need in needs {
                    for (name, presented) in credentials {
                        let is_let_in = decide(view, options, need, presented).is_ok();
                        let expected = match (need, keys, name) {
                            (Access::Open, ..) => true,
                            (Access::Metrics, ..) if is_ours_alone => true,
                            (_, "unknown", _) => false,
                            (_, "no keys", _) => is_ours_alone,
                            (Access::User | Access::Read, _, "user" | "trainer" | "admin") => true,
                            (Access::Train, _, "trainer" | "admin") => true,
                            (Access::Admin, _, "admin") => true,
                            (Access::Metrics, _, "metrics" | "admin") => true,
                            _ => false,
                        };
                        assert_eq!(is_let_in, expected, "{need:?} {keys} {name} {options:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_denial_says_which_and_what_to_do() {
        let (user, entry) = key("user", 1, KeyRole::User);
        let view = KeysView { keys: vec![entry], is_known: true };
        let options = GateOptions::default();
        assert_eq!(decide(&view, options, Access::User, None), Err(Denied::NoKey));
        assert_eq!(decide(&view, options, Access::User, Some("x")), Err(Denied::WrongKey));
        let role = decide(&view, options, Access::Admin, Some(user.reveal())).unwrap_err();
        assert!(role.to_string().contains("user"), "{role}");
    }

    #[test]
    fn a_key_that_is_revoked_is_out_at_once_and_its_count_with_it() {
        let (text, entry) = key("ann", 1, KeyRole::User);
        let (_, other) = key("bob", 2, KeyRole::User);
        let view = KeysView { keys: vec![entry.clone(), other.clone()], is_known: true };
        let (sender, keys) = watch::channel(view.clone());
        let gate = Gate::new(keys, GateOptions::default());
        let now = Instant::now();
        let ask = || gate.admit(Access::User, Some(text.reveal()), now).map(|_| ());
        assert_eq!((ask(), ask()), (Ok(()), Ok(())));
        assert!(matches!(ask(), Err(Denied::Exhausted(_))));
        assert!(gate.admit(Access::Metrics, None, now).is_ok(), "figures are not counted");
        assert!(gate.admits_still(Access::Read, Some(&entry)) && !gate.admits_still(Access::Read, None));
        sender.send_replace(KeysView { keys: vec![other], is_known: true });
        assert_eq!(ask(), Err(Denied::WrongKey));
        assert!(!gate.admits_still(Access::Read, Some(&entry)));
        sender.send_replace(view);
        assert_eq!(gate.lock().len(), 1);
    }

    #[test]
    fn waits_are_told_in_whole_seconds() {
        for (millis, seconds) in [(0, 1), (1, 1), (1000, 1), (1001, 2)] {
            assert_eq!(retry_seconds(Duration::from_millis(millis)), seconds);
        }
    }
}
