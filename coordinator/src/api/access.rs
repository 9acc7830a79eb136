//! Who comes in: the tenants and keys that the cluster has agreed on, by the latest state that this
//! process has applied.
//!
//! Where no voters are, nobody can have agreed on a tenant, and nobody has to show a key; nor where
//! the configuration says `open`. Everywhere else a key is needed.
//!
//! Invariants:
//! - a key that is unknown, wrong, revoked or expired gets the same answer after the same work;
//! - what was revoked is refused from the moment on at which this process has applied it;
//! - the records are read again when they have changed, not when a request comes.
//!
//! What this module does not know: what is asked for, and whether the tenant may have that much.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use aws_lc_rs::hmac;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use entente_membership::state::{RecordKind, State};
use entente_membership::tenant::{Key, Policy, Scope, Scopes, Shown, Tenant};
use entente_proto::ids::{RegionSet, RequestId, TenantName};
use tokio::sync::watch;

use super::ApiError;
use super::meter::Limits;
use super::quota::Quota;
use crate::engine::origin::{ANONYMOUS, Origin};

/// Who asks, as far as it is known and matters.
#[derive(Clone)]
pub struct Caller {
    /// Whose requests these are.
    pub tenant: TenantName,
    /// Where their rows may go.
    pub policy: Arc<Policy>,
    /// What the key that was shown may be used for.
    pub scopes: Scopes,
    /// How much the tenant may ask for.
    pub(super) quota: Quota,
    cache_salt: Vec<u8>,
}

impl Caller {
    /// Refuses whoever has shown a key that is not for this.
    pub(super) fn may(&self, scope: Scope) -> Result<(), ApiError> {
        if self.scopes.contains(&scope) {
            return Ok(());
        }
        let message = format!("this API key has not the scope {scope}");
        let error = ApiError::new(StatusCode::FORBIDDEN, "permission_error", message, None);
        Err(error.coded("insufficient_scope"))
    }

    /// A new request of this caller, whose rows `allowed` may see.
    pub(super) fn origin(&self, allowed: RegionSet) -> Origin {
        Origin {
            id: RequestId(uuid::Uuid::new_v4().as_u128()),
            tenant: self.tenant.clone(),
            allowed,
            cache_salt: self.cache_salt.clone(),
        }
    }
}

/// Knows callers by their keys.
pub struct Access {
    door: Door,
    /// A secret of this process: nobody else can tell which names its cached prefixes have.
    salt: hmac::Key,
}

enum Door {
    /// Everybody is the same caller.
    Open(Account),
    /// By key.
    Keyed { states: watch::Receiver<Arc<State>>, directory: Box<Mutex<Directory>> },
}

impl Access {
    /// Lets everybody in; what they ask for stays in `allowed`. `secret` is random.
    pub fn open(allowed: RegionSet, secret: &[u8; 32]) -> Self {
        let tenant: TenantName = ANONYMOUS.parse().expect("the word is a valid name");
        let policy = Arc::new(Policy::anonymous(&tenant, allowed));
        let (revision, keys) = (0, Vec::new());
        let quota = Quota::new(Limits::default());
        let account = Account { name: tenant, revision, policy, quota, keys };
        Self { door: Door::Open(account), salt: salt(secret) }
    }

    /// Lets those in whose keys are in the latest of `states`, each tenant with at most `answers_max`
    /// answers under way. `secret` is random.
    pub fn keyed(states: watch::Receiver<Arc<State>>, secret: &[u8; 32], answers_max: u32) -> Self {
        let directory = Box::new(Mutex::new(Directory::new(answers_max)));
        Self { door: Door::Keyed { states, directory }, salt: salt(secret) }
    }

    /// Whose request has these headers.
    ///
    /// # Errors
    /// 401 unless the key is there, known, right and live.
    pub fn authenticate(&self, headers: &HeaderMap) -> Result<Caller, ApiError> {
        match &self.door {
            Door::Open(account) => Ok(self.caller(account, Scope::ALL.into())),
            Door::Keyed { states, directory } => {
                let text = bearer(headers).ok_or_else(no_key)?;
                let mut directory = directory.lock().unwrap_or_else(PoisonError::into_inner);
                directory.follow(&states.borrow());
                let (account, key) = directory.find(text, now_ms()).ok_or_else(wrong_key)?;
                Ok(self.caller(account, key.scopes.clone()))
            }
        }
    }

    fn caller(&self, account: &Account, scopes: Scopes) -> Caller {
        let name = account.name.as_str();
        Caller {
            tenant: account.name.clone(),
            policy: account.policy.clone(),
            scopes,
            quota: account.quota.clone(),
            cache_salt: hmac::sign(&self.salt, name.as_bytes()).as_ref().to_vec(),
        }
    }
}

fn salt(secret: &[u8; 32]) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, secret)
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// What `Authorization: Bearer …` says.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, key) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

fn no_key() -> ApiError {
    unauthorized("an API key is needed: send the header `Authorization: Bearer <key>`")
}

/// One answer, whatever it is that is wrong with the key.
fn wrong_key() -> ApiError {
    unauthorized("the API key is not valid")
}

fn unauthorized(message: &str) -> ApiError {
    let kind = "invalid_request_error";
    ApiError::new(StatusCode::UNAUTHORIZED, kind, message.to_owned(), None)
        .coded("invalid_api_key")
        .with_header(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))
}

/// One tenant as requests need it.
struct Account {
    name: TenantName,
    /// That of the record that this was made from.
    revision: u64,
    policy: Arc<Policy>,
    /// Outlives changes of the record: to change a tenant does not fill its bucket.
    quota: Quota,
    keys: Vec<Key>,
}

/// Tenants by name and keys by id, as of one revision of the records. Pure.
struct Directory {
    revision: u64,
    accounts: BTreeMap<String, Account>,
    /// Which account has the key of this id.
    keys: BTreeMap<String, String>,
    decoy: Key,
    answers_max: u32,
}

impl Directory {
    fn new(answers_max: u32) -> Self {
        let (accounts, keys) = (BTreeMap::new(), BTreeMap::new());
        Self { revision: 0, accounts, keys, decoy: Key::decoy(), answers_max }
    }

    /// Takes over what has changed since the last time.
    fn follow(&mut self, state: &State) {
        if state.revision() == self.revision {
            return;
        }
        self.revision = state.revision();
        let gone: Vec<String> = self.accounts.keys().cloned().collect();
        for name in gone {
            if state.record(RecordKind::Tenant, &name).is_none() {
                self.forget(&name);
            }
        }
        for (name, record) in state.records(RecordKind::Tenant) {
            if self.accounts.get(name).is_some_and(|have| have.revision == record.revision) {
                continue;
            }
            let quota = self.forget(name);
            match Tenant::read(name, record) {
                Ok(tenant) => self.insert(tenant, record.revision, quota),
                Err(error) => tracing::error!(tenant = name, %error, "a tenant cannot be read"),
            }
        }
    }

    fn insert(&mut self, tenant: Tenant, revision: u64, quota: Option<Quota>) {
        let policy = Arc::new(tenant.policy(revision));
        let Tenant { name, keys, tokens_per_minute, concurrent_max, .. } = tenant;
        let answers_max = Some(self.answers_max);
        let limits = Limits { tokens_per_minute, concurrent_max, answers_max };
        let quota = quota.unwrap_or_else(|| Quota::new(limits));
        quota.set_limits(limits);
        for key in &keys {
            // Ids are random, so this never happens unless somebody wants it; then the first stays.
            let id = key.id.as_str().to_owned();
            self.keys.entry(id).or_insert_with(|| name.as_str().to_owned());
        }
        let account = Account { name, revision, policy, quota, keys };
        self.accounts.insert(account.name.as_str().to_owned(), account);
    }

    /// Gives the quota of the account that was there.
    fn forget(&mut self, name: &str) -> Option<Quota> {
        let account = self.accounts.remove(name)?;
        for key in account.keys {
            let is_its = |owner: &mut String| owner == name;
            if self.keys.get_mut(key.id.as_str()).is_some_and(is_its) {
                self.keys.remove(key.id.as_str());
            }
        }
        Some(account.quota)
    }

    /// The account and the key that `text` is, if it is one that is live at `now_ms`.
    fn find(&self, text: &str, now_ms: u64) -> Option<(&Account, &Key)> {
        let shown = Shown::parse(text);
        let account = self.keys.get(shown.id).and_then(|name| self.accounts.get(name));
        let key =
            account.and_then(|account| account.keys.iter().find(|k| k.id.as_str() == shown.id));
        // The work is done before anything is decided, also for a key that is not there.
        let matches = key.unwrap_or(&self.decoy).matches(&shown);
        let (account, key) = account.zip(key)?;
        (matches && key.is_live(now_ms)).then_some((account, key))
    }
}

#[cfg(test)]
mod tests {
    use entente_membership::state::Command;
    use entente_membership::tenant::Secret;
    use entente_membership::tenant::key::Seed;

    use super::*;

    fn mint(byte: u8) -> (Key, Secret) {
        let seed = Seed { id: [byte; 8], secret: [byte; 32].into(), salt: [!byte; 32] };
        Key::mint(&seed, 0, Scope::ALL.into(), String::new())
    }

    fn put(state: &mut State, tenant: &Tenant) {
        let (key, value) = (tenant.name.to_string(), tenant.encode());
        let kind = RecordKind::Tenant;
        state.apply(Command::PutRecord { kind, key, value, revision: None }).unwrap();
    }

    fn tenant(name: &str) -> Tenant {
        Tenant::new(name.parse().unwrap(), RegionSet::from(["fr".parse().unwrap()]))
    }

    fn founded() -> State {
        State::genesis(Vec::new()).unwrap()
    }

    fn headers(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())])
    }

    /// Status, code and headers of a refusal, as one text.
    fn refusal(access: &Access, headers: &HeaderMap) -> String {
        format!("{:?}", access.authenticate(headers).err())
    }

    #[test]
    fn wrong_unknown_expired_and_revoked_keys_get_the_same_answer() {
        let mut state = founded();
        let mut tenant = tenant("a");
        let (good, secret) = mint(1);
        tenant.add(good, 0).unwrap();
        let ((mut expired, old), (mut revoked, gone)) = (mint(2), mint(3));
        expired.expires_ms = Some(1);
        revoked.revoked = true;
        tenant.keys.extend([expired, revoked]);
        put(&mut state, &tenant);
        let (_sender, states) = watch::channel(Arc::new(state));
        let access = Access::keyed(states, &[7; 32], 9);

        let good = format!("Bearer {}", secret.reveal());
        let caller = access.authenticate(&headers(&good)).unwrap();
        assert_eq!((caller.tenant.as_str(), caller.policy.id.as_str()), ("a", "a@1"));
        assert!(access.authenticate(&headers(&good.replace("Bearer", "bearer"))).is_ok());

        let swapped = format!("{}{}", &secret.reveal()[..20], &old.reveal()[20..]);
        let unknown = mint(4).1;
        let bad = [old.reveal(), gone.reveal(), &swapped, unknown.reveal(), "mk_x", ""];
        let told: Vec<String> =
            bad.iter().map(|key| refusal(&access, &headers(&format!("Bearer {key}")))).collect();
        assert!(told[0].contains("401") && told[0].contains("invalid_api_key"), "{}", told[0]);
        assert!(told.iter().all(|text| *text == told[0]), "{told:#?}");
        let none = refusal(&access, &HeaderMap::new());
        assert!(none.contains("401") && none.contains("is needed"), "{none}");
        let basic = refusal(&access, &headers(&good.replace("Bearer", "Basic")));
        assert_eq!(basic, none, "another scheme is no key");
    }

    #[test]
    fn a_change_of_the_records_is_in_force_at_the_next_request() {
        let mut state = founded();
        let (sender, states) = watch::channel(Arc::new(state.clone()));
        let access = Access::keyed(states, &[7; 32], 9);
        let (key, secret) = mint(1);
        let shown = headers(&format!("Bearer {}", secret.reveal()));
        let mut knows = |change: &dyn Fn(&mut State)| {
            change(&mut state);
            sender.send_replace(Arc::new(state.clone()));
            access.authenticate(&shown).is_ok()
        };
        let with = |revoked: bool| {
            let mut tenant = tenant("a");
            let mut key = key.clone();
            key.revoked = revoked;
            tenant.keys.push(key);
            tenant
        };
        assert!(!knows(&|_| {}));
        assert!(knows(&|state| put(state, &with(false))));
        // Another tenant that claims the same id takes nothing from the first, coming or going.
        assert!(knows(&|state| put(state, &Tenant { name: "b".parse().unwrap(), ..with(false) })));
        let delete = |name: &str| Command::DeleteRecord {
            kind: RecordKind::Tenant,
            key: name.to_owned(),
            revision: None,
        };
        assert!(knows(&|state| drop(state.apply(delete("b")))));
        assert!(!knows(&|state| put(state, &with(true))));
        assert!(knows(&|state| put(state, &with(false))));
        // A record that nobody can read lets nobody in, and no other one suffers.
        assert!(knows(&|state| put(state, &tenant("c"))));
        assert!(!knows(&|state| {
            let (kind, key, value) = (RecordKind::Tenant, "a".to_owned(), vec![1].into());
            state.apply(Command::PutRecord { kind, key, value, revision: None }).unwrap();
        }));
        assert!(knows(&|state| put(state, &with(false))));
        assert!(!knows(&|state| drop(state.apply(delete("a")))));
    }

    #[test]
    fn tenants_have_different_cache_salts_and_another_process_has_others() {
        let mut state = founded();
        let mut shown = Vec::new();
        for (name, byte) in [("a", 1), ("a", 2), ("b", 3)] {
            let (key, secret) = mint(byte);
            let found = Tenant::of(&state, &name.parse().unwrap());
            let mut tenant = found.map_or_else(|| tenant(name), |found| found.unwrap().0);
            tenant.add(key, 0).unwrap();
            put(&mut state, &tenant);
            shown.push(headers(&format!("Bearer {}", secret.reveal())));
        }
        let (_sender, states) = watch::channel(Arc::new(state));
        let [one, other] =
            [[7; 32], [8; 32]].map(|secret| Access::keyed(states.clone(), &secret, 9));
        let salt = |access: &Access, at: usize| {
            let caller = access.authenticate(&shown[at]).unwrap();
            caller.origin(RegionSet::new()).cache_salt
        };
        assert_eq!(salt(&one, 0), salt(&one, 1), "a tenant's keys share what is cached");
        assert_ne!(salt(&one, 0), salt(&one, 2));
        assert_ne!(salt(&one, 0), salt(&other, 0));
    }

    #[test]
    fn a_key_without_the_scope_is_refused_by_name() {
        let access = Access::open(RegionSet::from(["fr".parse().unwrap()]), &[7; 32]);
        let mut caller = access.authenticate(&HeaderMap::new()).unwrap();
        assert!(caller.may(Scope::Inference).is_ok());
        caller.scopes = [Scope::Receipts].into();
        let text = format!("{:?}", caller.may(Scope::Inference).unwrap_err());
        assert!(text.contains("403") && text.contains("insufficient_scope"), "{text}");
    }
}
