//! Reports: a text table, and an HTML file with plots.

use std::fmt::Write as _;

use crate::samples::{BenchReport, Comparison, PhaseSamples, Series};

/// Width of a plot in its own units.
const PLOT_WIDTH: f64 = 640.0;
const BAR_HEIGHT: f64 = 22.0;
const COLOURS: [&str; 8] = [
    "#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2", "#97bbf5", "#9c6b4e",
];

/// Formats tables of all comparisons.
#[must_use]
pub fn text(report: &BenchReport) -> String {
    let mut out = String::new();
    for note in &report.notes {
        line(&mut out, note);
    }
    for comparison in &report.comparisons {
        line(&mut out, "");
        line(&mut out, &format!("{} (milliseconds)", comparison.title));
        line(
            &mut out,
            &format!(
                "  {:<12} {:<26} {:>9} {:>9} {:>9} {:>9}",
                "", "", "p50", "p90", "p99", "max"
            ),
        );
        for series in &comparison.series {
            for phase in rows(series) {
                let Some(summary) = phase.summary() else {
                    continue;
                };
                let figures = [summary.p50, summary.p90, summary.p99, summary.max]
                    .map(|micros| format!("{:>9.3}", micros / 1000.0));
                line(
                    &mut out,
                    &format!(
                        "  {:<12} {:<26} {}",
                        series.subject,
                        phase.name,
                        figures.join(" ")
                    ),
                );
            }
        }
        for ratio in ratios(comparison) {
            line(&mut out, &format!("  {ratio}"));
        }
    }
    out
}

fn line(out: &mut String, text: &str) {
    out.push_str(text.trim_end());
    out.push('\n');
}

/// Returns the phases and, if there are several, their total.
fn rows(series: &Series) -> impl Iterator<Item = &PhaseSamples> {
    let total = (series.phases.len() != 1).then_some(&series.total);
    series.phases.iter().chain(total)
}

fn ratios(comparison: &Comparison) -> Vec<String> {
    let others = comparison.series.iter().skip(1);
    let first = comparison.series.first().map_or("", |s| &s.subject);
    others
        .flat_map(|other| {
            let other = &other.subject;
            let takes = |ratio: f64, of: &str| {
                format!("{first} takes {ratio:.2} times as long as {other} (medians of {of})")
            };
            let total = comparison.ratio(other);
            let since = comparison.since.as_deref().unwrap_or_default();
            let part = comparison.ratio_since(other);
            total
                .map(|ratio| takes(ratio, "totals"))
                .into_iter()
                .chain(part.map(|ratio| takes(ratio, &format!("what happens from {since:?} on"))))
        })
        .collect()
}

/// Formats one HTML file without scripts: stacked bars of medians, then the tables.
#[must_use]
pub fn html(title: &str, report: &BenchReport) -> String {
    let title = escaped(title);
    let mut body = String::new();
    for note in &report.notes {
        let _ = writeln!(body, "<p>{}</p>", escaped(note));
    }
    for comparison in &report.comparisons {
        let _ = writeln!(body, "<h2>{}</h2>", escaped(&comparison.title));
        body.push_str(&bars(comparison));
        for ratio in ratios(comparison) {
            let _ = writeln!(body, "<p>{}</p>", escaped(&ratio));
        }
        body.push_str(&table(comparison));
    }
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title>\n\
         <style>body{{font:15px/1.4 sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem}}\
         table{{border-collapse:collapse}}td,th{{padding:.1rem .7rem;text-align:right}}\
         td:nth-child(-n+2),th:nth-child(-n+2){{text-align:left}}\
         tr:nth-child(even){{background:#f3f3f3}}svg text{{font-size:12px}}</style>\n\
         <h1>{title}</h1>\n{body}</html>\n"
    )
}

/// Draws stacked bars of phase medians, one for each subject, on a common scale.
fn bars(comparison: &Comparison) -> String {
    let medians = |series: &Series| -> Vec<(String, f64)> {
        series
            .phases
            .iter()
            .filter_map(|phase| Some((phase.name.clone(), phase.summary()?.p50 / 1000.0)))
            .collect()
    };
    let sums = comparison.series.iter().map(|series| {
        let all = medians(series);
        all.iter().map(|(_, median)| median).sum::<f64>()
    });
    let longest = sums.fold(f64::MIN_POSITIVE, f64::max);
    let mut names: Vec<String> = Vec::new();
    let mut shapes = String::new();
    let mut y = 0.0;
    for series in &comparison.series {
        let mut x = 110.0;
        let _ = write!(
            shapes,
            "<text x=\"0\" y=\"{:.0}\">{}</text>",
            y + 15.0,
            escaped(&series.subject)
        );
        for (name, median) in medians(series) {
            let index = names.iter().position(|known| *known == name);
            let index = index.unwrap_or_else(|| {
                names.push(name.clone());
                names.len() - 1
            });
            let width = median / longest * (PLOT_WIDTH - 120.0);
            let _ = write!(
                shapes,
                "<rect x=\"{x:.1}\" y=\"{y:.0}\" width=\"{width:.1}\" height=\"18\" fill=\"{}\">\
                 <title>{}: {median:.3} ms</title></rect>",
                colour(index),
                escaped(&name)
            );
            x += width;
        }
        y += BAR_HEIGHT;
    }
    let mut legend = String::new();
    for (index, name) in names.iter().enumerate() {
        let _ = write!(
            legend,
            "<span style=\"color:{}\">&#9632;</span> {} &nbsp; ",
            colour(index),
            escaped(name)
        );
    }
    format!(
        "<svg viewBox=\"0 0 {PLOT_WIDTH} {y}\" width=\"100%\" role=\"img\">{shapes}</svg>\n\
         <p>{legend}</p>\n"
    )
}

fn colour(index: usize) -> &'static str {
    COLOURS[index % COLOURS.len()]
}

fn table(comparison: &Comparison) -> String {
    let mut out =
        String::from("<table><tr><th><th>phase<th>p50 ms<th>p90 ms<th>p99 ms<th>max ms</tr>\n");
    for series in &comparison.series {
        for phase in rows(series) {
            let Some(summary) = phase.summary() else {
                continue;
            };
            let _ = write!(
                out,
                "<tr><td>{}<td>{}",
                escaped(&series.subject),
                escaped(&phase.name)
            );
            for micros in [summary.p50, summary.p90, summary.p99, summary.max] {
                let _ = write!(out, "<td>{:.3}", micros / 1000.0);
            }
            out.push_str("</tr>\n");
        }
    }
    out.push_str("</table>\n");
    out
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn report() -> BenchReport {
        let mut sm = Series::new("sm");
        let mut floor = Series::new("floor");
        for ms in [1, 2, 3] {
            sm.add(&[
                ("map <memory>", Duration::from_millis(ms)),
                ("state", Duration::from_millis(2)),
            ]);
            floor.add(&[("state", Duration::from_millis(2))]);
        }
        BenchReport {
            notes: vec!["a note".to_owned()],
            comparisons: vec![Comparison {
                title: "1 vCPU".to_owned(),
                series: vec![sm, floor],
                since: Some("state".to_owned()),
            }],
        }
    }

    #[test]
    fn the_table_has_every_phase_the_total_and_the_ratio() {
        let text = text(&report());
        for line in [
            "a note",
            "1 vCPU (milliseconds)",
            "  sm           map <memory>                   2.000     3.000     3.000     3.000",
            "  sm           total                          4.000     5.000     5.000     5.000",
            "  floor        state                          2.000     2.000     2.000     2.000",
            "  sm takes 2.00 times as long as floor (medians of totals)",
            "  sm takes 1.00 times as long as floor (medians of what happens from \"state\" on)",
        ] {
            assert!(text.contains(&format!("{line}\n")), "{line}\n{text}");
        }
        assert!(!text.contains("floor        total"), "{text}");
    }

    #[test]
    fn the_page_escapes_names_and_has_a_bar_for_each_median() {
        let html = html("A title", &report());
        assert!(html.contains("map &lt;memory&gt;") && !html.contains("<memory>"));
        assert_eq!(html.matches("<rect ").count(), 3);
        assert!(html.contains("2.000 ms"));
    }
}
