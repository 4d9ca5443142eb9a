//! Memory for weights, pages and activations: zeroed, 64-byte aligned, in regions that may use huge
//! pages.
//!
//! Weights are cut from regions of 32 MiB, so that small matrices share huge pages: reading a
//! model streams 10 to 20 % faster than from 4 KiB pages.
#![expect(unsafe_code, reason = "aligned allocation, and disjoint parts of one allocation")]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

const REGION_BYTES: usize = 32 << 20;
const HUGE_PAGE: usize = 2 << 20;
/// Of x86-64. Some AArch64 systems have pages of 16 or 64 KiB, and refuse advice about a range that
/// begins inside one; nothing is then given back.
const SMALL_PAGE: usize = 4 << 10;
const LINE: usize = 64;

/// Hands out parts of regions; a region is freed when its last part is dropped.
#[derive(Debug, Default)]
pub(crate) struct Arena {
    current: Mutex<Option<(Arc<Region>, usize)>>,
}

/// Exclusive zeroed bytes, 64-byte aligned.
#[derive(Debug)]
pub(crate) struct Bytes {
    start: NonNull<u8>,
    len: usize,
    // Keeps the allocation that `start` points into.
    _region: Arc<Region>,
}

#[derive(Debug)]
struct Region {
    start: NonNull<u8>,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Heap(Layout),
    #[cfg(target_os = "linux")]
    Mapping {
        base: NonNull<u8>,
        len: usize,
    },
}

// SAFETY: a region is a plain allocation; it is only freed through its last owner.
unsafe impl Send for Region {}
// SAFETY: a shared region gives no access to its bytes.
unsafe impl Sync for Region {}
// SAFETY: `Bytes` owns its range alone, like a `Box<[u8]>`.
unsafe impl Send for Bytes {}
// SAFETY: shared `Bytes` give shared access to plain bytes, like a `Box<[u8]>`.
unsafe impl Sync for Bytes {}

/// Zeros that take memory only where they are written, 64-byte aligned.
#[derive(Debug)]
pub(crate) struct Floats(Bytes);

impl Floats {
    /// `len` zeros, or `None` when the system has none.
    pub(crate) fn zeros(len: usize) -> Option<Floats> {
        let len_bytes = len.checked_mul(size_of::<f32>())?;
        Some(Floats(Bytes::of(Region::new(len_bytes.max(1), Pages::Small)?, len_bytes)))
    }
}

impl Deref for Floats {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        let len = self.0.len / size_of::<f32>();
        // SAFETY: as for `Bytes`, which is aligned to more than an f32 and has only zeros and what
        // was written as f32.
        unsafe { std::slice::from_raw_parts(self.0.start.as_ptr().cast(), len) }
    }
}

impl DerefMut for Floats {
    fn deref_mut(&mut self) -> &mut [f32] {
        let len = self.0.len / size_of::<f32>();
        // SAFETY: as for `deref`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.0.start.as_ptr().cast(), len) }
    }
}

/// Gives the free pages of the heap back to the system. The allocator keeps what was freed below
/// something in use, after a load about as much as the tokenizer holds.
pub(crate) fn release_free_pages() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: no argument but a number, and safe on any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Unmaps the pages of the program's own code and constants. The system maps sixteen around each
/// that was touched, and a load touches most of the program once; what runs next is mapped again
/// from the page cache.
pub(crate) fn release_code() {
    // A debugger's breakpoints are changes to these pages; they are seen below, but only if they are
    // there before.
    #[cfg(all(target_os = "linux", not(debug_assertions)))]
    if let Some(program) =
        std::env::current_exe().ok().and_then(|path| path.into_os_string().into_string().ok())
        && let Ok(smaps) = std::fs::read_to_string("/proc/self/smaps")
    {
        for range in unchanged(&smaps, &program) {
            let start = std::ptr::without_provenance_mut(range.start);
            // SAFETY: the pages are those of a file, nobody can write to them, and none was changed,
            // so that they are read from the file again when they are touched.
            unsafe { libc::madvise(start, range.len(), libc::MADV_DONTNEED) };
        }
    }
}

/// The mappings of `program` that have no writable and no changed page (`Anonymous`), out of a
/// process's `smaps`. Segments that were relocated, unpacked or moved to huge pages have such pages.
#[cfg(any(test, all(target_os = "linux", not(debug_assertions))))]
fn unchanged(smaps: &str, program: &str) -> Vec<std::ops::Range<usize>> {
    let mut ranges = Vec::new();
    let mut current = None;
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((start, end)) = first.split_once('-') {
            let address = |text| usize::from_str_radix(text, 16).ok();
            let readable = words.next().is_some_and(|rights| !rights.contains('w'));
            let is_program = line.strip_suffix(program).is_some_and(|rest| rest.ends_with(' '));
            let range = address(start).zip(address(end)).map(|(start, end)| start..end);
            current = range.filter(|_| readable && is_program);
        } else if first == "Anonymous:" {
            ranges.extend(current.take().filter(|_| words.next() == Some("0")));
        }
    }
    ranges
}

impl Arena {
    /// `len` zeroed bytes, or `None` when the system has none.
    pub(crate) fn bytes(&self, len: usize) -> Option<Bytes> {
        let padded = len.checked_next_multiple_of(LINE)?;
        if padded > REGION_BYTES / 4 {
            return Bytes::alone(len);
        }
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let (region, used) = match current.take() {
            Some((region, used)) if used + padded <= REGION_BYTES => (region, used),
            _ => (Arc::new(Region::new(REGION_BYTES, Pages::Huge)?), 0),
        };
        *current = Some((Arc::clone(&region), used + padded));
        // SAFETY: `used + padded` is at most the region's size.
        let start = unsafe { region.start.add(used) };
        Some(Bytes { start, len, _region: region })
    }
}

impl Arena {
    /// Gives back what was touched of the current region behind its last part: the rest of a huge
    /// page. The region stays in use.
    pub(crate) fn release_rest(&self) {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((region, used)) = &*current else { return };
        #[cfg(target_os = "linux")]
        if let Source::Mapping { .. } = region.source {
            let start = used.next_multiple_of(SMALL_PAGE);
            // SAFETY: no part ends behind the region, which is whole pages.
            let rest = unsafe { region.start.add(start) };
            // SAFETY: the range is inside the region, begins on a page or is refused, and holds no
            // part yet; its pages are zeroed when they are touched again.
            unsafe {
                libc::madvise(rest.as_ptr().cast(), REGION_BYTES - start, libc::MADV_DONTNEED)
            };
        }
        #[cfg(not(target_os = "linux"))]
        let _ = (region, used);
    }
}

impl Bytes {
    /// Bytes with an allocation of their own.
    pub(crate) fn alone(len: usize) -> Option<Bytes> {
        Some(Bytes::of(Region::new(len.max(1), Pages::Huge)?, len))
    }

    /// The first `len` bytes of a region.
    fn of(region: Region, len: usize) -> Bytes {
        Bytes { start: region.start, len, _region: Arc::new(region) }
    }
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the range lies inside the region, which lives as long as `self`; the bytes were
        // zeroed at allocation, and no other `Bytes` has them.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Bytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

/// How memory is touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pages {
    /// All of it, again and again: from this size on in huge pages.
    Huge,
    /// Often only its start: in pages as small as they come.
    Small,
}

impl Pages {
    /// Length from which a region is mapped. The heap would hand out memory that was used before,
    /// and write zeros over all of it.
    fn mapped_from(self) -> usize {
        match self {
            Pages::Huge => HUGE_PAGE,
            Pages::Small => 64 << 10,
        }
    }

    /// Bytes of a mapping at `base` before its first one in use: up to a huge page, or a place in a
    /// small one that changes from mapping to mapping. An operation reads the starts of several
    /// buffers, and those of all pages share a few lines of the first cache.
    #[cfg(target_os = "linux")]
    fn skipped(self, base: usize) -> usize {
        static N_SMALL: AtomicUsize = AtomicUsize::new(0);
        match self {
            Pages::Huge => base.next_multiple_of(HUGE_PAGE) - base,
            Pages::Small => N_SMALL.fetch_add(1, Ordering::Relaxed) * 5 * LINE % SMALL_PAGE,
        }
    }

    /// No more is skipped.
    #[cfg(target_os = "linux")]
    fn most_skipped(self) -> usize {
        match self {
            Pages::Huge => HUGE_PAGE,
            Pages::Small => SMALL_PAGE,
        }
    }
}

impl Region {
    fn new(len: usize, pages: Pages) -> Option<Region> {
        if len >= pages.mapped_from()
            && let Some(region) = Region::mapped(len, pages)
        {
            return Some(region);
        }
        let layout = Layout::from_size_align(len, LINE).ok()?;
        // SAFETY: callers ask for at least one byte.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        Some(Region { start, source: Source::Heap(layout) })
    }

    /// Pages from the system, zeroed when first touched.
    #[cfg(target_os = "linux")]
    fn mapped(len: usize, pages: Pages) -> Option<Region> {
        let mapped_len = len.checked_add(pages.most_skipped())?;
        let (prot, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: an anonymous mapping at an address of the system's choice touches nothing else.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), mapped_len, prot, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return None;
        }
        let base = NonNull::new(base.cast::<u8>())?;
        // SAFETY: the mapping is longer than `len` by the most that is skipped.
        let start = unsafe { base.add(pages.skipped(base.as_ptr().addr())) };
        // The pages behind `len` stay small, or the last huge one would take more than is needed.
        let (from, len, advice) = match pages {
            Pages::Huge => (start, len, libc::MADV_HUGEPAGE),
            Pages::Small => (base, mapped_len, libc::MADV_NOHUGEPAGE),
        };
        // SAFETY: the range is inside the mapping and starts on a page; the advice changes no
        // bytes, and a refusal changes nothing.
        unsafe { libc::madvise(from.as_ptr().cast(), len, advice) };
        Some(Region { start, source: Source::Mapping { base, len: mapped_len } })
    }

    #[cfg(not(target_os = "linux"))]
    fn mapped(_len: usize, _pages: Pages) -> Option<Region> {
        None
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        match self.source {
            // SAFETY: `start` was allocated with this layout and is freed once.
            Source::Heap(layout) => unsafe { dealloc(self.start.as_ptr(), layout) },
            #[cfg(target_os = "linux")]
            Source::Mapping { base, len } => {
                // SAFETY: exactly the mapping that `mapped` made, and nobody has parts of it left.
                unsafe { libc::munmap(base.as_ptr().cast(), len) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_unchanged_pages_of_the_program_are_released() {
        let mapping = |range: &str, rights: &str, path: &str, anonymous: u32| {
            format!(
                "{range} {rights} 00000000 fe:00 17    {path}\nRss: 8 kB\nAnonymous: {anonymous} kB\n"
            )
        };
        let smaps = [
            mapping("1000-3000", "r--p", "/bin/x", 0),
            mapping("3000-9000", "r-xp", "/bin/x", 0),
            mapping("9000-a000", "r--p", "/bin/x", 4),
            mapping("a000-b000", "rw-p", "/bin/x", 0),
            mapping("b000-c000", "r-xp", "/usr/bin/x", 0),
            mapping("c000-d000", "r-xp", "", 0),
        ];
        assert_eq!(unchanged(&smaps.concat(), "/bin/x"), [0x1000..0x3000, 0x3000..0x9000]);
    }

    #[test]
    fn zeros_are_zeros_and_too_many_are_refused() {
        for len in [0, 3, 1 << 20] {
            let mut zeros = Floats::zeros(len).expect("memory");
            assert_eq!(*zeros, vec![0.0; len]);
            zeros.fill(1.0);
            assert_eq!(*zeros, vec![1.0; len]);
        }
        assert!(Floats::zeros(usize::MAX / 2).is_none());
        assert!(Floats::zeros(1 << 58).is_none());
    }

    #[test]
    fn parts_are_aligned_zeroed_and_disjoint() {
        let arena = Arena::default();
        let mut parts: Vec<Bytes> =
            [1, 63, 64, 65, 10 << 20, 7 << 20, 7 << 20, 7 << 20, 7 << 20, 7 << 20]
                .into_iter()
                .map(|len| arena.bytes(len).expect("memory"))
                .collect();
        for part in &parts {
            assert!(part.as_ptr().addr().is_multiple_of(64));
            assert!(part.iter().all(|&b| b == 0));
        }
        for (i, part) in parts.iter_mut().enumerate() {
            part.fill(i as u8 + 1);
        }
        arena.release_rest();
        let next = arena.bytes(1 << 20).expect("memory");
        assert!(next.iter().all(|&b| b == 0));
        drop(arena);
        for (i, part) in parts.iter().enumerate() {
            assert!(part.iter().all(|&b| b == i as u8 + 1));
        }
    }
}
