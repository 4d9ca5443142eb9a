//! Who may ask: API keys with roles, the host and the page that a request comes from. Every route but those of
//! the table that are for anyone lies behind `guard`, new ones included.

use std::{net::IpAddr, sync::Arc};

use axum::{
    extract::{Request, State},
    http::{HeaderMap, Method, header},
    middleware::Next,
    response::Response,
};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use thiserror::Error;
use tokio::sync::watch;

use crate::{AppState, error::ApiError};

/// Shortest key in characters: 128 bits in base64 need 22.
const MIN_KEY_CHARS: usize = 16;

/// What the holder of a key may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Ask the models.
    User,
    /// That, and read how the server is set up.
    Admin,
}

impl Role {
    /// As it is written behind a key.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Admin => "admin",
        }
    }

    fn parse(word: &str) -> Option<Self> {
        [Self::User, Self::Admin].into_iter().find(|role| role.name() == word)
    }
}

/// A key as its hash: a dump of the process shows none.
#[derive(Clone, Debug)]
struct Entry {
    hash: [u8; 32],
    role: Role,
    /// Its number in labels, never that of another key of this process.
    label: usize,
}

/// The keys of a server.
#[derive(Clone, Debug, Default)]
pub struct Keys {
    entries: Vec<Entry>,
    /// The highest number that a key of this process has had.
    last_label: usize,
}

/// A key that cannot be used. No message holds any part of a key.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum KeyError {
    /// Too short to be a secret.
    #[error("api key {index}: expected at least {MIN_KEY_CHARS} characters, found {found}")]
    TooShort {
        /// Position, from 1.
        index: usize,
        /// Its length.
        found: usize,
    },
    /// Cannot stand in a header.
    #[error("api key {index}: expected visible ASCII characters only")]
    NotAscii {
        /// Position, from 1.
        index: usize,
    },
    /// What stands behind a key is no role.
    #[error("api key {index}: expected nothing, `user` or `admin` behind the key")]
    Role {
        /// Position, from 1.
        index: usize,
    },
    /// The same key twice, which could have two roles.
    #[error("api key {index}: expected a key of its own, found that of api key {first}")]
    Twice {
        /// Position, from 1.
        index: usize,
        /// That of the first one.
        first: usize,
    },
    /// A server that had keys is not opened by taking them away.
    #[error("api keys: expected at least one, as before, found none")]
    NoneLeft,
    /// An address that others can reach needs a key.
    #[error(
        "address {address}: expected an API key for a non-loopback address; pass --api-key-file FILE or bind 127.0.0.1"
    )]
    NeedsKey {
        /// The address.
        address: IpAddr,
    },
}

/// The folder of what is kept for a key beyond this process. It follows from the key and not from its place in
/// the file, which may be another one at the next start, and says nothing of the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeyFolder(pub(crate) String);

/// Who asked; the label goes into traces, never the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller(pub Option<String>);

impl Keys {
    /// Takes keys, one an entry: the key alone, or the key, white space, and `user` or `admin`. A key alone is a
    /// user's.
    ///
    /// # Errors
    /// A key that is too short, cannot stand in a header, has an unknown role or is there twice.
    pub fn new<'a>(keys: impl IntoIterator<Item = &'a str>) -> Result<Self, KeyError> {
        let mut entries: Vec<Entry> = Vec::new();
        for (index, line) in keys.into_iter().enumerate() {
            let index = index + 1;
            let mut words = line.split_ascii_whitespace();
            let key = words.next().unwrap_or_default();
            let role = match (words.next(), words.next()) {
                (None, _) => Role::User,
                (Some(word), None) => Role::parse(word).ok_or(KeyError::Role { index })?,
                (Some(_), Some(_)) => return Err(KeyError::Role { index }),
            };
            if !key.bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err(KeyError::NotAscii { index });
            }
            if key.len() < MIN_KEY_CHARS {
                return Err(KeyError::TooShort { index, found: key.len() });
            }
            let hash = Sha256::digest(key).into();
            if let Some(first) = entries.iter().position(|entry| entry.hash == hash) {
                return Err(KeyError::Twice { index, first: first + 1 });
            }
            entries.push(Entry { hash, role, label: index });
        }
        let last_label = entries.len();
        Ok(Self { entries, last_label })
    }

    /// These keys in place of `former`: a key that stays keeps its label, and a new one gets a number that none
    /// has had. Labels are tenants, whose cached prompts must not pass to whoever is next in the file (G-22).
    fn after(mut self, former: &Keys) -> Self {
        self.last_label = former.last_label;
        for entry in &mut self.entries {
            let known = former.entries.iter().find(|known| known.hash == entry.hash);
            entry.label = known.map_or_else(
                || {
                    self.last_label += 1;
                    self.last_label
                },
                |known| known.label,
            );
        }
        self
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Checks that this set of keys may serve on `address`.
    ///
    /// # Errors
    /// A non-loopback address without a key.
    pub fn allow_bind(&self, address: IpAddr) -> Result<(), KeyError> {
        if self.is_empty() && !address.is_loopback() {
            return Err(KeyError::NeedsKey { address });
        }
        Ok(())
    }

    /// Who presents this, or a refusal. Compares against every key in constant time.
    fn identify(&self, presented: Option<&str>) -> Option<Admitted> {
        if self.is_empty() {
            // Who reaches a server without keys sits at its machine.
            let folder = KeyFolder("default".to_owned());
            return Some(Admitted { caller: Caller(None), folder, role: Role::Admin });
        }
        let presented: [u8; 32] = Sha256::digest(presented?).into();
        let mut found = None;
        for entry in &self.entries {
            if bool::from(entry.hash.ct_eq(&presented)) {
                found = Some(entry);
            }
        }
        found.map(|entry| Admitted {
            caller: Caller(Some(format!("key-{}", entry.label))),
            folder: entry.folder(),
            role: entry.role,
        })
    }
}

impl Entry {
    fn folder(&self) -> KeyFolder {
        let digest = Sha256::new().chain_update("exrail sessions of ").chain_update(self.hash);
        KeyFolder(digest.finalize()[..16].iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// Somebody who was let in.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Admitted {
    caller: Caller,
    folder: KeyFolder,
    role: Role,
}

/// The keys of a running server, which may be replaced.
#[derive(Debug)]
pub struct KeyRing(watch::Sender<Arc<Keys>>);

impl KeyRing {
    /// Holds these keys.
    #[must_use]
    pub fn new(keys: Keys) -> Self {
        Self(watch::Sender::new(Arc::new(keys)))
    }

    /// Those of now.
    #[must_use]
    pub fn current(&self) -> Arc<Keys> {
        Arc::clone(&self.0.borrow())
    }

    /// From the next request on.
    ///
    /// # Errors
    /// None left where there were some.
    pub fn replace(&self, keys: Keys) -> Result<(), KeyError> {
        let former = self.current();
        if keys.is_empty() && !former.is_empty() {
            return Err(KeyError::NoneLeft);
        }
        self.0.send_replace(Arc::new(keys.after(&former)));
        Ok(())
    }
}

/// Who a request is from and what they may do; for another server with these keys.
///
/// # Errors
/// A wrong or missing key, a page of another origin or, without keys, another name than one of this machine.
pub fn identify(keys: &Keys, request: &Request) -> Result<(Caller, Role), ApiError> {
    let Admitted { caller, role, .. } = admit(keys, request)?;
    Ok((caller, role))
}

/// The layer of all routes that are not for anyone.
pub(crate) async fn guard(
    State(state): State<Arc<AppState>>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let Admitted { caller, folder, role } = admit(&state.keys.current(), &request)?;
    request.extensions_mut().insert(caller);
    request.extensions_mut().insert(folder);
    request.extensions_mut().insert(role);
    Ok(next.run(request).await)
}

/// The layer of the routes that are for anyone: no key, and still no page under another name.
pub(crate) async fn guard_host(
    State(state): State<Arc<AppState>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    refuse_foreign_host(&state.keys.current(), &request)?;
    Ok(next.run(request).await)
}

/// The layer of one route that needs a role. Without a role, which [`guard`] gives, nobody passes.
pub(crate) async fn require(
    needed: Role,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    match (needed, request.extensions().get::<Role>()) {
        (Role::User, Some(Role::User | Role::Admin)) | (Role::Admin, Some(Role::Admin)) => {
            Ok(next.run(request).await)
        }
        (Role::Admin, Some(Role::User)) => Err(ApiError::Forbidden { needed: needed.name() }),
        (Role::User | Role::Admin, None) => Err(ApiError::Internal("a route without its guard")),
    }
}

fn admit(keys: &Keys, request: &Request) -> Result<Admitted, ApiError> {
    refuse_foreign_host(keys, request)?;
    let presented = text(request.headers(), header::AUTHORIZATION);
    let presented = presented.and_then(|value| value.strip_prefix("Bearer "));
    let admitted = keys.identify(presented).ok_or(ApiError::Unauthorized)?;
    refuse_foreign_origin(request)?;
    Ok(admitted)
}

fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

fn host(request: &Request) -> &str {
    let authority = request.uri().authority().map(|authority| authority.as_str());
    text(request.headers(), header::HOST).or(authority).unwrap_or_default()
}

/// Without keys the loopback address is the only fence, and a page in the user's browser can point a name of its
/// own at it.
fn refuse_foreign_host(keys: &Keys, request: &Request) -> Result<(), ApiError> {
    let host = host(request);
    if keys.is_empty() && !is_loopback_name(host) {
        return Err(ApiError::ForeignHost { found: host.into() });
    }
    Ok(())
}

/// A browser says which page sends a request that changes something. Only a page of this server itself may: a
/// page of another origin is a stranger that uses the user's browser (field fault L3).
fn refuse_foreign_origin(request: &Request) -> Result<(), ApiError> {
    if [Method::GET, Method::HEAD, Method::OPTIONS].contains(request.method()) {
        return Ok(());
    }
    let Some(origin) = request.headers().get(header::ORIGIN) else { return Ok(()) };
    let origin = String::from_utf8_lossy(origin.as_bytes());
    let authority = origin.split_once("://").map(|(_, authority)| authority);
    if authority.is_some_and(|authority| authority.eq_ignore_ascii_case(host(request))) {
        return Ok(());
    }
    Err(ApiError::ForeignOrigin { found: origin.into_owned() })
}

fn is_loopback_name(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "0123456789abcdef";

    #[test]
    fn a_wrong_or_missing_key_is_nobody() {
        let keys = Keys::new([KEY]).unwrap();
        assert_eq!(keys.identify(None), None);
        assert_eq!(keys.identify(Some("0123456789abcdeg")), None);
        let Admitted { caller, folder, role } = keys.identify(Some(KEY)).unwrap();
        assert_eq!((caller, role), (Caller(Some("key-1".into())), Role::User));
        assert!(!folder.0.contains(KEY) && folder.0.len() == 32, "{folder:?}");
    }

    #[test]
    fn the_folder_of_a_key_does_not_depend_on_its_place() {
        let other = "another-key-of-16";
        let folder = |keys: &[&str], key| {
            let keys = Keys::new(keys.iter().copied()).unwrap();
            keys.identify(Some(key)).unwrap().folder
        };
        assert_eq!(folder(&[KEY, other], KEY), folder(&[other, KEY], KEY));
        assert_ne!(folder(&[KEY, other], KEY), folder(&[KEY, other], other));
    }

    /// Field fault L5: only the last of several keys worked.
    #[test]
    fn l5_each_of_three_keys_works_with_its_role() {
        let lines = ["user-key-0123456 user", "admin-key-012345\tadmin", "plain-key-012345"];
        let keys = Keys::new(lines).unwrap();
        let role = |key| keys.identify(Some(key)).map(|admitted| admitted.role);
        assert_eq!(role("user-key-0123456"), Some(Role::User));
        assert_eq!(role("admin-key-012345"), Some(Role::Admin));
        assert_eq!(role("plain-key-012345"), Some(Role::User), "a key alone is a user's");
        assert_eq!(role("admin-key-012345\tadmin"), None, "the role is no part of the key");
    }

    #[test]
    fn l5_a_line_that_is_no_key_is_refused_without_its_text() {
        let wrong = |line: &'static str| Keys::new([KEY, line]).unwrap_err();
        assert_eq!(wrong("second-key-01234 root"), KeyError::Role { index: 2 });
        assert_eq!(wrong("second-key-01234 admin user"), KeyError::Role { index: 2 });
        assert_eq!(wrong(KEY), KeyError::Twice { index: 2, first: 1 });
        assert!(!wrong("second-key-01234 root").to_string().contains("second-key"));
    }

    /// G-22: what is cached for a key does not pass to the one that takes its place in the file.
    #[test]
    fn g22_a_replaced_key_leaves_its_label_to_nobody() {
        let (second, third) = ("second-key-01234", "third-key-012345");
        let ring = KeyRing::new(Keys::new([KEY, second]).unwrap());
        let label = |key| ring.current().identify(Some(key)).and_then(|it| it.caller.0);
        ring.replace(Keys::new([third, second]).unwrap()).unwrap();
        assert_eq!(label(KEY), None);
        assert_eq!(label(second).as_deref(), Some("key-2"));
        assert_eq!(label(third).as_deref(), Some("key-3"));
        ring.replace(Keys::new([KEY]).unwrap()).unwrap();
        assert_eq!(label(KEY).as_deref(), Some("key-4"));
    }

    #[test]
    fn l5_a_server_with_keys_is_not_opened_by_an_empty_file() {
        let ring = KeyRing::new(Keys::new([KEY]).unwrap());
        assert_eq!(ring.replace(Keys::default()), Err(KeyError::NoneLeft));
        assert!(ring.current().identify(None).is_none());
    }

    /// The mutation: numbers by place give the second owner of a place the first one's label.
    #[test]
    fn mutation_g22_labels_by_place_pass_to_whoever_is_next() {
        let label = |keys: &Keys, key| keys.identify(Some(key)).unwrap().caller;
        let (before, after) = (Keys::new([KEY]).unwrap(), Keys::new(["third-key-012345"]).unwrap());
        assert_eq!(label(&before, KEY), label(&after, "third-key-012345"));
    }

    #[test]
    fn a_short_key_is_refused() {
        assert_eq!(Keys::new(["abc"]).unwrap_err(), KeyError::TooShort { index: 1, found: 3 });
    }

    #[test]
    fn a_public_address_needs_a_key() {
        let public: IpAddr = "0.0.0.0".parse().unwrap();
        assert!(Keys::default().allow_bind(public).is_err());
        assert!(Keys::new([KEY]).unwrap().allow_bind(public).is_ok());
        assert!(Keys::default().allow_bind("127.0.0.1".parse().unwrap()).is_ok());
    }

    #[test]
    fn only_loopback_names_are_loopback() {
        for host in ["localhost", "localhost:8080", "127.0.0.1:1", "[::1]:80", "127.0.0.1"] {
            assert!(is_loopback_name(host), "{host}");
        }
        for host in ["evil.example", "evil.example:80", "10.0.0.1", "", "[fe80::1]:80"] {
            assert!(!is_loopback_name(host), "{host}");
        }
    }
}
