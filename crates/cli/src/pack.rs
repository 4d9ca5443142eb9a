//! The pack that rides inside the binary: the sample corpus, whose documents are the pages that a diagnosis names.

use include_dir::{Dir, File, include_dir};

static STABILITY: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/../../packs/stability");

/// The whole pack.
pub(crate) fn stability() -> &'static Dir<'static> {
    &STABILITY
}

/// A document of the corpus.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Page {
    /// Its file name without the ending.
    pub(crate) name: &'static str,
    /// Markdown.
    pub(crate) text: &'static str,
}

impl Page {
    fn of(file: &'static File<'static>) -> Option<Page> {
        let name = file.path().file_stem()?.to_str()?;
        Some(Page { name, text: file.contents_utf8()? })
    }

    /// Its heading.
    pub(crate) fn title(self) -> &'static str {
        self.text.lines().next().unwrap_or_default().trim_start_matches('#').trim()
    }
}

/// All documents, by name.
pub(crate) fn pages() -> Vec<Page> {
    let files = STABILITY.get_dir("docs").into_iter().flat_map(Dir::files);
    let mut pages: Vec<Page> = files.filter_map(Page::of).collect();
    pages.sort_by_key(|page| page.name);
    pages
}

/// The documents one after the other: some text for who brings none.
pub(crate) fn sample_text() -> String {
    pages().iter().map(|page| page.text).collect::<Vec<_>>().join("\n\n")
}
