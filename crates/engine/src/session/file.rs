//! The file of a session, and its reader, which trusts nothing.
//!
//! ```text
//! EXRAILKV | version u32 | header bytes u32 | header, JSON
//! for each page: its bytes | their checksum u64
//! sha256 of all before
//! ```
//! Numbers are little-endian. The bytes of a page are in its device's own order, which the pins name. The
//! whole file is checked before the first page is handed out, and each page again when it is.

use std::io::{self, Read, Seek, SeekFrom, Write};

use exrail_kernels::PAGE_TOKENS;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{
    SavedSession,
    error::SessionError,
    memory::{Life, Memory, SessionState},
};
use crate::checksum::checksum;

const MAGIC: [u8; 8] = *b"EXRAILKV";
/// Of this layout, the order of a page's bytes on every device included. 1 had no memory.
const VERSION: u32 = 2;
/// Magic, version, and length of the header.
const FRONT_BYTES: u64 = 16;
const CHECKSUM_BYTES: u64 = 8;
const DIGEST_BYTES: u64 = 32;

/// What the pages of a file are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Header {
    pub(super) name: String,
    /// Whose it is.
    pub(super) owner: String,
    /// Which save of this name it is.
    pub(super) life: Life,
    /// What shapes the answers that go on from it.
    pub(super) state: SessionState,
    /// What follows from these and the tokens, to find a changed header without reading the pages.
    pub(super) memory: Memory,
    /// Under which conditions the pages were computed, by name.
    pub(super) pins: Vec<(String, String)>,
    /// Bytes of a page.
    pub(super) page_bytes: u64,
    /// All tokens of the pages, [`PAGE_TOKENS`] a page.
    pub(super) tokens: Vec<u32>,
}

impl Header {
    pub(super) fn n_pages(&self) -> usize {
        self.tokens.len() / PAGE_TOKENS
    }

    /// What is told of the file with this header.
    pub(super) fn saved(self) -> SavedSession {
        let bytes = self.file_bytes(self.to_json().len() as u64).unwrap_or(u64::MAX);
        SavedSession { tokens: self.tokens.len(), bytes, memory: self.memory }
    }

    /// Bytes of a page, in memory.
    pub(super) fn page_len(&self) -> Result<usize, SessionError> {
        let found = self.page_bytes;
        usize::try_from(found).map_err(|_| damaged(format!("pages of {found} bytes")))
    }

    fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("strings and numbers are JSON")
    }

    /// Bytes of the file with this header; `None`: more than a number holds.
    fn file_bytes(&self, header_bytes: u64) -> Option<u64> {
        let page = self.page_bytes.checked_add(CHECKSUM_BYTES)?;
        let pages = page.checked_mul(self.n_pages() as u64)?;
        pages.checked_add(FRONT_BYTES + DIGEST_BYTES)?.checked_add(header_bytes)
    }
}

/// Writes a file page by page.
pub(super) struct Writer<W> {
    inner: W,
    digest: Sha256,
}

impl<W: Write> Writer<W> {
    /// Bytes that the file will have.
    pub(super) fn len_bytes(header: &Header) -> u64 {
        header.file_bytes(header.to_json().len() as u64).unwrap_or(u64::MAX)
    }

    /// Writes what stands before the pages.
    pub(super) fn begin(inner: W, header: &Header) -> io::Result<Writer<W>> {
        let json = header.to_json();
        let len = u32::try_from(json.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let mut writer = Writer { inner, digest: Sha256::new() };
        writer.put(&MAGIC)?;
        writer.put(&VERSION.to_le_bytes())?;
        writer.put(&len.to_le_bytes())?;
        writer.put(&json)?;
        Ok(writer)
    }

    /// Writes the next page.
    pub(super) fn page(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.put(bytes)?;
        self.put(&checksum(bytes).to_le_bytes())
    }

    /// Writes what stands behind the pages.
    pub(super) fn end(mut self) -> io::Result<()> {
        self.inner.write_all(&self.digest.finalize())?;
        self.inner.flush()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.digest.update(bytes);
        self.inner.write_all(bytes)
    }
}

/// What a file must be to be restored.
#[derive(Clone, Copy, Debug)]
pub(super) struct Expected<'a> {
    pub(super) name: &'a str,
    pub(super) owner: &'a str,
    pub(super) pins: &'a [(String, String)],
    pub(super) page_bytes: u64,
    pub(super) vocab_len: usize,
}

/// A file whose bytes are those that were saved.
#[derive(Debug)]
pub(super) struct Checked<R> {
    source: R,
    header: Header,
    checksums: Vec<u64>,
    first_page: u64,
}

impl<R: Read + Seek> Checked<R> {
    /// Reads the whole file and compares it with what is expected and with its own sums.
    pub(super) fn open(mut source: R, expected: &Expected<'_>) -> Result<Checked<R>, SessionError> {
        let mut digest = Sha256::new();
        let (header, header_bytes, found) = read_front(&mut source, &mut digest)?;
        check_header(&header, expected)?;
        check_length(&header, header_bytes, found)?;
        let mut bytes = vec![0; header.page_len()?];
        let mut checksums = Vec::with_capacity(header.n_pages());
        for page in 0..header.n_pages() {
            take(&mut source, &mut bytes, &mut digest)?;
            let mut saved = [0; CHECKSUM_BYTES as usize];
            take(&mut source, &mut saved, &mut digest)?;
            let sum = checksum(&bytes);
            if sum != u64::from_le_bytes(saved) {
                return Err(SessionError::Page { page });
            }
            checksums.push(sum);
        }
        let mut saved = [0; DIGEST_BYTES as usize];
        source.read_exact(&mut saved).map_err(unread)?;
        if saved[..] != digest.finalize()[..] {
            return Err(SessionError::Digest);
        }
        Ok(Checked { source, header, checksums, first_page: FRONT_BYTES + header_bytes })
    }

    pub(super) fn header(&self) -> &Header {
        &self.header
    }

    /// The bytes of a page, compared with its checksum once more: the file may have changed since.
    pub(super) fn page(&mut self, page: usize, bytes: &mut [u8]) -> Result<(), SessionError> {
        let stride = self.header.page_bytes + CHECKSUM_BYTES;
        let start = self.first_page + page as u64 * stride;
        self.source.seek(SeekFrom::Start(start)).map_err(unread)?;
        self.source.read_exact(bytes).map_err(unread)?;
        if checksum(bytes) == self.checksums[page] {
            Ok(())
        } else {
            Err(SessionError::Page { page })
        }
    }
}

/// The header alone, for callers who need no page: of the name and owner, and whole. The pages may be damaged.
pub(super) fn peek(
    mut source: impl Read + Seek,
    (name, owner): (&str, &str),
) -> Result<Header, SessionError> {
    let (header, header_bytes, found) = read_front(&mut source, &mut Sha256::new())?;
    check_owner(&header, name, owner)?;
    check_length(&header, header_bytes, found)?;
    Ok(header)
}

/// Compares a header with what is expected; the pages may be damaged.
pub(super) fn check_header(header: &Header, expected: &Expected<'_>) -> Result<(), SessionError> {
    check_owner(header, expected.name, expected.owner)?;
    check_pins(header, expected)?;
    check_pages(header, expected)
}

/// The header, its length, and the bytes of the file.
fn read_front(
    source: &mut (impl Read + Seek),
    digest: &mut Sha256,
) -> Result<(Header, u64, u64), SessionError> {
    let found = source.seek(SeekFrom::End(0)).map_err(unread)?;
    source.rewind().map_err(unread)?;
    let (header, header_bytes) = read_header(source, found, digest)?;
    Ok((header, header_bytes, found))
}

fn check_length(header: &Header, header_bytes: u64, found: u64) -> Result<(), SessionError> {
    let expected = header.file_bytes(header_bytes).unwrap_or(u64::MAX);
    if expected != found {
        return Err(SessionError::Length { expected, found });
    }
    Ok(())
}

/// The header, and its length. Nothing larger than the file is allocated.
fn read_header(
    source: &mut impl Read,
    found: u64,
    digest: &mut Sha256,
) -> Result<(Header, u64), SessionError> {
    let least = FRONT_BYTES + DIGEST_BYTES;
    let mut magic = [0; 8];
    if found < least {
        return Err(SessionError::Length { expected: least, found });
    }
    take(source, &mut magic, digest)?;
    if magic != MAGIC {
        return Err(SessionError::NotASession);
    }
    let version = take_u32(source, digest)?;
    if version != VERSION {
        return Err(SessionError::Version { expected: VERSION, found: version });
    }
    let header_bytes = u64::from(take_u32(source, digest)?);
    if least + header_bytes > found {
        return Err(SessionError::Length { expected: least + header_bytes, found });
    }
    let mut json = vec![0; header_bytes as usize];
    take(source, &mut json, digest)?;
    let header = serde_json::from_slice(&json)
        .map_err(|error| SessionError::Header { problem: error.to_string() })?;
    Ok((header, header_bytes))
}

fn damaged(problem: String) -> SessionError {
    SessionError::Header { problem }
}

/// Whose it is, and that its memory is the one of what it holds.
fn check_owner(header: &Header, name: &str, owner: &str) -> Result<(), SessionError> {
    if header.name != name || header.owner != owner {
        return Err(SessionError::Owner { name: name.to_owned() });
    }
    let expected = header.life.memory(&header.name, &header.state, &header.tokens);
    if header.memory != expected || header.memory.rev == 0 {
        let (expected, found) = (expected.context_id(), header.memory.context_id());
        return Err(damaged(format!("expected memory {expected}, found {found}")));
    }
    Ok(())
}

fn check_pins(header: &Header, expected: &Expected<'_>) -> Result<(), SessionError> {
    for (pin, wanted) in expected.pins {
        let found = header.pins.iter().find(|(name, _)| name == pin);
        let found = found.map_or("nothing", |(_, value)| value);
        if found != wanted {
            let (pin, expected) = (pin.clone(), wanted.clone());
            return Err(SessionError::Pin { pin, expected, found: found.to_owned() });
        }
    }
    let (wanted, found) = (expected.pins.len(), header.pins.len());
    if wanted != found {
        return Err(damaged(format!("expected {wanted} pins, found {found}")));
    }
    Ok(())
}

fn check_pages(header: &Header, expected: &Expected<'_>) -> Result<(), SessionError> {
    if header.page_bytes != expected.page_bytes {
        let (wanted, found) = (expected.page_bytes, header.page_bytes);
        return Err(damaged(format!("expected pages of {wanted} bytes, found {found}")));
    }
    if header.tokens.is_empty() || !header.tokens.len().is_multiple_of(PAGE_TOKENS) {
        let found = header.tokens.len();
        let problem = format!("expected tokens in multiples of {PAGE_TOKENS}, found {found}");
        return Err(damaged(problem));
    }
    match header.tokens.iter().find(|&&id| id as usize >= expected.vocab_len) {
        Some(id) => {
            Err(damaged(format!("expected token ids below {}, found {id}", expected.vocab_len)))
        }
        None => Ok(()),
    }
}

fn take_u32(source: &mut impl Read, digest: &mut Sha256) -> Result<u32, SessionError> {
    let mut bytes = [0; 4];
    take(source, &mut bytes, digest)?;
    Ok(u32::from_le_bytes(bytes))
}

fn take(source: &mut impl Read, bytes: &mut [u8], digest: &mut Sha256) -> Result<(), SessionError> {
    source.read_exact(bytes).map_err(unread)?;
    digest.update(bytes);
    Ok(())
}

fn unread(source: io::Error) -> SessionError {
    SessionError::Io { path: "session file".into(), source }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;

    const PAGE_BYTES: usize = 96;

    fn pins() -> Vec<(String, String)> {
        [("model_sha256", "abc"), ("kv_dtype", "F16")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .to_vec()
    }

    /// With the memory that follows from the rest.
    fn remembered(header: Header) -> Header {
        let memory = header.life.memory(&header.name, &header.state, &header.tokens);
        Header { memory, ..header }
    }

    fn header(n_pages: usize) -> Header {
        remembered(Header {
            name: "talk".to_owned(),
            owner: "me".to_owned(),
            pins: pins(),
            life: Life { lineage: "first".to_owned(), rev: 1 },
            state: SessionState { system_rev: "none".to_owned(), policy: Vec::new() },
            memory: Memory { rev: 0, hash: String::new() },
            page_bytes: PAGE_BYTES as u64,
            tokens: (0..n_pages * PAGE_TOKENS).map(|i| (i % 300) as u32).collect(),
        })
    }

    fn page(n: usize) -> Vec<u8> {
        (0..PAGE_BYTES).map(|i| (i * 7 + n * 31) as u8).collect()
    }

    fn written(header: &Header) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut writer = Writer::begin(&mut bytes, header).unwrap();
        (0..header.n_pages()).for_each(|n| writer.page(&page(n)).unwrap());
        writer.end().unwrap();
        bytes
    }

    fn open(bytes: &[u8]) -> Result<Checked<Cursor<&[u8]>>, SessionError> {
        let pins = pins();
        let page_bytes = PAGE_BYTES as u64;
        let expected =
            Expected { name: "talk", owner: "me", pins: &pins, page_bytes, vocab_len: 300 };
        Checked::open(Cursor::new(bytes), &expected)
    }

    #[test]
    fn what_was_written_is_read() {
        let header = header(3);
        let bytes = written(&header);
        assert_eq!(bytes.len() as u64, Writer::<Vec<u8>>::len_bytes(&header));
        let mut checked = open(&bytes).unwrap();
        assert_eq!(*checked.header(), header);
        for n in [2, 0, 1] {
            let mut found = [0; PAGE_BYTES];
            checked.page(n, &mut found).unwrap();
            assert_eq!(found[..], page(n));
        }
    }

    #[test]
    fn each_pin_and_each_claim_of_the_header_is_compared() {
        let refused = |change: &dyn Fn(&mut Header)| {
            let mut header = header(1);
            change(&mut header);
            open(&written(&remembered(header))).unwrap_err()
        };
        for at in 0..pins().len() {
            let error = refused(&|header| header.pins[at].1.push('x'));
            assert!(matches!(&error, SessionError::Pin { pin, .. } if *pin == pins()[at].0));
            assert!(matches!(
                refused(&|header| drop(header.pins.remove(at))),
                SessionError::Pin { .. }
            ));
        }
        let more = ("more".to_owned(), "1".to_owned());
        assert!(matches!(
            refused(&|header| header.pins.push(more.clone())),
            SessionError::Header { .. }
        ));
        for field in [
            |header: &mut Header| header.name.push('x'),
            |header: &mut Header| header.owner.push('x'),
        ] {
            assert!(matches!(refused(&field), SessionError::Owner { .. }));
        }
        for claim in [
            |header: &mut Header| header.tokens[0] = 300,
            |header: &mut Header| header.tokens.push(1),
            |header: &mut Header| header.tokens.clear(),
            |header: &mut Header| header.page_bytes = 97,
            |header: &mut Header| header.page_bytes = u64::MAX,
        ] {
            assert!(matches!(refused(&claim), SessionError::Header { .. }));
        }
    }

    /// A header is believed without its pages, so that its own parts have to fit together.
    #[test]
    fn a_header_that_is_read_alone_is_whole_or_refused() {
        let whole = header(2);
        let at = |bytes: &[u8]| peek(Cursor::new(bytes), ("talk", "me"));
        assert_eq!(at(&written(&whole)).unwrap(), whole);
        for change in [
            |header: &mut Header| header.memory.rev = 2,
            |header: &mut Header| header.life.rev = 2,
            |header: &mut Header| header.life.lineage.push('x'),
            |header: &mut Header| header.state.system_rev.push('x'),
            |header: &mut Header| header.state.policy.push(("tools".into(), "x".into())),
            |header: &mut Header| header.tokens[0] += 1,
        ] {
            let mut changed = whole.clone();
            change(&mut changed);
            let error = at(&written(&changed)).unwrap_err();
            assert!(matches!(error, SessionError::Header { .. }), "{error}");
        }
        let none = Header { life: Life { rev: 0, ..whole.life.clone() }, ..whole.clone() };
        assert!(matches!(at(&written(&remembered(none))), Err(SessionError::Header { .. })));
        let bytes = written(&whole);
        let error = at(&bytes[..bytes.len() - 1]).unwrap_err();
        assert!(matches!(error, SessionError::Length { .. }), "{error}");
        let error = peek(Cursor::new(&bytes[..]), ("talk", "you")).unwrap_err();
        assert!(matches!(error, SessionError::Owner { .. }), "{error}");
    }

    #[test]
    fn another_version_and_another_file_are_named() {
        let mut bytes = written(&header(1));
        for other in [1, 3] {
            bytes[8] = other;
            let found = u32::from(other);
            let error = open(&bytes).unwrap_err();
            assert!(
                matches!(error, SessionError::Version { expected: 2, found: at } if at == found)
            );
        }
        assert!(matches!(open(&[b'x'; 100]).unwrap_err(), SessionError::NotASession));
    }

    /// The mutation: with the sums of a changed file corrected, as they would be without a check, the
    /// changed page is read as if it were the saved one.
    #[test]
    fn mutation_without_the_sums_a_flipped_bit_is_read() {
        let header = header(2);
        let mut bytes = written(&header);
        let first_page = bytes.len() - DIGEST_BYTES as usize - 2 * (PAGE_BYTES + 8);
        bytes[first_page] ^= 1;
        assert!(matches!(open(&bytes).unwrap_err(), SessionError::Page { page: 0 }));
        let sum = checksum(&bytes[first_page..first_page + PAGE_BYTES]);
        bytes[first_page + PAGE_BYTES..][..8].copy_from_slice(&sum.to_le_bytes());
        assert!(matches!(open(&bytes).unwrap_err(), SessionError::Digest));
        let end = bytes.len() - DIGEST_BYTES as usize;
        let digest = Sha256::digest(&bytes[..end]);
        bytes[end..].copy_from_slice(&digest);
        let mut found = [0; PAGE_BYTES];
        open(&bytes).unwrap().page(0, &mut found).unwrap();
        assert_ne!(found[..], page(0));
    }

    #[test]
    fn a_page_that_changes_behind_the_check_is_refused() {
        let bytes = written(&header(1));
        let mut checked = open(&bytes).unwrap();
        checked.checksums[0] ^= 1;
        let error = checked.page(0, &mut [0; PAGE_BYTES]).unwrap_err();
        assert!(matches!(error, SessionError::Page { page: 0 }));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn any_flipped_bit_is_refused(at in any::<prop::sample::Index>(), bit in 0..8_u32) {
            let mut bytes = written(&header(2));
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(open(&bytes).is_err(), "byte {at}");
        }

        #[test]
        fn any_other_length_is_refused(cut in any::<prop::sample::Index>(), more in 0..64_usize) {
            let mut bytes = written(&header(2));
            let cut = cut.index(bytes.len());
            prop_assert!(open(&bytes[..cut]).is_err(), "{cut} bytes");
            bytes.resize(bytes.len() + more + 1, 0);
            prop_assert!(open(&bytes).is_err(), "{more} more");
        }

        #[test]
        fn no_bytes_at_all_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), front in any::<bool>()) {
            let mut bytes = bytes;
            if front {
                let version = VERSION.to_le_bytes();
                bytes.splice(0..0, MAGIC.into_iter().chain(version));
            }
            prop_assert!(open(&bytes).is_err());
        }
    }
}
