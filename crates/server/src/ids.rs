//! Random names and seeds.

use crate::error::ApiError;

/// A fresh 64-bit seed.
pub(crate) fn seed() -> Result<u64, ApiError> {
    getrandom::u64().map_err(|_| ApiError::Internal("the system gave no random bytes"))
}

/// `PREFIX-` and 24 hexadecimal digits.
pub(crate) fn name(prefix: &str) -> Result<String, ApiError> {
    let (high, low) = (seed()?, seed()?);
    Ok(format!("{prefix}-{high:016x}{:08x}", low >> 32))
}
