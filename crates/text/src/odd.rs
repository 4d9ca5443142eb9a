//! Characters by which a text says something else to a model than to a person who reads it (G-21, signal 2). They
//! are counted and never removed: some languages need them, and what a message says is the client's.

/// How many there are of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OddCharacters {
    /// Without width, where no script needs them: between ASCII characters, or of the block of tags.
    pub zero_width: usize,
    /// That turn the direction of the text after them around.
    pub bidi: usize,
    /// Words of Latin letters and letters of another alphabet that look like them.
    pub mixed_words: usize,
}

/// An alphabet whose letters are taken for those of another one.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Alphabet {
    Latin,
    Greek,
    Cyrillic,
    FullWidth,
}

impl OddCharacters {
    /// Counts those of a text.
    #[must_use]
    pub fn of(text: &str) -> OddCharacters {
        let mut odd = OddCharacters::default();
        let mut before = ' ';
        let mut chars = text.chars().peekable();
        while let Some(char) = chars.next() {
            let is_among_ascii = before.is_ascii() || chars.peek().is_some_and(char::is_ascii);
            odd.zero_width += usize::from(is_zero_width(char, is_among_ascii));
            odd.bidi +=
                usize::from(matches!(char, '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}'));
            before = char;
        }
        let words = text.split(|char: char| !char.is_alphanumeric() && !is_zero_width(char, true));
        odd.mixed_words = words.filter(|word| is_mixed(word)).count();
        odd
    }

    /// The counts of two texts together.
    #[must_use]
    pub fn and(self, other: OddCharacters) -> OddCharacters {
        OddCharacters {
            zero_width: self.zero_width + other.zero_width,
            bidi: self.bidi + other.bidi,
            mixed_words: self.mixed_words + other.mixed_words,
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_none(self) -> bool {
        self == OddCharacters::default()
    }
}

/// Joiners belong to emoji and to several scripts; next to ASCII characters they join nothing.
fn is_zero_width(char: char, is_among_ascii: bool) -> bool {
    match char {
        '\u{200C}' | '\u{200D}' | '\u{00AD}' => is_among_ascii,
        '\u{200B}'
        | '\u{2060}'..='\u{2064}'
        | '\u{FEFF}'
        | '\u{180E}'
        | '\u{E0000}'..='\u{E007F}' => true,
        _ => false,
    }
}

fn is_mixed(word: &str) -> bool {
    let mut alphabets = word.chars().filter_map(alphabet);
    let Some(first) = alphabets.next() else { return false };
    let has_latin = word.chars().any(|char| alphabet(char) == Some(Alphabet::Latin));
    has_latin && (alphabets.any(|it| it != first) || first != Alphabet::Latin)
}

fn alphabet(char: char) -> Option<Alphabet> {
    match char {
        'a'..='z' | 'A'..='Z' => Some(Alphabet::Latin),
        '\u{0370}'..='\u{03FF}' => Some(Alphabet::Greek),
        '\u{0400}'..='\u{052F}' => Some(Alphabet::Cyrillic),
        '\u{FF21}'..='\u{FF3A}' | '\u{FF41}'..='\u{FF5A}' => Some(Alphabet::FullWidth),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(text: &str) -> [usize; 3] {
        let OddCharacters { zero_width, bidi, mixed_words } = OddCharacters::of(text);
        [zero_width, bidi, mixed_words]
    }

    #[test]
    fn g21_hidden_and_look_alike_characters_are_counted() {
        assert_eq!(counts("ig\u{200b}nore\u{feff} a\u{2060}ll"), [3, 0, 0]);
        assert_eq!(counts("a\u{202e}txt.exe \u{2066}b\u{2069}"), [0, 3, 0]);
        assert_eq!(counts("p\u{0430}ypal and \u{0410}dmin and \u{03b1}lpha"), [0, 0, 3]);
        assert_eq!(counts("p\u{200b}\u{0430}ypal"), [1, 0, 1]);
        assert_eq!(counts("\u{e0041}\u{e0042}"), [2, 0, 0]);
    }

    #[test]
    fn what_languages_and_emoji_need_is_not_odd() {
        for text in [
            "plain text, naïve café — ok",
            "Привет, мир",
            "γειά σου",
            "你好",
            "مرحبا",
            "می\u{200c}خواهم",
            "👩\u{200d}👩\u{200d}👧",
            "Latin и кириллица",
            "µm and Ω",
        ] {
            assert!(OddCharacters::of(text).is_none(), "{text}: {:?}", OddCharacters::of(text));
        }
    }
}
