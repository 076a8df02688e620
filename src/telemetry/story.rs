//! A call as one story: what it did, step by step, and what each step took.
//!
//! Steps are spans of level debug, so at the level info there are none and this does nothing. When
//! the span of a call ends, its steps are logged as one event of several lines, in whatever form the
//! log has; lines of calls that run side by side are not mixed up.
//!
//! Known limit: steps that run in tasks of their own are not part of the story, unless they were
//! given the call's span.

use std::fmt::{self, Write};
use std::time::{Duration, Instant};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

/// The name of the spans whose ends are the ends of stories.
const CALL: &str = "call";
/// The most lines of a step that are kept: a Mount that is tried until its deadline has some hundred.
const MOST: usize = 500;

/// See the module.
pub(super) struct Story;

/// What is known of a step that has not ended.
struct Step {
    began: Instant,
    fields: String,
    lines: Vec<Line>,
}

/// A step that has ended, or something that was logged.
struct Line {
    depth: usize,
    at: Instant,
    took: Option<Duration>,
    text: String,
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Story {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        span.extensions_mut().insert(Step {
            began: Instant::now(),
            fields: fields.0,
            lines: Vec::new(),
        });
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let Some(span) = context.event_span(event) else {
            return;
        };
        let mut fields = Fields::default();
        event.record(&mut fields);
        if let Some(step) = span.extensions_mut().get_mut::<Step>()
            && step.lines.len() < MOST
        {
            step.lines.push(Line {
                depth: 0,
                at: Instant::now(),
                took: None,
                text: format!("·{}", fields.0),
            });
        }
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        let Some(span) = context.span(&id) else {
            return;
        };
        let Some(step) = span.extensions_mut().remove::<Step>() else {
            return;
        };
        if let Some(above) = span.parent() {
            if let Some(above) = above.extensions_mut().get_mut::<Step>() {
                step.end(&place(span.metadata()), &mut above.lines);
            }
        } else if span.name() == CALL && !step.lines.is_empty() {
            tracing::debug!("{}", step.told());
        }
    }
}

/// Where a step is to be found: its module, and its function.
fn place(step: &Metadata<'_>) -> String {
    let module = step.target();
    // Other crates of the project keep their names.
    let module = module.strip_prefix("nfsvol::").unwrap_or(module);
    format!("{module}::{}", step.name())
}

impl Step {
    /// Becomes lines of the step above it.
    fn end(self, place: &str, above: &mut Vec<Line>) {
        let room = MOST.saturating_sub(above.len());
        let own = Line {
            depth: 0,
            at: self.began,
            took: Some(self.began.elapsed()),
            text: format!("{place}{}", self.fields),
        };
        let below = self.lines.into_iter().map(|line| Line {
            depth: line.depth + 1,
            ..line
        });
        above.extend([own].into_iter().chain(below).take(room));
    }

    /// The story of a call.
    fn told(&self) -> String {
        let took = milliseconds(self.began.elapsed());
        let mut told = format!("steps of{}, {} ms in all", self.fields, took.trim_start());
        for line in &self.lines {
            let at = milliseconds(line.at.duration_since(self.began));
            // What was logged meanwhile took no time.
            let took = match line.took {
                Some(took) => format!("+{} ms", milliseconds(took)),
                None => " ".repeat(12),
            };
            let indent = "  ".repeat(line.depth);
            // Writing to a String does not fail.
            let _ = write!(told, "\n  {at} {took}  {indent}{}", line.text);
        }
        told
    }
}

fn milliseconds(time: Duration) -> String {
    format!("{:8.1}", time.as_secs_f64() * 1e3)
}

/// Fields for people: the message first, empty ones left out.
#[derive(Default)]
struct Fields(String);

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        if !value.is_empty() {
            self.record_debug(field, &format_args!("{value}"));
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a String does not fail.
        let _ = match field.name() {
            "message" | CALL => write!(self.0, " {value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use tracing::{debug_span, info};
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    /// What is logged by `work` at a level.
    fn logged(filter: &str, work: impl FnOnce()) -> String {
        #[derive(Clone, Default)]
        struct Text(Arc<Mutex<Vec<u8>>>);
        impl io::Write for Text {
            fn write(&mut self, line: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().extend(line);
                Ok(line.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let text = Text::default();
        let writer = text.clone();
        let lines = tracing_subscriber::fmt::layer()
            .with_ansi(false)
            .without_time()
            .with_writer(move || writer.clone());
        let log = tracing_subscriber::registry()
            .with(tracing_subscriber::EnvFilter::new(filter))
            .with(Story)
            .with(lines);
        tracing::subscriber::with_default(log, work);
        let text = text.0.lock().unwrap().clone();
        String::from_utf8(text).unwrap()
    }

    fn mount() {
        let call = debug_span!("call", call = "Mount", volume = "db", id = "").entered();
        debug_span!("hold").in_scope(|| {
            debug_span!("publish").in_scope(|| info!(hosts = 2, "held"));
        });
        debug_span!("reach").in_scope(|| {});
        drop(call);
    }

    #[test]
    fn a_call_is_one_story_with_its_steps_indented() {
        let text = logged("debug", mount);
        let (_, story) = text.split_once("steps of Mount volume=db, ").unwrap();
        let times = "       0.1 +     0.1 ms  ".len();
        let steps: Vec<&str> = story
            .lines()
            .skip(1)
            .map(|line| line.get(times..).unwrap_or_default())
            .collect();
        let expected = [
            "telemetry::story::tests::hold",
            "  telemetry::story::tests::publish",
            "    · held hosts=2",
            "telemetry::story::tests::reach",
        ];
        assert_eq!(steps, expected, "{text}");
    }

    #[test]
    fn at_the_level_info_lines_are_as_they_are_without_steps() {
        let text = logged("info", mount);
        assert_eq!(
            text,
            " INFO nfsvol::telemetry::story::tests: held hosts=2\n"
        );
    }
}
