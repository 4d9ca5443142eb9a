//! Markdown for a terminal: headings in bold, paragraphs and items broken at words. Only what our pages use.

/// Widest line: longer ones are hard to read.
const MAX_WIDTH: usize = 100;
/// Narrowest line that words are broken for.
const MIN_WIDTH: usize = 40;

/// The text in lines of at most `width` columns (40 to 100 are used). Commands stay whole, however long.
pub(crate) fn for_terminal(text: &str, width: usize) -> String {
    let width = width.clamp(MIN_WIDTH, MAX_WIDTH);
    let mut shown = String::new();
    let mut in_code = false;
    for line in text.trim_end().lines() {
        if line.starts_with("```") {
            in_code = !in_code;
            continue;
        }
        if in_code {
            shown.push_str("    ");
            shown.push_str(line);
            shown.push('\n');
        } else if line.starts_with('#') {
            let heading = line.trim_start_matches('#').trim();
            shown.push_str(&format!("\x1b[1m{heading}\x1b[0m\n"));
        } else {
            broken(&mut shown, line, width);
        }
    }
    shown
}

/// A paragraph or an item, whose further lines stand below its first word.
fn broken(shown: &mut String, line: &str, width: usize) {
    let (first, rest, text) = match line.strip_prefix("- ") {
        Some(text) => ("- ", "  ", text),
        None => ("", "", line),
    };
    let mut column = 0;
    shown.push_str(first);
    for word in text.split_whitespace() {
        let len = word.chars().count();
        if column > 0 && first.len() + column + 1 + len > width {
            shown.push('\n');
            shown.push_str(rest);
            column = 0;
        } else if column > 0 {
            shown.push(' ');
            column += 1;
        }
        shown.push_str(word);
        column += len;
    }
    shown.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_broken_at_words_and_commands_are_not() {
        let words = "word ".repeat(30);
        let command = format!("exrail {}", "x".repeat(90));
        let text = format!("# Title\n\n{words}\n\n- {words}\n\n```sh\n{command}\n```\n");
        let shown = for_terminal(&text, 44);
        let mut lines = shown.lines();
        assert_eq!(lines.next(), Some("\x1b[1mTitle\x1b[0m"));
        assert!(shown.contains(&format!("\n    {command}\n")), "{shown}");
        assert!(!shown.contains("```"));
        let broken: Vec<&str> = lines.filter(|line| !line.contains("exrail")).collect();
        assert!(broken.iter().all(|line| line.len() <= 44), "{shown}");
        let n_words = broken.join(" ").split_whitespace().filter(|&word| word == "word").count();
        assert_eq!(n_words, 60, "no word is lost");
        assert!(shown.contains("\n- word word") && shown.contains("\n  word"), "{shown}");
    }
}
