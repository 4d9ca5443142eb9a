//! API keys. Every route but `/livez` and `/readyz` lies behind this layer, new ones included.

use std::{net::IpAddr, sync::Arc};

use axum::{
    extract::{Request, State},
    http::header,
    middleware::Next,
    response::Response,
};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use thiserror::Error;

use crate::{AppState, error::ApiError};

/// Shortest key in characters: 128 bits in base64 need 22.
const MIN_KEY_CHARS: usize = 16;

/// The keys of a server, as hashes: a dump of the process shows none.
#[derive(Clone, Debug, Default)]
pub struct Keys {
    hashes: Vec<[u8; 32]>,
}

/// A key that cannot be used.
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
    /// Takes keys, one an entry.
    ///
    /// # Errors
    /// A key that is too short or cannot stand in a header.
    pub fn new<'a>(keys: impl IntoIterator<Item = &'a str>) -> Result<Self, KeyError> {
        let mut hashes = Vec::new();
        for (index, key) in keys.into_iter().enumerate() {
            let index = index + 1;
            if !key.bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err(KeyError::NotAscii { index });
            }
            if key.len() < MIN_KEY_CHARS {
                return Err(KeyError::TooShort { index, found: key.len() });
            }
            hashes.push(Sha256::digest(key).into());
        }
        Ok(Self { hashes })
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.hashes.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.hashes.is_empty()
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

    /// The label of the caller, or a refusal. Compares against every key in constant time.
    fn identify(&self, presented: Option<&str>) -> Option<(Caller, KeyFolder)> {
        if self.is_empty() {
            return Some((Caller(None), KeyFolder("default".to_owned())));
        }
        let presented: [u8; 32] = Sha256::digest(presented?).into();
        let mut found = None;
        for (index, hash) in self.hashes.iter().enumerate() {
            if bool::from(hash.ct_eq(&presented)) {
                found = Some(index);
            }
        }
        found.map(|index| (Caller(Some(format!("key-{}", index + 1))), self.folder(index)))
    }

    fn folder(&self, index: usize) -> KeyFolder {
        let digest =
            Sha256::new().chain_update("exrail sessions of ").chain_update(self.hashes[index]);
        KeyFolder(digest.finalize()[..16].iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// The layer.
pub(crate) async fn guard(
    State(state): State<Arc<AppState>>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let (caller, folder) = admit(&state.keys, &request)?;
    request.extensions_mut().insert(caller);
    request.extensions_mut().insert(folder);
    Ok(next.run(request).await)
}

fn admit(keys: &Keys, request: &Request) -> Result<(Caller, KeyFolder), ApiError> {
    let text = |name| request.headers().get(name).and_then(|value| value.to_str().ok());
    // Without keys the loopback address is the only fence, and a page in the user's browser can
    // point a name of its own at it.
    if keys.is_empty() {
        let authority = request.uri().authority().map(|authority| authority.as_str());
        let host = text(header::HOST).or(authority).unwrap_or_default();
        if !is_loopback_name(host) {
            return Err(ApiError::ForeignHost { found: host.into() });
        }
    }
    let presented = text(header::AUTHORIZATION).and_then(|value| value.strip_prefix("Bearer "));
    keys.identify(presented).ok_or(ApiError::Unauthorized)
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
        let (caller, folder) = keys.identify(Some(KEY)).unwrap();
        assert_eq!(caller, Caller(Some("key-1".into())));
        assert!(!folder.0.contains(KEY) && folder.0.len() == 32, "{folder:?}");
    }

    #[test]
    fn the_folder_of_a_key_does_not_depend_on_its_place() {
        let other = "another-key-of-16";
        let folder = |keys: &[&str], key| {
            let keys = Keys::new(keys.iter().copied()).unwrap();
            keys.identify(Some(key)).unwrap().1
        };
        assert_eq!(folder(&[KEY, other], KEY), folder(&[other, KEY], KEY));
        assert_ne!(folder(&[KEY, other], KEY), folder(&[KEY, other], other));
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
