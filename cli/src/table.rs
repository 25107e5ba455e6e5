//! Aligned columns for a terminal. A column of numbers is aligned to the right.

use std::fmt;

/// Rows under a head line; no line for an empty head.
pub(crate) struct Table {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column names.
    pub(crate) fn new(head: &[&str]) -> Self {
        Table { head: head.iter().map(|h| (*h).to_string()).collect(), rows: Vec::new() }
    }

    /// Adds a row.
    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.map(|c| show(&c)).to_vec());
    }

    fn lines(&self) -> impl Iterator<Item = &Vec<String>> {
        Some(&self.head).filter(|h| !h.is_empty()).into_iter().chain(&self.rows)
    }
}

/// Control characters of odd names must not move the cursor.
pub(crate) fn show(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

fn width(cell: &str) -> usize {
    cell.chars().count()
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.lines().map(Vec::len).max().unwrap_or(0);
        let cells = |c: usize| self.rows.iter().filter_map(move |r| r.get(c));
        let shape: Vec<(usize, bool)> = (0..columns)
            .map(|c| {
                let widest = self.lines().filter_map(|l| l.get(c)).map(|t| width(t)).max().unwrap_or(0);
                let number = |t: &String| t == "-" || t.starts_with(|c: char| c.is_ascii_digit());
                (widest, !self.head.is_empty() && cells(c).all(number) && cells(c).next().is_some())
            })
            .collect();
        for line in self.lines() {
            let mut text = String::new();
            for (cell, (widest, right)) in line.iter().zip(&shape) {
                let pad = " ".repeat(widest - width(cell));
                text += &if *right { pad + cell } else { cell.clone() + &pad };
                text += "  ";
            }
            writeln!(f, "{}", text.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut t = Table::new(&["ID", "USED", "NAME"]);
        t.row(["w1".into(), "5 MiB".into(), "ä".into()]);
        t.row(["worker-2".into(), "512 MiB".into(), "b\x1b[2Jc".into()]);
        let text = t.to_string();
        assert_eq!(text, "ID           USED  NAME\nw1          5 MiB  ä\nworker-2  512 MiB  b\u{fffd}[2Jc\n");
    }

    #[test]
    fn a_table_may_be_empty() {
        assert_eq!(Table::new(&["A", "B"]).to_string(), "A  B\n");
        assert_eq!(Table::new(&[]).to_string(), "");
    }
}
