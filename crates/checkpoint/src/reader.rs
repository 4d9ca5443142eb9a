//! [`Reader`]: a cursor over untrusted little-endian bytes. Every read is checked against the end.

use crate::LoadError;

/// A position in the bytes of a file.
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader { bytes, at: 0 }
    }

    /// Offset of the next byte to be read.
    pub(crate) fn at(&self) -> usize {
        self.at
    }

    /// Bytes that are left.
    pub(crate) fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// The next `n_bytes` bytes; `what` names them in the error.
    pub(crate) fn take(&mut self, n_bytes: u64, what: &str) -> Result<&'a [u8], LoadError> {
        let left = self.left();
        let wanted = usize::try_from(n_bytes).ok().filter(|&n| n <= left);
        let Some(wanted) = wanted else {
            let (what, found) = (what.to_owned(), left as u64);
            return Err(LoadError::Truncated { what, expected: n_bytes, found });
        };
        let taken = &self.bytes[self.at..self.at + wanted];
        self.at += wanted;
        Ok(taken)
    }

    /// The next `N` bytes as an array.
    pub(crate) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], LoadError> {
        let taken = self.take(N as u64, what)?;
        Ok(taken.try_into().expect("`take` returns as many bytes as asked"))
    }

    pub(crate) fn u32(&mut self, what: &str) -> Result<u32, LoadError> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, what: &str) -> Result<u64, LoadError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A count of things that take at least `min_bytes` each: at most `limit`, and no more than fit
    /// in the rest of the file, so that the count may be used to reserve memory.
    pub(crate) fn count(
        &mut self,
        what: &str,
        limit: u64,
        min_bytes: u64,
    ) -> Result<usize, LoadError> {
        let found = self.u64(what)?;
        if found > limit {
            return Err(LoadError::LimitExceeded { what: what.to_owned(), limit, found });
        }
        let expected = found.saturating_mul(min_bytes);
        let left = self.left() as u64;
        if expected > left {
            let what = format!("{what} ({found})");
            return Err(LoadError::Truncated { what, expected, found: left });
        }
        usize::try_from(found).map_err(|_| LoadError::LimitExceeded {
            what: what.to_owned(),
            limit: usize::MAX as u64,
            found,
        })
    }

    /// A length-prefixed UTF-8 string of at most `limit` bytes.
    pub(crate) fn string(&mut self, what: &str, limit: u64) -> Result<String, LoadError> {
        let len = self.count(what, limit, 1)?;
        let bytes = self.take(len as u64, what)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(error) => {
                Err(LoadError::BadText { what: what.to_owned(), at: error.valid_up_to() })
            }
        }
    }
}
