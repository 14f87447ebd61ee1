//! `--format`: the part of Go's templates that scripts for Docker use.
//!
//! `{{.Name}}` is a member of a row, `{{.A.B}}` one of an object in it, `{{.Label "x"}}` the
//! value of a label; `{{json .Name}}`, `{{upper .Name}}` and `{{lower .Name}}` change it, and
//! `{{.}}` and `{{json .}}` are the whole row. `\t` and `\n` are a tab and a line feed.

use serde_json::Value;

/// A parsed template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Template {
    /// The text begins with `table`: columns are aligned below a header.
    table: bool,
    parts: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Field { function: Function, path: Path },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Function {
    Plain,
    Json,
    Upper,
    Lower,
}

/// Names of members, outermost first.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Path(Vec<String>);

/// The member of rows in which `{{.Label "x"}}` looks for labels.
const LABELS: &str = "LabelMap";

impl Template {
    /// Parses a template.
    pub(crate) fn parse(text: &str) -> anyhow::Result<Self> {
        let table = text.strip_prefix("table ");
        let text = table
            .unwrap_or(text)
            .replace("\\t", "\t")
            .replace("\\n", "\n");
        let mut parts = Vec::new();
        let mut rest = text.as_str();
        while let Some((before, after)) = rest.split_once("{{") {
            if !before.is_empty() {
                parts.push(Part::Text(before.to_owned()));
            }
            let Some((action, after)) = after.split_once("}}") else {
                anyhow::bail!("the format \"{text}\" has a {{{{ without its }}}}");
            };
            parts.push(field(action.trim())?);
            rest = after;
        }
        if !rest.is_empty() {
            parts.push(Part::Text(rest.to_owned()));
        }
        Ok(Self {
            table: table.is_some(),
            parts,
        })
    }

    /// Returns true if it names no other members than these.
    pub(crate) fn uses_only(&self, members: &[&str]) -> bool {
        self.parts.iter().all(|part| match part {
            Part::Text(_) => true,
            Part::Field { path, .. } => {
                let first = path.0.first().map(String::as_str);
                first.is_some_and(|first| members.contains(&first))
            }
        })
    }

    /// Returns the lines for `rows`.
    pub(crate) fn render(&self, rows: &[Value]) -> anyhow::Result<Vec<String>> {
        let lines = rows.iter().map(|row| self.line(row));
        let mut lines = lines.collect::<anyhow::Result<Vec<_>>>()?;
        if self.table {
            lines.insert(0, self.header());
            lines = aligned(&lines);
        }
        Ok(lines)
    }

    /// Returns the line for one row.
    pub(crate) fn line(&self, row: &Value) -> anyhow::Result<String> {
        let mut line = String::new();
        for part in &self.parts {
            match part {
                Part::Text(text) => line.push_str(text),
                Part::Field { function, path } => {
                    let value = path.of(row)?;
                    line.push_str(&match function {
                        Function::Json => value.to_string(),
                        Function::Plain => plain(value),
                        Function::Upper => plain(value).to_uppercase(),
                        Function::Lower => plain(value).to_lowercase(),
                    });
                }
            }
        }
        Ok(line)
    }

    fn header(&self) -> String {
        let parts = self.parts.iter().map(|part| match part {
            Part::Text(text) => text.clone(),
            Part::Field { path, .. } => {
                let last = path.0.last().map_or("", String::as_str);
                spaced(last).to_uppercase()
            }
        });
        parts.collect()
    }
}

fn field(action: &str) -> anyhow::Result<Part> {
    let bad = || {
        anyhow::anyhow!(
            "{{{{{action}}}}} is not understood in a format: write {{{{.NAME}}}}, \
             {{{{.Label \"NAME\"}}}} or {{{{json .NAME}}}}"
        )
    };
    let (function, path) = match action.split_once(' ') {
        Some(("json", path)) => (Function::Json, path.trim()),
        Some(("upper", path)) => (Function::Upper, path.trim()),
        Some(("lower", path)) => (Function::Lower, path.trim()),
        _ => (Function::Plain, action),
    };
    let names = path.strip_prefix('.').ok_or_else(bad)?;
    let label = names
        .strip_prefix("Label ")
        .map(|quoted| quoted.trim().trim_matches('"').to_owned());
    let names: Vec<String> = match label {
        Some(label) => vec![LABELS.to_owned(), label],
        None if names.is_empty() => Vec::new(),
        None => names.split('.').map(str::to_owned).collect(),
    };
    let is_name = |name: &String| !name.is_empty() && !name.contains(['"', '(', '|']);
    match names.iter().all(is_name) {
        true => Ok(Part::Field {
            function,
            path: Path(names),
        }),
        false => Err(bad()),
    }
}

impl Path {
    fn of<'a>(&self, row: &'a Value) -> anyhow::Result<&'a Value> {
        let mut value = row;
        for (depth, name) in self.0.iter().enumerate() {
            let in_labels = depth > 0 && self.0.first().is_some_and(|first| first == LABELS);
            value = match value.get(name) {
                Some(value) => value,
                // As Go prints missing members of a map.
                None if in_labels => &Value::Null,
                None => {
                    let known = value.as_object().map(|members| {
                        let names: Vec<&str> = members
                            .keys()
                            .map(String::as_str)
                            .filter(|name| *name != LABELS)
                            .collect();
                        names.join(", ")
                    });
                    anyhow::bail!(
                        "there is no .{name} here; these are: {}",
                        known.unwrap_or_default()
                    );
                }
            };
        }
        Ok(value)
    }
}

/// Returns a value as Docker prints it.
fn plain(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Separates the words of `CreatedAt`.
fn spaced(name: &str) -> String {
    let mut spaced = String::new();
    let mut lower = false;
    for letter in name.chars() {
        if letter.is_uppercase() && lower {
            spaced.push(' ');
        }
        lower = letter.is_lowercase();
        spaced.push(letter);
    }
    spaced
}

/// Replaces tabs by spaces, so that the cells between them are below each other.
fn aligned(lines: &[String]) -> Vec<String> {
    let rows: Vec<Vec<&str>> = lines
        .iter()
        .map(|line| line.split('\t').collect())
        .collect();
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<&str>| {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(cell);
            let padding = width.saturating_sub(cell.chars().count()) + 3;
            line.extend(std::iter::repeat_n(' ', padding));
        }
        line.trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn row() -> Value {
        json!({
            "Names": "web", "Ports": null, "State": {"ExitCode": 3}, "CreatedAt": "now",
            LABELS: {"a.b": "c"},
        })
    }

    fn rendered(template: &str) -> String {
        Template::parse(template).unwrap().line(&row()).unwrap()
    }

    #[test]
    fn members_are_put_in() {
        assert_eq!(rendered("{{.Names}}"), "web");
        assert_eq!(rendered("<{{ .Names }}>{{.Ports}}"), "<web>");
        assert_eq!(rendered("{{.State.ExitCode}}"), "3");
        assert_eq!(
            rendered("{{json .State}} {{upper .Names}}"),
            "{\"ExitCode\":3} WEB"
        );
        assert_eq!(rendered("{{.Label \"a.b\"}}{{.Label \"x\"}}\\n"), "c\n");
        assert_eq!(rendered("{{json .}}"), row().to_string());
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for bad in [
            "{{.Names",
            "{{Names}}",
            "{{range .X}}",
            "{{.A | .B}}",
            "{{..}}",
        ] {
            assert!(Template::parse(bad).is_err(), "{bad}");
        }
        let unknown = Template::parse("{{.Colour}}").unwrap().line(&row());
        let error = unknown.unwrap_err().to_string();
        assert!(
            error.contains(".Colour") && error.contains("Names"),
            "{error}"
        );
        assert!(!error.contains(LABELS), "{error}");
    }

    #[test]
    fn the_members_that_are_used_are_known() {
        let uses_only = |text: &str| Template::parse(text).unwrap().uses_only(&["Name", "ID"]);
        assert!(uses_only("x {{.Name}} {{json .ID}}"));
        assert!(!uses_only("{{.Name}}{{.Size}}"));
        assert!(!uses_only("{{.}}") && !uses_only("{{.Label \"a\"}}"));
    }

    #[test]
    fn a_table_has_a_header_and_columns() {
        let table = Template::parse("table {{.Names}}\\t{{.CreatedAt}}").unwrap();
        let lines = table.render(&[row()]).unwrap();
        assert_eq!(lines, ["NAMES   CREATED AT", "web     now"]);
    }
}
