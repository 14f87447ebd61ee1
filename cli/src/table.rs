//! Aligned columns for listings.

use crate::shown::ShownInline;

/// Formats `rows` under `header`, with columns padded to their widest cell.
///
/// Control characters in cells are escaped, so that no cell breaks the table.
pub(crate) fn render<const N: usize>(header: [&str; N], rows: &[[String; N]]) -> String {
    let shown = |cell: &String| ShownInline(cell).to_string();
    let rows: Vec<[String; N]> = rows.iter().map(|row| row.each_ref().map(shown)).collect();
    let mut widths = header.map(str::len);
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (cell, width) in cells.zip(widths) {
            text.push_str(cell);
            let padding = width.saturating_sub(cell.chars().count()) + 3;
            text.extend(std::iter::repeat_n(' ', padding));
        }
        text.trim_end().to_owned()
    };
    let mut lines = vec![line(&mut header.iter().copied())];
    lines.extend(
        rows.iter()
            .map(|row| line(&mut row.iter().map(String::as_str))),
    );
    lines.join("\n")
}

/// Like [`render`], with a number of columns that is not known before; the last one is not
/// padded.
pub(crate) fn render_columns(header: &[&str], rows: &[Vec<String>]) -> String {
    let shown = |cell: &String| ShownInline(cell).to_string();
    let header: Vec<String> = header.iter().map(|&cell| cell.to_owned()).collect();
    let rows = rows.iter().map(|row| row.iter().map(shown).collect());
    let rows: Vec<Vec<String>> = std::iter::once(header).chain(rows).collect();
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let mut text = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            text.push_str(cell);
            let padding = width.saturating_sub(cell.chars().count()) + 3;
            text.extend(std::iter::repeat_n(' ', padding));
        }
        text.trim_end().to_owned()
    };
    let lines: Vec<String> = rows.iter().map(line).collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [["a".to_owned(), "long".to_owned()]];
        assert_eq!(render(["NAME", "X"], &rows), "NAME   X\na      long");
    }

    #[test]
    fn control_characters_in_cells_are_escaped() {
        let rows = [["a\n\u{1b}[1A".to_owned(), "b".to_owned()]];
        let table = render(["NAME", "X"], &rows);
        assert_eq!(table, "NAME           X\na\\n\\u{1b}[1A   b");
    }
}
