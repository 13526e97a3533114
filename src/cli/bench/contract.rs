//! Suite `contract`: what is promised is kept, or refused before the start.
//!
//! One guest writes half of its memory at full speed. Each promise is asked of each protocol, once
//! a run. What came of it is judged by what is seen here (the job's time, the size of the image),
//! and by the engine's own figures where nothing else can be seen.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::super::output::{bytes, table, to_f64};
use super::contender::{Contender, Staging};
use super::setup::{HELD_BYTES_PER_S, Setup, discard};
use super::vm::{Backing, GuestSpec, Outcome, Request, Vm, half_full, micros};
use crate::host::Protocol;

const SETTLE: Duration = Duration::from_millis(300);

/// A checkpoint is cancelled within so long of its start: it takes about as long.
const CANCEL_WITHIN: Duration = Duration::from_millis(600);

/// Share of memory that the guest writes, in percent.
const WORKING_SET_PERCENT: u32 = 50;

/// What is promised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Promise {
    MaxDowntime(Duration),
    Deadline(Duration),
    MaxStaging(u64),
    MaxBandwidth(u64),
    /// A cancel is answered so soon, in any phase.
    Cancel(Duration),
}

/// Those that a live checkpoint of a guest of any size can keep, and two that none can.
const PROMISES: [Promise; 7] = [
    Promise::MaxDowntime(Duration::from_millis(20)),
    Promise::Deadline(Duration::from_secs(10)),
    Promise::MaxStaging(64 << 20),
    Promise::MaxBandwidth(HELD_BYTES_PER_S),
    Promise::Cancel(Duration::from_millis(100)),
    Promise::MaxDowntime(Duration::from_micros(500)),
    Promise::Deadline(Duration::from_millis(200)),
];

#[derive(Debug, Serialize)]
pub(super) struct Contract {
    memory_bytes: u64,
    rows: Vec<Figures>,
}

/// What became of one promise by one protocol. `late` counts those that were not refused, but
/// failed and left the guest running.
#[derive(Debug, Serialize)]
struct Figures {
    promise: String,
    protocol: Protocol,
    kept: u32,
    refused: u32,
    broken: u32,
    late: u32,
    /// What broke it, or failed, last.
    why: Option<String>,
}

/// What became of one checkpoint.
#[derive(Debug)]
enum Verdict {
    Kept,
    Refused,
    Broken(String),
    Failed(String),
}

pub(super) fn run(setup: &Setup) -> anyhow::Result<Contract> {
    let args = setup.args;
    let cmdline = half_full(WORKING_SET_PERCENT, "2m", 100);
    let guest = GuestSpec::pagewriter(args.memory, Backing::Thp, cmdline);
    let mut vm = setup.start_pagewriter(Contender::Nothing, &guest, SETTLE)?;
    let protocols = setup.protocols();
    let mut rows: Vec<(Promise, Figures)> = PROMISES
        .into_iter()
        .flat_map(|promise| {
            let protocols = protocols.iter();
            protocols.map(move |&protocol| (promise, Figures::new(promise, protocol)))
        })
        .collect();
    for run in 1..=args.runs {
        setup.say(format_args!("contract: run {run} of {}", args.runs));
        for (promise, figures) in &mut rows {
            let verdict = match *promise {
                Promise::Cancel(most) => {
                    // Over the whole of a checkpoint, and not in step with the runs.
                    let after = CANCEL_WITHIN.mul_f64((f64::from(run) * 0.618).fract());
                    cancel(&mut vm, setup, most, figures.protocol, after)?
                }
                promise => ask(&mut vm, setup, promise, figures.protocol)?,
            };
            figures.count(verdict);
            setup.go_on()?;
        }
    }
    Ok(Contract {
        memory_bytes: args.memory,
        rows: rows.into_iter().map(|(_, figures)| figures).collect(),
    })
}

/// Cancels one checkpoint, on disk.
fn cancel(
    vm: &mut Vm,
    setup: &Setup,
    most: Duration,
    of: Protocol,
    after: Duration,
) -> anyhow::Result<Verdict> {
    let request = setup.disk().request();
    let contender = Contender::Ours(of, Staging::Default);
    let verdict = match vm.cancel(contender, setup.args.memory, &request, after) {
        Ok(Some(took)) if took > most => Verdict::Broken(format!("{took:?} came out")),
        Ok(Some(_)) => Verdict::Kept,
        Ok(None) => {
            discard(&request.image)?;
            Verdict::Kept
        }
        Err(error) => Verdict::Failed(format!("{error:#}")),
    };
    std::thread::sleep(SETTLE);
    Ok(verdict)
}

/// Asks for one checkpoint with a promise, on disk.
fn ask(vm: &mut Vm, setup: &Setup, promise: Promise, of: Protocol) -> anyhow::Result<Verdict> {
    let mut request = setup.disk().request();
    promise.add_to(&mut request);
    let contender = Contender::Ours(of, Staging::Default);
    let taken = vm.checkpoint(contender, setup.args.memory, &request);
    let verdict = match taken {
        Ok(outcome) => {
            discard(&request.image)?;
            promise.judge(&outcome)
        }
        Err(error) => {
            let text = format!("{error:#}");
            // The control protocol passes on what the engine says, not its kind.
            if text.contains("cannot be promised") {
                Verdict::Refused
            } else {
                Verdict::Failed(text)
            }
        }
    };
    std::thread::sleep(SETTLE);
    Ok(verdict)
}

impl Promise {
    fn add_to(self, request: &mut Request) {
        match self {
            Self::MaxDowntime(most) => request.max_downtime = Some(most),
            Self::Deadline(most) => request.deadline = Some(most),
            Self::MaxStaging(most) => request.max_staging_bytes = Some(most),
            Self::MaxBandwidth(most) => request.max_bandwidth = Some(most),
            Self::Cancel(_) => {}
        }
    }

    fn judge(self, outcome: &Outcome) -> Verdict {
        let total_s = outcome.total.as_secs_f64();
        let (came_out, most) = match self {
            Self::MaxDowntime(most) => (outcome.downtime_us(), micros(most)),
            Self::Deadline(most) => (Some(outcome.total_us()), micros(most)),
            Self::MaxStaging(most) => (outcome.figure("/staging/peak_bytes"), to_f64(most)),
            Self::MaxBandwidth(most) => (Some(to_f64(outcome.image_bytes) / total_s), to_f64(most)),
            Self::Cancel(_) => {
                unreachable!("there is no outcome of a checkpoint that is cancelled")
            }
        };
        let reported = outcome.statistics.pointer("/contract/kept");
        let reported = reported.and_then(serde_json::Value::as_bool) == Some(true);
        match came_out {
            Some(figure) if figure <= most && reported => Verdict::Kept,
            Some(figure) if figure <= most => Verdict::Broken("reported as broken".to_owned()),
            Some(figure) => Verdict::Broken(format!("{figure:.0} came out")),
            None => Verdict::Broken("the figure is not reported".to_owned()),
        }
    }
}

impl fmt::Display for Promise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MaxDowntime(most) => write!(f, "downtime {most:?}"),
            Self::Deadline(most) => write!(f, "deadline {most:?}"),
            Self::MaxStaging(most) => write!(f, "staging {}", bytes(*most)),
            Self::MaxBandwidth(most) => write!(f, "{} MB/s", most / 1_000_000),
            Self::Cancel(most) => write!(f, "cancel {most:?}"),
        }
    }
}

impl Figures {
    fn new(promise: Promise, protocol: Protocol) -> Self {
        Self {
            promise: promise.to_string(),
            protocol,
            kept: 0,
            refused: 0,
            broken: 0,
            late: 0,
            why: None,
        }
    }

    fn count(&mut self, verdict: Verdict) {
        let (counter, why) = match verdict {
            Verdict::Kept => (&mut self.kept, None),
            Verdict::Refused => (&mut self.refused, None),
            Verdict::Broken(why) => (&mut self.broken, Some(why)),
            Verdict::Failed(why) => (&mut self.late, Some(why)),
        };
        *counter += 1;
        self.why = why.or(self.why.take());
    }

    fn row(&self) -> Vec<String> {
        let counts = [self.kept, self.refused, self.broken, self.late];
        let mut cells = vec![self.promise.clone(), self.protocol.to_string()];
        cells.extend(counts.map(|count| count.to_string()));
        cells.push(self.why.clone().unwrap_or_default());
        cells
    }
}

impl Contract {
    pub fn markdown(&self) -> String {
        let header = [
            "promise", "protocol", "kept", "refused", "broken", "failed", "why",
        ];
        let rows: Vec<_> = self.rows.iter().map(Figures::row).collect();
        format!(
            "### Promises\n\n{} of memory, half of it written at full speed; image on disk, \
             durable; default staging. Counted: what became of each promise.\n\n{}",
            bytes(self.memory_bytes),
            table(&header, &rows)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn outcome(downtime_ms: u64, kept: bool) -> Outcome {
        Outcome {
            downtime: Some(Duration::from_millis(downtime_ms)),
            total: Duration::from_secs(1),
            image_bytes: 1000,
            statistics: json!({ "contract": { "kept": kept } }),
            began: None,
        }
    }

    #[test]
    fn a_promise_is_kept_where_both_the_figure_and_the_report_say_so() {
        let promise = Promise::MaxDowntime(Duration::from_millis(2));
        assert!(matches!(promise.judge(&outcome(2, true)), Verdict::Kept));
        assert!(matches!(
            promise.judge(&outcome(2, false)),
            Verdict::Broken(_)
        ));
        assert!(matches!(
            promise.judge(&outcome(3, true)),
            Verdict::Broken(_)
        ));
        let rate = |most| Promise::MaxBandwidth(most).judge(&outcome(0, true));
        assert!(matches!(rate(1000), Verdict::Kept));
        assert!(matches!(rate(999), Verdict::Broken(_)));
        let staging = Promise::MaxStaging(1).judge(&outcome(0, true));
        assert!(matches!(staging, Verdict::Broken(_)));
    }

    #[test]
    fn what_went_wrong_last_is_told() {
        let mut figures = Figures::new(PROMISES[0], Protocol::Cow);
        figures.count(Verdict::Failed("one".to_owned()));
        figures.count(Verdict::Broken("two".to_owned()));
        figures.count(Verdict::Kept);
        figures.count(Verdict::Refused);
        let row = ["downtime 20ms", "cow", "1", "1", "1", "1", "two"];
        assert_eq!(figures.row(), row);
    }
}
