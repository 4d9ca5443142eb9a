//! Random names and seeds.

use exrail_text::tools::IdShape;

use crate::error::ApiError;

/// A fresh 64-bit seed.
pub(crate) fn seed() -> Result<u64, ApiError> {
    getrandom::u64().map_err(|_| ApiError::Internal("the system gave no random bytes"))
}

/// `PREFIX-` and 24 hexadecimal digits.
///
/// # Errors
/// The system gave no random bytes.
pub fn name(prefix: &str) -> Result<String, ApiError> {
    let (high, low) = (seed()?, seed()?);
    Ok(format!("{prefix}-{high:016x}{:08x}", low >> 32))
}

/// A fresh name of a tool call, in the shape that the model's template takes.
pub(crate) fn call(shape: IdShape) -> Result<String, ApiError> {
    const ALPHANUMERICS: &[u8; 62] =
        b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let mut id = String::from(shape.prefix);
    for _ in 0..shape.n_alphanumerics {
        // The remainder favours a few characters by one part in 2^58.
        let at = usize::try_from(seed()? % 62).unwrap_or(0);
        id.push(char::from(ALPHANUMERICS[at]));
    }
    Ok(id)
}
