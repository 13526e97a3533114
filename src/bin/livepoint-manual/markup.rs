//! From the marks that the header's comments use to those of man pages.

use clap_mangen::roff::{Inline, Roff, bold, italic, roman};

use crate::header::words;

/// A part of a comment.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Block {
    Paragraph(String),
    /// `@param name text`
    Parameter(String, String),
    /// Lines between ``` fences.
    Example(Vec<String>),
    /// `Since: version`
    Since(String),
}

/// Cuts a comment into its parts.
pub(crate) fn blocks(doc: &[String]) -> Vec<Block> {
    let mut out = Vec::new();
    let mut open = false;
    let mut lines = doc.iter();
    while let Some(line) = lines.next() {
        if line.starts_with("```") {
            let example = lines.by_ref().take_while(|line| !line.starts_with("```"));
            out.push(Block::Example(example.cloned().collect()));
            open = false;
        } else if let Some(rest) = line.strip_prefix("@param ") {
            let (name, text) = rest.split_once(' ').unwrap_or((rest, ""));
            out.push(Block::Parameter(name.to_owned(), text.trim().to_owned()));
            open = true;
        } else if let Some(version) = line.strip_prefix("Since: ") {
            out.push(Block::Since(version.to_owned()));
            open = false;
        } else if line.is_empty() {
            open = false;
        } else if !open {
            out.push(Block::Paragraph(line.clone()));
            open = true;
        } else if let Some(Block::Paragraph(text) | Block::Parameter(_, text)) = out.last_mut() {
            text.push(' ');
            text.push_str(line.trim_start());
        }
    }
    out
}

/// Returns the first sentence, without its full stop, as a page's NAME has it.
pub(crate) fn summary(doc: &[String]) -> String {
    let text = blocks(doc).into_iter().find_map(|block| match block {
        Block::Paragraph(text) => Some(text),
        _ => None,
    });
    let text = text.unwrap_or_default().replace(['`', '*'], "");
    let sentence = text.split(". ").next().unwrap_or_default();
    let sentence = sentence.split([';', ':']).next().unwrap_or_default();
    let mut chars = sentence.trim_end_matches('.').chars();
    // Names such as KVM stay as they are.
    match (chars.next(), chars.clone().next()) {
        (Some(first), Some(second)) if !second.is_uppercase() => {
            format!("{}{}", first.to_lowercase(), chars.as_str())
        }
        _ => sentence.trim_end_matches('.').to_owned(),
    }
}

/// Returns a text with functions and constants of ours in bold, `code` in bold and the names in
/// `parameters` in italics.
pub(crate) fn inlines(text: &str, parameters: &[String]) -> Vec<Inline> {
    let mut out = Vec::new();
    let mut plain = String::new();
    for (at, part) in text.split('`').enumerate() {
        if at % 2 == 1 {
            out.push(roman(std::mem::take(&mut plain)));
            out.push(bold(part));
            continue;
        }
        for word in part.replace("**", "").split_inclusive(' ') {
            let Some(name) = words(word).next() else {
                plain.push_str(word);
                continue;
            };
            let marked = if parameters.iter().any(|parameter| parameter == name) {
                italic(name)
            } else if ["lvp_", "LVP_", "KVM_"].iter().any(|p| name.starts_with(p)) {
                bold(name)
            } else {
                plain.push_str(word);
                continue;
            };
            let start = word.find(name).unwrap_or_default();
            plain.push_str(&word[..start]);
            out.push(roman(std::mem::take(&mut plain)));
            out.push(marked);
            plain.push_str(&word[start + name.len()..]);
        }
    }
    out.push(roman(plain));
    out
}

/// Adds lines that are shown as they are.
pub(crate) fn verbatim<'a>(page: &mut Roff, lines: impl IntoIterator<Item = &'a str>) {
    page.control("nf", []);
    for line in lines {
        page.text([bold(line)]);
    }
    page.control("fi", []);
}

/// Adds one part of a description.
pub(crate) fn block(page: &mut Roff, block: &Block, parameters: &[String]) {
    match block {
        Block::Paragraph(text) => {
            page.control("PP", []);
            page.text(inlines(text, parameters));
        }
        Block::Parameter(name, text) => {
            page.control("TP", []);
            page.text([italic(name.as_str())]);
            page.text(inlines(text, parameters));
        }
        Block::Example(lines) => {
            page.control("PP", []);
            page.control("RS", ["4"]);
            verbatim(page, lines.iter().map(String::as_str));
            page.control("RE", []);
        }
        Block::Since(version) => {
            page.text([roman(format!("Since livepoint {version}."))]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn doc(text: &str) -> Vec<String> {
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_comment_falls_into_its_parts() {
        let text = "Does it,\nat once.\n\n```c\nx();\n```\n\n@param a  what,\n          or where\n\
                    @param b  b\n\nReturns 0.\n\nSince: 0.1";
        let wanted = [
            Block::Paragraph("Does it, at once.".to_owned()),
            Block::Example(vec!["x();".to_owned()]),
            Block::Parameter("a".to_owned(), "what, or where".to_owned()),
            Block::Parameter("b".to_owned(), "b".to_owned()),
            Block::Paragraph("Returns 0.".to_owned()),
            Block::Since("0.1".to_owned()),
        ];
        assert_eq!(blocks(&doc(text)), wanted);
    }

    #[test]
    fn a_summary_is_the_first_sentence() {
        assert_eq!(summary(&doc("Does it\nall. Then more.")), "does it all");
        assert_eq!(summary(&doc("KVM's state.")), "KVM's state");
        assert_eq!(summary(&doc("Waits; for ever.")), "waits");
    }

    #[test]
    fn names_stand_out_and_keep_what_surrounds_them() {
        let found = inlines("see (lvp_x()), `a b` and n.", &["n".to_owned()]);
        let wanted = [
            roman("see ("),
            bold("lvp_x"),
            roman("()), "),
            bold("a b"),
            roman(" and "),
            italic("n"),
            roman("."),
        ];
        assert_eq!(found, wanted);
    }
}
