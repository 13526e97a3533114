//! Reads the C header: its declarations, each with the comment before it.

use anyhow::{Context as _, bail};

/// The header's first comment, and all that is documented in it, in its order.
#[derive(Debug)]
pub(crate) struct Header {
    pub overview: Vec<String>,
    pub items: Vec<Item>,
}

/// A documented declaration.
#[derive(Debug)]
pub(crate) struct Item {
    pub name: String,
    pub kind: Kind,
    /// The lines of its comment, without the stars.
    pub doc: Vec<String>,
    /// The declaration, without comments.
    pub code: Vec<String>,
    /// The fields, where it is a struct.
    pub fields: Vec<Field>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Function,
    Type,
    Macro,
}

/// A documented field of a struct.
#[derive(Debug)]
pub(crate) struct Field {
    pub doc: Vec<String>,
    pub code: String,
}

/// Reads a header as cbindgen writes it.
///
/// # Errors
///
/// A declaration that does not end, or whose name is not found.
pub(crate) fn parse(text: &str) -> anyhow::Result<Header> {
    let mut lines = text.lines();
    let mut overview = None;
    let mut doc = Vec::new();
    let mut items = Vec::new();
    while let Some(line) = lines.next() {
        if line.starts_with("/*") {
            let comment = comment(line, &mut lines);
            if line.starts_with("/**") {
                doc = comment;
            } else {
                overview.get_or_insert(comment);
            }
        } else if line.starts_with("#define") && !doc.is_empty() {
            items.push(item(vec![line.to_owned()], Vec::new(), &mut doc)?);
        } else if line.trim().is_empty() || line.starts_with('#') {
            doc.clear();
        } else if !doc.is_empty() {
            let (code, fields) = declaration(line, &mut lines)?;
            items.push(item(code, fields, &mut doc)?);
        }
    }
    Ok(Header {
        overview: overview.context("it has no comment at its top")?,
        items,
    })
}

/// Returns the text of a comment, whose first line has been read.
fn comment<'a>(first: &'a str, rest: &mut impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    let mut next = Some(first.trim_start().trim_start_matches('/'));
    while let Some(line) = next {
        let (inside, ends) = match line.split_once("*/") {
            Some((inside, _)) => (inside, true),
            None => (line, false),
        };
        let inside = inside.trim_start().trim_start_matches('*');
        let inside = inside.strip_prefix(' ').unwrap_or(inside).trim_end();
        if !(inside.is_empty() && out.is_empty()) {
            out.push(inside.to_owned());
        }
        next = if ends { None } else { rest.next() };
    }
    while out.pop_if(|last| last.is_empty()).is_some() {}
    out
}

/// Returns a declaration without its comments, and the fields in it.
fn declaration<'a>(
    first: &'a str,
    rest: &mut impl Iterator<Item = &'a str>,
) -> anyhow::Result<(Vec<String>, Vec<Field>)> {
    let (mut code, mut fields) = (Vec::new(), Vec::new());
    let mut doc = Vec::new();
    let mut field = String::new();
    let mut depth = 0;
    let mut line = first;
    loop {
        if line.trim_start().starts_with("/*") {
            doc = comment(line, rest);
        } else {
            if depth == 1 && !line.contains('}') {
                field = format!("{field} {}", line.trim()).trim().to_owned();
                let in_parameters = field.matches('(').count() > field.matches(')').count();
                if field.ends_with([';', ',']) && !in_parameters {
                    fields.push(Field {
                        doc: std::mem::take(&mut doc),
                        code: std::mem::take(&mut field),
                    });
                }
            }
            depth += line.matches('{').count();
            depth -= line.matches('}').count().min(depth);
            code.push(line.to_owned());
            if depth == 0 && line.trim_end().ends_with(';') {
                return Ok((code, fields));
            }
        }
        let Some(next) = rest.next() else {
            bail!("the declaration that begins with {first:?} does not end");
        };
        line = next;
    }
}

fn item(code: Vec<String>, fields: Vec<Field>, doc: &mut Vec<String>) -> anyhow::Result<Item> {
    let joined = code.join(" ");
    let (kind, name) = if let Some(rest) = joined.strip_prefix("#define") {
        (Kind::Macro, rest.split_whitespace().next())
    } else if joined.starts_with("typedef") {
        let name = match joined.split_once("(*") {
            // A pointer to a function, unless it is a field.
            Some((_, rest)) if fields.is_empty() => words(rest).next(),
            _ => words(&joined).last(),
        };
        (Kind::Type, name)
    } else {
        let before = joined.split('(').next().unwrap_or(&joined);
        (Kind::Function, words(before).last())
    };
    let name = name.with_context(|| format!("no name in {joined:?}"))?;
    Ok(Item {
        name: name.to_owned(),
        kind,
        doc: std::mem::take(doc),
        fields,
        code,
    })
}

/// Returns the identifiers and numbers of a text.
pub(crate) fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
        .filter(|word| !word.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
/*
 * A library.
 *
 * More of it.
 */

#ifndef X_H
/* Made by a program. */
/** A number. */
#define X_ONE 1
#define X_UNDOCUMENTED 2

/**
 * Options.
 */
typedef struct {
  /**
   * The size; of {all}.
   */
  size_t struct_size;
  /**
   * A callback.
   */
  void (*call)(void *user_data,
               uint32_t n);
} x_options;

/**
 * Told of things.
 */
typedef void (*x_told)(int what);

/**
 * Does it.
 *
 * @param a  what
 */
int x_do(const x_options *a,
         int b);
";

    #[test]
    fn every_kind_of_declaration_is_found_with_its_comment() {
        let header = parse(TEXT).unwrap();
        assert_eq!(header.overview, ["A library.", "", "More of it."]);
        let found: Vec<_> = header
            .items
            .iter()
            .map(|item| (item.name.as_str(), item.kind, item.doc[0].as_str()))
            .collect();
        let wanted = [
            ("X_ONE", Kind::Macro, "A number."),
            ("x_options", Kind::Type, "Options."),
            ("x_told", Kind::Type, "Told of things."),
            ("x_do", Kind::Function, "Does it."),
        ];
        assert_eq!(found, wanted);
        assert_eq!(header.items[3].doc, ["Does it.", "", "@param a  what"]);
        assert_eq!(header.items[3].code.len(), 2);
    }

    #[test]
    fn the_fields_of_a_struct_are_found_and_its_comments_are_not_code() {
        let header = parse(TEXT).unwrap();
        let options = &header.items[1];
        assert_eq!(options.fields[0].code, "size_t struct_size;");
        assert_eq!(options.fields[0].doc, ["The size; of {all}."]);
        assert_eq!(
            options.fields[1].code,
            "void (*call)(void *user_data, uint32_t n);"
        );
        assert_eq!(options.fields.len(), 2);
        assert!(options.code.iter().all(|line| !line.contains("*/")));
    }

    #[test]
    fn a_declaration_without_an_end_is_an_error() {
        let error = parse("/* X */\n/** Y */\nint x_do(int a,\n").unwrap_err();
        assert!(format!("{error:#}").contains("x_do"), "{error:#}");
    }
}
