//! Suite `lazy`: how soon a guest runs that is restored lazily, and what it pays for it later,
//! beside an eager restore of the same image.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::super::output::{bytes, table, to_f64};
use super::super::vm_process::{Spawned, Start};
use super::contender::{Contender, Staging};
use super::huge_pages::GuestMemory;
use super::setup::{Setup, discard};
use super::spread::{Spread, cell};
use super::vm::{Backing, GuestSpec, half_full, micros};
use crate::host::Protocol;

const SETTLE: Duration = Duration::from_millis(300);
const PATIENCE: Duration = Duration::from_secs(300);

/// What makes the images: it records the working set.
const PROTOCOL: Protocol = Protocol::Threaded;

/// Runs of the computation from its first iteration on.
const REPEAT: u32 = 2;

/// The page writer prints so often, in milliseconds: its first output is so much late at most.
const TICK_MS: u32 = 1;

#[derive(Debug, Serialize)]
pub(super) struct Lazy {
    first_output: Vec<FirstOutput>,
    computation: Option<Computation>,
}

/// From the command until the restored guest prints something.
#[derive(Debug, Serialize)]
struct FirstOutput {
    memory_bytes: u64,
    lazy_us: Option<Spread>,
    eager_us: Option<Spread>,
    /// Share of resident guest memory in huge pages, when all of it has come.
    lazy_huge_share: Option<Spread>,
}

/// From the command until an NPB kernel that goes on from the image has finished.
#[derive(Debug, Serialize)]
struct Computation {
    kernel: String,
    class: String,
    memory_bytes: u64,
    lazy_us: Option<Spread>,
    eager_us: Option<Spread>,
    ratio: Option<f64>,
}

pub(super) fn run(setup: &Setup) -> anyhow::Result<Lazy> {
    let sizes = setup.args.sizes.iter();
    let first_output = sizes.map(|&size| first_output(setup, size));
    Ok(Lazy {
        first_output: first_output.collect::<Result<_, _>>()?,
        computation: Some(computation(setup)?),
    })
}

/// Each run has an image of its own: how many pages the guest touches before it prints is by chance,
/// and the same for each restore of one image.
fn first_output(setup: &Setup, memory_bytes: u64) -> anyhow::Result<FirstOutput> {
    let cmdline = half_full(10, "2m", TICK_MS);
    let guest = GuestSpec::pagewriter(memory_bytes, Backing::Thp, cmdline);
    let request = setup.shm().request();
    let (mut lazy, mut eager, mut shares) = (Vec::new(), Vec::new(), Vec::new());
    for run in 1..=setup.args.runs {
        let size = bytes(memory_bytes);
        setup.say(format_args!(
            "lazy, {size}: run {run} of {}",
            setup.args.runs
        ));
        let mut vm = setup.start_pagewriter(Contender::Nothing, &guest, SETTLE)?;
        let contender = Contender::Ours(PROTOCOL, Staging::Ample);
        vm.checkpoint(contender, memory_bytes, &request)?;
        drop(vm);
        for (start, times) in [(Start::Lazy, &mut lazy), (Start::Eager, &mut eager)] {
            let mut restored =
                Spawned::another(setup.scratch(), "restored", &request.image, start)?;
            times.push(micros(restored.first_output()?));
            let restored = restored.answer()?;
            if start == Start::Lazy {
                shares.extend(share_when_filled(restored.pid(), memory_bytes)?);
            }
            restored.kill();
            setup.go_on()?;
        }
        discard(&request.image)?;
    }
    Ok(FirstOutput {
        memory_bytes,
        lazy_us: Spread::of(lazy),
        eager_us: Spread::of(eager),
        lazy_huge_share: Spread::of(shares),
    })
}

/// Waits until no more memory comes, and returns how much of it is in huge pages.
fn share_when_filled(pid: u32, memory_bytes: u64) -> anyhow::Result<Option<f64>> {
    let mut before = 0;
    let deadline = Instant::now() + PATIENCE;
    loop {
        std::thread::sleep(SETTLE);
        // While it still comes, the memory is several mappings.
        match GuestMemory::find(pid, memory_bytes).and_then(|memory| memory.look()) {
            Ok(now) if now.bytes == before || Instant::now() > deadline => {
                let share = to_f64(now.huge_bytes) / to_f64(now.bytes.max(1));
                return Ok((now.bytes > 0).then_some(share));
            }
            Ok(now) => before = now.bytes,
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => {}
        }
    }
}

fn computation(setup: &Setup) -> anyhow::Result<Computation> {
    let args = setup.args;
    let (kernel, class) = ("mg".to_owned(), args.class.clone());
    let guest = GuestSpec {
        kernel: "npb",
        cmdline: format!("kernel={kernel} class={class} repeat={REPEAT}"),
        memory_bytes: args.memory,
        backing: Backing::Thp,
        preallocate: false,
    };
    let mut vm = setup.start(Contender::Nothing, &guest)?;
    vm.wait_line("its first iteration", PATIENCE, |line| {
        line.contains(" iteration 1/")
    })?;
    let request = setup.shm().request();
    let contender = Contender::Ours(PROTOCOL, Staging::Ample);
    vm.checkpoint(contender, args.memory, &request)?;
    drop(vm);
    let (mut lazy, mut eager) = (Vec::new(), Vec::new());
    for run in 1..=args.runs {
        setup.say(format_args!(
            "lazy, {kernel} {class}: run {run} of {}",
            args.runs
        ));
        for (start, times) in [(Start::Lazy, &mut lazy), (Start::Eager, &mut eager)] {
            let began = Instant::now();
            let restored = Spawned::another(setup.scratch(), "restored", &request.image, start)?;
            let mut restored = restored.answer()?;
            let done =
                restored.wait_line("its end", PATIENCE, |line| line.contains("npb: done"))?;
            anyhow::ensure!(done.contains("failed=0"), "it computed wrong: {done}");
            times.push(micros(began.elapsed()));
            restored.kill();
            setup.go_on()?;
        }
    }
    discard(&request.image)?;
    let (lazy_us, eager_us) = (Spread::of(lazy), Spread::of(eager));
    Ok(Computation {
        kernel,
        class,
        memory_bytes: args.memory,
        ratio: lazy_us.zip(eager_us).map(|(a, b)| a.median / b.median),
        lazy_us,
        eager_us,
    })
}

impl Lazy {
    pub fn markdown(&self) -> String {
        let ms = |spread: &Option<Spread>| cell(spread.as_ref(), 1e3, 1);
        let mut rows: Vec<_> = self
            .first_output
            .iter()
            .map(|row| {
                vec![
                    format!("first output, {}", bytes(row.memory_bytes)),
                    ms(&row.lazy_us),
                    ms(&row.eager_us),
                    String::new(),
                    cell(row.lazy_huge_share.as_ref(), 0.01, 0),
                ]
            })
            .collect();
        rows.extend(self.computation.iter().map(|row| {
            vec![
                format!("{} {} to its end", row.kernel, row.class),
                ms(&row.lazy_us),
                ms(&row.eager_us),
                row.ratio.map_or_else(String::new, |v| format!("{v:.3}")),
                String::new(),
            ]
        }));
        let header = [
            "ms from the command: median (min–max)",
            "lazy",
            "eager",
            "lazy ÷ eager",
            "% huge, lazy",
        ];
        format!(
            "### Lazy restore\n\nHalf of memory is incompressible, the rest untouched; an image of its own \
             for each first output; the computation is saved after its first iteration; images of \
             {PROTOCOL} in shm.\n\n{}",
            table(&header, &rows)
        )
    }
}
