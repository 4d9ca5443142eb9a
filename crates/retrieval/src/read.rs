//! Files to documents: format by name, canonical text, outline.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use unicode_normalization::UnicodeNormalization;

use crate::hash::sha256_hex;
use crate::outline::{Outline, sections};
use crate::{Document, DocumentFormat, RetrievalError, html, markdown, nesting};

/// Largest file that is read as one document, 16 MiB; a larger one is an archive, not a document.
pub const MAX_DOCUMENT_BYTES: u64 = 16 << 20;

/// Reads one `.md`, `.txt` or `.html` file. Its `doc_id` and `source_url` are the file name.
///
/// # Errors
/// [`RetrievalError::UnknownFormat`], [`RetrievalError::TooLarge`], [`RetrievalError::BadUtf8`],
/// [`RetrievalError::TooDeep`], [`RetrievalError::Io`].
pub fn read_document(path: &Path) -> Result<Document, RetrievalError> {
    let name = path.file_name().unwrap_or(path.as_os_str());
    read_named(path, &name.to_string_lossy())
}

/// Reads every document under `root`, in order of name. `doc_id` and `source_url` are the path
/// below `root` with `/` between its parts. Files of other formats and names that start with a
/// dot are passed over; symbolic links are not followed.
///
/// # Errors
/// As [`read_document`]; the first bad document ends the reading, none is left out silently.
pub fn read_folder(root: &Path) -> Result<Vec<Document>, RetrievalError> {
    let mut files = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        let failed = |source| RetrievalError::Io { path: folder.clone(), source };
        for entry in fs::read_dir(&folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let kind = entry.file_type().map_err(failed)?;
            let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
            if hidden {
                continue;
            }
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() && format_of(&entry.path()).is_some() {
                files.push(entry.path());
            }
        }
    }
    let mut named: Vec<(String, PathBuf)> =
        files.into_iter().map(|path| (name_below(root, &path), path)).collect();
    named.sort();
    named.iter().map(|(name, path)| read_named(path, name)).collect()
}

fn name_below(root: &Path, path: &Path) -> String {
    let below = path.strip_prefix(root).unwrap_or(path);
    let parts: Vec<_> = below.iter().map(OsStr::to_string_lossy).collect();
    parts.join("/")
}

fn read_named(path: &Path, name: &str) -> Result<Document, RetrievalError> {
    let failed = |source| RetrievalError::Io { path: path.to_owned(), source };
    let format =
        format_of(path).ok_or_else(|| RetrievalError::UnknownFormat { path: path.to_owned() })?;
    check_size(name, fs::metadata(path).map_err(failed)?.len())?;
    Document::parse(name, name, format, &fs::read(path).map_err(failed)?)
}

fn format_of(path: &Path) -> Option<DocumentFormat> {
    let ending = path.extension()?.to_str()?.to_ascii_lowercase();
    match ending.as_str() {
        "md" | "markdown" => Some(DocumentFormat::Markdown),
        "txt" | "text" => Some(DocumentFormat::PlainText),
        "html" | "htm" => Some(DocumentFormat::Html),
        _ => None,
    }
}

fn check_size(doc_id: &str, found: u64) -> Result<(), RetrievalError> {
    if found > MAX_DOCUMENT_BYTES {
        let doc_id = doc_id.to_owned();
        return Err(RetrievalError::TooLarge { doc_id, limit: MAX_DOCUMENT_BYTES, found });
    }
    Ok(())
}

impl Document {
    /// Makes a document out of the bytes of a file.
    ///
    /// # Errors
    /// [`RetrievalError::TooLarge`], [`RetrievalError::BadUtf8`], [`RetrievalError::TooDeep`].
    pub fn parse(
        doc_id: &str,
        source_url: &str,
        format: DocumentFormat,
        bytes: &[u8],
    ) -> Result<Document, RetrievalError> {
        check_size(doc_id, bytes.len() as u64)?;
        let source = std::str::from_utf8(bytes).map_err(|error| RetrievalError::BadUtf8 {
            doc_id: doc_id.to_owned(),
            valid_up_to: error.valid_up_to(),
        })?;
        let mut lang = "und".to_owned();
        let (text, outline): (String, Outline) = match format {
            DocumentFormat::Markdown => {
                let text = canonical(source);
                let outline = markdown::scan(&text);
                (text, outline)
            }
            DocumentFormat::PlainText => {
                let text = canonical(source);
                let outline = markdown::scan_plain(&text);
                (text, outline)
            }
            DocumentFormat::Html => {
                nesting::check(doc_id, source)?;
                let page = html::extract(source);
                lang = page.lang.unwrap_or(lang);
                (page.text, page.outline)
            }
        };
        let mut rev = sha256_hex(text.as_bytes());
        rev.truncate(16);
        Ok(Document {
            doc_id: doc_id.to_owned(),
            rev,
            source_url: source_url.to_owned(),
            lang,
            format,
            sections: sections(doc_id, &text, &outline),
            blocks: outline.blocks,
            text,
        })
    }
}

/// NFC, `\n` line ends, no soft hyphen (U+00AD), no byte order mark, no control characters but tab
/// and line end: some vocabularies have no token for them. Idempotent.
pub(crate) fn canonical(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let shown = |c: &char| match c {
        '\u{00AD}' | '\u{FEFF}' => false,
        '\n' | '\t' => true,
        c => !c.is_control(),
    };
    source.chars().filter(shown).nfc().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn markdown(text: &str) -> Document {
        Document::parse("doc.md", "doc.md", DocumentFormat::Markdown, text.as_bytes()).unwrap()
    }

    fn blocks(document: &Document) -> Vec<(crate::BlockKind, &str)> {
        let text = |block: &crate::Block| &document.text[block.span.clone()];
        document.blocks.iter().map(|block| (block.kind, text(block))).collect()
    }

    #[test]
    fn markdown_blocks_are_found() {
        use crate::BlockKind::{Code, Heading, ListItem, Paragraph, Table};
        let document = markdown(
            "---\ntitle: x\n---\n# One [two](http://x) `three` #\r\npara\nmore\n- a\n  b\n- c\n\n\
             | h | i |\n|---|---|\n| 1 | 2 |\n\n```rust\n# no heading\n\n```\n<!-- hidden\nx -->\n\
             Sub\n---\n$$\nx = 1\n$$\n***\n    code\nlast",
        );
        assert_eq!(
            blocks(&document),
            [
                (Heading, "# One [two](http://x) `three` #"),
                (Paragraph, "para\nmore"),
                (ListItem, "- a\n  b"),
                (ListItem, "- c"),
                (Table, "| h | i |\n|---|---|\n| 1 | 2 |"),
                (Code, "```rust\n# no heading\n\n```"),
                (Heading, "Sub\n---"),
                (Code, "$$\nx = 1\n$$"),
                (Code, "code"),
                (Paragraph, "last"),
            ]
        );
        let ids: Vec<&str> = document.sections.iter().map(|s| s.section_id.as_str()).collect();
        assert_eq!(ids, ["doc.md#top", "doc.md#one-two-three", "doc.md#one-two-three/sub"]);
        assert_eq!(document.sections[2].path, ["One two three", "Sub"]);
        assert_eq!(document.sections[2].anchor, "#sub");
    }

    #[test]
    fn equal_headings_get_distinct_stable_ids() {
        let document = markdown("# A\nx\n# A\ny\n# A-2\nz\n# !!\nw\n");
        let ids: Vec<&str> = document.sections.iter().map(|s| s.section_id.as_str()).collect();
        assert_eq!(ids, ["doc.md#a", "doc.md#a-2", "doc.md#a-2-2", "doc.md#section"]);
    }

    #[test]
    fn a_comment_without_end_hides_nothing() {
        let document = markdown("<!-- oops\n\ntext");
        assert_eq!(document.blocks.len(), 2);
        assert_eq!(markdown("<!-- a --> text").blocks.len(), 1);
    }

    #[test]
    fn canonical_text_is_normalised_and_its_hash_is_the_revision() {
        let document = markdown("\u{FEFF}cafe\u{0301}\r\nco\u{00AD}o\u{4}p\rend");
        assert_eq!(document.text, "café\ncoop\nend");
        assert_eq!(document.rev, markdown("café\ncoop\nend").rev);
        assert_ne!(document.rev, markdown("café\ncoop\nEnd").rev);
    }

    #[test]
    fn wrong_files_are_refused_by_name() {
        let bad = Document::parse("a.txt", "a.txt", DocumentFormat::PlainText, b"ab\xff");
        assert_eq!(bad.unwrap_err().to_string(), "document `a.txt`: not UTF-8 from byte 2 on");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.pdf");
        fs::write(&path, "x").unwrap();
        assert!(matches!(read_document(&path), Err(RetrievalError::UnknownFormat { .. })));
        let path = folder.path().join("big.txt");
        fs::File::create(&path).unwrap().set_len(MAX_DOCUMENT_BYTES + 1).unwrap();
        assert!(matches!(read_document(&path), Err(RetrievalError::TooLarge { .. })));
        assert!(matches!(
            read_document(&folder.path().join("none.md")),
            Err(RetrievalError::Io { .. })
        ));
    }

    #[test]
    fn a_folder_is_read_in_order_of_name() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("b")).unwrap();
        for name in ["z.md", "b/a.txt", ".hidden.md", "c.bin", "a.html"] {
            fs::write(folder.path().join(name), "x").unwrap();
        }
        let documents = read_folder(folder.path()).unwrap();
        let ids: Vec<&str> = documents.iter().map(|d| d.doc_id.as_str()).collect();
        assert_eq!(ids, ["a.html", "b/a.txt", "z.md"]);
    }
}
