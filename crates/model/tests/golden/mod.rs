//! Reads the files under `golden/`, whose READMEs describe the layout.

use std::path::Path;

/// Little-endian numbers of a golden file, in order.
pub(crate) struct Reader {
    bytes: Vec<u8>,
    at: usize,
}

impl Reader {
    /// Opens `golden/<name>`, which starts with `magic` and version 1.
    pub(crate) fn open(name: &str, magic: &[u8; 8]) -> Reader {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden").join(name);
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert_eq!(&bytes[..8], magic, "{}", path.display());
        let mut reader = Reader { bytes, at: 8 };
        assert_eq!(reader.u32(), 1, "version of {}", path.display());
        reader
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.next())
    }

    pub(crate) fn u32s(&mut self, len: usize) -> Vec<u32> {
        (0..len).map(|_| self.u32()).collect()
    }

    pub(crate) fn f32s(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| f32::from_le_bytes(self.next())).collect()
    }

    /// Checks that nothing is left.
    pub(crate) fn end(&self) {
        assert_eq!(self.at, self.bytes.len(), "bytes read of the golden file");
    }

    fn next(&mut self) -> [u8; 4] {
        let bytes = self.bytes[self.at..self.at + 4].try_into().expect("four bytes are four bytes");
        self.at += 4;
        bytes
    }
}
