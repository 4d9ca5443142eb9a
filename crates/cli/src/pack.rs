//! The pack that rides inside the binary: the sample corpus, and the pages that say what to do about a fault.

use include_dir::{Dir, File, include_dir};

static STABILITY: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/../../packs/stability");

/// The whole pack.
pub(crate) fn stability() -> &'static Dir<'static> {
    &STABILITY
}

/// A document of the corpus, or a fix page.
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

    /// The guard that it is about, such as `G-17`, where its heading names one.
    pub(crate) fn guard(self) -> Option<&'static str> {
        let (guard, _) = self.title().split_once(": ")?;
        guard.strip_prefix("G-").filter(|number| number.parse::<u8>().is_ok()).map(|_| guard)
    }
}

/// The documents of the corpus, by name: what a gold set asks about.
pub(crate) fn pages() -> Vec<Page> {
    let mut pages = read("docs");
    pages.sort_by_key(|page| page.name);
    pages
}

/// The fix pages: breakpoints and guards by number, then the others. They are no part of the corpus, so that a word
/// changed in one changes no measurement.
pub(crate) fn fixes() -> Vec<Page> {
    let mut pages = read("fix");
    let rank = |page: &Page| match (page.title().starts_with("Breakpoint"), page.guard()) {
        (true, _) => 0,
        (false, Some(_)) => 1,
        (false, None) => 2,
    };
    pages.sort_by_key(|page| (rank(page), page.title()));
    pages
}

fn read(folder: &str) -> Vec<Page> {
    STABILITY.get_dir(folder).into_iter().flat_map(Dir::files).filter_map(Page::of).collect()
}

/// The documents one after the other: some text for who brings none.
pub(crate) fn sample_text() -> String {
    pages().iter().map(|page| page.text).collect::<Vec<_>>().join("\n\n")
}
