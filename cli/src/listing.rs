//! The forms of a listing: a table, names only, JSON, or lines of a template.

use serde::Serialize;
use serde_json::Value;

use crate::args::ListArgs;
use crate::failure::Failure;
use crate::printer::Printer;
use crate::table;
use crate::template::Template;

/// The form of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// One name, or ID, on each line.
    Names,
    Table,
    Json,
    Lines(Template),
}

impl ListArgs {
    /// Returns the form that the options choose.
    ///
    /// # Errors
    /// The template is malformed.
    pub(crate) fn form(&self) -> anyhow::Result<Form> {
        Ok(match self.format.as_str() {
            _ if self.quiet => Form::Names,
            "json" => Form::Json,
            _ if self.json => Form::Json,
            "table" => Form::Table,
            text => Form::Lines(Template::parse(text)?),
        })
    }
}

impl Form {
    /// Returns true if no other members of rows are printed than these, of which the first
    /// one is the name.
    pub(crate) fn needs_only(&self, members: &[&str]) -> bool {
        match self {
            Self::Names => true,
            Self::Table | Self::Json => false,
            Self::Lines(template) => template.uses_only(members),
        }
    }
}

/// The columns and members of the rows of a listing.
pub(crate) struct Listing<'a, T> {
    /// The header of the table.
    pub(crate) header: &'a [&'a str],
    /// Returns what is printed if names only are.
    pub(crate) name: &'a dyn Fn(&T) -> String,
    /// Returns the cells of a row of the table.
    pub(crate) cells: &'a dyn Fn(&T) -> Vec<String>,
    /// Returns the members that templates can name.
    pub(crate) members: &'a dyn Fn(&T) -> Value,
}

impl<T: Serialize> Listing<'_, T> {
    /// Prints `rows`.
    ///
    /// # Errors
    /// A template names an unknown member.
    pub(crate) fn print(&self, rows: &[T], form: &Form, printer: &Printer) -> Result<(), Failure> {
        match form {
            Form::Names => {
                for row in rows {
                    printer.line((self.name)(row));
                }
            }
            Form::Json => printer.json(&rows)?,
            Form::Table => {
                let cells: Vec<_> = rows.iter().map(self.cells).collect();
                printer.line(table::render_columns(self.header, &cells));
            }
            Form::Lines(template) => {
                let rows: Vec<_> = rows.iter().map(self.members).collect();
                for line in template.render(&rows)? {
                    printer.line(line);
                }
            }
        }
        Ok(())
    }
}

/// Returns labels as Docker prints them.
pub(crate) fn joined(labels: &std::collections::BTreeMap<String, String>) -> String {
    let labels = labels.iter();
    let labels: Vec<String> = labels
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    labels.join(",")
}
