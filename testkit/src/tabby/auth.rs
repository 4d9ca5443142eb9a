//! Keys: which header counts, and the four texts of a 401.

use axum::http::{HeaderMap, StatusCode};

use super::{TabbyOptions, refusal::Refusal};

/// Who may use a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Open,
    Api,
    Admin,
}

/// What the key of a request opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Permission {
    Api,
    Admin,
}

/// What the request's key opens, or the 401.
pub(super) fn check(
    access: Access,
    headers: &HeaderMap,
    options: &TabbyOptions,
) -> Result<Permission, Refusal> {
    let is_admin = |key: &str| key == options.admin_key;
    match access {
        Access::Open => Ok(Permission::Api),
        Access::Api => {
            let key = sent(headers, "x-api-key", "API key", "an API key")?;
            if is_admin(key) {
                Ok(Permission::Admin)
            } else if key == options.api_key {
                Ok(Permission::Api)
            } else {
                Err(unauthorized("Invalid API key"))
            }
        }
        Access::Admin => {
            let key = sent(headers, "x-admin-key", "admin key", "an admin key")?;
            if is_admin(key) {
                Ok(Permission::Admin)
            } else {
                Err(unauthorized("Invalid admin key"))
            }
        }
    }
}

/// The key of header `own`, which wins, or of `Authorization`.
fn sent<'a>(
    headers: &'a HeaderMap,
    own: &str,
    name: &str,
    please: &str,
) -> Result<&'a str, Refusal> {
    let header = |name: &str| {
        let value = headers.get(name).and_then(|value| value.to_str().ok());
        value.filter(|value| !value.is_empty())
    };
    if let Some(key) = header(own) {
        return Ok(key);
    }
    let Some(authorization) = header("authorization") else {
        return Err(unauthorized(format!("Please provide {please}")));
    };
    let mut words = authorization.split(' ');
    match (words.next(), words.next()) {
        (Some(scheme), Some(key)) if scheme.eq_ignore_ascii_case("bearer") => Ok(key),
        _ => Err(unauthorized(format!("Invalid {name}"))),
    }
}

fn unauthorized(text: impl Into<String>) -> Refusal {
    Refusal::Detail(StatusCode::UNAUTHORIZED, text.into())
}
