//! `sm events`.

use sm_runtime::Sm;
use sm_runtime::events::{EventAction, EventQuery, EventRecord, EventSubject};

use crate::args::EventsArgs;
use crate::failure::Failure;
use crate::filter::{Filters, has_label};
use crate::moment::timestamp;
use crate::printer::Printer;
use crate::shown::{self, ShownInline};
use crate::template::Template;

/// The conditions for events.
const OF_EVENTS: &[&str] = &[
    "container",
    "event",
    "image",
    "label",
    "name",
    "snapshot",
    "type",
    "vm",
];

pub(crate) fn events(sm: &Sm, args: &EventsArgs, printer: &Printer) -> Result<u32, Failure> {
    let filters = Filters::parse(&args.filter, OF_EVENTS)?;
    let template = match args.format.as_deref() {
        None | Some("json") => None,
        Some(text) => Some(Template::parse(text)?),
    };
    let json = args.json || args.format.as_deref() == Some("json");
    let mut query = EventQuery::new().follow(true);
    if let Some(since) = args.since {
        query = query.since(since);
    }
    if let Some(until) = args.until {
        query = query.until(until);
    }
    let mut events = sm.events(query)?;
    while let Some(event) = events.wait_event()? {
        if !matches(&filters, &event) {
            continue;
        }
        let line = match &template {
            _ if json => shown::json(&serde_json::to_string(&event)?),
            Some(template) => template.line(&serde_json::to_value(&event)?)?,
            None => text(&event),
        };
        if !printer.line_is_read(line) {
            break;
        }
    }
    Ok(0)
}

fn matches(filters: &Filters, event: &EventRecord) -> bool {
    let of = |subject: EventSubject, value: &str| {
        let is_id = value.len() >= 4 && event.id.starts_with(value);
        event.subject == subject && (event.name == value || is_id)
    };
    let is_vm = |value: &str| of(EventSubject::Vm, value);
    let is_image = |value: &str| {
        of(EventSubject::Image, value) || event.attributes.get("image").is_some_and(|i| i == value)
    };
    let is_action = |value: &str| {
        // Docker adds details to these words.
        let value = value.split(':').next().unwrap_or(value);
        event.action != EventAction::Other && event.action.as_str() == value
    };
    filters.hold("type", |value| match value {
        "container" => event.subject == EventSubject::Vm,
        value => event.subject.as_str() == value,
    }) && filters.hold("event", is_action)
        && filters.hold("vm", is_vm)
        && filters.hold("container", is_vm)
        && filters.hold("name", |value| event.name == value)
        && filters.hold("image", is_image)
        && filters.hold("snapshot", |value| of(EventSubject::Snapshot, value))
        && filters.all_hold("label", |value| has_label(&event.labels, value))
}

/// Returns `TIME TYPE ACTION ID (name=web, image=nginx)`.
fn text(event: &EventRecord) -> String {
    let mut details = vec![format!("name={}", event.name)];
    let attributes = event.attributes.iter().chain(&event.labels);
    details.extend(attributes.map(|(name, value)| format!("{name}={value}")));
    format!(
        "{} {} {} {} ({})",
        timestamp(event.time_ns),
        event.subject,
        event.action,
        ShownInline(&event.id),
        ShownInline(details.join(", "))
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event() -> EventRecord {
        let event = EventRecord::now(EventSubject::Vm, EventAction::Die, "abcdef", "web");
        let mut event = event.with("image", "nginx").with("exit_code", 3);
        event.time_ns = 0;
        event.labels.insert("role".to_owned(), "x\ny".to_owned());
        event
    }

    #[test]
    fn an_event_is_a_line() {
        let line = "1970-01-01T00:00:00.000000000Z vm die abcdef \
                    (name=web, exit_code=3, image=nginx, role=x\\ny)";
        assert_eq!(text(&event()), line);
    }

    #[test]
    fn conditions_of_events() {
        let holds = |texts: &[&str]| {
            let texts: Vec<_> = texts.iter().map(|&text| text.to_owned()).collect();
            matches(&Filters::parse(&texts, OF_EVENTS).unwrap(), &event())
        };
        assert!(holds(&["type=container", "event=die", "event=start"]));
        assert!(holds(&["vm=web"]) && holds(&["container=abcd"]) && holds(&["image=nginx"]));
        assert!(holds(&["label=role"]));
        assert!(!holds(&["vm=abc"]), "too short for an identifier");
        assert!(!holds(&["event=start"]) && !holds(&["snapshot=web"]));
    }
}
